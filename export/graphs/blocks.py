"""Building blocks that every architecture's graph uses: nodes, weights, embedding, normalisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from samescore.export.quantize import quantize_rows
from samescore.export.recipes import Recipe
from samescore.export.weights import WeightFile

FloatArray = npt.NDArray[np.float32]
CONTRIB = "com.microsoft"


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
        self._named = 0

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[str | int]) -> ir.Value:
        """A graph input; strings in `shape` are dynamic axes."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[str | int]) -> None:
        """Make a value a graph output under that name."""
        self.result(self.op("Identity", value), name, dtype, shape)

    def result(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[str | int]) -> None:
        """Rename a value that is itself a graph output."""
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        self.outputs.append(value)

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
        number, self._named = self._named, self._named + 1
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

    def choose(self, condition: ir.Value, then: Callable[[], ir.Value], otherwise: Callable[[], ir.Value]) -> ir.Value:
        """The value that one of two branches computes; both read any value from before."""

        def branch(emit: Callable[[], ir.Value]) -> ir.Graph:
            outer, self.nodes = self.nodes, []
            value = emit()
            graph = ir.Graph((), [value], nodes=self.nodes, name=f"branch_{self._named}")
            self.nodes = outer
            return graph

        return self.op("If", condition, then_branch=branch(then), else_branch=branch(otherwise))

    def constant(self, value: Any, dtype: npt.DTypeLike) -> ir.Value:
        """A small array stored inside the graph; equal ones are stored once."""
        array = np.asarray(value, dtype=dtype)
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = self.initializer(ir.Tensor(array, name=name), name)
        return self._constants[key]

    def ints(self, *values: int) -> ir.Value:
        """A 1-D int64 constant (axes, shapes, indices)."""
        return self.constant(list(values), np.int64)

    def weight(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        """An array stored in the external data file."""
        return self.initializer(self.weights.add(name, array), name)

    def float_weight(self, name: str, array: FloatArray) -> ir.Value:
        """An array stored in the recipe's float type."""
        return self.weight(name, array.astype(self.float_dtype))

    @property
    def float_dtype(self) -> np.dtype[Any]:
        """float16 in half-precision recipes, else float32."""
        return np.dtype(np.float16 if self.recipe.half else np.float32)

    @property
    def half(self) -> bool:
        """Whether linear layers compute in float16."""
        return self.recipe.half

    def cast(self, x: ir.Value, dtype: npt.DTypeLike) -> ir.Value:
        """`x` as `dtype` in half-precision recipes; in float32 ones it is float32 already."""
        return self.op("Cast", x, to=ir.DataType.from_numpy(np.dtype(dtype)).value) if self.half else x

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

    def initializer(self, tensor: ir.ExternalTensor | ir.Tensor[Any], name: str) -> ir.Value:
        """A stored tensor as a value of the graph."""
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        self.initializers.append(value)
        return value


def embedding(g: GraphBuilder, name: str, chunks: Callable[[], Any], shape: tuple[int, int], ids: ir.Value) -> ir.Value:
    """Rows of a table by ids, float32. `chunks()` yields the table as float32 blocks of rows."""
    number_format = g.recipe.format_of(name, g.recipe.embedding)
    if number_format == "int8-row":
        return _int8_embedding(g, name, chunks, shape, ids)
    half = number_format != "float32"
    tensor = g.weights.add_chunks(name, chunks(), shape, np.float16 if half else np.float32)
    rows = g.op("Gather", g.initializer(tensor, name), ids)
    return g.op("Cast", rows, to=ir.DataType.FLOAT.value) if half else rows


def _int8_embedding(
    g: GraphBuilder, name: str, chunks: Callable[[], Any], shape: tuple[int, int], ids: ir.Value
) -> ir.Value:
    scales: list[FloatArray] = []

    def quantized() -> Any:
        for chunk in chunks():
            rows, scale = quantize_rows(chunk)
            scales.append(scale)
            yield rows

    tensor = g.weights.add_chunks(name, quantized(), shape, np.int8)
    table = g.initializer(tensor, name)
    scale = g.weight(f"{name}.scale", np.concatenate(scales))
    rows = g.op("Cast", g.op("Gather", table, ids), to=ir.DataType.FLOAT.value)
    return g.op("Mul", rows, g.op("Gather", scale, ids))


def layer_norm(g: GraphBuilder, x: ir.Value, name: str, weight: FloatArray, bias: FloatArray, eps: float) -> ir.Value:
    """LayerNormalization of float32 rows over the last axis, float32."""
    return g.op(
        "LayerNormalization",
        x,
        g.weight(f"{name}.weight", weight),
        g.weight(f"{name}.bias", bias),
        axis=-1,
        epsilon=eps,
    )


def rms_norm(g: GraphBuilder, x: ir.Value, weight: ir.Value, eps: float) -> ir.Value:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis of float32 rows, from standard operators."""
    # ONNX Runtime makes one SimplifiedLayerNormalization of it, which a file may not name; it looks for Pow.
    squares = g.op("Pow", x, g.constant(2.0, np.float32)) if g.recipe.contrib else g.op("Mul", x, x)
    mean = g.op("ReduceMean", squares, g.ints(-1), keepdims=1)
    root = g.op("Sqrt", g.op("Add", mean, g.constant(eps, np.float32)))
    return g.op("Mul", g.op("Div", x, root), weight)


def add_rms_norm(
    g: GraphBuilder, x: ir.Value, addend: ir.Value, weight: ir.Value, eps: float
) -> tuple[ir.Value, ir.Value]:
    """`rms_norm(x + addend)` and the sum itself, both float32."""
    if not g.recipe.contrib:
        total = g.op("Add", x, addend)
        return rms_norm(g, total, weight, eps), total
    outputs = g.op_many("SkipSimplifiedLayerNormalization", x, addend, weight, outputs=4, domain=CONTRIB, epsilon=eps)
    for unused in outputs[1:3]:
        unused.name = ""
    return outputs[0], outputs[3]
