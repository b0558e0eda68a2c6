"""What has happened to token ids: the same edit in every text has a cause with a name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from samescore.runtime.prefill import Ids

# Tokens of an edit that are spelled out.
SPELLED = 12
# An edit explains a set of texts when so many of them have it: texts that are cut at the limit have others.
SHARE = 0.5


@dataclass(frozen=True)
class TokenizationEquality:
    """How many distinct strings were compared, how many gave other ids, and the first of those.

    upper95: upper bound of the rate of differing strings among such strings, one-sided 95 % (exact for none: 1 - 0.05^(1/N)),
    if they were drawn at random. seed: of the mixtures.
    """

    texts: int
    different: int
    first_difference: str | None
    upper95: float
    seed: int


class Edit(NamedTuple):
    """What turns one text's wanted ids into those found: at `start` (from the front) tokens are removed and added."""

    start: int
    end: int
    removed: tuple[int, ...]
    added: tuple[int, ...]


def name_difference(wanted: Sequence[Ids], found: Sequence[Ids], spell: Callable[[list[int]], str]) -> str:
    """In words, how the ids found differ from the wanted ones; both int64 [sequence] of texts whose ids differ.

    spell: the text of ids. An edit that most texts share at their beginning or end is named by its likely cause.
    """
    edits = [edit_between(a, b) for a, b in zip(wanted, found, strict=True)]
    kinds = [
        (_at_front, Counter((edit.start, edit.removed, edit.added) for edit in edits)),
        (_at_end, Counter((edit.end, edit.removed, edit.added) for edit in edits)),
        (_anywhere, Counter((0, edit.removed, edit.added) for edit in edits)),
    ]
    for describe, counter in kinds:
        (place, removed, added), count = counter.most_common(1)[0]
        if count < SHARE * len(edits) or (len(edits) == 1 and max(len(removed), len(added)) > 1):
            continue
        if said := describe(place, removed, added, spell):
            return f"{said}, in {count} of {len(edits)} texts"
    first = edits[0]
    return (
        f"the texts are split or numbered in another way: the first differs from token {first.start} on, where "
        f"{_quoted(first.removed, spell)} has become {_quoted(first.added, spell)}"
    )


def edit_between(wanted: Ids, found: Ids) -> Edit:
    """The smallest single edit."""
    shortest = min(len(wanted), len(found))
    start = _same(wanted[:shortest], found[:shortest])
    end = _same(wanted[::-1][: shortest - start], found[::-1][: shortest - start])
    removed, added = (tuple(int(i) for i in ids[start : len(ids) - end]) for ids in (wanted, found))
    return Edit(start, end, removed, added)


def _at_front(
    place: int, removed: tuple[int, ...], added: tuple[int, ...], spell: Callable[[list[int]], str]
) -> str | None:
    """An edit of the first token, or a cut right behind it."""
    if place == 0 and len(removed) == len(added) == 1:
        return f"the first token is {_token(added, spell)} where it should be {_token(removed, spell)} (BOS)"
    if place == 0 and len(removed) == 1 and not added:
        return f"no BOS: the first token {_token(removed, spell)} is missing"
    if place <= 1 and len(added) == 1 and not removed:
        return f"an extra token {_token(added, spell)} at the beginning (BOS twice, or where there should be none)"
    if place <= 1 and len(removed) > max(1, len(added)):
        return f"the prompt is cut: its first {len(removed)} tokens are missing: {_quoted(removed, spell)}"
    return None


def _at_end(
    place: int, removed: tuple[int, ...], added: tuple[int, ...], spell: Callable[[list[int]], str]
) -> str | None:
    """An edit of the last token, or a cut right before it."""
    if place == 0 and len(removed) == len(added) == 1:
        return f"the last token is {_token(added, spell)} where it should be {_token(removed, spell)} (EOS)"
    if place == 0 and len(removed) == 1 and not added:
        return f"the last token {_token(removed, spell)} is missing (EOS, or the prompt is cut)"
    if place <= 1 and len(added) == 1 and not removed:
        return f"an extra token {_token(added, spell)} at the end"
    if place <= 1 and len(removed) > 1 and len(removed) > len(added):
        return f"the prompt is cut: its last {len(removed)} tokens are missing: {_quoted(removed, spell)}"
    return None


def _anywhere(
    _: int, removed: tuple[int, ...], added: tuple[int, ...], spell: Callable[[list[int]], str]
) -> str | None:
    """The same edit in the middle of the texts."""
    if not removed and not added:
        return None
    return f"the prompt has changed: {_quoted(removed, spell)} has become {_quoted(added, spell)}"


def _same(a: Ids, b: Ids) -> int:
    """How many first ids are equal."""
    equal = a == b
    return len(a) if equal.all() else int(np.argmin(equal))


def _token(ids: tuple[int, ...], spell: Callable[[list[int]], str]) -> str:
    return f"{ids[0]} {spell(list(ids))!r}"


def _quoted(ids: tuple[int, ...], spell: Callable[[list[int]], str]) -> str:
    if not ids:
        return "nothing"
    more = "…" if len(ids) > SPELLED else ""
    return f"{spell(list(ids[:SPELLED]))!r}{more} ({len(ids)} tokens)"
