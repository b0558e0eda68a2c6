"""Faults behind the last layer, told from logits alone: their labels, an activation too many, the pooled position.

A hypothesis is a fault applied to the reference's logits. It explains a variant when it is close to the variant's logits
itself, and much closer than the reference's own logits are.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from samescore.runtime.manifest import Activation
from samescore.runtime.prefill import Ids, feeds_for
from samescore.runtime.session import Session

FloatArray = npt.NDArray[np.float64]

# A hypothesis leaves at most this share of the distance, and is at most this far away, relative to its own size.
LEFT, FAR = 0.25, 0.35
# All orders of so many labels are tried; of more, the most similar columns are matched.
FEW_LABELS = 6
# How far rounding to half precision lets probabilities sum to something other than 1.
SUM_TOLERANCE = 5e-3
# How many tokens before the last one are looked at.
EARLIER = 3


def output_fault(
    reference: npt.NDArray[np.float32], variant: npt.NDArray[np.float32], labels: Sequence[str], activation: Activation
) -> str | None:
    """What is wrong with a variant's logits [texts, labels], or None."""
    r, v = _wide(reference), _wide(variant)
    if not np.isfinite(v).all():
        return None
    return _activated(r, v, activation) or _reordered(r, v, labels)


def constant_fault(reference: npt.NDArray[np.float32], variant: npt.NDArray[np.float32]) -> str | None:
    """What is wrong when all texts get the same logits and should not, or None."""
    if not np.isfinite(variant).all() or len(variant) < 2:
        return None
    if np.ptp(variant, axis=0).max() <= 1e-6 < np.ptp(reference, axis=0).max():
        return (
            "every text gets the same logits: the graph pools a position that all texts share, or what it reads is lost"
        )
    return None


def output_note(reference: npt.NDArray[np.float32], variant: npt.NDArray[np.float32]) -> str | None:
    """What is strange about logits but changes no probability."""
    normalised = np.abs(_logsumexp(_wide(variant))).max() < SUM_TOLERANCE
    if variant.shape[1] > 1 and normalised and np.abs(_logsumexp(_wide(reference))).max() > 10 * SUM_TOLERANCE:
        return "the graph's outputs are log-probabilities (log_softmax): that alone changes no probability"
    return None


def explains(hypothesis: FloatArray, reference: FloatArray, variant: FloatArray) -> bool:
    """Whether a hypothesis [texts, labels] is what the variant computes."""
    left = _rms(variant - hypothesis)
    size = _rms(hypothesis - hypothesis.mean(axis=0)) or _rms(hypothesis)
    return left <= LEFT * _rms(variant - reference) and left <= FAR * size


def position_fault(
    session: Session,
    sequences: Sequence[Ids],
    reference: npt.NDArray[np.float32],
    variant: npt.NDArray[np.float32],
    *,
    longest: int,
) -> str | None:
    """Which position before the last real token a causal variant pools, found by adding tokens; or None.

    What a causal network computes at one position does not depend on the tokens behind it. So if the logits of a text with
    k more tokens are the reference's without them, the variant reads k positions before the last one.
    longest: tokens that the graph can surely read.
    """
    rows = [i for i, ids in enumerate(sequences) if 1 < len(ids) <= longest - EARLIER]
    if len(rows) < 2:
        return None
    r, v = _wide(reference[rows]), _wide(variant[rows])
    for count in range(1, EARLIER + 1):
        longer = [np.concatenate([sequences[i], np.resize(sequences[i][::-1], count)]) for i in rows]
        found = np.stack([_logits(session, ids) for ids in longer])
        # The same must hold of the text without its last tokens: they are not read at all.
        other = [np.concatenate([sequences[i][:-count], np.full(count, sequences[i][0])]) for i in rows]
        blind = np.stack([_logits(session, ids) for ids in other])
        if explains(found, v, r) and np.abs(blind - v).max() <= 1e-3 * _rms(v):
            where = (
                "the position before the last real token"
                if count == 1
                else f"{count} positions before the last real token"
            )
            return f"the graph pools {where}: with {count} more, any, it gives the reference's logits"
    return None


def pooled_position(
    by_position: Sequence[npt.NDArray[np.float32]],
    reference: npt.NDArray[np.float32],
    variant: npt.NDArray[np.float32],
    labels: Sequence[str],
) -> str | None:
    """Which position the variant pools, when the reference's logits at every position are known; or None.

    by_position: float32 [sequence, labels] of each text. reference, variant: logits [texts, labels].
    """
    r, v = _wide(reference), _wide(variant)
    shortest = min(map(len, by_position))
    places = [*range(shortest), *range(-shortest, 0)]
    at = {place: _wide(np.stack([rows[place] for rows in by_position])) for place in places}
    right = min(places, key=lambda place: _rms(at[place] - r))
    best = min(places, key=lambda place: _rms(at[place] - v))
    if best == right or not explains(at[best], r, v):
        return None
    return f"the graph pools position {best}, where the reference pools position {right}"


def _activated(r: FloatArray, v: FloatArray, activation: Activation) -> str | None:
    inside = v.min() >= -1e-6 and v.max() <= 1 + SUM_TOLERANCE
    if not inside or (r.min() >= 0 and r.max() <= 1):
        return None
    if v.shape[1] > 1 and np.abs(v.sum(axis=1) - 1).max() <= SUM_TOLERANCE:
        return (
            "the graph already applies softmax: its outputs are probabilities that sum to 1, and the runtime applies "
            f"{activation} to them again"
        )
    if explains(1 / (1 + np.exp(-r)), r, v):
        return f"the graph already applies sigmoid: its outputs are sigmoid(logits), and the runtime applies {activation} again"
    return None


def _reordered(r: FloatArray, v: FloatArray, labels: Sequence[str]) -> str | None:
    order = _best_order(r, v)
    if order == list(range(len(labels))) or not explains(r[:, order], r, v):
        return None
    moved = [f"output {i} holds {labels[j]!r}, not {labels[i]!r}" for i, j in enumerate(order) if i != j]
    more = f" and {len(moved) - 4} more" if len(moved) > 4 else ""
    return f"the labels are in another order: {', '.join(moved[:4])}{more}"


def _best_order(r: FloatArray, v: FloatArray) -> list[int]:
    """Which of the reference's columns each of the variant's is nearest to, each taken once."""
    count = r.shape[1]
    cost = np.square(v[:, :, None] - r[:, None, :]).mean(axis=0)
    if count <= FEW_LABELS:
        orders = itertools.permutations(range(count))
        return list(min(orders, key=lambda order: cost[range(count), order].sum()))
    order, taken = [-1] * count, set[int]()
    for flat in np.argsort(cost, axis=None):
        i, j = divmod(int(flat), count)
        if order[i] < 0 and j not in taken:
            order[i] = j
            taken.add(j)
    return order


def _logits(session: Session, ids: Ids) -> FloatArray:
    return _wide(session.run(feeds_for(session.inputs, ids[None, :]))[0])


def _wide(logits: npt.NDArray[np.float32]) -> FloatArray:
    return logits.astype(np.float64)


def _logsumexp(x: FloatArray) -> FloatArray:
    top = x.max(axis=1)
    result: FloatArray = top + np.log(np.exp(x - top[:, None]).sum(axis=1))
    return result


def _rms(x: FloatArray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))
