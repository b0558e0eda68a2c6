"""What a half-precision graph's float16 values would be in float32.

ONNX Runtime's CPU provider computes float16 operators in float32 and rounds between them, so that a run there can hide what
overflows on a GPU. Here the graph's float32 twin is run (the same nodes, with nothing in float16) and every value that the
graph itself holds in float16 is measured.
"""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, numpy_helper


def every_output(model):
    """Make every node's outputs graph outputs too; types are left to ONNX Runtime."""
    known = {value.name for value in model.graph.output}
    for node in model.graph.node:
        for name in node.output:
            if name and name not in known:
                model.graph.output.append(onnx.ValueInfoProto(name=name))
    return model


def open_session(model, folder: Path):
    """Nodes as they are: none fused, none folded."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    path = folder / "every-output.onnx"
    onnx.save(model, path)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def half_values(path: Path) -> dict[str, str]:
    """The operator that makes each float16 value of a graph, by the value's name."""
    model = every_output(onnx.load(path))
    session = open_session(model, path.parent)
    types = {value.name: value.type for value in session.get_outputs()}
    makers = {name: node.op_type for node in model.graph.node for name in node.output}
    return {name: makers[name] for name, kind in types.items() if kind == "tensor(float16)"}


def float32_twin(path: Path):
    """The same graph with float32 in place of float16, weights too."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            wide = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = 0  # float32 activations
    return model


def largest_half_values(path: Path, batches) -> dict[str, float]:
    """By float16 value, the largest |x| that it would have over these feeds, as `operator name: |x|`; largest first."""
    makers = half_values(path)
    session = open_session(every_output(float32_twin(path)), path.parent)
    names = list(makers)
    largest = dict.fromkeys(names, 0.0)
    for feeds in batches:
        for name, value in zip(names, session.run(names, feeds), strict=True):
            largest[name] = max(largest[name], float(np.abs(value).max()))
    return dict(sorted(largest.items(), key=lambda item: -item[1]))
