"""How far a variant's probabilities are from the reference's. Everything is measured; nothing is judged here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from samescore.calibrate.intervals import bootstrap_interval, mean_interval, quantile_interval, rule_of_three, wilson
from samescore.runtime.manifest import Activation
from samescore.runtime.prediction import probabilities_of

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Flip:
    """A text whose most probable label changed; margin: the reference's top probability minus its second.

    Of labels with sigmoids of their own, a text whose set of labels above one half changed; margin: the largest |2 p - 1|
    among those that did. The sets are written with `+`.
    """

    text: int
    reference: str
    variant: str
    margin: float


@dataclass(frozen=True)
class LabelScores:
    """How good the probabilities are where the label is known, and how far that is from the reference's.

    accuracy; ece: expected calibration error; brier: Brier score; shifts: the variant's minus the reference's, with
    bootstrapped 95 % intervals.
    """

    accuracy: float
    accuracy_shift: float
    ece: float
    ece_shift: float
    ece_shift_low: float
    ece_shift_high: float
    brier: float
    brier_shift: float
    brier_shift_low: float
    brier_shift_high: float


@dataclass(frozen=True)
class Drift:
    """A variant against the reference, over `texts` texts; `_low` and `_high` are 95 % intervals (see `intervals`).

    The difference dp of one text is the largest absolute difference of its probabilities over the labels; max, p99.9,
    p99 and mean are over texts. beyond_max_high: the rate at which other texts of this kind may exceed max_abs_dp (rule of
    three). kld: mean Kullback-Leibler divergence of the variant from the reference, in nats. agreement: share of texts with
    the same most probable label (Wilson). noise_ratio: mean dp over the mean dp of the reference's own bfloat16 run, whose
    own uncertainty the interval leaves out. ece, brier and their shifts from the reference: over the `labelled` texts.
    None where there are too few texts to bound a number, or no text with finite logits for a divergence.
    """

    texts: int
    max_abs_dp: float
    beyond_max_high: float
    p999_abs_dp: float
    p999_abs_dp_low: float
    p999_abs_dp_high: float | None
    p99_abs_dp: float
    p99_abs_dp_low: float
    p99_abs_dp_high: float | None
    mean_abs_dp: float
    mean_abs_dp_low: float
    mean_abs_dp_high: float | None
    max_abs_dlogit: float
    kld: float | None
    kld_low: float | None
    kld_high: float | None
    agreement: float
    agreement_low: float
    agreement_high: float
    flips: tuple[Flip, ...]
    not_finite: int
    noise_ratio: float | None
    noise_ratio_low: float | None
    noise_ratio_high: float | None
    labelled: int
    labels: LabelScores | None


def measure(
    reference: npt.NDArray[Any],
    variant: npt.NDArray[Any],
    labels: Sequence[str],
    activation: Activation,
    *,
    truth: Sequence[str | None] | None = None,
    bf16_mean_abs_dp: float | None = None,
) -> Drift:
    """Compare logits [texts, labels] of the variant with the reference's; differences are taken in float64."""
    p, q = probabilities_of(reference, activation), probabilities_of(variant, activation)
    finite: npt.NDArray[np.bool_] = np.asarray(np.isfinite(variant).all(axis=1))
    dp = np.where(finite, np.abs(p - q).max(axis=1), 1.0)
    flips = _flips(p, np.where(finite[:, None], q, 0.0), labels, activation)
    agreement_low, agreement_high = wilson(len(dp) - len(flips), len(dp))
    p99_low, p99_high = quantile_interval(dp, 0.99)
    p999_low, p999_high = quantile_interval(dp, 0.999)
    mean, (mean_low, mean_high) = float(dp.mean()), mean_interval(dp)
    divergence = _kld(p, q, activation)[finite]
    kld_low, kld_high = mean_interval(divergence) if finite.any() else (None, None)
    # One known label says nothing of labels that do not exclude each other.
    rows, classes = _known(labels, truth if activation == "softmax" else None)
    return Drift(
        texts=len(dp),
        max_abs_dp=float(dp.max()),
        beyond_max_high=rule_of_three(len(dp)),
        p999_abs_dp=float(np.quantile(dp, 0.999)),
        p999_abs_dp_low=p999_low,
        p999_abs_dp_high=p999_high,
        p99_abs_dp=float(np.quantile(dp, 0.99)),
        p99_abs_dp_low=p99_low,
        p99_abs_dp_high=p99_high,
        mean_abs_dp=mean,
        mean_abs_dp_low=mean_low,
        mean_abs_dp_high=mean_high,
        max_abs_dlogit=float(np.abs(np.float64(reference) - variant)[finite].max(initial=0.0)),
        kld=float(divergence.mean()) if finite.any() else None,
        kld_low=kld_low,
        kld_high=kld_high,
        agreement=1 - len(flips) / len(dp),
        agreement_low=agreement_low,
        agreement_high=agreement_high,
        flips=tuple(flips),
        not_finite=int((~finite).sum()),
        noise_ratio=_ratio(mean, bf16_mean_abs_dp),
        noise_ratio_low=_ratio(mean_low, bf16_mean_abs_dp),
        noise_ratio_high=_ratio(mean_high, bf16_mean_abs_dp),
        labelled=len(rows),
        labels=_label_scores(p[rows], q[rows], classes) if len(rows) else None,
    )


