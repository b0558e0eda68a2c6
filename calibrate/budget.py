"""How much drift a recipe search may leave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from samescore.calibrate.gate import Tolerance
from samescore.calibrate.metrics import Drift
from samescore.runtime.errors import UsageError, did_you_mean

# What of a budget may be used on the calibration texts, because others must stay inside too: of few texts, whose p99 is nearly
# their largest, half; from MANY on three quarters.
FEW_SAFETY, MANY_SAFETY, MANY = 0.5, 0.75, 200
BUDGET_NAMES = {"max": "max_abs_dp", "p99": "p99_abs_dp", "mean": "mean_abs_dp"}


@dataclass(frozen=True)
class Budget:
    """The largest drift that a search may leave, of each number; None where it does not matter. safety: the used share."""

    max_abs_dp: float | None
    p99_abs_dp: float | None
    mean_abs_dp: float | None
    safety: float = FEW_SAFETY

    @classmethod
    def parse(cls, text: str, tolerance: Tolerance) -> Budget:
        """`gate`, the tolerance's own numbers, or some of `max=…,p99=…,mean=…`; UsageError for anything else."""
        if text == "gate":
            return cls(tolerance.max_abs_dp, tolerance.p99_abs_dp, tolerance.mean_abs_dp)
        found: dict[str, float] = {}
        for item in text.split(","):
            name, _, value = item.partition("=")
            if name not in BUDGET_NAMES:
                raise UsageError(
                    f"budget {text!r}: {name!r} is none of gate, {', '.join(BUDGET_NAMES)}.{did_you_mean(name, BUDGET_NAMES)} "
                    "Write --budget gate, --budget none or --budget p99=5e-3,mean=1e-3"
                )
            try:
                found[BUDGET_NAMES[name]] = float(value)
            except ValueError:
                raise UsageError(f"budget {text!r}: {value!r} is no number") from None
            if not 0 < found[BUDGET_NAMES[name]] <= 1:
                raise UsageError(f"budget {text!r}: {name} is a difference of probabilities, more than 0 and at most 1")
        return cls(found.get("max_abs_dp"), found.get("p99_abs_dp"), found.get("mean_abs_dp"))

    def excess(self, drift: Drift | Mapping[str, float]) -> float:
        """The largest number over the used share of its limit; at most 1 when all are inside."""
        values: Mapping[str, float] = drift if isinstance(drift, Mapping) else vars(drift)
        limits: dict[str, float] = {
            name: limit for name in BUDGET_NAMES.values() if (limit := getattr(self, name)) is not None
        }
        return max(values[name] / (self.safety * limit) for name, limit in limits.items())

    def over(self, texts: int) -> Budget:
        """The same for so many calibration texts."""
        return replace(self, safety=MANY_SAFETY if texts >= MANY else FEW_SAFETY)
