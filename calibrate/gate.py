"""The gate: which drift a precision may have. Separate from the measurement, so that neither can excuse the other."""

from __future__ import annotations

from dataclasses import dataclass

from samescore.calibrate.metrics import Drift
from samescore.runtime.manifest import Precision


@dataclass(frozen=True)
class Tolerance:
    """The largest drift that passes. flip_margin: a flipped label must have had at most this reference margin."""

    max_abs_dp: float
    p99_abs_dp: float
    mean_abs_dp: float | None
    agreement: float
    flip_margin: float | None


TOLERANCES: dict[Precision, Tolerance] = {
    # float32 differs by summation order only.
    "fp32": Tolerance(max_abs_dp=5e-5, p99_abs_dp=1e-5, mean_abs_dp=None, agreement=1.0, flip_margin=None),
    "fp16": Tolerance(max_abs_dp=5e-3, p99_abs_dp=1e-3, mean_abs_dp=None, agreement=0.999, flip_margin=0.01),
    # Measured on trained e5-small weights: the model's own bfloat16 run has p99 1.4e-2.
    "int8": Tolerance(max_abs_dp=5e-2, p99_abs_dp=2e-2, mean_abs_dp=3e-3, agreement=0.995, flip_margin=0.1),
    "int4": Tolerance(max_abs_dp=1.5e-1, p99_abs_dp=6e-2, mean_abs_dp=None, agreement=0.99, flip_margin=None),
}


@dataclass(frozen=True)
class Verdict:
    """Whether a drift passes, and each number that does not."""

    passed: bool
    failures: tuple[str, ...]


def judge(drift: Drift, tolerance: Tolerance) -> Verdict:
    """Compare a drift with a tolerance."""
    failures = []
    if drift.not_finite:
        failures.append(f"{drift.not_finite} of {drift.texts} texts gave NaN or infinite logits")
    for name in ("max_abs_dp", "p99_abs_dp", "mean_abs_dp"):
        measured, allowed = getattr(drift, name), getattr(tolerance, name)
        # `not <=` so that a NaN fails.
        if allowed is not None and not measured <= allowed:
            failures.append(f"{name} {measured:.2e} > {allowed:.0e}")
    if not drift.agreement >= tolerance.agreement:
        failures.append(
            f"label agreement {drift.agreement:.4f} < {tolerance.agreement} ({len(drift.flips)} of {drift.texts} flipped)"
        )
    if tolerance.flip_margin is not None:
        far = [flip for flip in drift.flips if flip.margin > tolerance.flip_margin]
        if far:
            worst = max(far, key=lambda flip: flip.margin)
            failures.append(f"text {worst.text} flipped with margin {worst.margin:.3f} > {tolerance.flip_margin}")
    return Verdict(not failures, tuple(failures))
