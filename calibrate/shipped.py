"""A bundle's golden set: the first texts whole, what exceeds a few megabytes by its digest, and everyone's reference logits.

    {"golden": 1, "reference": {...}}                                            as in `golden.py`
    {"text": "…", "label": "…", "input_ids": [...], "logits": ["0x1.8p+0", ...]}
    {"digest": "9f86d0…", "tokens": 812, "logits": [...], "label": "…", "slice": "…", "language": "…"}

A digest is the SHA-256 of the text as the contract renders it. Who has the text can check its numbers; the bundle alone
cannot tell it. The order is that of the set, and of `scores.npz`.
"""

from __future__ import annotations

import gzip
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from samescore.calibrate.golden import (
    MAX_BYTES,
    GoldenSet,
    GoldenText,
    ReferenceInfo,
    is_digest_only,
    over_fewer,
    parse_logits,
    parse_said,
    parse_text,
    read_lines,
    text_digest,
    write_golden,
)
from samescore.calibrate.metrics import measure
from samescore.runtime.contract import TextContract
from samescore.runtime.errors import InputError
from samescore.runtime.manifest import Activation

GOLDEN_NAME = "golden.jsonl.gz"
# Compressed bytes, and how many texts are whole however long they are.
GOLDEN_LIMIT, LEAST_WHOLE = 5_000_000, 300

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class KnownText:
    """A text that is not inside the bundle: its digest, its length in tokens, its reference logits float32 [labels]."""

    digest: str
    tokens: int
    logits: npt.NDArray[np.float32]
    label: str | None
    slice: str | None
    language: str | None


@dataclass(frozen=True)
class ShippedSet:
    """A bundle's golden set. whole: texts with ids and logits; known: those after them, by digest only."""

    reference: ReferenceInfo
    whole: tuple[GoldenText, ...]
    known: tuple[KnownText, ...]

    def __len__(self) -> int:
        return len(self.whole) + len(self.known)

    def texts(self) -> tuple[GoldenText | KnownText, ...]:
        """All, in order."""
        return (*self.whole, *self.known)

    def logits(self) -> npt.NDArray[np.float32]:
        """Reference logits [texts, labels] of all."""
        return np.stack([text.logits for text in self.texts() if text.logits is not None])

    def labels(self) -> list[str | None]:
        """The known label of each, or None."""
        return [text.label for text in self.texts()]

    def lengths(self) -> list[int]:
        """Tokens of each."""
        inside = [len(text.input_ids) for text in self.whole if text.input_ids is not None]
        return [*inside, *(text.tokens for text in self.known)]

    def digests(self, contract: TextContract) -> list[str]:
        """SHA-256 of each text as the contract renders it."""
        return [*(text_digest(text, contract) for text in self.whole), *(text.digest for text in self.known)]

    def inside(self) -> GoldenSet:
        """The whole texts alone. If they are not all, what was measured over all is not said of them."""
        if not self.known:
            return GoldenSet(self.reference, self.whole)
        return GoldenSet(over_fewer(self.reference), self.whole)

    def note(self) -> str | None:
        """How much of the set is inside the bundle, in words; None when all of it is."""
        if not self.known:
            return None
        return f"{len(self.whole)} of {len(self)} texts are inside the bundle; the others are known by digest"


def read_shipped(raw: bytes, name: str = GOLDEN_NAME) -> ShippedSet:
    """The golden set of a bundle, from JSONL or gzip; InputError names the first bad line."""
    reference, texts = read_lines(raw, name, _text)
    whole = tuple(text for text in texts if isinstance(text, GoldenText))
    known = tuple(text for text in texts if isinstance(text, KnownText))
    if reference is None:
        raise InputError(f"{name} names no reference in its first line, as a bundle's golden set does")
    if not whole or any(text.logits is None or text.input_ids is None for text in whole):
        raise InputError(f"{name} names a reference, but some lines hold no `input_ids` and `logits`")
    if any(isinstance(text, KnownText) for text in texts[: len(whole)]):
        raise InputError(f"{name}: whole texts stand behind ones that are known by digest")
    return ShippedSet(reference, whole, known)


