"""How far a variant's next-token distributions are from the reference's, position by position, in llama.cpp's statistics.

    KLD   = sum over tokens of p log(p / q)                      p: the reference's softmax, q: the variant's
    Δp    = q(t) - p(t)                                          t: the reference's likeliest token
    ratio = exp(mean(log p(x) - log q(x)))                       x: the text's own next token; perplexity over perplexity

A full vocabulary is only ever held for one sequence. What is kept of the reference are its likeliest tokens and the
normalizer (`Rows.top`); the KLD of those and of all other tokens as one outcome is a lower bound of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from samescore.calibrate.intervals import bootstrap_interval, wilson

Array = npt.NDArray[np.float64]
Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

# llama.cpp's percentiles of Δp, in percent.
PERCENTILES = (0.1, 1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9)


@dataclass(frozen=True)
class Rows:
    """The reference at the positions of one sequence.

    ids: int64 [positions, k], the tokens that are known, the likeliest first; None for the whole vocabulary. logits: float32
    [positions, k or vocabulary]. normalizer: float64 [positions], log of the sum of exp over the vocabulary. following:
    int64 [positions], the token that comes next. following_logit: float32 [positions], its logit.
    """

    ids: Ids | None
    logits: Logits
    normalizer: Array
    following: Ids
    following_logit: Logits

    @staticmethod
    def whole(logits: Logits, following: Ids) -> Rows:
        """From the logits [positions, vocabulary] of every token."""
        normalizer = np.array([_normalizer(row) for row in logits])
        return Rows(None, logits, normalizer, following, logits[np.arange(len(logits)), following])

    def top(self, count: int) -> Rows:
        """Only the likeliest tokens."""
        ids = np.stack([_likeliest(row, count) for row in self.logits])
        logits = np.take_along_axis(self.logits, ids, axis=1)
        return Rows(ids, logits, self.normalizer, self.following, self.following_logit)


@dataclass(frozen=True)
class Positions:
    """One variant at the positions of one sequence; every field [positions].

    kld, dp: as above; NaN where logits are not finite. gap: the reference's logit of its likeliest token over that of the
    variant's, 0 where they are the same; infinite where that token is not known. likeliest: the variant's. same: whether it is
    the reference's. loss, reference_loss: -log of what the next token got.
    """

    kld: Array
    dp: Array
    gap: Array
    likeliest: Ids
    same: npt.NDArray[np.bool_]
    loss: Array
    reference_loss: Array


def compare(rows: Rows, logits: Logits) -> Positions:
    """The variant's logits float32 [positions, vocabulary] against the reference."""
    count = len(logits)
    kld, dp, gap, loss = np.full((4, count), np.nan)
    likeliest, same = np.full(count, -1, np.int64), np.zeros(count, bool)
    for at, row in enumerate(logits):
        if not np.isfinite(row).all():
            gap[at] = np.inf
            continue
        found, normalizer = int(row.argmax()), _normalizer(row)
        ids = slice(None) if rows.ids is None else rows.ids[at]
        p, q = rows.logits[at] - rows.normalizer[at], row[ids].astype(np.float64) - normalizer
        best = int(rows.logits[at].argmax())
        first = best if rows.ids is None else int(rows.ids[at, best])
        kld[at] = _kld(p, q, whole=rows.ids is None)
        dp[at] = math.exp(q[best]) - math.exp(p[best])
        likeliest[at], same[at], gap[at] = found, found == first, _gap(rows, at, found, best)
        loss[at] = normalizer - float(row[rows.following[at]])
    return Positions(kld, dp, gap, likeliest, same, loss, rows.normalizer - rows.following_logit)


def divergences(reference: Logits, logits: Logits) -> Array:
    """KL(reference || variant) of logits float32 [positions, vocabulary], float64 [positions] in nats.

    Infinite where the variant's are not finite.
    """
    found = np.full(len(logits), np.inf)
    for at, (row, other) in enumerate(zip(reference, logits, strict=True)):
        if np.isfinite(other).all():
            p, q = (x.astype(np.float64) - _normalizer(x) for x in (row, other))
            found[at] = _kld(p, q, whole=True)
    return found


