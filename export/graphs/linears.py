"""How a graph multiplies by its weight matrices: one class per number format, one protocol for all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from samescore.export.graphs.blocks import FloatArray, GraphBuilder
from samescore.export.quantize import (
    ChannelStatistics,
    Rescaling,
    quantize_blocks4,
    quantize_blocks8,
    quantize_columns,
    smoothing_scales,
)
from samescore.export.recipes import TAPS, Recipe, tap_name

# uint8 activations: zero point 128 splits the range evenly for signed values.
SIGNED_ZERO_POINT = 128
# GELU is bounded below by -0.17, so most of a symmetric range would never be used: 32 steps below zero are enough.
GELU_ZERO_POINT = 32
GELU_MINIMUM = 0.17
# SmoothQuant's alpha for inputs that lose their mean first, and for those that do not.
ALPHA_CENTRED, ALPHA = 0.65, 0.7
# The same where only weights are rounded.
ALPHA_WEIGHTS = 0.4
# A gated feed-forward is computed in this many slices of its inner channels, each with its own activation scales.
FFN_SLICES = 4


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
    """float32 or float16 MatMul. With `taps`, the graph also outputs statistics of each site's input channels."""

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
        y = self._multiply(x, name, weight if rescaled is None else weight * rescaled.scale[:, None])
        return y if bias is None else self.g.op("Add", y, self.g.float_weight(f"{name}.bias", bias))

    def gated(self, x: ir.Value, prefix: str, weights: GatedWeights, rescaled: Rescaling | None) -> ir.Value:
        """See Linears."""
        g, site = self.g, f"{prefix}.down_proj"
        inner = self.rescaling(site, weights.down, centred=False)
        wide = weights.up if inner is None else weights.up / inner.scale
        gate = self(x, f"{prefix}.gate_up", weights.gate, name=f"{prefix}.gate_proj", rescaled=rescaled)
        up = self(x, f"{prefix}.gate_up", wide, name=f"{prefix}.up_proj", rescaled=rescaled)
        return self(g.op("Mul", silu(g, gate), up), site, weights.down, rescaled=inner)

    def _multiply(self, x: ir.Value, name: str, weight: FloatArray) -> ir.Value:
        return self.g.op("MatMul", x, self.g.float_weight(f"{name}.weight", weight))

    def _tap(self, x: ir.Value, site: str, channels: int) -> None:
        self._tapped.add(site)
        for statistic, operator in TAPS.items():
            value = self.g.op(operator, x, self.g.ints(0), keepdims=0)
            self.g.output(value, tap_name(site, statistic), ir.DataType.FLOAT, [channels])


class WeightOnlyLinears(FloatLinears):
    """Rounded weights, exact activations.

    Where a graph can fold it, the weights of channels that carry large activations are scaled up before they are rounded,
    so that they lose less (Lin et al. 2023, AWQ).
    """

    def __init__(self, g: GraphBuilder, statistics: Mapping[str, ChannelStatistics] | None):
        super().__init__(g)
        self.statistics = statistics

    def rescaling(
        self, site: str, weight: FloatArray, *, centred: bool = True, tied: tuple[int, int] | None = None
    ) -> Rescaling | None:
        """Scales alone; None where they could not be folded, or without calibration."""
        if centred or self.statistics is None or not self.g.recipe.smoothing:
            return None
        return _smoothing(self.statistics[site].uncentred(), weight, ALPHA_WEIGHTS, tied)


class WeightOnlyInt8Linears(WeightOnlyLinears):
    """int8 weights per output channel, dequantized before a float16 (or float32) MatMul: standard operators only."""

    def _multiply(self, x: ir.Value, name: str, weight: FloatArray) -> ir.Value:
        g = self.g
        values, scale = quantize_columns(weight)
        scales = g.float_weight(f"{name}.weight.scale", scale)
        dequantized = g.op("DequantizeLinear", g.weight(f"{name}.weight", values), scales, axis=1)
        return g.op("MatMul", x, dequantized)


class Blocks8Linears(WeightOnlyLinears):
    """8-bit weights in blocks of inputs (MatMulNBits); on a CPU the operator also rounds activations to int8 blocks."""

    def _multiply(self, x: ir.Value, name: str, weight: FloatArray) -> ir.Value:
        return _matmul_nbits(self.g, x, name, weight, 8, *quantize_blocks8(weight))


class Blocks4Linears(WeightOnlyLinears):
    """4-bit weights in blocks of 32 inputs (MatMulNBits); activations are rounded to int8 blocks inside the operator."""

    def _multiply(self, x: ir.Value, name: str, weight: FloatArray) -> ir.Value:
        return _matmul_nbits(self.g, x, name, weight, 4, *quantize_blocks4(weight))