def write_shipped(golden: GoldenSet, contract: TextContract) -> bytes:
    """A golden set with ids and logits as a bundle holds it, in gzip; the same set always gives the same bytes.

    As many texts are whole, from the first, as GOLDEN_LIMIT bytes hold, at least LEAST_WHOLE where the set has them.
    """
    head, *whole = write_golden(golden).rstrip(b"\n").split(b"\n")
    known = [_known_line(text, contract) for text in golden.texts]
    count = len(whole)
    packed = _packed([head, *whole])
    if packed is not None and len(packed) <= GOLDEN_LIMIT:
        return packed
    fewest, most = min(LEAST_WHOLE, count), count
    while fewest < most:
        middle = (fewest + most + 1) // 2
        packed = _packed([head, *whole[:middle], *known[middle:]])
        if packed is not None and len(packed) <= GOLDEN_LIMIT:
            fewest = middle
        else:
            most = middle - 1
    packed = _packed([head, *whole[:fewest], *known[fewest:]])
    if packed is None:
        raise InputError(
            f"the first {fewest} golden texts and their ids take more than {MAX_BYTES // 10**6} MB, the most that a bundle "
            "holds of them: put shorter texts first, or cut them with --max-tokens"
        )
    return packed


def with_stored(
    shipped: ShippedSet,
    texts: Sequence[GoldenText],
    rows: Sequence[int],
    *,
    bfloat16: npt.NDArray[np.float32] | None,
    labels: Sequence[str],
    activation: Activation,
) -> GoldenSet:
    """Texts with the reference logits of these rows of the shipped set.

    The yardstick is measured again on them from `bfloat16` float32 [all texts, labels], if the bundle has it. The label mass
    of other texts than all is not known.
    """
    logits = shipped.logits()
    chosen = tuple(replace(text, logits=logits[row]) for text, row in zip(texts, rows, strict=True))
    if list(rows) == list(range(len(shipped))):
        return GoldenSet(shipped.reference, chosen)
    index = list(rows)
    drift = None
    if bfloat16 is not None and bfloat16.shape == logits.shape:
        drift = measure(logits[index], bfloat16[index], labels, activation)
    reference = over_fewer(shipped.reference)
    if drift is not None:
        reference = replace(reference, bf16_mean_abs_dp=drift.mean_abs_dp, bf16_p99_abs_dp=drift.p99_abs_dp)
    return GoldenSet(reference, chosen)


def _packed(lines: Sequence[bytes]) -> bytes | None:
    """The lines in gzip, without a time or a name; None when they are more than a reader unpacks."""
    raw = b"\n".join(lines) + b"\n"
    if len(raw) > MAX_BYTES:
        return None
    stream = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=stream, mtime=0) as file:
        file.write(raw)
    return stream.getvalue()


def _known_line(text: GoldenText, contract: TextContract) -> bytes:
    if text.input_ids is None or text.logits is None:
        raise ValueError("a shipped golden set needs ids and logits")
    document: dict[str, Any] = {
        "digest": text_digest(text, contract),
        "tokens": len(text.input_ids),
        "logits": [float(x).hex() for x in text.logits],
    }
    said = {"label": text.label, "slice": text.slice, "language": text.language}
    document.update({key: value for key, value in said.items() if value is not None})
    return json.dumps(document, ensure_ascii=False).encode()


def _text(document: Mapping[str, Any]) -> GoldenText | KnownText:
    if not is_digest_only(document):
        return parse_text(document)
    digest, tokens, logits = (document.get(key) for key in ("digest", "tokens", "logits"))
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise InputError("`digest` is not a SHA-256 in 64 hexadecimal digits")
    if type(tokens) is not int or tokens < 1:
        raise InputError("`tokens` is not a number of tokens")
    if not isinstance(logits, list) or not logits:
        raise InputError("`logits` is not a list of numbers")
    said = {key: parse_said(document, key) for key in ("label", "slice", "language")}
    return KnownText(digest, tokens, parse_logits(logits), **said)