def _normalizer(row: Logits) -> float:
    exact = row.astype(np.float64)
    largest = exact.max()
    return float(largest + np.log(np.exp(exact - largest).sum()))


def _kld(p: Array, q: Array, *, whole: bool) -> float:
    """From log probabilities; of some tokens only, all others count as one outcome."""
    known = np.exp(p)
    # The sum of x - log(1 + x) over outcomes keeps the digits that the sum of p log(p / q) cancels away.
    ratio = np.expm1(q - p)
    total = float((known * (ratio - (q - p))).sum())
    if whole:
        return total
    rest, other = 1 - float(known.sum()), 1 - float(np.exp(q).sum())
    if rest < 1e-9 or other <= 0:
        return total
    return total + rest * (math.expm1(math.log(other / rest)) - math.log(other / rest))


def _gap(rows: Rows, at: int, found: int, best: int) -> float:
    if rows.ids is None:
        return float(rows.logits[at, best] - rows.logits[at, found])
    (places,) = np.nonzero(rows.ids[at] == found)
    return float(rows.logits[at, best] - rows.logits[at, places[0]]) if len(places) else math.inf


def _likeliest(row: Logits, count: int) -> Ids:
    """Ids of the largest logits, largest first; among equals the smallest id, as argmax takes it."""
    count = min(count, len(row))
    threshold = np.partition(row, -count)[-count]
    (candidates,) = np.nonzero(row >= threshold)
    order = np.argsort(-row[candidates], kind="stable")
    return np.asarray(candidates[order][:count], np.int64)


@dataclass(frozen=True)
class TokenDrift:
    """Over the positions of some sequences. Intervals are 95 %.

    Those of mean_kld and perplexity_ratio resample sequences (fixed seed), as neighbouring positions are no independent
    samples; that of `same` is Wilson's and takes them for independent, so it is too narrow. dp_percentiles: of Δp, by name.
    not_finite: positions without numbers, which no other field counts.
    """

    sequences: int
    positions: int
    mean_kld: float
    mean_kld_low: float
    mean_kld_high: float
    median_kld: float
    p99_kld: float
    max_kld: float
    same: float
    same_low: float
    same_high: float
    mean_dp: float
    rms_dp: float
    p99_abs_dp: float
    max_abs_dp: float
    dp_percentiles: Mapping[str, float]
    perplexity: float
    perplexity_ratio: float
    perplexity_ratio_low: float
    perplexity_ratio_high: float
    not_finite: int


def token_drift(found: Sequence[Positions]) -> TokenDrift:
    """The statistics of the positions of each sequence."""
    kept = [np.isfinite(one.kld) for one in found]
    sizes = np.array([int(keep.sum()) for keep in kept])
    kld = np.concatenate([one.kld[keep] for one, keep in zip(found, kept, strict=True)])
    dp = np.concatenate([one.dp[keep] for one, keep in zip(found, kept, strict=True)])
    same = np.concatenate([one.same[keep] for one, keep in zip(found, kept, strict=True)])
    loss = [(one.loss - one.reference_loss)[keep] for one, keep in zip(found, kept, strict=True)]
    missing = int(sum(len(one.kld) for one in found) - sizes.sum())
    if not len(kld):
        return _no_numbers(len(found), missing)
    sums = np.array([float(one.kld[keep].sum()) for one, keep in zip(found, kept, strict=True)])
    losses = np.array([float(one.sum()) for one in loss])
    mean_low, mean_high = _resampled(sums, sizes, lambda mean: mean)
    ratio_low, ratio_high = _resampled(losses, sizes, math.exp)
    count = int(same.sum())
    low, high = wilson(count, len(same))
    reference_loss = np.concatenate([one.reference_loss for one in found])
    return TokenDrift(
        sequences=len(found),
        positions=len(same),
        mean_kld=float(kld.mean()),
        mean_kld_low=mean_low,
        mean_kld_high=mean_high,
        median_kld=float(np.median(kld)),
        p99_kld=float(np.quantile(kld, 0.99)),
        max_kld=float(kld.max()),
        same=count / len(same),
        same_low=low,
        same_high=high,
        mean_dp=float(dp.mean()),
        rms_dp=float(np.sqrt(np.square(dp).mean())),
        p99_abs_dp=float(np.quantile(np.abs(dp), 0.99)),
        max_abs_dp=float(np.abs(dp).max()),
        dp_percentiles={f"p{q:g}": float(np.percentile(dp, q)) for q in PERCENTILES},
        perplexity=_exp(float(reference_loss.mean())),
        perplexity_ratio=_exp(float(losses.sum() / sizes.sum())),
        perplexity_ratio_low=ratio_low,
        perplexity_ratio_high=ratio_high,
        not_finite=missing,
    )


