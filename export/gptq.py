"""GPTQ: rounding weights one input channel after another, so that later channels make up for what earlier ones lost.

    H   = (I + U) D (I + U)^T                                U strictly upper triangular
    W'[k] = the step nearest to  W[k] + U[:k, k]^T (W - W')[:k]

It lowers `sum of (X W - X W')^2` over the inputs X of calibration texts, of which only the Gram matrix H = X^T X is needed
(Frantar et al. 2022). This form without an inverse is Chee et al. 2023 (QuIP), who show it to be the same (theorem 6).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from samescore.export.quantize import (
    BLOCK4,
    INT8_MAX,
    STEPS4,
    Blocks4,
    FloatArray,
    Int8Array,
    fit_blocks4,
    pack_blocks4,
    quantize_columns,
)
from samescore.runtime.errors import CheckpointError

# Added to the diagonal of H, as a share of its mean (Frantar et al.); more where float32 sums left H too far from definite.
DAMPING = (0.01, 0.1, 1.0)


# Channels that are brought up to date at once.
GROUP = 32


def gptq_blocks4(weight: FloatArray, gram: FloatArray) -> Blocks4:
    """The format of `quantize_blocks4` for a weight float32 [K, N] and inputs with the Gram matrix [K, K], of any scale.

    Scales and zero points are those of the nearest rounding, so that the order of the channels is free.
    """
    scales, zeros = fit_blocks4(weight)
    steps = np.empty(weight.shape, np.uint8)

    def nearest(channel: int, wanted: FloatArray) -> FloatArray:
        scale, zero = scales[channel // BLOCK4], zeros[channel // BLOCK4]
        step = np.clip(np.rint(wanted / scale) + zero, 0, STEPS4)
        steps[channel] = step
        value: FloatArray = (step - zero) * scale
        return value

    _round_in_turn(weight, gram, nearest)
    return pack_blocks4(steps, scales, zeros)


def gptq_columns(weight: FloatArray, gram: FloatArray) -> tuple[Int8Array, FloatArray]:
    """The format of `quantize_columns`, and its scales; arguments as `gptq_blocks4`."""
    steps, scale = quantize_columns(weight)

    def nearest(channel: int, wanted: FloatArray) -> FloatArray:
        step = np.clip(np.rint(wanted / scale), -INT8_MAX, INT8_MAX)
        steps[channel] = step
        value: FloatArray = step * scale
        return value

    _round_in_turn(weight, gram, nearest)
    return steps, scale


def _round_in_turn(weight: FloatArray, gram: FloatArray, nearest: Callable[[int, FloatArray], FloatArray]) -> None:
    """Round every channel (row) of a weight [K, N]: those with the most power first, while all others can still make up for
    them (the authors' `act_order`). nearest: takes a channel and its wanted weights [N], and returns what they become.
    """
    order = np.argsort(-np.diagonal(gram), kind="stable")
    factor = feedback(gram[np.ix_(order, order)])
    rows = weight[order]
    errors = np.zeros_like(rows)
    for start in range(0, len(rows), GROUP):
        group = slice(start, start + GROUP)
        wanted = rows[group] + factor[:start, group].T @ errors[:start]
        for k, target in enumerate(wanted, start):
            target += factor[start:k, k] @ errors[start:k]
            errors[k] = rows[k] - nearest(int(order[k]), target)


def feedback(gram: FloatArray) -> FloatArray:
    """U float32 [K, K] of the damped Gram matrix `(I + U) D (I + U)^T`.

    A channel that never carried anything has a zero row and column: it is rounded to the nearest, and damping makes any
    Gram matrix regular.
    """
    upper = _upper_factor(gram)
    result: FloatArray = upper.astype(np.float32)
    result /= np.diagonal(result).copy()
    np.einsum("ii->i", result)[:] = 0
    return result


def _upper_factor(gram: FloatArray) -> npt.NDArray[np.floating[Any]]:
    """R of the damped Gram matrix `R R^T`, upper triangular; CheckpointError for one that is none."""
    share = float(np.diagonal(gram).mean(dtype=np.float64)) or 1.0
    for damping in DAMPING if np.isfinite(share) else ():
        damped: npt.NDArray[np.float64] = gram.astype(np.float64)
        np.einsum("ii->i", damped)[:] += damping * share
        try:
            # Of the matrix read backwards, numpy's lower factor is the upper one.
            lower = np.linalg.cholesky(damped[::-1, ::-1])
        except np.linalg.LinAlgError:
            continue
        return lower[::-1, ::-1]
    raise CheckpointError(
        "activations on the calibration texts are too large or not finite: weights cannot be rounded by them"
    )