def _matmul_nbits(
    g: GraphBuilder,
    x: ir.Value,
    name: str,
    weight: FloatArray,
    bits: int,
    packed: npt.NDArray[np.uint8],
    scales: FloatArray,
) -> ir.Value:
    """`x @ weight`, where packed [N, blocks, bytes] and scales [N, blocks] stand for the weight [K, N]."""
    return g.contrib(
        "MatMulNBits",
        x,
        g.weight(f"{name}.weight", packed),
        g.float_weight(f"{name}.weight.scale", scales),
        K=weight.shape[0],
        N=weight.shape[1],
        bits=bits,
        block_size=packed.shape[2] * 8 // bits,
        # Activations as int8: without it the CPU kernels unpack weights to float32, which is many times slower.
        accuracy_level=4,
    )


class _QuantizedRows(NamedTuple):
    """uint8 [rows, K] and one float32 scale per row [rows, 1]."""

    values: ir.Value
    scale: ir.Value


class RowInt8Linears:
    """int8 weights per output channel, uint8 activations with one dynamic scale per row (token).

    A row's scale depends on that row alone, so a score depends neither on padding nor on neighbours. `statistics` (by
    site, from calibration texts) serve three corrections that leave the product as it is in exact arithmetic:

    - shift: channels lose their mean before they are quantized; `weight^T mean` goes to the bias, unquantized.
    - smoothing: outlier channels are divided by a scale that their weight rows are multiplied by.
    - after a GELU neither can pass through, but the rounding of the weights moves the output's mean by a known
      amount, which is taken off the bias.

    A gated feed-forward's inner channels are sorted by size and sliced, so that the few channels with massive
    activations have scales of their own.
    """

    def __init__(self, g: GraphBuilder, statistics: Mapping[str, ChannelStatistics] | None):
        self.g = g
        self.statistics = statistics
        self._quantized: dict[tuple[int, int], _QuantizedRows] = {}

    def rescaling(
        self, site: str, weight: FloatArray, *, centred: bool = True, tied: tuple[int, int] | None = None
    ) -> Rescaling | None:
        """Shift and smoothing for this site, or None without calibration."""
        if self.statistics is None or not self.g.recipe.smoothing:
            return None
        statistics = self.statistics[site]
        if not centred:
            statistics = statistics.uncentred()
        return _smoothing(statistics, weight, ALPHA_CENTRED if centred else ALPHA, tied)

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
        g, name = self.g, name or site
        if not after_gelu:
            rescaling = rescaled or self.rescaling(site, weight)
            if rescaling is not None:
                if rescaled is None:
                    centred = g.op("Sub", x, g.weight(f"{site}.shift", rescaling.shift))
                    x = g.op("Mul", centred, g.weight(f"{site}.smoothing", 1 / rescaling.scale))
                if rescaling.shift.any():
                    bias = rescaling.shift @ weight + (0 if bias is None else bias)
                weight = weight * rescaling.scale[:, None]
        values, column_scale = quantize_columns(weight)
        if after_gelu and bias is not None and self.statistics is not None:
            bias = bias + self.statistics[site].mean @ (weight - values * column_scale)
        rows = self._quantize(x, after_gelu=after_gelu)
        zero_point = GELU_ZERO_POINT if after_gelu else SIGNED_ZERO_POINT
        y = g.op("Mul", self._multiply(rows.values, name, values, column_scale, zero_point), rows.scale)
        return y if bias is None else g.op("Add", y, g.weight(f"{name}.bias", bias))

    def gated(self, x: ir.Value, prefix: str, weights: GatedWeights, rescaled: Rescaling | None) -> ir.Value:
        """See Linears. In slices of the inner channels, largest activations first."""
        g, (gate, up, down) = self.g, weights
        if rescaled is not None:
            gate, up = gate * rescaled.scale[:, None], up * rescaled.scale[:, None]
        inner = self.rescaling(f"{prefix}.down_proj", down, centred=False)
        order = np.arange(len(down))
        if inner is not None and self.statistics is not None:
            up, down = up / inner.scale, down * inner.scale[:, None]
            spread = self.statistics[f"{prefix}.down_proj"].uncentred().spread / inner.scale
            order = np.argsort(-spread, kind="stable")
        rows = self._quantize(x, after_gelu=False)
        total = None
        for number, chosen in enumerate(np.array_split(order, FFN_SLICES)):
            chosen = np.sort(chosen)
            names = [f"{prefix}.{part}.{number}" for part in ("gate_proj", "up_proj", "down_proj")]
            activated = silu(
                g, g.op("Mul", self._raw(rows, names[0], np.ascontiguousarray(gate[:, chosen])), rows.scale)
            )
            # The row's scale passes through `up` and the rounding: it is multiplied in once, behind `down`.
            product = g.op("Mul", activated, self._raw(rows, names[1], np.ascontiguousarray(up[:, chosen])))
            hidden = self._quantize(product, after_gelu=False)
            y = g.op("Mul", self._raw(hidden, names[2], down[chosen]), g.op("Mul", hidden.scale, rows.scale))
            total = y if total is None else g.op("Add", total, y)
        assert total is not None
        return total

    def _raw(self, rows: _QuantizedRows, name: str, weight: FloatArray) -> ir.Value:
        """The product without the rows' scales."""
        return self._multiply(rows.values, name, *quantize_columns(weight), SIGNED_ZERO_POINT)

    def _multiply(
        self,
        rows: ir.Value,
        name: str,
        values: npt.NDArray[np.int8],
        column_scale: FloatArray,
        zero_point: int,
    ) -> ir.Value:
        g = self.g
        return g.contrib(
            "MatMulIntegerToFloat",
            rows,
            g.weight(f"{name}.weight", values),
            g.constant(1.0, np.float32),
            g.weight(f"{name}.weight.scale", column_scale),
            g.constant(zero_point, np.uint8),
        )

    def _quantize(self, x: ir.Value, *, after_gelu: bool) -> _QuantizedRows:
        """Rows of x as uint8, once for all matrices that read them."""
        g = self.g
        zero_point = GELU_ZERO_POINT if after_gelu else SIGNED_ZERO_POINT
        key = (id(x), zero_point)
        if key not in self._quantized:
            scale = self._row_scale(x, after_gelu=after_gelu)
            flat = g.op("Squeeze", scale, g.ints(1))
            # QuantizeLinear wants the zero point in the shape of the scale.
            zero_points = g.op("Expand", g.constant([zero_point], np.uint8), g.op("Shape", x, start=0, end=1))
            self._quantized[key] = _QuantizedRows(g.op("QuantizeLinear", x, flat, zero_points, axis=0), scale)
        return self._quantized[key]

    def _row_scale(self, x: ir.Value, *, after_gelu: bool) -> ir.Value:
        """One scale per row, float32 [rows, 1]."""
        g = self.g
        top = g.op("ReduceMax", x, g.ints(1), keepdims=1)
        if after_gelu:
            step = g.op("Mul", top, g.constant(1 / (255 - GELU_ZERO_POINT), np.float32))
            return g.op("Max", step, g.constant(GELU_MINIMUM / GELU_ZERO_POINT, np.float32))
        bottom = g.op("Neg", g.op("ReduceMin", x, g.ints(1), keepdims=1))
        peak = g.op("Max", top, bottom, g.constant(1e-8, np.float32))
        return g.op("Mul", peak, g.constant(1 / 127, np.float32))


