"""What MIGraphX's parser and ONNX Runtime's provider for it would refuse in a graph, from their sources and wheel.

`migraphx_operators.json` names the versions. The provider's own answer (test_placement.py) does not see the parser, which
throws only when a program is compiled, on the box with the GPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import TensorProto

FACTS = json.loads(Path(__file__).with_name("migraphx_operators.json").read_text())
MAX_OPSET, MAX_IR = 21, 10
CONTROL_FLOW = {"If", "Loop", "Scan"}
# Same names as com.microsoft operators; the parser looks at no domain and reads the inputs in their order.
MISREAD = {"Attention", "RotaryEmbedding"}
FLOATS = ("FLOAT16", "BFLOAT16", "FLOAT", "DOUBLE")
INTEGERS = tuple(f"{sign}INT{bits}" for sign in ("", "U") for bits in (4, 8, 16, 32, 64))
TYPES = {getattr(TensorProto, name) for name in (*FLOATS, *INTEGERS, "BOOL")}


def complaints(model: onnx.ModelProto) -> list[str]:
    """Every reason why a node, or the file, would not run on MIGraphX; none for a graph that it takes."""
    found = []
    for opset in model.opset_import:
        if opset.domain:
            found.append(f"operators of {opset.domain}")
        elif opset.version > MAX_OPSET:
            found.append(f"opset {opset.version} > {MAX_OPSET}")
    if model.ir_version > MAX_IR:
        found.append(f"IR {model.ir_version} > {MAX_IR}")
    graph = Graph(model)
    for tensor in model.graph.initializer:
        if tensor.data_type not in TYPES:
            found.append(f"{tensor.name}: type {TensorProto.DataType.Name(tensor.data_type)}")
    for node in model.graph.node:
        found += [f"{node.name or node.op_type}: {said}" for said in graph.of_node(node)]
    return found


class Graph:
    """A model's nodes, by what they make."""

    def __init__(self, model: onnx.ModelProto):
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.makers = {name: node for node in model.graph.node for name in node.output}

    def of_node(self, node: onnx.NodeProto) -> Iterator[str]:
        """What is wrong with one node."""
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        operator = node.op_type
        for part in ("parser", "provider"):
            if operator not in FACTS[part]:
                yield f"{operator} is unknown to the {part}"
        if operator in CONTROL_FLOW:
            yield "control flow"
        if operator in MISREAD and not node.domain:
            yield f"{operator} is read as com.microsoft's"
        for number in FACTS["constant_inputs"].get(operator, ()):
            if number < len(node.input) and node.input[number] and not self.is_shape(node.input[number]):
                yield f"input {number} of {operator} depends on data"
        yield from self.of_attributes(node, attributes)

    def of_attributes(self, node: onnx.NodeProto, attributes: dict[str, object]) -> Iterator[str]:
        """Attributes and constants that the parser throws for, or reads otherwise."""
        operator = node.op_type
        constant = {number: name in self.initializers for number, name in enumerate(node.input)}
        if operator == "MatMulNBits" and attributes["bits"] != 4:
            yield f"MatMulNBits of {attributes['bits']} bits, not 4"
        if operator == "SimplifiedLayerNormalization":
            yield "its mean of squares is rounded to the type of its input"
        if operator == "Cast" and attributes["to"] not in TYPES:
            yield f"a cast to {TensorProto.DataType.Name(attributes['to'])}"
        if operator == "Pad" and attributes.get("mode", b"constant") not in (b"constant", b"reflect"):
            yield f"Pad of mode {attributes['mode']!r}"
        if operator in ("ArgMax", "ArgMin") and attributes.get("select_last_index"):
            yield "select_last_index"
        if operator in ("CumSum", "Trilu", "ReduceMean", "ReduceMax", "ReduceMin") and not constant.get(1, True):
            yield f"input 1 of {operator} is no constant"
        if operator == "LayerNormalization" and attributes.get("stash_type", 1) != 1:
            yield "LayerNormalization that does not compute in float32"
        if operator == "DequantizeLinear" and not all(constant.values()):
            yield "DequantizeLinear of activations"
        if operator in ("MatMulInteger", "DynamicQuantizeLinear"):
            yield f"{operator} takes static shapes only"

    def is_shape(self, name: str) -> bool:
        """Whether a value follows from constants and shapes alone."""
        if name in self.initializers:
            return True
        node = self.makers.get(name)
        if node is None:  # a graph input
            return False
        return node.op_type in ("Shape", "Constant") or all(self.is_shape(part) for part in node.input if part)
