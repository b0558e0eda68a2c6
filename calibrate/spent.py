"""What a recipe does to a classifier's calibration texts, as far as a budget limits it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from samescore.calibrate.metrics import FloatArray
from samescore.runtime.manifest import Activation
from samescore.runtime.prediction import probabilities_of

NEAREST = 0.25
TINY = 1e-12


@dataclass(frozen=True)
class Spent:
    """What a recipe does to texts: the numbers that a budget limits. disagreement: `expected_disagreement`."""

    max_abs_dp: float
    p99_abs_dp: float
    mean_abs_dp: float
    disagreement: float

    @classmethod
    def of(cls, reference: npt.NDArray[Any], logits: npt.NDArray[Any], activation: Activation) -> Spent:
        """Of logits [texts, labels] against the reference's; a text whose logits are not finite has lost all."""
        finite = np.isfinite(logits).all(axis=1)
        moved = np.abs(probabilities_of(logits, activation) - probabilities_of(reference, activation)).max(axis=1)
        lost = float(1 - finite.mean())
        exact = reference[finite].astype(np.float64)
        changed = expected_disagreement(exact, logits[finite] - exact, activation) if finite.any() else 0.0
        return cls.moved(np.where(finite, moved, 1.0), min(1.0, lost + changed))

    @classmethod
    def moved(cls, dp: FloatArray, disagreement: float) -> Spent:
        """Of each text's largest change of a probability, float64 [texts]."""
        return cls(float(dp.max()), float(np.quantile(dp, 0.99)), float(dp.mean()), disagreement)


def expected_disagreement(logits: FloatArray, changes: FloatArray, activation: Activation) -> float:
    """The share of texts like these whose label will change: density of ties times the mean distance that they move, halved.

    logits, changes: [texts, labels]. Of a hundred texts hardly one changes its label, and few are near a tie. So the density
    is that of the quarter (NEAREST) of the texts that are nearest to one, and the mean theirs too: texts near ties move
    further than others. Half of the moves lead away from the tie. That of sigmoids: any label, summed.
    """
    if activation == "sigmoid":
        gaps, moves = np.abs(logits), np.abs(changes)
    elif logits.shape[1] < 2:
        return 0.0
    else:
        best = np.argsort(-logits, axis=1)[:, :2]
        gaps, moves = (np.abs(np.diff(np.take_along_axis(x, best, axis=1))) for x in (logits, changes))
    count = max(1, round(NEAREST * len(gaps)))
    total = 0.0
    for gap, move in zip(gaps.T, moves.T, strict=True):
        nearest = np.argsort(gap, kind="stable")[:count]
        density = count / len(gap) / max(float(gap[nearest[-1]]), TINY)
        total += min(1.0, density * float(move[nearest].mean()) / 2)
    return min(1.0, total)
