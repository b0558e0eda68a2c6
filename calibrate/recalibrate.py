"""Fit a correction of a variant's logits on some texts, and judge it on others.

The fit minimizes the mean cross entropy H(t, q) of the corrected probabilities q: with the reference's probabilities as
targets t that is KL(t || q) up to a constant, with one-hot labels the negative log likelihood (Guo et al. 2017, "On
Calibration of Modern Neural Networks"). Logits are linear in scale and bias and H is convex in logits, so Newton's method
finds the one minimum; no chance is involved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from samescore.calibrate.intervals import Z95
from samescore.calibrate.metrics import expected_calibration_error
from samescore.runtime.errors import GateError, MissingDependencyError, UsageError
from samescore.runtime.manifest import Activation
from samescore.runtime.prediction import probabilities_of
from samescore.runtime.recalibration import (
    LIMIT,
    Curve,
    FitNumbers,
    FittedTo,
    Method,
    Recalibration,
    calibrated,
    is_binary,
)

FloatArray = npt.NDArray[np.float64]
Outcome = Literal["gain", "no gain", "worse"]

MIN_HELD_OUT = 30
# Pulls towards no correction where the texts do not decide (a bias that all labels share); far below any gain.
RIDGE = 1e-9
# Below this mean change of probabilities a correction is float noise.
SAME = 1e-6
# Isotonic probabilities of 0 and 1 have no log-odds.
EDGE = 1e-9


@dataclass(frozen=True)
class Evidence:
    """What is known of texts, in order: the variant's raw logits [texts, labels], the reference's, and the labels' indices."""

    logits: FloatArray
    reference: FloatArray | None
    classes: npt.NDArray[np.int64] | None

    def take(self, rows: npt.NDArray[np.bool_]) -> Evidence:
        """Some of the texts."""
        reference = None if self.reference is None else self.reference[rows]
        return Evidence(self.logits[rows], reference, None if self.classes is None else self.classes[rows])

    def targets(self, to: FittedTo, activation: Activation) -> FloatArray:
        """Probabilities [texts, labels] to fit to; a label counts as present and all others as absent."""
        if to == "reference":
            assert self.reference is not None
            return probabilities_of(self.reference, activation)
        assert self.classes is not None
        return np.eye(self.logits.shape[1])[self.classes]


@dataclass(frozen=True)
class Fit:
    """A fitted correction and what held-out texts say of it: `gain` is worth storing, `reason` says why others are not."""

    recalibration: Recalibration
    outcome: Outcome
    reason: str


