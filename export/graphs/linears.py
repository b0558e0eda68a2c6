"""How a graph multiplies by its weight matrices: one class per number format, one protocol for all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from samescore.export.gptq import gptq_blocks4
from samescore.export.graphs.blocks import FloatArray, GraphBuilder
from samescore.export.quantize import (
    ChannelStatistics,
    Rescaling,
    quantize_blocks4,
    quantize_blocks8,
    quantize_columns,
    smoothing_scales,
)
from samescore.export.recipes import INPUT, TAPS, tap_name

# AWQ's alpha: weights of channels with large activations are scaled up before they are rounded.
ALPHA_WEIGHTS = 0.4
# Where the operator rounds activations to int8 blocks too, part of their difficulty goes to the weights (SmoothQuant's alpha).
ALPHA_BLOCKS = 0.7


class GatedWeights(NamedTuple):
    """A SwiGLU feed-forward's matrices: gate and up [K, F], down [F, K]."""

    gate: FloatArray
    up: FloatArray
    down: FloatArray


class Linears(Protocol):
    """How a graph multiplies by its weight matrices."""

    def rescaling(
        self, site: str, weight: FloatArray, *, centred: bool = True, tied: tuple[int, int] | None = None
    ) -> Rescaling | None:
        """What the producer of this site's input may apply to its output channels in advance, or None.

        centred: whether the producer can subtract a shift too. tied: (repeats, size) when input channels come in groups
        of `repeats * size` whose channels with the same place in `size` must share one scale (grouped-query attention).
        """

    def __call__(
        self,
        x: ir.Value,
        site: str,
        weight: FloatArray,
        bias: FloatArray | None = None,
        *,
        name: str | None = None,
        after_gelu: bool = False,
        rescaled: Rescaling | None = None,
    ) -> ir.Value:
        """`x [rows, K] @ weight [K, N] (+ bias [N])`.

        site: whose input statistics apply. name: of the stored weight, where it is not the site's. after_gelu: x is a
        GELU's output, so x >= -0.17. rescaled: what was already applied to x.
        """

    def gated(self, x: ir.Value, prefix: str, weights: GatedWeights, rescaled: Rescaling | None) -> ir.Value:
        """SwiGLU: `(silu(x @ gate) * (x @ up)) @ down`; sites `<prefix>.gate_up` and `<prefix>.down_proj`."""


def silu(g: GraphBuilder, x: ir.Value) -> ir.Value:
    """`x * sigmoid(x)`; QuickGelu with alpha 1 is that in one pass."""
    if g.recipe.contrib:
        return g.contrib("QuickGelu", x, alpha=1.0)
    return g.op("Mul", x, g.op("Sigmoid", x))


class FloatLinears:
    """float32 or float16 MatMul. With `taps`, the graph also outputs statistics of each site's input channels.

    Where its recipe rounds by GPTQ, `taps` output the inputs themselves too.
    """

    def __init__(self, g: GraphBuilder, *, taps: bool = False):
        self.g = g
        self.taps = taps
        self._tapped: set[str] = set()

    def rescaling(
        self, site: str, weight: FloatArray, *, centred: bool = True, tied: tuple[int, int] | None = None
    ) -> Rescaling | None:
        """None: floats have no outlier problem."""
        return None

    def __call__(
        self,
        x: ir.Value,
        site: str,
        weight: FloatArray,
        bias: FloatArray | None = None,
        *,
        name: str | None = None,
        after_gelu: bool = False,
        rescaled: Rescaling | None = None,
    ) -> ir.Value:
        """See Linears."""
        if self.taps and site not in self._tapped:
            self._tap(x, site, weight.shape[0])
        name = name or site
        matrix = weight if rescaled is None else weight * rescaled.scale[:, None]
        y = self._multiply(x, name, matrix, self._gram(site, rescaled))
        return y if bias is None else self.g.op("Add", y, self.g.float_weight(f"{name}.bias", bias))

    def gated(self, x: ir.Value, prefix: str, weights: GatedWeights, rescaled: Rescaling | None) -> ir.Value:
        """See Linears."""
        g, site = self.g, f"{prefix}.down_proj"
        inner = self.rescaling(site, weights.down, centred=False)
        wide = weights.up if inner is None else weights.up / inner.scale
        gate = self(x, f"{prefix}.gate_up", weights.gate, name=f"{prefix}.gate_proj", rescaled=rescaled)
        up = self(x, f"{prefix}.gate_up", wide, name=f"{prefix}.up_proj", rescaled=rescaled)
        return self(g.op("Mul", silu(g, gate), up), site, weights.down, rescaled=inner)

    def _multiply(self, x: ir.Value, name: str, weight: FloatArray, gram: FloatArray | None) -> ir.Value:
        return self.g.op("MatMul", x, self.g.float_weight(f"{name}.weight", weight))

    def _gram(self, site: str, rescaled: Rescaling | None) -> FloatArray | None:
        """The Gram matrix [K, K] of what is multiplied, for formats that round by it."""
        return None

    def _tap(self, x: ir.Value, site: str, channels: int) -> None:
        self._tapped.add(site)
        for statistic, operator in TAPS.items():
            value = self.g.op(operator, x, self.g.ints(0), keepdims=0)
            self.g.output(value, tap_name(site, statistic), ir.DataType.FLOAT, [channels])
        if self.g.recipe.rounding == "gptq":
            self.g.output(x, tap_name(site, INPUT), ir.DataType.FLOAT, [f"{site}.rows", channels])


