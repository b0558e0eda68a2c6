"""Padded batches: which texts go into one call of a GPU, and in which shape.

A GPU wants many rows at once, and rows of one call have one length, so texts are padded. Two ways to choose the shapes:

- `budget_batches`, where any shape runs (CUDA): rows fill a token budget, lengths are rounded up to a short list.
- `plan_buckets` and `bucket_batches`, where each shape is compiled before (MIGraphX): a few (batch, sequence) buckets chosen
  from a histogram of lengths, then texts are laid into them with the fewest padded tokens.

Everything here is arithmetic on lengths. Waste is 1 - real tokens / padded tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from samescore.runtime.errors import UsageError

# Padded tokens of one call, where nobody says otherwise: enough to fill a large GPU with a 1B model. Estimated, not measured.
BATCH_TOKENS = 8192
# Rows beyond this make activations larger and products hardly faster.
MOST_ROWS = 128
# What a call costs besides its tokens, in tokens. Estimated, not measured.
CALL_TOKENS = 256
MOST_BUCKETS = 8
WASTE = 0.10
# Compiled lengths are multiples of this, as matrix units want them.
MULTIPLE = 8
# Buckets of one row, so that a single request is not padded to a whole batch.
SINGLES = 2

_BUCKET = re.compile(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,6})")
Lengths = npt.NDArray[np.int64]


@dataclass(frozen=True, order=True)
class Bucket:
    """The shape of one call: `batch` rows of `sequence` tokens."""

    batch: int
    sequence: int

    @property
    def tokens(self) -> int:
        """Padded tokens of a call."""
        return self.batch * self.sequence

    def __str__(self) -> str:
        return f"{self.batch}x{self.sequence}"


@dataclass(frozen=True)
class Batch:
    """One call: its shape, and the indices of its texts, longest first; rows beyond them are padding."""

    shape: Bucket
    rows: tuple[int, ...]


@dataclass(frozen=True)
class BucketPlan:
    """Buckets, and what they cost for the lengths that they were chosen for.

    texts: how many lengths. waste: of each text alone in the tightest bucket that many texts share, as in the limit of many
    texts. waste_at_once: of laying these texts into the buckets in one go, with the empty rows of last batches. calls: in that.
    """

    buckets: tuple[Bucket, ...]
    texts: int
    waste: float
    waste_at_once: float
    calls: int


def parse_buckets(asked: str | Iterable[Bucket | tuple[int, int]]) -> tuple[Bucket, ...]:
    """Buckets from `8x128,1x512` or pairs (batch, sequence), the shortest first; UsageError for anything else."""
    parts = (
        asked.split(",")
        if isinstance(asked, str)
        else [f"{b}" if isinstance(b, Bucket) else "x".join(map(str, b)) for b in asked]
    )
    buckets = set()
    for part in parts:
        match = _BUCKET.fullmatch(part.strip())
        if match is None:
            raise UsageError(f"{part!r} is no bucket; name batch x sequence, as in 8x128,1x512")
        buckets.add(Bucket(int(match[1]), int(match[2])))
    if not buckets:
        raise UsageError("no bucket was named; name batch x sequence, as in 8x128,1x512")
    return in_order(buckets)


def in_order(buckets: Iterable[Bucket]) -> tuple[Bucket, ...]:
    """The shortest first, and of one length the fewest rows."""
    return tuple(sorted(set(buckets), key=lambda bucket: (bucket.sequence, bucket.batch)))


def rows_for(sequence: int, batch_tokens: int) -> int:
    """Rows of that many tokens which fill the budget: at least one, at most MOST_ROWS."""
    return max(1, min(MOST_ROWS, batch_tokens // sequence))


def plan_buckets(
    lengths: Iterable[int],
    *,
    longest: int,
    limit: int = MOST_BUCKETS,
    waste: float = WASTE,
    batch_tokens: int = BATCH_TOKENS,
    multiple: int = MULTIPLE,
) -> BucketPlan:
    """At most `limit` buckets for texts of these lengths: the fewest lengths that keep `waste`, or the best there are.

    lengths: tokens per text, a sample of what will be scored. longest: the longest text that must fit; lengths beyond it count
    as it. Buckets for batches have the lengths of `best_lengths`; one or two of a single row are left for what is scored alone,
    and the longer of these holds `longest`. UsageError for a limit below 2 or no lengths.
    """
    if limit < 2:
        raise UsageError(f"at least 2 buckets are needed, one for batches and one for a single text; got {limit}")
    if longest < 1 or batch_tokens < 1 or multiple < 1:
        raise UsageError("the longest text, the token budget and the multiple must be at least 1")
    real = np.minimum(np.array(list(lengths), np.int64), longest)
    if not len(real) or real.min() < 1:
        raise UsageError("buckets are chosen from the lengths of texts: name at least one, each of at least 1 token")
    padded = np.minimum(-(-real // multiple) * multiple, longest)
    chosen = best_lengths(padded, limit - 1)
    few = next((found for found in chosen if _waste(real, found) <= waste), chosen[-1])
    singles = best_lengths(padded, min(SINGLES, limit - len(few)))[-1]
    buckets = {Bucket(rows_for(sequence, batch_tokens), sequence) for sequence in few}
    buckets |= {Bucket(1, sequence) for sequence in (*singles[:-1], longest)}
    return measure_plan(in_order(buckets), real.tolist())


def measure_plan(buckets: Sequence[Bucket], lengths: Sequence[int]) -> BucketPlan:
    """What these buckets cost for these lengths, none of which may be longer than all of them."""
    batches = bucket_batches(lengths, buckets)
    real = np.array(lengths, np.int64)
    shared = sorted({bucket.sequence for bucket in buckets if bucket.batch > 1})
    # A text that only a bucket of one row can hold is padded to that.
    reach = sorted({*shared, *(b.sequence for b in buckets if not shared or b.sequence > shared[-1])})
    padded = sum(batch.shape.tokens for batch in batches)
    return BucketPlan(in_order(buckets), len(lengths), _waste(real, reach), 1 - int(real.sum()) / padded, len(batches))


def best_lengths(lengths: Lengths, most: int) -> list[tuple[int, ...]]:
    """For 1, 2, … `most` lengths: those that pad these texts the least when each is padded to the next of them.

    lengths: int64 [texts]. The last is always the longest text's; fewer are returned where there are no more distinct lengths.
    Exact, by dynamic programming over the sorted distinct lengths l; n(i, j) texts have one of l_i+1 … l_j, cost(k, 0) is 0:

        cost(k, j) = min over i < j of cost(k - 1, i) + l_j n(i, j)

    It is the recurrence of optimal histograms: Jagadish et al., Optimal Histograms with Quality Guarantees, VLDB 1998.
    """
    distinct, counts = np.unique(lengths, return_counts=True)
    texts = np.concatenate([[0], np.cumsum(counts)])
    size = len(distinct)
    cost = np.concatenate([[0], distinct * texts[1:]])  # one length: everything is padded to it
    cuts: list[Lengths] = []
    found: list[tuple[int, ...]] = [(int(distinct[-1]),)]
    for _ in range(2, min(most, size) + 1):
        previous, cost, cut = cost, np.zeros(size + 1, np.int64), np.zeros(size + 1, np.int64)
        for j in range(1, size + 1):
            options = previous[:j] + distinct[j - 1] * (texts[j] - texts[:j])
            cut[j] = options.argmin()
            cost[j] = options[cut[j]]
        cuts.append(cut)
        found.append(_follow(distinct, cuts))
    return found


def _follow(distinct: Lengths, cuts: Sequence[Lengths]) -> tuple[int, ...]:
    """The lengths that the cuts lead to, shortest first; a cut at 0 says that one length is enough."""
    j, chosen = len(distinct), [int(distinct[-1])]
    for cut in reversed(cuts):
        if cut[j]:
            j = int(cut[j])
            chosen.append(int(distinct[j - 1]))
    return tuple(reversed(chosen))


def _waste(real: Lengths, reach: Sequence[int]) -> float:
    """Waste of padding each text to the next of these lengths (ascending)."""
    padded = np.array(reach, np.int64)[np.searchsorted(reach, real)]
    return float(1 - real.sum() / padded.sum())


def bucket_batches(lengths: Sequence[int], buckets: Sequence[Bucket]) -> list[Batch]:
    """Texts laid into buckets, longest first, with the least padded tokens + CALL_TOKENS per call.

    Exact: with texts sorted by length some best division is into runs of neighbours (swapping two texts so that the longer one
    lies in the longer bucket changes no cost), and a fuller batch is never worse, so from text i on

        cost(i) = min over buckets that hold text i of tokens + CALL_TOKENS + cost(i + batch)

    UsageError when a text is longer than every bucket.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    if order and lengths[order[0]] > (top := max(buckets, key=lambda bucket: bucket.sequence)).sequence:
        raise UsageError(f"a text of {lengths[order[0]]} tokens is longer than the longest bucket, {top}")
    # Many rows first: of equal costs the fewest calls.
    options = sorted(buckets, key=lambda bucket: -bucket.batch)
    total = len(order)
    cost = [0] * (total + 1)
    choice: list[Bucket] = [options[0]] * total
    for i in range(total - 1, -1, -1):
        length = lengths[order[i]]
        cost[i], choice[i] = min(
            ((b.tokens + CALL_TOKENS + cost[min(total, i + b.batch)], b) for b in options if b.sequence >= length),
            key=lambda pair: pair[0],
        )
    batches, i = [], 0
    while i < total:
        batches.append(Batch(choice[i], tuple(order[i : i + choice[i].batch])))
        i += choice[i].batch
    return batches


