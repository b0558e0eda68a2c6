"""What a recipe does to a classifier's calibration texts, as far as a budget limits it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from samescore.calibrate.metrics import FloatArray
from samescore.runtime.manifest import Activation
from samescore.runtime.prediction import probabilities_of

# The change of a logit that turns every label.
LOST = 1e9


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
        changes = np.where(finite[:, None], np.float64(logits) - reference, LOST * np.arange(reference.shape[1]))
        disagreement = expected_disagreement(reference.astype(np.float64), changes, activation)
        return cls.moved(np.where(finite, moved, 1.0), disagreement)

    @classmethod
    def moved(cls, dp: FloatArray, disagreement: float) -> Spent:
        """Of each text's largest change of a probability, float64 [texts]."""
        return cls(float(dp.max()), float(np.quantile(dp, 0.99)), float(dp.mean()), disagreement)


def expected_disagreement(logits: FloatArray, changes: FloatArray, activation: Activation) -> float:
    """The share of texts whose label would change if every text's change of logits befell every text, in either direction.

    logits, changes: [texts, labels]. Of a few texts hardly one changes its label; who might is seen from how near their ties
    are and how far logits move, taken as independent of each other. That of sigmoids: any label, summed.
    """
    if activation == "sigmoid":
        gaps, moves = np.abs(logits), np.abs(changes)
    elif logits.shape[1] < 2:
        return 0.0
    else:
        best = np.argsort(-logits, axis=1)[:, :2]
        gaps, moves = (np.abs(np.diff(np.take_along_axis(x, best, axis=1))) for x in (logits, changes))
    # Half of the moves are away from the tie.
    rates = [(move[:, None] > gap[None, :]).mean() / 2 for gap, move in zip(gaps.T, moves.T, strict=True)]
    return float(min(1.0, sum(rates)))
