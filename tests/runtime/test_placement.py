import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from samescore.runtime.placement import CPU, CUDA, RECORD_ENTRY, Placement, placement_of, strays

MIGRAPHX, OTHER = "MIGraphXExecutionProvider", "OpenVINOExecutionProvider"


def model() -> bytes:
    """Two products and a sum."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2, 2]))
    weight = ir.Value(name="w", const_value=ir.tensor(np.eye(2, dtype=np.float32), name="w"))
    first = ir.node("MatMul", [x, weight])
    second = ir.node("MatMul", [first.outputs[0], x])
    last = ir.node("Add", [second.outputs[0], x])
    last.outputs[0].name, last.outputs[0].type, last.outputs[0].shape = "y", x.type, ir.Shape([2, 2])
    graph = ir.Graph(
        [x], last.outputs, nodes=[first, second, last], initializers=[weight], opset_imports={"": 18}, name="g"
    )
    return ir.to_proto(ir.Model(graph, ir_version=9)).SerializeToString()


def session(**entries: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    return onnxruntime.InferenceSession(model(), options, providers=[CPU])


def test_nodes_are_counted_by_provider():
    placement = placement_of(session(**{RECORD_ENTRY: "1"}))
    assert placement is not None
    assert placement.first == CPU and placement.nodes == {CPU: {"MatMul": 2, "Add": 1}}
    assert placement.count(CPU) == 3 and placement.count(CUDA) == 0
    assert sum(placement.subgraphs.values()) >= 1
    assert strays(placement, CPU) == {}


def test_a_session_without_a_record_has_no_placement():
    assert placement_of(session()) is None

    class Old:
        """A session of an ONNX Runtime without the report."""

    assert placement_of(Old()) is None


def test_what_computes_on_the_cpu_is_a_stray():
    nodes = {CUDA: {"MatMul": 9}, CPU: {"Shape": 4, "Gather": 2, "DynamicQuantizeLinear": 3, "MatMulInteger": 5}}
    assert strays(Placement(CUDA, nodes, {}), CUDA) == {"MatMulInteger": 5, "DynamicQuantizeLinear": 3}
    assert strays(Placement(CUDA, {**nodes, CPU: {"Shape": 4, "Gather": 2}}, {}), CUDA) == {}


@pytest.mark.parametrize("operator", ["Shape", "Mul", "SomethingNew"])
@pytest.mark.parametrize("provider", [MIGRAPHX, OTHER])
def test_others_than_cuda_may_leave_nothing(provider, operator):
    nodes = {provider: {"MatMul": 9}, CPU: {operator: 1}}
    assert strays(Placement(provider, nodes, {}), provider) == {operator: 1}
    assert strays(Placement(provider, {provider: {"MatMul": 9}}, {}), provider) == {}


def test_a_provider_that_took_nothing_leaves_everything():
    assert strays(Placement(CUDA, {CPU: {"Add": 2, "Shape": 1}}, {}), CUDA) == {"Add": 2, "Shape": 1}
