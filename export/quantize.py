"""int8 and int4 formats, as plain functions on arrays. int8 is symmetric with the range [-127, 127]; int4 has zero points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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

    def gram_of(self, rescaling: Rescaling | None) -> FloatArray | None:
        """The Gram matrix [K, K] of the rescaled inputs, where there is one."""
        if self.gram is None or rescaling is None:
            return self.gram
        gram, shift, scale = self.gram, rescaling.shift, rescaling.scale
        if shift.any():
            crossed = np.outer(shift, self.mean)
            gram = gram - crossed - crossed.T + np.outer(shift, shift)
        rescaled: FloatArray = gram / scale[:, None] / scale
        return rescaled

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


def quantize_blocks8(weight: FloatArray, largest: int = BLOCKS8[0]) -> tuple[npt.NDArray[np.uint8], FloatArray]:
    """int8 blocks for MatMulNBits: uint8 [N, blocks, size] and scales float32 [N, blocks] of weight [K, N].

    Values are stored with zero point 128. A block holds the most inputs of BLOCKS8 that divide K, `largest` at most; K is
    padded with zeros where none does.
    """
    inputs, outputs = weight.shape
    size = next((size for size in BLOCKS8 if size <= largest and inputs % size == 0), BLOCKS8[-1])
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
STEPS4 = 15


class Blocks4(NamedTuple):
    """A weight [K, N] in 4-bit blocks of 32 inputs, as MatMulNBits stores it: `(steps - zero) * scale`.

    packed: steps uint8 [N, K/32, 16], low nibble first; K is padded. scales: float32 [N, K/32]. zeros: uint8 [N, K/64],
    low nibble first, an odd number of blocks is padded.
    """

    packed: npt.NDArray[np.uint8]
    scales: FloatArray
    zeros: npt.NDArray[np.uint8]


def quantize_blocks4(weight: FloatArray) -> Blocks4:
    """4-bit blocks of a weight float32 [K, N], rounded to the nearest step."""
    scales, zeros = fit_blocks4(weight)
    steps = np.empty(weight.shape, np.uint8)
    for block, here in enumerate(_blocks4(weight)):
        steps[here] = _steps4(weight[here], scales[block], zeros[block])
    return pack_blocks4(steps, scales, zeros)


def pack_blocks4(steps: npt.NDArray[np.uint8], scales: FloatArray, zeros: FloatArray) -> Blocks4:
    """The stored form of steps uint8 [K, N] (0 to 15) with scales and zero points [K/32, N]."""
    blocks, outputs = scales.shape
    packed = _nibbles(_padded(steps.T, blocks * BLOCK4)).reshape(outputs, blocks, BLOCK4 // 2)
    return Blocks4(packed, np.ascontiguousarray(scales.T), _nibbles(_padded(zeros.T, blocks + blocks % 2)))


def fit_blocks4(weight: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Scales and zero points (0 to 15) of a weight's [K, N] blocks, float32 [K/32, N]: those with the least squared error.

    Tried are scales that map the value farthest from zero to -8 with the zero point 8, scales that map the smallest and the
    largest value (or zero) to both ends with the zero point between them, and fractions of both.
    """
    blocks = _blocks4(weight)
    scales, zeros = np.empty((2, len(blocks), weight.shape[1]), np.float32)
    for block, here in enumerate(blocks):
        rows = weight[here]
        low, high = np.minimum(rows.min(axis=0), 0), np.maximum(rows.max(axis=0), 0)
        symmetric = np.where(-low > high, low, high) / np.float32(-8)
        spread = (high - low) / np.float32(STEPS4)
        between = np.rint(np.divide(-low, spread, out=np.zeros_like(low), where=spread > 0))
        scales[block], zeros[block] = _best_of(rows, [(symmetric, np.full_like(low, 8)), (spread, between)])
    return scales, zeros


def _blocks4(weight: FloatArray) -> list[slice]:
    """The inputs of each block; the last may have fewer."""
    return [slice(start, start + BLOCK4) for start in range(0, len(weight), BLOCK4)]


def _best_of(rows: FloatArray, candidates: Sequence[tuple[FloatArray, FloatArray]]) -> tuple[FloatArray, FloatArray]:
    """The scale and zero point [N] of one block's rows [32, N]; candidates: full scales and their zero points."""
    best_error = np.full(rows.shape[1], np.inf, np.float32)
    best_scale, best_zero = np.ones((2, rows.shape[1]), np.float32)
    for full, zero in candidates:
        for fraction in BLOCK4_FRACTIONS:
            scale = np.where(full == 0, np.float32(1), full * np.float32(fraction))
            error = np.square((_steps4(rows, scale, zero) - zero) * scale - rows).sum(axis=0)
            better = error < best_error
            best_error[better], best_scale[better], best_zero[better] = error[better], scale[better], zero[better]
    return best_scale, best_zero


def _steps4(rows: FloatArray, scale: FloatArray, zero: FloatArray) -> FloatArray:
    steps: FloatArray = np.clip(np.rint(rows / scale) + zero, 0, STEPS4)
    return steps


def _padded(values: npt.NDArray[Any], size: int) -> npt.NDArray[np.uint8]:
    """uint8 [N, size] of values [N, K]. Inputs beyond K are zero, so that their weights do not matter."""
    padded = np.zeros((len(values), size), np.uint8)
    padded[:, : values.shape[1]] = values
    return padded


def _nibbles(values: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Two neighbours of the last axis in one byte, the first in its low half."""
    packed: npt.NDArray[np.uint8] = values[..., 0::2] | np.left_shift(values[..., 1::2], 4, dtype=np.uint8)
    return packed
