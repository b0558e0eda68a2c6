"""The gate of generation: which drift of the next token's distribution a precision may have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from samescore.calibrate.generation_metrics import GreedyAgreement, TokenDrift
from samescore.runtime.manifest import Precision

Outcome = Literal["PASS", "FAIL", "NOT MEASURED"]


@dataclass(frozen=True)
class GenerationTolerance:
    """The largest drift that passes, of answers and of texts each; None is free.

    tie: the largest gap in logits of a near tie. greedy: whether answers may leave the reference's at near ties only.
    """

    mean_kld: float
    max_kld: float | None
    tie: float
    greedy: bool


GENERATION_TOLERANCES: dict[Precision, GenerationTolerance] = {
    # Differs by summation order only: the largest logit difference on trained SmolLM2-135M is 9.9e-5, of which a tie can take
    # two; ten times that for deeper models.
    "fp32": GenerationTolerance(mean_kld=1e-7, max_kld=1e-6, tie=1e-3, greedy=True),
    "fp16": GenerationTolerance(mean_kld=1e-4, max_kld=None, tie=5e-2, greedy=True),
    "int8": GenerationTolerance(mean_kld=1e-3, max_kld=None, tie=0.25, greedy=False),
    # Measured on SmolLM2-135M, the smallest trained model at hand, by GPTQ with calibration: 1.5e-1 (rounded to the nearest
    # 3.1e-1). Larger models lose less.
    "int4": GenerationTolerance(mean_kld=2e-1, max_kld=None, tie=1.0, greedy=False),
}


def failures_of(
    answers: TokenDrift, texts: TokenDrift, greedy: GreedyAgreement, tolerance: GenerationTolerance
) -> tuple[str, ...]:
    """What is outside the tolerance, in words; nothing for a variant that passes."""
    failures = []
    for name, drift in (("answers", answers), ("texts", texts)):
        if drift.not_finite:
            failures.append(f"{drift.not_finite} positions of {name} gave NaN or infinite logits")
        # `not <=` so that a NaN fails.
        if not drift.mean_kld <= tolerance.mean_kld:
            failures.append(f"mean KLD on {name} {drift.mean_kld:.2e} > {tolerance.mean_kld:.0e}")
        if tolerance.max_kld is not None and not drift.max_kld <= tolerance.max_kld:
            failures.append(f"largest KLD on {name} {drift.max_kld:.2e} > {tolerance.max_kld:.0e}")
    if tolerance.greedy and greedy.outside:
        failures.append(
            f"{greedy.outside} of {greedy.prompts} greedy answers are not the reference's, outside near ties "
            f"({tolerance.tie:g} of a logit)"
        )
    return tuple(failures)
