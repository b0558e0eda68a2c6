"""Every node of every migraphx file is one that MIGraphX's parser and ONNX Runtime's provider take, attributes too."""

import onnx
import pytest
from onnx import TensorProto, helper

from samescore.export.build import MODEL_NAME, build_graph
from samescore.export.checkpoint import Checkpoint
from samescore.export.graphs import bert, llama, qwen3_5
from samescore.export.recipes import variant_spec
from samescore.export.scorer import TokenScorer

from ..conftest import label_tokens
from .migraphx import FACTS, complaints

pytestmark = pytest.mark.torch
GRAPHS = {"bert": bert, "llama": llama, "qwen3_5": qwen3_5}
FILES = [
    (architecture, variant)
    for architecture, graph in GRAPHS.items()
    for variant in graph.VARIANTS
    if variant_spec(variant).target == "migraphx"
]


def built(request, architecture, variant, folder):
    source = request.getfixturevalue(f"{architecture}_checkpoint")
    checkpoint = Checkpoint(source)
    if architecture == "qwen3_5":
        checkpoint = TokenScorer(checkpoint, label_tokens(source))
    folder.mkdir(exist_ok=True)
    build_graph(checkpoint, variant_spec(variant).recipe, folder)
    return onnx.load(folder / MODEL_NAME, load_external_data=False)


@pytest.mark.parametrize(("architecture", "variant"), FILES)
def test_migraphx_files_hold_nothing_that_it_refuses(request, tmp_path, architecture, variant):
    model = built(request, architecture, variant, tmp_path / "model")
    assert len(model.graph.node) > 50
    assert complaints(model) == []


def test_every_architecture_has_files_for_it():
    assert {architecture for architecture, _ in FILES} == set(GRAPHS)


def test_a_fused_graph_is_refused(request, tmp_path):
    """The same method on a file for CUDA: contrib operators, and MatMulNBits of 8 bits."""
    said = complaints(built(request, "qwen3_5", "cuda-int8", tmp_path / "model"))
    assert "operators of com.microsoft" in said
    assert any("MatMulNBits of 8 bits" in one for one in said)
    assert any("LinearAttention is unknown to the parser" in one for one in said)
    assert any("LinearAttention is unknown to the provider" in one for one in said)


def node_of(operator, inputs, **attributes):
    return helper.make_node(operator, inputs, ["y"], name="it", **attributes)


@pytest.mark.parametrize(
    ("node", "said"),
    [
        (node_of("Attention", ["x", "x", "x"]), "it: Attention is read as com.microsoft's"),
        (node_of("Reshape", ["x", "data"]), "it: input 1 of Reshape depends on data"),
        (node_of("CumSum", ["x", "data"]), "it: input 1 of CumSum is no constant"),
        (node_of("DequantizeLinear", ["x", "scale"]), "it: DequantizeLinear of activations"),
        (node_of("Cast", ["x"], to=TensorProto.STRING), "it: a cast to STRING"),
        (node_of("RMSNormalization", ["x", "scale"]), "it: RMSNormalization is unknown to the parser"),
        (node_of("IsNaN", ["x"]), "it: IsNaN is unknown to the provider"),
        (node_of("LayerNormalization", ["x", "scale"], stash_type=10), "that does not compute in float32"),
    ],
    ids=lambda value: value.op_type if isinstance(value, onnx.NodeProto) else "",
)
def test_what_is_refused(node, said):
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "data")]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    scale = helper.make_tensor("scale", TensorProto.FLOAT, [1], [1.0])
    graph = helper.make_graph([node], "one", inputs, [output], [scale])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    assert any(said in one for one in complaints(model))


def test_versions_are_bounded():
    graph = helper.make_graph([], "none", [], [])
    model = helper.make_model(graph, ir_version=11, opset_imports=[helper.make_opsetid("", 23)])
    assert complaints(model) == ["opset 23 > 21", "IR 11 > 10"]


def test_the_facts_are_whole():
    """As many names as were counted at the source, and those that the files cannot do without."""
    assert len(FACTS["parser"]) == 184 and len(FACTS["provider"]) == 162
    assert {"MatMul", "DequantizeLinear", "GatherND", "CumSum"} <= set(FACTS["parser"]) & set(FACTS["provider"])
