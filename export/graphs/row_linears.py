"""Linear layers whose activations are quantized by rows: one dynamic scale per token, int8 products."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from samescore.export.gptq import gptq_columns
from samescore.export.graphs.blocks import FloatArray, GraphBuilder
from samescore.export.graphs.linears import GatedWeights, silu, smoothing
from samescore.export.quantize import ChannelStatistics, Int8Array, Rescaling, quantize_columns

# uint8 activations: zero point 128 splits the range evenly for signed values.
SIGNED_ZERO_POINT = 128
# GELU is bounded below by -0.17, so most of a symmetric range would never be used: 32 steps below zero are enough.
GELU_ZERO_POINT = 32
GELU_MINIMUM = 0.17
# SmoothQuant's alpha for inputs that lose their mean first, and for those that do not.
ALPHA_CENTRED, ALPHA = 0.65, 0.7
# What a low digit's step is of a high digit's: the rest after rounding is half a step, the digits reach to 127.
DIGIT = np.float32(254)


class _QuantizedRows(NamedTuple):
    """uint8 [rows, K] and one float32 scale per row [rows, 1]; scales and zero points [rows] as QuantizeLinear wants them."""

    values: ir.Value
    scale: ir.Value
    flat: ir.Value
    zero_points: ir.Value


class _Digits(NamedTuple):
    """uint8: the high digits [rows, K], high and low digits [2 rows, K]; and the scale of each row [rows, 1]."""

    high: ir.Value
    both: ir.Value
    scale: ir.Value


class RowInt8Linears:
    """int8 weights per output channel, uint8 activations with one dynamic scale per row (token).

    A row's scale depends on that row alone, so a score depends neither on padding nor on neighbours. `statistics` (by
    site, from calibration texts) serve three corrections that leave the product as it is in exact arithmetic:

    - shift: channels lose their mean before they are quantized; `weight^T mean` goes to the bias, unquantized.
    - smoothing: outlier channels are divided by a scale that their weight rows are multiplied by.
    - after a GELU neither can pass through, but the rounding of the weights moves the output's mean by a known
      amount, which is taken off the bias.

    A gated feed-forward's inner channels are sorted by size and cut into `recipe.slices`, so that the few channels with
    massive activations have scales of their own.
    """

    def __init__(self, g: GraphBuilder, statistics: Mapping[str, ChannelStatistics] | None):
        self.g = g
        self.statistics = statistics
        self._quantized: dict[tuple[int, int], _QuantizedRows] = {}

    @property
    def by_gptq(self) -> bool:
        """Whether weights are rounded by GPTQ, where there are Gram matrices."""
        return self.g.recipe.rounding == "gptq" and self.g.recipe.rounded_rows

    def rescaling(
        self, site: str, weight: FloatArray, *, centred: bool = True, tied: tuple[int, int] | None = None
    ) -> Rescaling | None:
        """Shift and smoothing for this site, or None without calibration."""
        if self.statistics is None or not self.g.recipe.smoothing:
            return None
        statistics = self.statistics[site]
        if not centred:
            statistics = statistics.uncentred()
        return smoothing(statistics, weight, ALPHA_CENTRED if centred else ALPHA, tied)

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
        rescaling = None
        if not after_gelu:
            rescaling = rescaled or self.rescaling(site, weight)
            x, weight, bias = self._rescaled(x, site, weight, bias, rescaling, folded=rescaled is not None)
        values, column_scale = self._rounded(weight, site, rescaling)
        if after_gelu:
            bias = self._unbiased(bias, site, weight - values * column_scale)
        rows = self._quantize(x, after_gelu=after_gelu)
        zero_point = GELU_ZERO_POINT if after_gelu else SIGNED_ZERO_POINT
        y = g.op("Mul", self._multiply(rows.values, name, values, column_scale, zero_point), rows.scale)
        return y if bias is None else g.op("Add", y, g.weight(f"{name}.bias", bias))

    def gated(self, x: ir.Value, prefix: str, weights: GatedWeights, rescaled: Rescaling | None) -> ir.Value:
        """See Linears. In slices of the inner channels, largest activations first."""
        g = self.g
        (gate, up, down), inner = self._rescaled_gate(prefix, weights, rescaled)
        order, slices = np.arange(len(down)), g.recipe.slices
        if slices > 1 and inner is not None and self.statistics is not None:
            spread = self.statistics[f"{prefix}.down_proj"].uncentred().spread / inner.scale
            order = np.argsort(-spread, kind="stable")
        rows = self._quantize(x, after_gelu=False)
        total = None
        for number, chosen in enumerate(np.array_split(order, slices)):
            chosen = np.sort(chosen)
            names = [f"{prefix}.{part}.{number}" for part in ("gate_proj", "up_proj", "down_proj")]
            gate_rounded, up_rounded = (
                self._rounded(np.ascontiguousarray(matrix[:, chosen]), f"{prefix}.gate_up", rescaled)
                for matrix in (gate, up)
            )
            gate_rows = self._multiply(rows.values, names[0], *gate_rounded, SIGNED_ZERO_POINT)
            activated = silu(g, g.op("Mul", gate_rows, rows.scale))
            # The row's scale passes through `up` and the rounding: it is multiplied in once, behind `down`.
            up_rows = self._multiply(rows.values, names[1], *up_rounded, SIGNED_ZERO_POINT)
            hidden = self._quantize(g.op("Mul", activated, up_rows), after_gelu=False)
            rounded = self._rounded(down[chosen], f"{prefix}.down_proj", inner, chosen)
            y = self._multiply(hidden.values, names[2], *rounded, SIGNED_ZERO_POINT)
            y = g.op("Mul", y, g.op("Mul", hidden.scale, rows.scale))
            total = y if total is None else g.op("Add", total, y)
        assert total is not None
        return total

    def _rescaled(
        self,
        x: ir.Value,
        site: str,
        weight: FloatArray,
        bias: FloatArray | None,
        rescaling: Rescaling | None,
        *,
        folded: bool,
    ) -> tuple[ir.Value, FloatArray, FloatArray | None]:
        """The input shifted and smoothed, unless its producer did that (folded), and the weight and bias that undo it."""
        if rescaling is None:
            return x, weight, bias
        if not folded:
            g = self.g
            centred = g.op("Sub", x, g.weight(f"{site}.shift", rescaling.shift))
            x = g.op("Mul", centred, g.weight(f"{site}.smoothing", 1 / rescaling.scale))
        if rescaling.shift.any():
            bias = rescaling.shift @ weight + (0 if bias is None else bias)
        return x, weight * rescaling.scale[:, None], bias

    def _rescaled_gate(
        self, prefix: str, weights: GatedWeights, rescaled: Rescaling | None
    ) -> tuple[GatedWeights, Rescaling | None]:
        """Weights that undo what rescaled the input, with the inner channels smoothed, and how they were."""
        gate, up, down = weights
        if rescaled is not None:
            gate, up = gate * rescaled.scale[:, None], up * rescaled.scale[:, None]
        inner = self.rescaling(f"{prefix}.down_proj", down, centred=False)
        if inner is not None:
            up, down = up / inner.scale, down * inner.scale[:, None]
        return GatedWeights(gate, up, down), inner

    def _unbiased(self, bias: FloatArray | None, site: str, lost: FloatArray) -> FloatArray | None:
        """The bias without what the rounding of the weight (lost [K, N]) takes off the output's mean, where calibration tells."""
        if bias is None or self.statistics is None:
            return bias
        unbiased: FloatArray = bias + self.statistics[site].mean @ lost
        return unbiased

    def _rounded(
        self, weight: FloatArray, site: str, rescaling: Rescaling | None, channels: npt.NDArray[np.intp] | None = None
    ) -> tuple[Int8Array, FloatArray]:
        """int8 [K, N] and column scales [N] of a weight whose input was rescaled so. channels: which of the site's."""
        gram = None
        if self.statistics is not None and self.by_gptq:
            gram = self.statistics[site].gram_of(rescaling)
        if gram is None:
            return quantize_columns(weight)
        return gptq_columns(weight, gram if channels is None else gram[np.ix_(channels, channels)])

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
            flat = self._row_scale(x, after_gelu=after_gelu)
            scale = g.op("Unsqueeze", flat, g.ints(1))
            # QuantizeLinear wants the zero point in the shape of the scale.
            zero_points = g.op("Expand", g.constant([zero_point], np.uint8), g.op("Shape", x, start=0, end=1))
            values = g.op("QuantizeLinear", x, flat, zero_points, axis=0)
            self._quantized[key] = _QuantizedRows(values, scale, flat, zero_points)
        return self._quantized[key]

    def _row_scale(self, x: ir.Value, *, after_gelu: bool) -> ir.Value:
        """One scale per row, float32 [rows]."""
        g = self.g
        if after_gelu:
            top = g.op("ReduceMax", x, g.ints(1), keepdims=0)
            step = g.op("Mul", top, g.constant(1 / (255 - GELU_ZERO_POINT), np.float32))
            return g.op("Max", step, g.constant(GELU_MINIMUM / GELU_ZERO_POINT, np.float32))
        peak = g.op("ReduceMax", g.op("Abs", x), g.ints(1), keepdims=0)
        return g.op("Max", g.op("Mul", peak, g.constant(1 / 127, np.float32)), g.constant(1e-10, np.float32))