def _no_numbers(sequences: int, positions: int) -> TokenDrift:
    """What is said of a variant that gave not one number: the worst of everything."""
    worst = dict.fromkeys((field.name for field in fields(TokenDrift)), math.inf)
    counts = {"sequences": sequences, "positions": 0, "same": 0.0, "same_low": 0.0, "same_high": 1.0}
    percentiles = {f"p{q:g}": math.inf for q in PERCENTILES}
    return TokenDrift(**{**worst, **counts, "dp_percentiles": percentiles, "not_finite": positions})  # type: ignore[arg-type]


def _resampled(sums: Array, sizes: npt.NDArray[np.int64], then: Callable[[float], float]) -> tuple[float, float]:
    """The interval of the mean over positions when sequences are drawn again."""

    def statistic(rows: npt.NDArray[np.int64]) -> float:
        total = int(sizes[rows].sum())
        return then(float(sums[rows].sum()) / total) if total else 0.0

    return bootstrap_interval(statistic, len(sums))


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))


@dataclass(frozen=True)
class Divergence:
    """Where a variant's greedy answer leaves the reference's: the first such place of an answer.

    gap: the reference's logit of its own token over that of the variant's; None where it is not known.
    """

    prompt: int
    position: int
    reference_token: int
    token: int
    gap: float | None


@dataclass(frozen=True)
class GreedyAgreement:
    """Greedy answers: how many are the reference's to the last token, and how many leave it at a near tie or elsewhere.

    tie: the largest gap of a near tie, in logits. tokens: how many greedy tokens agree before the answers part, on average.
    divergences: the widest gaps first, at most LISTED.
    """

    prompts: int
    identical: int
    near_ties: int
    outside: int
    tie: float
    tokens: float
    divergences: tuple[Divergence, ...]


LISTED = 10


def greedy_agreement(found: Sequence[Positions], answers: Sequence[Ids], tie: float) -> GreedyAgreement:
    """From positions along the reference's own greedy answers [tokens]: up to the first other token both read the same."""
    parted, agreed = [], 0
    for number, (one, answer) in enumerate(zip(found, answers, strict=True)):
        (others,) = np.nonzero(one.likeliest != answer)
        if not len(others):
            agreed += len(answer)
            continue
        at = int(others[0])
        agreed += at
        gap = float(one.gap[at])
        parted.append(Divergence(number, at, int(answer[at]), int(one.likeliest[at]), gap))
    outside = [where for where in parted if where.gap is None or not where.gap <= tie]
    parted.sort(key=lambda where: -(where.gap or 0.0))
    listed = tuple(
        Divergence(w.prompt, w.position, w.reference_token, w.token, w.gap if math.isfinite(w.gap or 0.0) else None)
        for w in parted[:LISTED]
    )
    return GreedyAgreement(
        prompts=len(found),
        identical=len(found) - len(parted),
        near_ties=len(parted) - len(outside),
        outside=len(outside),
        tie=tie,
        tokens=agreed / max(1, len(found)),
        divergences=listed,
    )
