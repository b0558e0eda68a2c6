"""The gate: which drift a precision may have. Separate from the measurement, so that neither can excuse the other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from samescore.calibrate.intervals import rule_of_three
from samescore.calibrate.metrics import Drift
from samescore.runtime.manifest import Precision

Outcome = Literal["PASS", "FAIL", "AMBIGUOUS"]
# More changed labels than this are a fault, however near the ties are.
NEAR_TIE_FLIPS = 0.01


@dataclass(frozen=True)
class Tolerance:
    """The largest drift that passes. flip_margin: a flipped label must have had at most this reference margin."""

    max_abs_dp: float
    p99_abs_dp: float
    mean_abs_dp: float | None
    agreement: float
    flip_margin: float | None

    @property
    def near_tie(self) -> float:
        """Texts whose two best labels are at most this far apart in the reference: both may move by p99 towards each other.

        0 where p99 is free: nothing says then what a near tie is.
        """
        return 2 * self.p99_abs_dp if self.p99_abs_dp < 1 else 0.0


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
    """PASS: every number inside its tolerance. FAIL: the `failures`. AMBIGUOUS: only labels of near ties changed, see `notes`.

    notes: what the numbers cannot show, whatever the outcome.
    """

    outcome: Outcome
    failures: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed; an ambiguous verdict has not."""
        return self.outcome != "FAIL"


def _limit(value: float) -> str:
    """One digit, or two where it has two."""
    short = f"{value:.0e}"
    return short if float(short) == value else f"{value:.1e}"


def judge(drift: Drift, tolerance: Tolerance) -> Verdict:
    """Compare a drift with a tolerance."""
    failures, notes = [], []
    if drift.not_finite:
        failures.append(f"{drift.not_finite} of {drift.texts} texts gave NaN or infinite logits")
    for name in ("max_abs_dp", "p99_abs_dp", "mean_abs_dp"):
        measured, allowed = getattr(drift, name), getattr(tolerance, name)
        # `not <=` so that a NaN fails.
        if allowed is not None and not measured <= allowed:
            failures.append(f"{name} {measured:.2e} > {_limit(allowed)}")
    flipped = len(drift.flips)
    outside = sum(flip.margin > tolerance.near_tie for flip in drift.flips)
    excused = flipped - outside <= NEAR_TIE_FLIPS * drift.texts or flipped - outside == 1
    if not 1 - outside / drift.texts >= tolerance.agreement or (drift.agreement < tolerance.agreement and not excused):
        failures.append(
            f"label agreement {drift.agreement:.4f} < {tolerance.agreement} ({flipped} of {drift.texts} flipped, "
            f"{flipped - outside} of them near ties)"
        )
    elif not drift.agreement >= tolerance.agreement:
        notes.append(
            f"label agreement {drift.agreement:.4f} < {tolerance.agreement}, but of {flipped} flipped texts only {outside} had a "
            f"reference margin above {tolerance.near_tie:.0e}: the others are near ties, which nothing but their noise decides"
        )
    if tolerance.flip_margin is not None:
        far = [flip for flip in drift.flips if flip.margin > tolerance.flip_margin]
        if far:
            worst = max(far, key=lambda flip: flip.margin)
            failures.append(f"text {worst.text} flipped with margin {worst.margin:.3f} > {tolerance.flip_margin}")
    outcome: Outcome = "FAIL" if failures else "AMBIGUOUS" if notes else "PASS"
    if not flipped and rule_of_three(drift.texts) > 1 - tolerance.agreement > 0:
        notes.append(
            f"no label changed, but {drift.texts} texts only bound the rate of changes by {rule_of_three(drift.texts):.2%} "
            f"(95 %); {math.ceil(3 / (1 - tolerance.agreement))} texts are needed for {1 - tolerance.agreement:.2%}"
        )
    return Verdict(outcome, tuple(failures), tuple(notes))
