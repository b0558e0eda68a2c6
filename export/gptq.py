"""GPTQ: rounding weights one input channel after another, so that later channels make up for what earlier ones lost.

    H   = (I + U) D (I + U)^T                                U strictly upper triangular
    w_k = W[k] + U[:k, k]^T (W - W')[:k],  W'[k] = the step nearest to w_k

It lowers `sum of (X W - X W')^2` over the inputs X of calibration texts, of which only the Gram matrix H = X^T X is needed
(Frantar et al. 2022). This form without an inverse is Chee et al. 2023 (QuIP), who show it to be the same (theorem 6).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from samescore.export.quantize import BLOCK4, STEPS4, Blocks4, FloatArray, fit_block4, pack_blocks4

# Added to the diagonal of H, as a share of its mean (Frantar et al.).
DAMPING = 0.01


def gptq_blocks4(weight: FloatArray, gram: FloatArray) -> Blocks4:
    """The format of `quantize_blocks4` for a weight float32 [K, N] and inputs with the Gram matrix [K, K], of any scale.

    A block's scales and zero points are fitted to what its weights are when its turn comes.
    """
    factor = feedback(gram)
    errors = np.zeros_like(weight)
    steps = np.empty(weight.shape, np.uint8)
    scales, zeros = np.empty((2, -(-len(weight) // BLOCK4), weight.shape[1]), np.float32)
    for block in range(len(scales)):
        start = block * BLOCK4
        here = slice(start, start + BLOCK4)
        wanted = weight[here] + factor[:start, here].T @ errors[:start]
        scales[block], zeros[block] = scale, zero = fit_block4(wanted)
        for row in range(len(wanted)):
            k = start + row
            target = wanted[row] + factor[start:k, k] @ errors[start:k]
            step = np.clip(np.rint(target / scale) + zero, 0, STEPS4)
            errors[k] = weight[k] - (step - zero) * scale
            steps[k] = step
    return pack_blocks4(steps, scales, zeros)


def feedback(gram: FloatArray) -> FloatArray:
    """U float32 [K, K] of the damped Gram matrix `(I + U) D (I + U)^T`.

    A channel that never carried anything has a zero row and column: it is rounded to the nearest, and damping makes any
    Gram matrix regular.
    """
    damped: npt.NDArray[np.float64] = gram.astype(np.float64)
    diagonal = np.einsum("ii->i", damped)
    diagonal += DAMPING * diagonal.mean() or 1.0
    # Of the matrix read backwards, numpy's lower factor is the upper one.
    upper = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    del damped
    result: FloatArray = upper.astype(np.float32)
    result /= np.diagonal(result).copy()
    np.einsum("ii->i", result)[:] = 0
    return result