def _ratio(value: float | None, yardstick: float | None) -> float | None:
    return value / yardstick if value is not None and yardstick else None


def expected_calibration_error(probabilities: FloatArray, correct: npt.NDArray[np.bool_], bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal-width confidence bins, weighted by bin size (Guo et al. 2017)."""
    confidence = probabilities.max(axis=1)
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = 0.0
    for index in range(bins):
        chosen = bin_of == index
        if chosen.any():
            gaps += abs(confidence[chosen].mean() - correct[chosen].mean()) * chosen.mean()
    return float(gaps)


def _flips(p: FloatArray, q: FloatArray, labels: Sequence[str], activation: Activation) -> list[Flip]:
    if activation == "sigmoid":
        above, still = p > 0.5, q > 0.5
        changed = above != still
        found = np.where(changed, np.abs(2 * p - 1), 0.0).max(axis=1)
        return [
            Flip(int(i), _decided(above[i], labels), _decided(still[i], labels), float(found[i]))
            for i in np.flatnonzero(changed.any(axis=1))
        ]
    ranked = np.sort(p, axis=1)
    margins = ranked[:, -1] - ranked[:, -2] if p.shape[1] > 1 else np.ones(len(p))
    before, after = p.argmax(axis=1), q.argmax(axis=1)
    return [
        Flip(int(i), labels[before[i]], labels[after[i]], float(margins[i])) for i in np.flatnonzero(before != after)
    ]


def _decided(above: npt.NDArray[np.bool_], labels: Sequence[str]) -> str:
    return "+".join(label for label, yes in zip(labels, above, strict=True) if yes) or "none"


def _kld(p: FloatArray, q: FloatArray, activation: Activation) -> FloatArray:
    """KL(reference || variant) per text; for independent sigmoids, summed over the labels."""
    tiny = np.finfo(np.float64).tiny
    terms = p * (np.log(np.maximum(p, tiny)) - np.log(np.maximum(q, tiny)))
    if activation == "sigmoid":
        terms = terms + (1 - p) * (np.log(np.maximum(1 - p, tiny)) - np.log(np.maximum(1 - q, tiny)))
    result: FloatArray = terms.sum(axis=1)
    return result


def _known(
    labels: Sequence[str], truth: Sequence[str | None] | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The rows whose label is known, and which label it is."""
    index = {label: i for i, label in enumerate(labels)}
    known = [(row, index[name]) for row, name in enumerate(truth or ()) if name in index]
    return np.array([row for row, _ in known], np.int64), np.array([label for _, label in known], np.int64)


def brier_score(probabilities: FloatArray, classes: npt.NDArray[np.int64]) -> float:
    """Mean squared distance of [texts, labels] from the known label's one-hot vector, summed over labels (Brier 1950)."""
    target = np.eye(probabilities.shape[1])[classes]
    return float(((probabilities - target) ** 2).sum(axis=1).mean())


def _label_scores(p: FloatArray, q: FloatArray, classes: npt.NDArray[np.int64]) -> LabelScores:
    """Scores of the variant's probabilities q, and their shift from the reference's p, on texts of known label."""
    right_p, right_q = p.argmax(axis=1) == classes, q.argmax(axis=1) == classes

    def ece(x: FloatArray, right: npt.NDArray[np.bool_], rows: npt.NDArray[np.int64]) -> float:
        return expected_calibration_error(x[rows], right[rows])

    def ece_shift(rows: npt.NDArray[np.int64]) -> float:
        return ece(q, right_q, rows) - ece(p, right_p, rows)

    def brier_shift(rows: npt.NDArray[np.int64]) -> float:
        return brier_score(q[rows], classes[rows]) - brier_score(p[rows], classes[rows])

    everything = np.arange(len(classes))
    ece_low, ece_high = bootstrap_interval(ece_shift, len(classes))
    brier_low, brier_high = bootstrap_interval(brier_shift, len(classes))
    return LabelScores(
        accuracy=float(right_q.mean()),
        accuracy_shift=float(right_q.mean() - right_p.mean()),
        ece=ece(q, right_q, everything),
        ece_shift=ece_shift(everything),
        ece_shift_low=ece_low,
        ece_shift_high=ece_high,
        brier=brier_score(q, classes),
        brier_shift=brier_shift(everything),
        brier_shift_low=brier_low,
        brier_shift_high=brier_high,
    )
