"""Token ids to text, piece by piece: the pieces together are what decoding all ids at once gives.

A token can end inside a character (three bytes of four of an emoji). Such bytes wait for the rest; a piece never holds half
a character, and U+FFFD only where the bytes really are no UTF-8.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from typing import Any, Protocol

from tokenizers import decoders

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    """Decodes one stream of tokens; special tokens have no text."""

    def feed(self, token: int) -> str:
        """The text that this token completes, maybe none."""

    def flush(self) -> str:
        """What is still held back at the end: bytes that never became a character."""


class DetokenizerFactory:
    """Makes detokenizers for a tokenizer: exact bytes for byte-level BPE, a moving window for every other decoder."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._special = frozenset(i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special)
        self._byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)

    def __call__(self) -> Detokenizer:
        """A detokenizer at the beginning of a text."""
        if self._byte_level:
            return ByteDetokenizer(self._tokenizer, self._special)
        return WindowDetokenizer(self._tokenizer, self._special)


class ByteDetokenizer:
    """Byte-level BPE (GPT-2's alphabet, one character per byte): tokens are bytes, decoded by Python's UTF-8 decoder.

    It replaces maximal invalid parts by U+FFFD, as the tokenizers library does, and keeps an unfinished character.
    """

    def __init__(self, tokenizer: Any, special: frozenset[int]):
        self._tokenizer, self._special = tokenizer, special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The characters that this token completes."""
        text = None if token in self._special else self._tokenizer.id_to_token(token)
        return "" if text is None else self._decoder.decode(bytes_of(text))

    def flush(self) -> str:
        """U+FFFD for an unfinished character, if there is one."""
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """Any other decoder: decode the last pieces again with each token, and hand out what is new and can no longer change.

    Held back while the newest token is a byte token (`<0xE4>`: what it means depends on the next ones) or the text ends in
    U+FFFD.
    """

    def __init__(self, tokenizer: Any, special: frozenset[int]):
        self._tokenizer, self._special = tokenizer, special
        self._settled: list[int] = []
        self._waiting: list[int] = []

    def feed(self, token: int) -> str:
        """The text that is new and will stay."""
        text = None if token in self._special else self._tokenizer.id_to_token(token)
        if text is None:
            return ""
        self._waiting.append(token)
        if _BYTE_TOKEN.fullmatch(text):
            return ""
        piece = self._new()
        return "" if piece.endswith(REPLACEMENT) else self._settle(piece)

    def flush(self) -> str:
        """The text of what waits."""
        return self._settle(self._new()) if self._waiting else ""

    def _new(self) -> str:
        whole = str(self._tokenizer.decode(self._settled + self._waiting, skip_special_tokens=False))
        return whole[len(self._tokenizer.decode(self._settled, skip_special_tokens=False)) :]

    def _settle(self, piece: str) -> str:
        # Without text of its own (a lone space at the beginning) a window would not show what comes before the next token.
        self._settled = self._waiting if piece.strip() else self._settled + self._waiting
        self._waiting = []
        return piece


def bytes_of(token: str) -> bytes:
    """The bytes of a byte-level token; of an added token that is no such token, its UTF-8."""
    try:
        return bytes(_BYTES[character] for character in token)
    except KeyError:
        return token.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's `bytes_to_unicode`, turned round: printable Latin-1 stands for itself, the rest for U+0100 onwards."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_alphabet()


class StopFilter:
    """Lets text through up to the first stop string; what may become one waits.

    `stopped` tells whether one was found: what comes then has no text.
    """

    def __init__(self, stop: Sequence[str]):
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """The part of all text so far that is new and lies before any stop string."""
        if self.stopped:
            return ""
        self._held += text
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._take(min(found), rest=False)
        return self._take(len(self._held) - self._unsure())

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        return "" if self.stopped else self._take(len(self._held))

    def _take(self, length: int, *, rest: bool = True) -> str:
        piece, self._held = self._held[:length], self._held[length:] if rest else ""
        return piece

    def _unsure(self) -> int:
        """The length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        lengths = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(self._held[-n:]) for stop in self._stop)), 0)