def rounded_lengths(longest: int, *, per_octave: int = 4, least: int = 16) -> tuple[int, ...]:
    """The lengths that budget batches are rounded up to: `per_octave` for each doubling from `least`, the last `longest`.

    Rounding up by a fourth of the power of two below adds less than 1 / (per_octave + 1) of the padded tokens.
    """
    lengths, octave = [], least
    while octave < longest:
        lengths += [octave + step * octave // per_octave for step in range(per_octave)]
        octave *= 2
    return (*(length for length in lengths if length < longest), longest)


def budget_batches(lengths: Sequence[int], *, longest: int, batch_tokens: int = BATCH_TOKENS) -> list[Batch]:
    """Batches of texts sorted by length, each padded to one of `rounded_lengths(longest)`; longest first, no empty rows.

    A batch has at most `batch_tokens` padded tokens (a single text may have more) and MOST_ROWS rows. Texts of a shorter
    rounded length join a batch that has room where padding them costs less than a call of their own (CALL_TOKENS).
    """
    grid = np.array(rounded_lengths(max([longest, *lengths])), np.int64)
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    widths = grid[np.searchsorted(grid, [lengths[index] for index in order])].tolist() if order else []
    ends = {width: end for end, width in enumerate(widths, start=1)}
    batches, start = [], 0
    while start < len(order):
        width = widths[start]
        full = start + rows_for(width, batch_tokens)
        end = min(ends[width], full)
        while end < min(full, len(order)):
            following = min(ends[widths[end]], full)
            if (following - end) * (width - widths[end]) > CALL_TOKENS:
                break
            end = following
        batches.append(Batch(Bucket(end - start, width), tuple(order[start:end])))
        start = end
    return batches
