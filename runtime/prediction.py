"""What the runtime answers: logits and the probabilities computed from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from samescore.runtime.errors import UsageError
from samescore.runtime.manifest import Activation
from samescore.runtime.recalibration import Recalibration, calibrated


@dataclass(frozen=True)
class Prediction:
    """One scored text.

    label: the most probable label. probability: its probability. probabilities: by label, in the model's order.
    logits: the raw float32 outputs in the same order. tokens: the length the model read. truncated: whether the text
    was cut to the contract's limit. entropy: of the softmax probabilities, -sum p ln p in nats, from 0 (sure) to
    ln(labels); None where each label has a sigmoid of its own. expected_value: sum p * value over ordinal labels; None
    where labels have no values. calibrated_logits: what the probabilities come from where the variant has a
    recalibration, None where that is `logits`.
    """

    label: str
    probability: float
    probabilities: Mapping[str, float]
    logits: tuple[float, ...]
    tokens: int
    truncated: bool
    entropy: float | None = None
    expected_value: float | None = None
    calibrated_logits: tuple[float, ...] | None = None

    @property
    def margin(self) -> float:
        """The margin of a two-label model: the second label's logit minus the first's (log-odds of the second).

        It follows the recalibration as the probabilities do; the raw one is `logits[1] - logits[0]`.
        """
        if len(self.logits) != 2:
            raise UsageError(f"a margin is of two labels; this model has {len(self.logits)}: use log_odds(label)")
        first, second = self.calibrated_logits or self.logits
        return second - first

    def log_odds(self, label: str) -> float:
        """log(p / (1 - p)) of a label's softmax probability, from the (calibrated) logits: it does not saturate."""
        index = list(self.probabilities).index(label)
        logits = self.calibrated_logits or self.logits
        others = np.delete(np.asarray(logits, dtype=np.float64), index)
        return logits[index] - float(np.logaddexp.reduce(others))

    def to_record(self) -> dict[str, Any]:
        """The fields that go into an output line; `entropy` and `expected_value` where there are any."""
        optional = {"entropy": self.entropy, "expected_value": self.expected_value}
        return {
            "label": self.label,
            "probability": self.probability,
            "probabilities": dict(self.probabilities),
            "logits": list(self.logits),
            **{name: value for name, value in optional.items() if value is not None},
            "truncated": self.truncated,
        }


def probabilities_of(logits: npt.NDArray[Any], activation: Activation) -> npt.NDArray[np.float64]:
    """Softmax over the last axis, or the sigmoid of each logit, in float64; same shape as `logits` [..., labels]."""
    wide = np.asarray(logits, dtype=np.float64)
    if activation == "sigmoid":
        with np.errstate(invalid="ignore"):  # NaN stays NaN
            return np.exp(-np.logaddexp(0.0, -wide))
    shifted = np.exp(wide - wide.max(axis=-1, keepdims=True))
    result: npt.NDArray[np.float64] = shifted / shifted.sum(axis=-1, keepdims=True)
    return result


def entropy_of(probabilities: npt.NDArray[np.float64]) -> float:
    """-sum p ln p in nats of one distribution [labels]; 0 ln 0 is 0."""
    positive = probabilities[probabilities > 0]
    return max(0.0, -float((positive * np.log(positive)).sum()))


def predict(
    logits: npt.NDArray[np.float32],
    labels: Sequence[str],
    activation: Activation,
    *,
    tokens: int,
    truncated: bool,
    values: Sequence[float] | None = None,
    recalibration: Recalibration | None = None,
) -> Prediction:
    """The Prediction for one row of raw logits [labels]; values: of ordinal labels, in their order."""
    corrected = calibrated(logits, recalibration)
    row = probabilities_of(corrected, activation)
    best = int(row.argmax())
    return Prediction(
        label=labels[best],
        probability=float(row[best]),
        probabilities={label: float(p) for label, p in zip(labels, row, strict=True)},
        logits=tuple(float(x) for x in logits),
        tokens=tokens,
        truncated=truncated,
        entropy=entropy_of(row) if activation == "softmax" else None,
        expected_value=None if values is None else float(row @ np.asarray(values, dtype=np.float64)),
        calibrated_logits=None if recalibration is None else tuple(float(x) for x in corrected),
    )