def _smoothing(
    statistics: ChannelStatistics, weight: FloatArray, alpha: float, tied: tuple[int, int] | None
) -> Rescaling:
    spread, largest = statistics.spread, np.abs(weight).max(axis=1)
    if tied is not None:
        spread, largest = _largest_of_tied(spread, *tied), _largest_of_tied(largest, *tied)
    return Rescaling(statistics.mean, smoothing_scales(spread, largest, alpha))


def _largest_of_tied(values: FloatArray, repeats: int, size: int) -> FloatArray:
    """The largest of each tied set, at every one of its places; [groups * repeats * size]."""
    grouped = values.reshape(-1, repeats, size)
    result: FloatArray = np.broadcast_to(grouped.max(axis=1, keepdims=True), grouped.shape).reshape(-1)
    return result


class MixedLinears:
    """Quantized matrices, and float ones in the parts that the recipe keeps exact."""

    def __init__(self, recipe: Recipe, quantized: Linears, exact: Linears):
        self.recipe = recipe
        self.quantized = quantized
        self.exact = exact

    def rescaling(
        self, site: str, weight: FloatArray, *, centred: bool = True, tied: tuple[int, int] | None = None
    ) -> Rescaling | None:
        """See Linears."""
        return self._of(site).rescaling(site, weight, centred=centred, tied=tied)

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
        return self._of(site)(x, site, weight, bias, name=name, after_gelu=after_gelu, rescaled=rescaled)

    def gated(self, x: ir.Value, prefix: str, weights: GatedWeights, rescaled: Rescaling | None) -> ir.Value:
        """See Linears."""
        return self._of(prefix).gated(x, prefix, weights, rescaled)

    def _of(self, site: str) -> Linears:
        return self.exact if self.recipe.keeps(site) else self.quantized


def make_linears(
    g: GraphBuilder, *, statistics: Mapping[str, ChannelStatistics] | None = None, taps: bool = False
) -> Linears:
    """The recipe's way to multiply."""
    linears = _linears(g, statistics, taps)
    return MixedLinears(g.recipe, linears, FloatLinears(g)) if g.recipe.exact else linears


def _linears(g: GraphBuilder, statistics: Mapping[str, ChannelStatistics] | None, taps: bool) -> Linears:
    match g.recipe.linear:
        case "int8-row":
            return RowInt8Linears(g, statistics)
        case "int8-weights":
            return WeightOnlyInt8Linears(g, statistics)
        case "int8-blocks":
            return Blocks8Linears(g, statistics)
        case "int4-blocks":
            return Blocks4Linears(g, statistics)
        case _:
            return FloatLinears(g, taps=taps)
