"""Our token ids against the Hugging Face tokenizer's, on many texts: the given ones, pieces of them, and mixtures.

    texts → sentences, windows of words ─┬→ case, spacing, Unicode changed ─┬→ distinct strings ─┬→ TextEncoder
                                         └→ joined across languages ────────┘                    └→ AutoTokenizer

Left out are strings that one contract or the other cuts, and those that AutoTokenizer finds control tokens in: there our
ids differ on purpose (see `runtime/tokenizer.py`).
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np

from samescore.calibrate.intervals import rule_of_three, wilson
from samescore.calibrate.reference import ReferenceTokenizer, load_tokenizer
from samescore.calibrate.token_faults import TokenizationEquality, name_difference
from samescore.export.checkpoint import Checkpoint
from samescore.runtime.errors import InputError
from samescore.runtime.prefill import Ids
from samescore.runtime.tokenizer import TextEncoder

# Characters of a made string, and how many strings are tokenized at a time.
LONGEST, BATCH = 200, 2000
# Made strings in a row that were there before: the texts are too few for more.
FRUITLESS = 10_000
SPACES = (" ", "  ", "\t", "\n", "\r\n", "\n\n", "\u00a0", "\u2003", "\u3000", "\u200b", "")
MARKS = ("\u0301", "\u0308", "\u20e3", "\u200d", "\ufe0f", "\u202e", "\u0000", "\u00ad", "\ufeff")
SYMBOLS = (
    "👩‍🔬",
    "🏳️‍🌈",
    "𝔘",
    "Ⅳ",
    "ﬁ",
    "½",
    "㍿",
    "ﷺ",
    "…",
    "“",
    "—",
    "1234567",
    "<b>",
    "{}",
    "\\n",
    "&amp;",
    "▁",
    "Ġ",
    "##",
)
SENTENCE = re.compile(r"[^.!?。！？\n]+[.!?。！？\n]*")


def check_tokenization(
    checkpoint: Checkpoint,
    encoder: TextEncoder,
    texts: Sequence[str],
    count: int = 100_000,
    seed: int = 0,
    progress: Callable[[], None] | None = None,
) -> TokenizationEquality:
    """Compare `encoder` with the tokenizer that transformers loads from the checkpoint on up to `count` distinct strings.

    texts: as the contract takes them (a conversation or a pair already rendered); they come first, and everything else is
    made of them. progress: called for each BATCH of strings. MissingDependencyError without transformers.
    """
    reference = load_tokenizer(checkpoint)
    compared = 0
    wanted: list[Ids] = []
    found: list[Ids] = []
    first: str | None = None
    strings = iter(varied(texts, count, seed))
    while batch := list(islice(strings, BATCH)):
        for text, theirs, ours in compare(reference, encoder, batch):
            compared += 1
            if np.array_equal(theirs, ours):
                continue
            wanted.append(theirs)
            found.append(ours)
            first = first if first is not None else _described(text, theirs, ours)
        if progress is not None:
            progress()
    if first is not None:
        first = f"{name_difference(wanted, found, encoder.spell)}. {first}"
    return TokenizationEquality(compared, len(wanted), first, _upper(len(wanted), compared), seed)


def compare(
    reference: ReferenceTokenizer, encoder: TextEncoder, texts: Sequence[str]
) -> Iterator[tuple[str, Ids, Ids]]:
    """Each text that can be compared, with transformers' ids and ours, int64 [sequence]."""
    kept: list[tuple[str, str, Ids]] = []
    for text in texts:
        try:
            encoded, string = encoder.encode(text), encoder.string(text)
        except InputError:
            continue
        # Also those spelled out that name no control token by their id, as an unknown token that ends texts too (SmolLM2).
        if not encoded.truncated and not any(spelled in string for spelled in reference.spelled):
            kept.append((text, string, encoded.input_ids))
    for (text, _, ours), ids in zip(kept, reference.encode([string for _, string, _ in kept]), strict=True):
        if sum(number in reference.control for number in ids) <= reference.added:
            yield text, np.asarray(ids, dtype=np.int64), ours


def varied(texts: Sequence[str], count: int, seed: int) -> Iterator[str]:
    """Up to `count` distinct strings: the texts, their pieces, then mixtures of pieces. The same seed, the same strings."""
    seen: set[str] = set()
    pieces = [piece for text in texts for piece in _pieces(text)]
    chance = random.Random(seed)
    fruitless = 0
    for string in (*texts, *pieces):
        if string.strip() and string not in seen and len(seen) < count:
            seen.add(string)
            yield string
    while pieces and len(seen) < count and fruitless < FRUITLESS:
        string = _mixed(pieces, chance)
        fruitless += 1
        if string.strip() and string not in seen:
            seen.add(string)
            fruitless = 0
            yield string


def _pieces(text: str) -> Iterator[str]:
    """Sentences, and windows of words; of scripts without spaces, windows of characters. None longer than LONGEST."""
    for sentence in SENTENCE.findall(text):
        yield sentence[:LONGEST]
    words = text.split(" ")
    for start in range(0, len(words), 5):
        yield " ".join(words[start : start + 7])[:LONGEST]


def _mixed(pieces: Sequence[str], chance: random.Random) -> str:
    """Some pieces joined, and changed in one to three ways."""
    chosen = chance.choices(pieces, k=chance.choice((1, 1, 2, 3)))
    cut = [
        piece[chance.randrange(len(piece)) :] if len(piece) > 1 and chance.random() < 0.3 else piece for piece in chosen
    ]
    text = chance.choice(SPACES).join(cut)[:LONGEST]
    for change in chance.choices(CHANGES, k=chance.randint(1, 3)):
        text = change(text, chance)
    return text[:LONGEST]


def _somewhere(text: str, chance: random.Random, put: str) -> str:
    at = chance.randint(0, len(text))
    return text[:at] + put + text[at:]


def _code_point(text: str, chance: random.Random) -> str:
    """Any code point but the surrogates."""
    return _somewhere(
        text, chance, chr(chance.choice((chance.randrange(0x20, 0xD800), chance.randrange(0xE000, 0x20000))))
    )


CHANGES: tuple[Callable[[str, random.Random], str], ...] = (
    lambda text, chance: chance.choice((str.upper, str.lower, str.title, str.swapcase))(text),
    lambda text, chance: unicodedata.normalize(chance.choice(("NFC", "NFD", "NFKC", "NFKD")), text),
    lambda text, chance: text.replace(" ", chance.choice(SPACES)),
    lambda text, chance: chance.choice(SPACES) + text + chance.choice(SPACES),
    lambda text, chance: _somewhere(text, chance, chance.choice(SPACES)),
    lambda text, chance: _somewhere(text, chance, chance.choice(MARKS)),
    lambda text, chance: _somewhere(text, chance, chance.choice(SYMBOLS)),
    lambda text, chance: _somewhere(text, chance, str(chance.randrange(10 ** chance.randint(1, 9)))),
    _code_point,
)


def _described(text: str, theirs: Ids, ours: Ids) -> str:
    return f"First text: {text[:LONGEST]!r}: ours {ours[:24].tolist()}, transformers' {theirs[:24].tolist()}" + (
        " (first 24 ids)" if max(len(ours), len(theirs)) > 24 else ""
    )


def _upper(different: int, texts: int) -> float:
    # z of a one-sided 95 % bound.
    return wilson(different, texts, z=1.644854)[1] if different else rule_of_three(texts)
