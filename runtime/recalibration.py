"""A small correction of a variant's logits, stored in the manifest: what it is, its checks, and applying it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Method = Literal["temperature", "vector", "platt", "isotonic"]
FittedTo = Literal["reference", "labels"]

# Larger scales and biases make steps of probabilities, which no text can justify.
LIMIT = 1e4
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FitNumbers:
    """A variant on held-out texts: means over texts, in nats for kld and nll.

    kld, mean_abs_dp, p99_abs_dp: against the reference, as in the certificate; None where it was not at hand. nll (negative
    log likelihood), ece, brier: against the texts' labels; None where they have none.
    """

    kld: float | None
    mean_abs_dp: float | None
    p99_abs_dp: float | None
    nll: float | None
    ece: float | None
    brier: float | None


@dataclass(frozen=True)
class Curve:
    """A piecewise linear map of log-odds: through the points (x, y), x strictly and y weakly increasing; slope 1 outside."""

    x: tuple[float, ...]
    y: tuple[float, ...]

    def __call__(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The map at float64 log-odds of any shape."""
        inside = np.clip(values, self.x[0], self.x[-1])
        result: npt.NDArray[np.float64] = np.interp(inside, self.x, self.y) + (values - inside)
        return result


@dataclass(frozen=True)
class Recalibration:
    """Calibrated logits = scale * logits + bias, per label; `isotonic` has curves in their place (scale and bias are empty).

    temperature: one scale (1 / T) for all labels and no bias (Guo et al. 2017). vector: one of each per label (likewise).
    platt: scale and bias of the log-odds (Platt 1999). isotonic: one curve of the log-odds for two labels under a softmax,
    one per label for sigmoids. fitted_to: the reference's probabilities, or the texts' labels. texts_sha256: over the
    sorted digests of all texts, fitted on and held out. before, after: the held-out texts without and with the correction.
    """

    method: Method
    fitted_to: FittedTo
    scale: tuple[float, ...]
    bias: tuple[float, ...]
    curves: tuple[Curve, ...]
    texts_fitted: int
    texts_held_out: int
    texts_sha256: str
    before: FitNumbers
    after: FitNumbers

    @property
    def summary(self) -> str:
        """For people: how it was fitted, and what it gained on held-out texts."""
        shape = {
            "temperature": f"temperature {1 / self.scale[0]:.4g}" if self.scale else "",
            "vector": f"vector scaling (scale {_list(self.scale)}; bias {_list(self.bias)})",
            "platt": f"Platt scaling (scale {_list(self.scale)}; bias {_list(self.bias)})",
            "isotonic": f"isotonic ({sum(len(curve.x) for curve in self.curves)} points)",
        }[self.method]
        name, before, after = (
            ("KLD", self.before.kld, self.after.kld)
            if self.fitted_to == "reference"
            else ("NLL", self.before.nll, self.after.nll)
        )
        return (
            f"{shape} to the {'reference' if self.fitted_to == 'reference' else 'labels'}, fitted on {self.texts_fitted} "
            f"texts; {name} of {self.texts_held_out} others {before or 0.0:.2e} → {after or 0.0:.2e}"
        )


def calibrated(logits: npt.NDArray[Any], recalibration: Recalibration | None) -> npt.NDArray[Any]:
    """Logits [..., labels] after the correction, float64; the very same array where there is none."""
    if recalibration is None:
        return logits
    wide = np.asarray(logits, dtype=np.float64)
    curves = recalibration.curves
    if not curves:
        scaled: npt.NDArray[np.float64] = wide * np.array(recalibration.scale) + np.array(recalibration.bias)
        return scaled
    if len(curves) == wide.shape[-1]:
        return np.stack([curve(wide[..., k]) for k, curve in enumerate(curves)], axis=-1)
    # Two labels under a softmax: only their difference matters; their mean stays.
    centre, half = wide.mean(axis=-1), curves[0](wide[..., 1] - wide[..., 0]) / 2
    return np.stack([centre - half, centre + half], axis=-1)


def is_binary(labels: int, activation: str) -> bool:
    """Whether every label's probability is a function of one log-odds: two labels under a softmax, or sigmoids."""
    return activation == "sigmoid" or labels == 2


def problem_of(recalibration: Recalibration, labels: int, activation: str) -> str | None:
    """What is wrong with a stored correction for a model of that many labels, or None."""
    if recalibration.texts_fitted < 1 or recalibration.texts_held_out < 1:
        return "texts_fitted and texts_held_out must be at least 1"
    if not _SHA256.fullmatch(recalibration.texts_sha256):
        return f"texts_sha256 {recalibration.texts_sha256[:70]!r} is no SHA-256"
    for numbers in (recalibration.before, recalibration.after):
        if not all(value is None or (math.isfinite(value) and value >= 0) for value in vars(numbers).values()):
            return "before and after must hold finite numbers that are not negative"
        if (numbers.kld if recalibration.fitted_to == "reference" else numbers.nll) is None:
            return f"before and after lack what a fit to the {recalibration.fitted_to} is judged by"
    if recalibration.method in ("platt", "isotonic") and not is_binary(labels, activation):
        return f"{recalibration.method} is for two labels or sigmoid labels, not for {labels} under a {activation}"
    if recalibration.method == "isotonic":
        return _curves_problem(recalibration, 1 if activation == "softmax" else labels)
    return _scaling_problem(recalibration, labels, activation)


def _scaling_problem(recalibration: Recalibration, labels: int, activation: str) -> str | None:
    scale, bias, method = recalibration.scale, recalibration.bias, recalibration.method
    if recalibration.curves:
        return f"{method} has no curves"
    if len(scale) != labels or len(bias) != labels:
        return f"{len(scale)} scales and {len(bias)} biases for {labels} labels"
    if not all(0 < value <= LIMIT for value in scale):
        return f"scales must be above 0 and at most {LIMIT:g}, got {list(scale)}"
    if not all(abs(value) <= LIMIT for value in bias):
        return f"biases must be finite and at most {LIMIT:g}, got {list(bias)}"
    shared = method == "temperature" or (method == "platt" and activation == "softmax")
    if shared and len(set(scale)) != 1:
        return f"{method} has one scale for all labels, got {list(scale)}"
    if method == "temperature" and any(bias):
        return f"temperature has no bias, got {list(bias)}"
    return None


def _curves_problem(recalibration: Recalibration, wanted: int) -> str | None:
    if recalibration.scale or recalibration.bias:
        return "isotonic has curves, and neither scale nor bias"
    if len(recalibration.curves) != wanted:
        return f"{len(recalibration.curves)} curves where {wanted} belong"
    for curve in recalibration.curves:
        if len(curve.x) != len(curve.y) or len(curve.x) < 2:
            return f"a curve has at least two points, got {len(curve.x)} x and {len(curve.y)} y"
        if not all(map(math.isfinite, (*curve.x, *curve.y))):
            return "a curve's points must be finite"
        if not all(a < b for a, b in zip(curve.x, curve.x[1:], strict=False)):
            return "a curve's x must increase"
        if not all(a <= b for a, b in zip(curve.y, curve.y[1:], strict=False)):
            return "a curve's y must not decrease"
    return None


def _list(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
