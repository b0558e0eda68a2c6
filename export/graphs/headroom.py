"""Room for large values in float16: powers of two that are folded into weights, and undone in float32 behind them.

float16 ends at 65504. Trained decoders put far larger numbers than usual into a few channels of a few tokens (Sun et al.:
Massive Activations in Large Language Models, 2024), and a product that goes beyond is infinite before float32 sees it. So
the columns of a matrix whose result could be too large are stored divided by a power of two. How large a result can be
follows from the weights alone: a row behind an RMS norm has length sqrt(channels) times the norm's weight, whatever the text.
"""

from __future__ import annotations

import math

import numpy as np

from samescore.export.graphs.blocks import FloatArray
from samescore.export.graphs.linears import GatedWeights

# What a float16 result may reach by the bound: a power of two below 65504.
LARGEST = 2.0**15
# A column's largest weight stays above this, so that its others and int8 scales (1/127 of it) keep float16's digits.
SMALLEST_PEAK = 2.0**-7


def reach_after_norm(norm: FloatArray, weight: FloatArray) -> FloatArray:
    """The largest |normed row @ weight| [N] for any text; norm [K] is the RMS norm's weight, weight [K, N].

    By Cauchy and Schwarz: a normed row before its weights has length sqrt(K) at most.
    """
    reach: FloatArray = math.sqrt(len(norm)) * np.linalg.norm(norm[:, None] * weight, axis=0)
    return reach


def divisors(weight: FloatArray, reach: FloatArray) -> FloatArray:
    """Powers of two [N] to divide the columns of a weight [K, N] by, where |input| can reach `reach` [K].

    1 where the result fits anyhow. The bound is loose by orders of magnitude, so that columns of small weights are divided
    by less than it asks for rather than lose digits.
    """
    wanted = reach @ np.abs(weight) / LARGEST
    allowed = np.abs(weight).max(axis=0) / SMALLEST_PEAK
    return np.minimum(_power_above(wanted), _power_below(allowed))


def gated_with_room(norm: FloatArray, weights: GatedWeights) -> tuple[GatedWeights, FloatArray]:
    """A SwiGLU feed-forward with room in `silu(gate) * up` and in the result, and what its result [K] is to be multiplied by.

    norm: the weight [K] of the RMS norm before it. |silu(a) b| <= |a b|, which for rows of length 1 is at most
    (|g| |u| + |g · u|) / 2.
    """
    gate, up = norm[:, None] * weights.gate, norm[:, None] * weights.up
    lengths = np.linalg.norm(gate, axis=0) * np.linalg.norm(up, axis=0)
    reach = len(norm) * (lengths + np.abs((gate * up).sum(axis=0))) / 2
    # One factor for all inner channels: one for each would spread the rows of `down`, which int8 columns share a scale for.
    allowed = np.median(np.abs(weights.up).max(axis=0)) / SMALLEST_PEAK
    shared = np.float32(np.minimum(_power_above(reach.max() / LARGEST), _power_below(allowed)))
    down = divisors(weights.down, reach / shared)
    return GatedWeights(weights.gate, weights.up / shared, weights.down / down), down * shared


def _power_above(x: FloatArray) -> FloatArray:
    """The smallest power of two, at least 1, that is not below x."""
    found: FloatArray = np.exp2(np.ceil(np.log2(np.maximum(x, 1)))).astype(np.float32)
    return found


def _power_below(x: FloatArray) -> FloatArray:
    """The largest power of two, at least 1, that is not above x."""
    found: FloatArray = np.exp2(np.floor(np.log2(np.maximum(x, 1)))).astype(np.float32)
    return found