def held_out_rows(digests: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Every third text in the order of the digests, which do not depend on the file's order. UsageError when too few.

    digests: SHA-256 of each text, all different.
    """
    rows = np.zeros(len(digests), dtype=bool)
    rows[np.argsort(np.array(digests, dtype=object))[2::3]] = True
    if rows.sum() < MIN_HELD_OUT:
        raise UsageError(
            f"{len(digests)} different texts leave {rows.sum()} to judge the fit by, and it takes {MIN_HELD_OUT}: hand in "
            f"{3 * MIN_HELD_OUT - len(digests)} more"
        )
    return rows


def fit(
    texts: Evidence,
    held_out: npt.NDArray[np.bool_],
    *,
    method: Method,
    to: FittedTo,
    activation: Activation,
    labels: Sequence[str],
    digest: str,
) -> Fit:
    """Fit on the texts that are not held out, and judge on those that are.

    held_out: [texts]. digest: recorded of the texts. Raises UsageError for a method that does not suit the model or labels
    that cannot be fitted to, GateError where no sensible correction exists, MissingDependencyError for scikit-learn.
    """
    check_method(method, len(labels), activation)
    if not np.isfinite(texts.logits).all():
        count = int((~np.isfinite(texts.logits).all(axis=1)).sum())
        raise GateError(
            f"{count} of {len(texts.logits)} texts gave NaN or infinite logits: nothing can be fitted to them"
        )
    training, judged = texts.take(~held_out), texts.take(held_out)
    targets = training.targets(to, activation)
    if to == "labels":
        _check_classes(training.classes, labels, activation)
    before = numbers_of(judged, None, activation)
    scale, bias, curves = _solve(method, training.logits, targets, activation, smooth=to == "labels")
    recalibration = Recalibration(
        method=method,
        fitted_to=to,
        scale=scale,
        bias=bias,
        curves=curves,
        texts_fitted=len(training.logits),
        texts_held_out=len(judged.logits),
        texts_sha256=digest,
        before=before,
        after=before,
    )
    recalibration = replace(recalibration, after=numbers_of(judged, recalibration, activation))
    return Fit(recalibration, *_outcome(recalibration, judged, activation))


def judged_pair(
    reference: npt.NDArray[Any], variant: npt.NDArray[Any], recalibration: Recalibration | None
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The logits [texts, labels] that a drift is measured between: the reference's, and what the variant's user gets.

    A correction fitted to labels is a choice about the model, which leaves the reference on purpose: the reference gets it
    too.
    """
    if recalibration is not None and recalibration.fitted_to == "labels":
        reference = calibrated(reference, recalibration)
    return reference, calibrated(variant, recalibration)


def check_method(method: Method, labels: int, activation: Activation) -> None:
    """UsageError when there is no such method, or it is for other models."""
    if method not in get_args(Method):
        raise UsageError(f"there is no method {method!r}; there are: {', '.join(get_args(Method))}")
    if method in ("platt", "isotonic") and not is_binary(labels, activation):
        raise UsageError(
            f"--method {method} is for two labels or sigmoid labels; this bundle has {labels} under a {activation}: use "
            "--method temperature or --method vector"
        )


def numbers_of(texts: Evidence, recalibration: Recalibration | None, activation: Activation) -> FitNumbers:
    """How near the corrected probabilities are to the reference's and to the labels, whichever is known."""
    logits = calibrated(texts.logits, recalibration)
    q = probabilities_of(logits, activation)
    kld = mean_dp = p99_dp = nll = ece = brier = None
    if texts.reference is not None:
        p = probabilities_of(texts.reference, activation)
        dp = np.abs(p - q).max(axis=1)
        gap = cross_entropy(logits, p, activation) - cross_entropy(texts.reference, p, activation)
        kld, mean_dp, p99_dp = max(0.0, float(gap.mean())), float(dp.mean()), float(np.quantile(dp, 0.99))
    if texts.classes is not None:
        target = np.eye(q.shape[1])[texts.classes]
        nll = float(cross_entropy(logits, target, activation).mean())
        ece = expected_calibration_error(q, q.argmax(axis=1) == texts.classes)
        brier = float(((q - target) ** 2).sum(axis=1).mean())
    return FitNumbers(kld, mean_dp, p99_dp, nll, ece, brier)


def cross_entropy(logits: FloatArray, targets: FloatArray, activation: Activation) -> FloatArray:
    """-sum t ln q of each text [texts], in nats; for sigmoids with (1 - t) ln (1 - q), summed over the labels."""
    if activation == "softmax":
        result: FloatArray = np.logaddexp.reduce(logits, axis=1) - (targets * logits).sum(axis=1)
    else:
        result = (np.logaddexp(0.0, logits) - targets * logits).sum(axis=1)
    return result


def _outcome(recalibration: Recalibration, judged: Evidence, activation: Activation) -> tuple[Outcome, str]:
    """What the held-out texts say, and in words why the correction is not worth storing."""
    corrected, to = calibrated(judged.logits, recalibration), recalibration.fitted_to
    change = np.abs(probabilities_of(corrected, activation) - probabilities_of(judged.logits, activation)).max(axis=1)
    if change.mean() < SAME:
        return "no gain", f"it changes probabilities by {change.mean():.1e} on average"
    targets = judged.targets(to, activation)
    gains = cross_entropy(judged.logits, targets, activation) - cross_entropy(corrected, targets, activation)
    gain, noise = float(gains.mean()), Z95 * float(gains.std(ddof=1)) / len(gains) ** 0.5
    name = "KLD" if to == "reference" else "NLL"
    if abs(gain) < noise:
        return (
            "no gain",
            f"{name} {'falls' if gain > 0 else 'rises'} by {abs(gain):.1e}, within its 95 % noise of ± {noise:.1e}",
        )
    if gain <= 0:
        return "worse", f"the held-out texts' {name} rises by {-gain:.1e}"
    before, after = recalibration.before, recalibration.after
    if to == "labels" and before.ece is not None and after.ece is not None and after.ece > before.ece:
        return "worse", f"the held-out texts' ECE rises by {after.ece - before.ece:.1e}"
    return "gain", ""


def _check_classes(classes: npt.NDArray[np.int64] | None, labels: Sequence[str], activation: Activation) -> None:
    """Every label must occur among the texts to fit on, and under sigmoids also be absent from some."""
    assert classes is not None
    counts = np.bincount(classes, minlength=len(labels))
    missing = [label for label, count in zip(labels, counts, strict=True) if count == 0]
    if missing:
        raise UsageError(f"no text to fit on has the label {', '.join(missing)}: hand in texts of every label")
    if activation == "sigmoid" and len(labels) == 1:
        raise UsageError("a model of one label cannot be fitted to labels: no text says that the label is absent")


def _solve(
    method: Method, logits: FloatArray, targets: FloatArray, activation: Activation, *, smooth: bool
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[Curve, ...]]:
    """Scale and bias per label, or curves."""
    count = logits.shape[1]
    if method in ("temperature", "vector"):
        scale, bias = _newton(logits, targets, activation, shared=method == "temperature")
    else:
        softmax = activation == "softmax"
        odds = logits[:, 1:] - logits[:, :1] if softmax else logits
        wanted = targets[:, 1:] if softmax else targets
        if method == "isotonic":
            return (), (), tuple(_isotonic(odds[:, k], wanted[:, k], smooth) for k in range(odds.shape[1]))
        pairs = [_platt(odds[:, k], wanted[:, k], smooth) for k in range(odds.shape[1])]
        if softmax:
            (slope, offset), pairs = pairs[0], []
            scale, bias = np.array([slope, slope]), np.array([-offset / 2, offset / 2])
        else:
            scale, bias = np.array([a for a, _ in pairs]), np.array([b for _, b in pairs])
    if not (scale > 1 / LIMIT).all() or not (scale <= LIMIT).all() or not (np.abs(bias) <= LIMIT).all():
        shown = ", ".join(f"{value:.3g}" for value in (scale if len(set(scale)) > 1 else scale[:1]))
        raise GateError(
            f"{method} finds no sensible correction over {len(logits)} texts and {count} labels: the scale goes to {shown}. "
            "Either the logits separate the texts perfectly (hand in more texts) or they say nothing about them"
        )
    return tuple(map(float, scale)), tuple(map(float, bias)), ()


def _newton(
    logits: FloatArray, targets: FloatArray, activation: Activation, *, shared: bool, steps: int = 200
) -> tuple[FloatArray, FloatArray]:
    """Scale and bias [labels] of least mean cross entropy by Newton's method with a backtracking line search.

    shared: one scale, no bias. The scale stays above 0.
    """
    count = logits.shape[1]
    # What the parameters are of the full (scale, bias) [2 * labels].
    basis = np.zeros((2 * count, 1)) if shared else np.eye(2 * count)
    if shared:
        basis[:count] = 1
    start = np.ones(1) if shared else np.concatenate([np.ones(count), np.zeros(count)])
    positive = slice(0, 1 if shared else count)

    def loss(theta: FloatArray) -> float:
        scale, bias = np.split(basis @ theta, 2)
        cost = cross_entropy(logits * scale + bias, targets, activation).mean()
        return float(cost + RIDGE / 2 * ((theta - start) ** 2).sum())

    theta, current = start, loss(start)
    for _ in range(steps):
        scale, bias = np.split(basis @ theta, 2)
        gradient, hessian = _derivatives(logits, logits * scale + bias, targets, activation)
        slope = basis.T @ gradient + RIDGE * (theta - start)
        step = -np.linalg.solve(basis.T @ hessian @ basis + RIDGE * np.eye(len(theta)), slope)
        decrement = -float(slope @ step)
        if decrement < 1e-16:
            break
        falling = step[positive] < 0
        room = theta[positive][falling] / -step[positive][falling]
        size = min(1.0, 0.9 * float(room.min(initial=np.inf)))
        while size > 1e-12 and not loss(theta + size * step) <= current - 1e-4 * size * decrement:
            size /= 2
        if size <= 1e-12:
            break  # no float64 decrease is left
        theta = theta + size * step
        current = loss(theta)
    scale, bias = np.split(basis @ theta, 2)
    return scale, bias


def _derivatives(
    logits: FloatArray, corrected: FloatArray, targets: FloatArray, activation: Activation
) -> tuple[FloatArray, FloatArray]:
    """Gradient [2 * labels] and Hessian of the mean cross entropy by scale and bias."""
    q = probabilities_of(corrected, activation)
    texts, count = q.shape
    inputs = np.stack([logits, np.ones_like(logits)])  # [2, texts, labels]
    gradient = np.einsum("ank,nk->ak", inputs, q - targets) / texts
    if activation == "sigmoid":
        weighted = np.einsum("ank,nk,cnk->ack", inputs, q * (1 - q), inputs)
        hessian = np.einsum("ack,kl->akcl", weighted, np.eye(count))
    else:
        # diag(q) - q q^T of each text.
        hessian = np.einsum("ack,kl->akcl", np.einsum("ank,nk,cnk->ack", inputs, q, inputs), np.eye(count))
        hessian = hessian - np.einsum("ank,cnl->akcl", inputs * q, inputs * q, optimize=True)
    return gradient.ravel(), hessian.reshape(2 * count, 2 * count) / texts


def _platt(odds: FloatArray, targets: FloatArray, smooth: bool) -> tuple[float, float]:
    """Slope and offset of the log-odds (Platt 1999). smooth: targets are labels, and become Platt's smoothed ones."""
    linear_model = _sklearn("linear_model", "platt")
    if smooth:
        present, absent = targets.sum(), (1 - targets).sum()
        targets = np.where(targets > 0.5, (present + 1) / (present + 2), 1 / (absent + 2))
    # Each text once as present and once as absent, weighed by its target.
    weights = np.concatenate([targets, 1 - targets])
    classes = np.concatenate([np.ones(len(odds)), np.zeros(len(odds))])
    model = linear_model.LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-8, max_iter=1000)
    model.fit(np.concatenate([odds, odds])[:, None], classes, sample_weight=weights)
    return float(model.coef_[0, 0]), float(model.intercept_[0])


