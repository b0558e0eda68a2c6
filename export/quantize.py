"""int8 and int4 formats, as plain functions on arrays. All are symmetric; ranges are [-127, 127]."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
Int8Array = npt.NDArray[np.int8]


@dataclass(frozen=True)
class ChannelStatistics:
    """What a linear layer's input channels did on calibration texts; low, high and mean are float32 [K], over tokens.

    gram: float32 [K, K], of inputs X [tokens, K] the mean of XᵀX / tokens over the texts; None where nothing asked for it.
    """

    low: FloatArray
    high: FloatArray
    mean: FloatArray
    gram: FloatArray | None = None

    @property
    def spread(self) -> FloatArray:
        """The largest distance from the mean."""
        result: FloatArray = np.maximum(self.high - self.mean, self.mean - self.low)
        return result

    def uncentred(self) -> ChannelStatistics:
        """The same with mean 0, so that `spread` is the largest magnitude."""
        return replace(self, mean=np.zeros_like(self.mean))


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


BLOCKS8 = (128, 64, 32, 16)


def quantize_blocks8(weight: FloatArray) -> tuple[npt.NDArray[np.uint8], FloatArray]:
    """int8 blocks for MatMulNBits: uint8 [N, blocks, size] and scales float32 [N, blocks] of weight [K, N].

    Values are stored with zero point 128. A block holds the most inputs of BLOCKS8 that divide K; K is padded with zeros
    where none does.
    """
    inputs, outputs = weight.shape
    size = next((size for size in BLOCKS8 if inputs % size == 0), BLOCKS8[-1])
    blocks = -(-inputs // size)
    packed = np.empty((outputs, blocks, size), np.uint8)
    scales = np.empty((outputs, blocks), np.float32)
    step = max(1, (1 << 22) // max(1, inputs))
    for start in range(0, outputs, step):
        columns = weight[:, start : start + step].T
        rows = np.zeros((len(columns), blocks * size), np.float32)
        rows[:, :inputs] = columns
        grouped = rows.reshape(len(columns), blocks, size)
        scale = _scale_of(np.abs(grouped).max(axis=2))
        values = _round(np.divide(grouped, scale[..., None], dtype=np.float32))
        packed[start : start + step] = (values.astype(np.int16) + 128).astype(np.uint8)
        scales[start : start + step] = scale
    return packed, scales


BLOCK4 = 32
# Fractions of the range-preserving scale that are tried for each 4-bit block; clipping a lone outlier often pays.
BLOCK4_FRACTIONS = (1.0, 0.94, 0.88, 0.82, 0.76)


def quantize_blocks4(weight: FloatArray) -> tuple[npt.NDArray[np.uint8], FloatArray]:
    """4-bit blocks of 32 inputs for MatMulNBits: uint8 [N, K/32, 16] and scales float32 [N, K/32] of weight [K, N].

    Values are stored with zero point 8, low nibble first; K is padded with zeros. Of each block, the value farthest from
    zero maps to -8 (so that all 16 steps are used), and of a few smaller scales the one with the least squared error is
    taken.
    """
    inputs, outputs = weight.shape
    blocks = -(-inputs // BLOCK4)
    packed = np.empty((outputs, blocks, BLOCK4 // 2), np.uint8)
    scales = np.empty((outputs, blocks), np.float32)
    step = max(1, (1 << 22) // max(1, inputs))
    for start in range(0, outputs, step):
        columns = weight[:, start : start + step].T
        rows = np.zeros((len(columns), blocks * BLOCK4), np.float32)
        rows[:, :inputs] = columns
        values, scale = _fit_blocks4(rows.reshape(len(columns), blocks, BLOCK4))
        packed[start : start + step] = values[..., 0::2] | (values[..., 1::2] << 4)
        scales[start : start + step] = scale
    return packed, scales


def _fit_blocks4(blocks: FloatArray) -> tuple[npt.NDArray[np.uint8], FloatArray]:
    """Values uint8 (0..15, zero point 8) and the scale of each block [..., 32]."""
    farthest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1, keepdims=True), axis=-1)
    full = np.where(farthest == 0, np.float32(1), farthest / np.float32(-8))
    best_error = np.full(blocks.shape[:-1], np.inf, np.float32)
    best = np.zeros(blocks.shape, np.uint8)
    best_scale = np.ones(blocks.shape[:-1], np.float32)
    for fraction in BLOCK4_FRACTIONS:
        scale = full * np.float32(fraction)
        steps = np.clip(np.rint(blocks / scale), -8, 7)
        error = np.square(steps * scale - blocks).sum(axis=-1)
        better = error < best_error
        best_error[better] = error[better]
        best_scale[better] = scale[..., 0][better]
        best[better] = (steps[better] + 8).astype(np.uint8)
    return best, best_scale
