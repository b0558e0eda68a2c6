"""Building blocks that every architecture's graph uses: nodes, weights, linear layers, normalisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from samescore.export.quantize import (
    ChannelStatistics,
    Rescaling,
    quantize_columns,
    quantize_rows,
    smoothing_scales,
)
from samescore.export.recipes import TAPS, Recipe, tap_name
from samescore.export.weights import WeightFile

FloatArray = npt.NDArray[np.float32]
CONTRIB = "com.microsoft"

# uint8 activations: zero point 128 splits the range evenly for signed values.
SIGNED_ZERO_POINT = 128
# GELU is bounded below by -0.17, so most of a symmetric range would never be used: 32 steps below zero are enough.
GELU_ZERO_POINT = 32
GELU_MINIMUM = 0.17


class GraphBuilder:
    """Collects nodes and initializers of one graph; weights go to `weights` as they are added."""

    def __init__(self, weights: WeightFile, recipe: Recipe):
        self.weights = weights
        self.recipe = recipe
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[str | int]) -> ir.Value:
        """A graph input; strings in `shape` are dynamic axes."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[str | int]) -> None:
        """Make a value a graph output under that name."""
        result = self.op("Identity", value)
        result.name, result.type, result.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        self.outputs.append(result)

    def op(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """A node with one output."""
        return self.op_many(op_type, *inputs, outputs=1, domain=domain, **attributes)[0]

    def contrib(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """A com.microsoft node with one output."""
        return self.op(op_type, *inputs, domain=CONTRIB, **attributes)

    def op_many(
        self, op_type: str, *inputs: ir.Value | None, outputs: int, domain: str = "", **attributes: Any
    ) -> list[ir.Value]:
        """A node with several outputs."""
        number = len(self.nodes)
        node = ir.Node(
            domain,
            op_type,
            inputs,
            ir.convenience.convert_attributes(attributes),
            num_outputs=outputs,
            name=f"{op_type}_{number}",
        )
        for index, value in enumerate(node.outputs):
            value.name = f"{op_type}_{number}_{index}"
        self.nodes.append(node)
        return list(node.outputs)

    def constant(self, value: Any, dtype: npt.DTypeLike) -> ir.Value:
        """A small array stored inside the graph; equal ones are stored once."""
        array = np.asarray(value, dtype=dtype)
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = self._initializer(ir.Tensor(array, name=name), name)
        return self._constants[key]

    def ints(self, *values: int) -> ir.Value:
        """A 1-D int64 constant (axes, shapes, indices)."""
        return self.constant(list(values), np.int64)

    def weight(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        """An array stored in the external data file."""
        return self._initializer(self.weights.add(name, array), name)

    def float_weight(self, name: str, array: FloatArray) -> ir.Value:
        """An array stored in the recipe's float type."""
        return self.weight(name, array.astype(self.float_dtype))

    @property
    def float_dtype(self) -> np.dtype[Any]:
        """float16 in half-precision recipes, else float32."""
        return np.dtype(np.float16 if self.recipe.linear == "float16" else np.float32)

    def model(self, name: str) -> ir.Model:
        """The finished model."""
        opsets = {"": self.recipe.opset} | ({CONTRIB: 1} if self.recipe.contrib else {})
        graph = ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self.nodes,
            initializers=self.initializers,
            opset_imports=opsets,
            name=name,
        )
        return ir.Model(graph, ir_version=self.recipe.ir_version, producer_name="samescore")

    def _initializer(self, tensor: ir.ExternalTensor | ir.Tensor[Any], name: str) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        self.initializers.append(value)
        return value


def embedding(g: GraphBuilder, name: str, chunks: Callable[[], Any], shape: tuple[int, int], ids: ir.Value) -> ir.Value:
    """Rows of a table by ids, in the recipe's float type. `chunks()` yields the table as float32 blocks of rows."""
    if g.recipe.embedding != "int8-row":
        tensor = g.weights.add_chunks(name, chunks(), shape, g.float_dtype)
        return g.op("Gather", g._initializer(tensor, name), ids)
    scales: list[FloatArray] = []

    def quantized() -> Any:
        for chunk in chunks():
            rows, scale = quantize_rows(chunk)
            scales.append(scale)
            yield rows

    tensor = g.weights.add_chunks(name, quantized(), shape, np.int8)
    table = g._initializer(tensor, name)
    scale = g.weight(f"{name}.scale", np.concatenate(scales))
    rows = g.op("Cast", g.op("Gather", table, ids), to=ir.DataType.FLOAT.value)
    return g.op("Mul", rows, g.op("Gather", scale, ids))


def layer_norm(g: GraphBuilder, x: ir.Value, name: str, weight: FloatArray, bias: FloatArray, eps: float) -> ir.Value:
    """LayerNormalization over the last axis, computed in float32 whatever the recipe."""
    half = g.float_dtype == np.float16
    if half:
        x = g.op("Cast", x, to=ir.DataType.FLOAT.value)
    y = g.op(
        "LayerNormalization",
        x,
        g.weight(f"{name}.weight", weight),
        g.weight(f"{name}.bias", bias),
        axis=-1,
        epsilon=eps,
    )
    return g.op("Cast", y, to=ir.DataType.FLOAT16.value) if half else y


class Linears(Protocol):
    """How a graph multiplies by its weight matrices."""

    def rescaling(self, site: str, weight: FloatArray) -> Rescaling | None:
        """What the producer of this site's input may apply to its output channels in advance, or None."""

    def __call__(
        self,
        x: ir.Value,
        site: str,
        weight: FloatArray,
        bias: FloatArray,
        *,
        after_gelu: bool = False,
        rescaled: Rescaling | None = None,
    ) -> ir.Value:
        """`x [rows, K] @ weight [K, N] + bias [N]`.

        site: the linear layer's name. after_gelu: x is a GELU's output, so x >= -0.17. rescaled: what was already
        applied to x.
        """


class FloatLinears:
    """float32 or float16 MatMul. With `taps`, the graph also outputs statistics of each input's channels."""

    def __init__(self, g: GraphBuilder, *, taps: bool = False):
        self.g = g
        self.taps = taps

    def rescaling(self, site: str, weight: FloatArray) -> Rescaling | None:
        """None: floats have no outlier problem."""
        return None

    def __call__(
        self,
        x: ir.Value,
        site: str,
        weight: FloatArray,
        bias: FloatArray,
        *,
        after_gelu: bool = False,
        rescaled: Rescaling | None = None,
    ) -> ir.Value:
        """See Linears."""
        g = self.g
        if self.taps:
            for statistic, operator in TAPS.items():
                value = g.op(operator, x, g.ints(0), keepdims=0)
                g.output(value, tap_name(site, statistic), ir.DataType.FLOAT, [weight.shape[0]])
        y = g.op("MatMul", x, g.float_weight(f"{site}.weight", weight))
        return g.op("Add", y, g.float_weight(f"{site}.bias", bias))


class RowInt8Linears:
    """int8 weights per output channel, uint8 activations with one dynamic scale per row (token).

    A row's scale depends on that row alone, so a score depends neither on padding nor on neighbours. `statistics` (by
    site, from calibration texts) serve three corrections that leave the product as it is in exact arithmetic:

    - shift: channels lose their mean before they are quantized; `weight^T mean` goes to the bias, unquantized.
    - smoothing: outlier channels are divided by a scale that their weight rows are multiplied by.
    - after a GELU neither can pass through, but the rounding of the weights moves the output's mean by a known
      amount, which is taken off the bias.
    """

    def __init__(self, g: GraphBuilder, statistics: Mapping[str, ChannelStatistics] | None):
        self.g = g
        self.statistics = statistics

    def rescaling(self, site: str, weight: FloatArray) -> Rescaling | None:
        """Shift and smoothing for this site, or None without calibration."""
        alpha = self.g.recipe.smoothing
        if self.statistics is None or alpha is None:
            return None
        statistics = self.statistics[site]
        scale = smoothing_scales(statistics.spread, np.abs(weight).max(axis=1), alpha)
        return Rescaling(statistics.mean, scale)

    def __call__(
        self,
        x: ir.Value,
        site: str,
        weight: FloatArray,
        bias: FloatArray,
        *,
        after_gelu: bool = False,
        rescaled: Rescaling | None = None,
    ) -> ir.Value:
        """See Linears."""
        g = self.g
        if not after_gelu:
            rescaling = rescaled or self.rescaling(site, weight)
            if rescaling is not None:
                if rescaled is None:
                    centred = g.op("Sub", x, g.weight(f"{site}.shift", rescaling.shift))
                    x = g.op("Mul", centred, g.weight(f"{site}.smoothing", 1 / rescaling.scale))
                bias = bias + rescaling.shift @ weight
                weight = weight * rescaling.scale[:, None]
        values, column_scale = quantize_columns(weight)
        if after_gelu and self.statistics is not None:
            bias = bias + self.statistics[site].mean @ (weight - values * column_scale)
        y = self._multiply(x, site, values, column_scale, after_gelu=after_gelu)
        return g.op("Add", y, g.weight(f"{site}.bias", bias))

    def _multiply(
        self, x: ir.Value, site: str, values: npt.NDArray[np.int8], column_scale: FloatArray, *, after_gelu: bool
    ) -> ir.Value:
        """Quantize the rows of x and multiply; float32 [rows, N]."""
        g = self.g
        zero_point = GELU_ZERO_POINT if after_gelu else SIGNED_ZERO_POINT
        row_scale = self._row_scale(x, after_gelu=after_gelu)
        quantized = g.op(
            "QuantizeLinear", x, g.op("Squeeze", row_scale, g.ints(1)), self._zero_points(x, zero_point), axis=0
        )
        y = g.contrib(
            "MatMulIntegerToFloat",
            quantized,
            g.weight(f"{site}.weight", values),
            g.constant(1.0, np.float32),
            g.weight(f"{site}.weight.scale", column_scale),
            g.constant(zero_point, np.uint8),
        )
        return g.op("Mul", y, row_scale)

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

    def _zero_points(self, x: ir.Value, zero_point: int) -> ir.Value:
        """The zero point once per row, uint8 [rows]: QuantizeLinear wants it in the shape of the scale."""
        g = self.g
        rows = g.op("Shape", x, start=0, end=1)
        return g.op("Expand", g.constant([zero_point], np.uint8), rows)


def make_linears(
    g: GraphBuilder, *, statistics: Mapping[str, ChannelStatistics] | None = None, taps: bool = False
) -> Linears:
    """The recipe's way to multiply."""
    if g.recipe.linear == "int8-row":
        return RowInt8Linears(g, statistics)
    return FloatLinears(g, taps=taps)
