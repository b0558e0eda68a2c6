"""int8 formats, as plain functions on arrays. All are symmetric; ranges are [-127, 127]."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
Int8Array = npt.NDArray[np.int8]


@dataclass(frozen=True)
class ChannelStatistics:
    """What a linear layer's input channels did on calibration texts; each float32 [K], over tokens."""

    low: FloatArray
    high: FloatArray
    mean: FloatArray

    @property
    def spread(self) -> FloatArray:
        """The largest distance from the mean."""
        result: FloatArray = np.maximum(self.high - self.mean, self.mean - self.low)
        return result


@dataclass(frozen=True)
class Rescaling:
    """A linear layer's input as `(x - shift) / scale`, each [K]; the layer's weight and bias undo it."""

    shift: FloatArray
    scale: FloatArray


INT8_MAX = np.float32(127)


def quantize_columns(weight: FloatArray) -> tuple[Int8Array, FloatArray]:
    """int8 [K, N] and scales float32 [N] of a weight float32 [K, N]: one scale per output channel."""
    scale = _scale_of(np.abs(weight).max(axis=0))
    return _round(weight / scale), scale


def quantize_rows(table: FloatArray) -> tuple[Int8Array, FloatArray]:
    """int8 [V, H] and scales float32 [V, 1] of a table float32 [V, H]: one scale per row (embeddings)."""
    scale = _scale_of(np.abs(table).max(axis=1, keepdims=True))
    return _round(table / scale), scale


def smoothing_scales(activation_max: FloatArray, weight_max: FloatArray, alpha: float) -> FloatArray:
    """SmoothQuant's per-channel scales s [K] = max|x|^alpha / max|w|^(1 - alpha), with geometric mean 1.

    Activations are divided and weight rows multiplied by s, which moves the difficulty of outlier channels from
    activations to weights (Xiao et al. 2022, eq. 4). Channels never seen active keep s = 1.
    """
    x = np.asarray(activation_max, dtype=np.float64)
    w = np.maximum(np.asarray(weight_max, dtype=np.float64), 1e-8)
    alive = x > 1e-8
    s = np.ones_like(x)
    s[alive] = x[alive] ** alpha / w[alive] ** (1 - alpha)
    if alive.any():
        s[alive] /= np.exp(np.log(s[alive]).mean())
    return s.astype(np.float32)


def _scale_of(maximum: FloatArray) -> FloatArray:
    scale = maximum / INT8_MAX
    return np.where(scale > 0, scale, np.float32(1)).astype(np.float32)


def _round(values: FloatArray) -> Int8Array:
    return np.clip(np.rint(values), -INT8_MAX, INT8_MAX).astype(np.int8)