def _isotonic(odds: FloatArray, targets: FloatArray, smooth: bool) -> Curve:
    """The increasing curve of least squared error in probability (Zadrozny and Elkan 2002), its values as log-odds.

    smooth: targets are labels; a share of 0 or 1 over N texts is kept 1 / (N + 2) away from certainty.
    """
    isotonic = _sklearn("isotonic", "isotonic")
    edge = 1 / (len(odds) + 2) if smooth else EDGE
    model = isotonic.IsotonicRegression(y_min=edge, y_max=1 - edge, out_of_bounds="clip").fit(odds, targets)
    x, p = np.asarray(model.X_thresholds_, np.float64), np.asarray(model.y_thresholds_, np.float64)
    if len(x) < 2:
        raise GateError(f"isotonic needs different logits; all {len(odds)} texts have the same")
    y = np.maximum.accumulate(np.log(p) - np.log1p(-p))
    return Curve(tuple(map(float, x)), tuple(map(float, y)))


def _sklearn(module: str, method: str) -> Any:
    """A module of scikit-learn, or MissingDependencyError naming the extra."""
    from importlib import import_module

    try:
        return import_module(f"sklearn.{module}")
    except ImportError as error:
        raise MissingDependencyError(
            f"--method {method} needs scikit-learn: pip install 'samescore[recalibrate]', or use --method temperature or "
            "--method vector, which need nothing"
        ) from error
