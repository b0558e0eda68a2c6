"""How much drift a recipe search may leave, of a classifier and of a language model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from samescore.calibrate.effects import LabelEffects, Logits, TokenEffects
from samescore.calibrate.gate import Tolerance
from samescore.calibrate.generation_gate import GenerationTolerance
from samescore.calibrate.generation_metrics import divergences
from samescore.calibrate.spent import Spent
from samescore.runtime.errors import UsageError, did_you_mean
from samescore.runtime.manifest import Activation

# What of a budget may be used on the calibration texts, because others must stay inside too: of few texts, whose p99 is nearly
# their largest, half; from MANY on three quarters.
FEW_SAFETY, MANY_SAFETY, MANY = 0.5, 0.75, 200
BUDGET_NAMES = {"max": "max_abs_dp", "p99": "p99_abs_dp", "mean": "mean_abs_dp", "agreement": "disagreement"}


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

    @staticmethod
    def spent(reference: Logits, logits: Logits, activation: Activation) -> Spent:
        """Of a built recipe's logits [texts, labels] against the reference's."""
        return Spent.of(reference, logits, activation)

    @staticmethod
    def effects(logits: Logits, activation: Activation) -> LabelEffects:
        """What takes in the effects of parts, of the logits with nothing quantized."""
        return LabelEffects(logits, activation)

    @staticmethod
    def said(spent: Spent) -> str:
        """In words."""
        changed = f"{spent.disagreement:.2%} of the labels are expected to change"
        return f"mean |Δp| is {spent.mean_abs_dp:.1e}, max {spent.max_abs_dp:.1e}, and {changed}"

    @classmethod
    def parse(cls, text: str, tolerance: Tolerance) -> Budget:
        """`gate`, the tolerance's own numbers, or some of `max=…,p99=…,mean=…,agreement=…`; UsageError for anything else."""
        if text == "gate":
            changed = 1 - tolerance.agreement if tolerance.agreement < 1 else None
            return cls(tolerance.max_abs_dp, tolerance.p99_abs_dp, tolerance.mean_abs_dp, changed)
        found = _numbers(text, BUDGET_NAMES, "p99=5e-3,mean=1e-3")
        for name, field in BUDGET_NAMES.items():
            if name == "agreement" and field in found:
                if not 0 <= found[field] < 1:
                    raise UsageError(
                        f"budget {text!r}: agreement is the least share of same labels, at least 0, below 1"
                    )
                found[field] = 1 - found[field]
            elif field in found and not 0 < found[field] <= 1:
                raise UsageError(f"budget {text!r}: {name} is a difference of probabilities, more than 0 and at most 1")
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
        return replace(self, safety=_safety(texts))


@dataclass(frozen=True)
class TokenBudget:
    """The most that a language model may spend. mean_kld: mean divergence of the next token's distribution, in nats."""

    mean_kld: float
    safety: float = FEW_SAFETY

    @classmethod
    def parse(cls, text: str, tolerance: GenerationTolerance) -> TokenBudget:
        """`gate`, the tolerance's own number, or `kld=…`; UsageError for anything else."""
        if text == "gate":
            return cls(tolerance.mean_kld)
        (number,) = _numbers(text, {"kld": "mean_kld"}, "kld=5e-4").values()
        if not number > 0:
            raise UsageError(f"budget {text!r}: kld is a mean divergence in nats, more than 0")
        return cls(number)

    @staticmethod
    def spent(reference: Logits, logits: Logits, activation: Activation) -> float:
        """Of a built recipe's logits [texts, vocabulary] against the reference's."""
        return float(divergences(reference, logits).mean())

    @staticmethod
    def effects(logits: Logits, activation: Activation) -> TokenEffects:
        """What takes in the effects of parts, of the logits with nothing quantized."""
        return TokenEffects(logits, activation)

    @staticmethod
    def said(spent: float) -> str:
        """In words."""
        return f"the mean divergence is {spent:.1e}"

    def excess(self, spent: float) -> float:
        """The number over the used share of its limit; at most 1 when it is inside."""
        return spent / (self.safety * self.mean_kld)

    def over(self, texts: int) -> TokenBudget:
        """The same for so many calibration texts."""
        return replace(self, safety=_safety(texts))


def _safety(texts: int) -> float:
    return MANY_SAFETY if texts >= MANY else FEW_SAFETY


def _numbers(text: str, names: dict[str, str], example: str) -> dict[str, float]:
    """The numbers of `name=number,…` by field; UsageError for other names, and for what is no number."""
    found: dict[str, float] = {}
    for item in text.split(","):
        name, _, value = item.partition("=")
        if name not in names:
            raise UsageError(
                f"budget {text!r}: {name!r} is none of gate, {', '.join(names)}.{did_you_mean(name, names)} "
                f"Write --budget gate, --budget none or --budget {example}"
            )
        try:
            found[names[name]] = float(value)
        except ValueError:
            raise UsageError(f"budget {text!r}: {value!r} is no number") from None
    return found
