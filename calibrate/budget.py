"""How much drift a recipe search may leave, and how much of that a recipe spends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from samescore.calibrate.gate import Tolerance
from samescore.calibrate.metrics import FloatArray
from samescore.runtime.errors import UsageError, did_you_mean
from samescore.runtime.manifest import Activation
from samescore.runtime.prediction import probabilities_of

# What of a budget may be used on the calibration texts, because others must stay inside too: of few texts, whose p99 is nearly
# their largest, half; from MANY on three quarters.
FEW_SAFETY, MANY_SAFETY, MANY = 0.5, 0.75, 200
# The change of a logit that turns every label.
LOST = 1e9
BUDGET_NAMES = {"max": "max_abs_dp", "p99": "p99_abs_dp", "mean": "mean_abs_dp", "agreement": "disagreement"}


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


@dataclass(frozen=True)
class Budget:
    """The most that a search may leave, of each number; None where it does not matter. safety: the used share.

    disagreement: the share of texts whose label may change.
    """

    max_abs_dp: float | None
    p99_abs_dp: float | None
    mean_abs_dp: float | None
    disagreement: float | None = None
    safety: float = FEW_SAFETY

    @classmethod
    def parse(cls, text: str, tolerance: Tolerance) -> Budget:
        """`gate`, the tolerance's own numbers, or some of `max=…,p99=…,mean=…,agreement=…`; UsageError for anything else."""
        if text == "gate":
            changed = 1 - tolerance.agreement if tolerance.agreement < 1 else None
            return cls(tolerance.max_abs_dp, tolerance.p99_abs_dp, tolerance.mean_abs_dp, changed)
        found: dict[str, float] = {}
        for item in text.split(","):
            name, _, value = item.partition("=")
            if name not in BUDGET_NAMES:
                raise UsageError(
                    f"budget {text!r}: {name!r} is none of gate, {', '.join(BUDGET_NAMES)}.{did_you_mean(name, BUDGET_NAMES)} "
                    "Write --budget gate, --budget none or --budget p99=5e-3,mean=1e-3"
                )
            try:
                number = float(value)
            except ValueError:
                raise UsageError(f"budget {text!r}: {value!r} is no number") from None
            if name == "agreement":
                if not 0 <= number < 1:
                    raise UsageError(
                        f"budget {text!r}: agreement is the least share of same labels, at least 0, below 1"
                    )
                number = 1 - number
            elif not 0 < number <= 1:
                raise UsageError(f"budget {text!r}: {name} is a difference of probabilities, more than 0 and at most 1")
            found[BUDGET_NAMES[name]] = number
        return cls(
            found.get("max_abs_dp"), found.get("p99_abs_dp"), found.get("mean_abs_dp"), found.get("disagreement")
        )

    def excess(self, spent: Spent) -> float:
        """The largest number over the used share of its limit; at most 1 when all are inside."""
        limits: dict[str, float] = {
            name: limit for name in BUDGET_NAMES.values() if (limit := getattr(self, name)) is not None
        }
        values: dict[str, float] = vars(spent)
        return max(values[name] / (self.safety * limit) for name, limit in limits.items())

    def over(self, texts: int) -> Budget:
        """The same for so many calibration texts."""
        return replace(self, safety=MANY_SAFETY if texts >= MANY else FEW_SAFETY)
