"""How far a variant's probabilities are from the reference's. Everything is measured; nothing is judged here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from samescore.runtime.manifest import Activation
from samescore.runtime.prediction import probabilities_of

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Flip:
    """A text whose most probable label changed. margin: the reference's top probability minus its second."""

    text: int
    reference: str
    variant: str
    margin: float


@dataclass(frozen=True)
class Drift:
    """A variant against the reference, over `texts` texts.

    The difference dp of one text is the largest absolute difference of its probabilities over the labels; max, p99.9,
    p99 and mean are over texts. kld: mean Kullback-Leibler divergence of the variant from the reference, in nats.
    agreement: share of texts with the same most probable label, with its 95 % Wilson interval. noise_ratio: mean dp over
    the mean dp of the reference's own bfloat16 run; ece_shift and brier_shift where the texts have labels.
    """

    texts: int
    max_abs_dp: float
    p999_abs_dp: float
    p99_abs_dp: float
    mean_abs_dp: float
    max_abs_dlogit: float
    kld: float
    agreement: float
    agreement_low: float
    agreement_high: float
    flips: tuple[Flip, ...]
    not_finite: int
    noise_ratio: float | None = None
    ece_shift: float | None = None
    brier_shift: float | None = None


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
    flips = _flips(p, np.where(finite[:, None], q, 0.0), labels)
    low, high = wilson(len(dp) - len(flips), len(dp))
    ece_shift, brier_shift = _calibration_shift(p, q, labels, truth)
    mean = float(dp.mean())
    return Drift(
        texts=len(dp),
        max_abs_dp=float(dp.max()),
        p999_abs_dp=float(np.quantile(dp, 0.999)),
        p99_abs_dp=float(np.quantile(dp, 0.99)),
        mean_abs_dp=mean,
        max_abs_dlogit=float(np.abs(np.float64(reference) - variant)[finite].max(initial=0.0)),
        kld=float(_kld(p, q, activation)[finite].mean()) if finite.any() else math.inf,
        agreement=1 - len(flips) / len(dp),
        agreement_low=low,
        agreement_high=high,
        flips=tuple(flips),
        not_finite=int((~finite).sum()),
        noise_ratio=mean / bf16_mean_abs_dp if bf16_mean_abs_dp else None,
        ece_shift=ece_shift,
        brier_shift=brier_shift,
    )


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval (95 % by default) of a proportion."""
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


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


def _flips(p: FloatArray, q: FloatArray, labels: Sequence[str]) -> list[Flip]:
    ranked = np.sort(p, axis=1)
    margins = ranked[:, -1] - ranked[:, -2] if p.shape[1] > 1 else np.ones(len(p))
    before, after = p.argmax(axis=1), q.argmax(axis=1)
    return [
        Flip(int(i), labels[before[i]], labels[after[i]], float(margins[i])) for i in np.flatnonzero(before != after)
    ]


def _kld(p: FloatArray, q: FloatArray, activation: Activation) -> FloatArray:
    """KL(reference || variant) per text; for independent sigmoids, summed over the labels."""
    tiny = np.finfo(np.float64).tiny
    terms = p * (np.log(np.maximum(p, tiny)) - np.log(np.maximum(q, tiny)))
    if activation == "sigmoid":
        terms = terms + (1 - p) * (np.log(np.maximum(1 - p, tiny)) - np.log(np.maximum(1 - q, tiny)))
    result: FloatArray = terms.sum(axis=1)
    return result


def _calibration_shift(
    p: FloatArray, q: FloatArray, labels: Sequence[str], truth: Sequence[str | None] | None
) -> tuple[float | None, float | None]:
    """ECE and Brier score of the variant minus those of the reference, on the texts whose label is known."""
    index = {label: i for i, label in enumerate(labels)}
    known = [(row, index[name]) for row, name in enumerate(truth or ()) if name in index]
    if not known:
        return None, None
    rows, classes = np.array([row for row, _ in known]), np.array([c for _, c in known])
    target = np.eye(len(labels))[classes]

    def scores(x: FloatArray) -> tuple[float, float]:
        chosen = x[rows]
        brier = float(((chosen - target) ** 2).sum(axis=1).mean())
        return expected_calibration_error(chosen, chosen.argmax(axis=1) == classes), brier

    (ece_p, brier_p), (ece_q, brier_q) = scores(p), scores(q)
    return ece_q - ece_p, brier_q - brier_p