class RowDigitLinears(RowInt8Linears):
    """Activations in two int8 digits, `x = scale (q1 + q2 / 254)`, and weights in one or two: int8 products, 15-bit numbers.

    Both digits of the activations go through one product, one below the other, so that the weights are read once. The
    product of the two low digits is left out: it is below the rounding of either. GPTQ rounds int8 weights as they are:
    activations of two digits need no smoothing, which would make the weights harder to round.
    """

    def __init__(self, g: GraphBuilder, statistics: Mapping[str, ChannelStatistics] | None, *, wide_weights: bool):
        super().__init__(g, statistics)
        self.wide_weights = wide_weights
        self._digits: dict[int, _Digits] = {}

    def rescaling(
        self, site: str, weight: FloatArray, *, centred: bool = True, tied: tuple[int, int] | None = None
    ) -> Rescaling | None:
        """See RowInt8Linears."""
        if self.by_gptq and not self.wide_weights:
            return None
        return super().rescaling(site, weight, centred=centred, tied=tied)

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
        rescaling = None
        if not after_gelu:
            rescaling = rescaled or self.rescaling(site, weight)
            x, weight, bias = self._rescaled(x, site, weight, bias, rescaling, folded=rescaled is not None)
        values, scale = self._digits_of(weight, site, rescaling)
        if after_gelu and not self.wide_weights:
            bias = self._unbiased(bias, site, weight - values * scale)
        y = self._product(x, name or site, weight, values, scale)
        return y if bias is None else self.g.op("Add", y, self.g.weight(f"{name or site}.bias", bias))

    def gated(self, x: ir.Value, prefix: str, weights: GatedWeights, rescaled: Rescaling | None) -> ir.Value:
        """See Linears."""
        g = self.g
        (gate, up, down), inner = self._rescaled_gate(prefix, weights, rescaled)

        def product(x: ir.Value, part: str, site: str, weight: FloatArray, rescaling: Rescaling | None) -> ir.Value:
            return self._product(x, f"{prefix}.{part}", weight, *self._digits_of(weight, f"{prefix}.{site}", rescaling))

        activated = silu(g, product(x, "gate_proj", "gate_up", gate, rescaled))
        wide = g.op("Mul", activated, product(x, "up_proj", "gate_up", up, rescaled))
        return product(wide, "down_proj", "down_proj", down, inner)

    def _digits_of(self, weight: FloatArray, site: str, rescaling: Rescaling | None) -> tuple[Int8Array, FloatArray]:
        """The weight's high digits and column scales; where low digits follow, the nearest ones."""
        return quantize_columns(weight) if self.wide_weights else self._rounded(weight, site, rescaling)

    def _product(self, x: ir.Value, name: str, weight: FloatArray, values: Int8Array, scale: FloatArray) -> ir.Value:
        """`x [rows, K] @ weight [K, N]`; values, scale: the weight's high digits."""
        g, digits = self.g, self._split(x)
        both = self._multiply(digits.both, name, values, scale, SIGNED_ZERO_POINT)
        high, low = g.op_many("Split", both, outputs=2, axis=0, num_outputs=2)
        y = g.op("Add", high, g.op("Mul", low, g.constant(1 / DIGIT, np.float32)))
        if self.wide_weights:
            rest = np.rint((weight / scale - values) * DIGIT).astype(np.int8)
            y = g.op("Add", y, self._multiply(digits.high, f"{name}.low", rest, scale / DIGIT, SIGNED_ZERO_POINT))
        return g.op("Mul", y, digits.scale)

    def _split(self, x: ir.Value) -> _Digits:
        """Both digits of rows of x, once for all matrices that read them."""
        g = self.g
        if id(x) not in self._digits:
            rows = self._quantize(x, after_gelu=False)
            rest = g.op("Sub", x, g.op("DequantizeLinear", rows.values, rows.flat, rows.zero_points, axis=0))
            step = g.op("Mul", rows.flat, g.constant(1 / DIGIT, np.float32))
            low = g.op("QuantizeLinear", rest, step, rows.zero_points, axis=0)
            self._digits[id(x)] = _Digits(rows.values, g.op("Concat", rows.values, low, axis=0), rows.scale)
        return self._digits[id(x)]