class WeightOnlyLinears(FloatLinears):
    """Rounded weights, exact activations.

    Where a graph can fold it, the weights of channels that carry large activations are scaled up before they are rounded,
    so that they lose less (Lin et al. 2023, AWQ).
    """

    def __init__(self, g: GraphBuilder, statistics: Mapping[str, ChannelStatistics] | None):
        super().__init__(g)
        self.statistics = statistics
        self.alpha = ALPHA_WEIGHTS

    def rescaling(
        self, site: str, weight: FloatArray, *, centred: bool = True, tied: tuple[int, int] | None = None
    ) -> Rescaling | None:
        """Scales alone; None where they could not be folded, or without calibration."""
        if centred or self.statistics is None or not self.g.recipe.smoothing:
            return None
        return smoothing(self.statistics[site].uncentred(), weight, self.alpha, tied)


class WeightOnlyInt8Linears(WeightOnlyLinears):
    """int8 weights per output channel, dequantized before a float16 (or float32) MatMul: standard operators only."""

    def _multiply(self, x: ir.Value, name: str, weight: FloatArray, gram: FloatArray | None) -> ir.Value:
        g = self.g
        values, scale = quantize_columns(weight)
        scales = g.float_weight(f"{name}.weight.scale", scale)
        dequantized = g.op("DequantizeLinear", g.weight(f"{name}.weight", values), scales, axis=1)
        return g.op("MatMul", x, dequantized)


class Blocks8Linears(WeightOnlyLinears):
    """8-bit weights in blocks of inputs (MatMulNBits); in float32 files the operator also rounds activations to int8 blocks."""

    def __init__(self, g: GraphBuilder, statistics: Mapping[str, ChannelStatistics] | None):
        super().__init__(g, statistics)
        self.alpha = ALPHA_WEIGHTS if g.half else ALPHA_BLOCKS

    def _multiply(self, x: ir.Value, name: str, weight: FloatArray, gram: FloatArray | None) -> ir.Value:
        return _matmul_nbits(self.g, x, name, weight, 8, *quantize_blocks8(weight, self.g.recipe.block), None)


class Blocks4Linears(WeightOnlyLinears):
    """4-bit weights in blocks of 32 inputs (MatMulNBits); activations are rounded to int8 blocks inside the operator.

    Weights are rounded by GPTQ where the recipe says so and the site's Gram matrix is known, else to the nearest.
    """

    def _multiply(self, x: ir.Value, name: str, weight: FloatArray, gram: FloatArray | None) -> ir.Value:
        blocks = quantize_blocks4(weight) if gram is None else gptq_blocks4(weight, gram)
        return _matmul_nbits(self.g, x, name, weight, 4, *blocks)

    def _gram(self, site: str, rescaled: Rescaling | None) -> FloatArray | None:
        if self.statistics is None or self.g.recipe.rounding == "nearest":
            return None
        return self.statistics[site].gram_of(rescaled)


def _matmul_nbits(
    g: GraphBuilder,
    x: ir.Value,
    name: str,
    weight: FloatArray,
    bits: int,
    packed: npt.NDArray[np.uint8],
    scales: FloatArray,
    zeros: npt.NDArray[np.uint8] | None,
) -> ir.Value:
    """`x @ weight`, where packed [N, blocks, bytes], scales [N, blocks] and zero points stand for the weight [K, N]."""
    return g.contrib(
        "MatMulNBits",
        x,
        g.weight(f"{name}.weight", packed),
        g.float_weight(f"{name}.weight.scale", scales),
        None if zeros is None else g.weight(f"{name}.weight.zero", zeros),
        K=weight.shape[0],
        N=weight.shape[1],
        bits=bits,
        block_size=packed.shape[2] * 8 // bits,
        # On a CPU 4 rounds activations to int8 blocks: without it the kernels unpack weights to float32, which is many times
        # slower. Files for GPUs, which do not round them, are only measured there, and should be measured as they are.
        accuracy_level=1 if g.half else 4,
    )


def smoothing(
    statistics: ChannelStatistics, weight: FloatArray, alpha: float, tied: tuple[int, int] | None
) -> Rescaling:
    """Shift and scales [K] of a site's input from its statistics and the weight [K, N]; tied: see `Linears.rescaling`."""
    spread, largest = statistics.spread, np.abs(weight).max(axis=1)
    if tied is not None:
        spread, largest = _largest_of_tied(spread, *tied), _largest_of_tied(largest, *tied)
    return Rescaling(statistics.mean, smoothing_scales(spread, largest, alpha))


def _largest_of_tied(values: FloatArray, repeats: int, size: int) -> FloatArray:
    """The largest of each tied set, at every one of its places; [groups * repeats * size]."""
    grouped = values.reshape(-1, repeats, size)
    result: FloatArray = np.broadcast_to(grouped.max(axis=1, keepdims=True), grouped.shape).reshape(-1)
    return result
