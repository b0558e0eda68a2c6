"""Every node of a GPU variant lies on the GPU, as the providers of the published wheels themselves say."""

import shutil
from pathlib import Path

import pytest

from samescore.export.build import MODEL_NAME, build_graph
from samescore.export.checkpoint import Checkpoint
from samescore.export.graphs import bert, llama, qwen3_5
from samescore.export.recipes import variant_spec
from samescore.export.scorer import TokenScorer

from ..conftest import label_tokens, tiny_bert, tiny_qwen3_5
from .providers import Provider

ASSETS = Path(__file__).parents[2] / ".cache" / "assets"
pytestmark = [
    pytest.mark.placement,
    pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("readelf")), reason="needs gcc and readelf"),
]
# CUDA graphs keep the bookkeeping of dynamic shapes on the CPU; nothing that computes may be there.
SHAPE_OPERATORS = {"Shape", "Concat", "Cast", "Squeeze", "Unsqueeze", "Gather", "Slice", "Add", "Sub", "Range"}


def provider(name: str) -> Provider:
    wheels = sorted((ASSETS / "wheels").glob(f"{name}-*.whl"))
    if not wheels:
        pytest.skip(f"{name} was not fetched: make assets")
    return Provider(wheels[-1], ASSETS / "placement" / name)


@pytest.fixture(scope="module")
def migraphx():
    return provider("onnxruntime_migraphx")


@pytest.fixture(scope="module")
def cuda():
    return provider("onnxruntime_gpu")


def built(checkpoint: Path, variant: str, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    opened = Checkpoint(checkpoint)
    if opened.architecture.endswith("ForCausalLM"):
        opened = TokenScorer(opened, label_tokens(checkpoint))
    build_graph(opened, variant_spec(variant).recipe, folder)
    return folder / MODEL_NAME


@pytest.mark.parametrize("architecture", ["bert", "llama", "qwen3_5"])
@pytest.mark.parametrize("variant", ["migraphx-fp16", "migraphx-int8"])
def test_migraphx_takes_the_whole_graph(request, migraphx, tmp_path, architecture, variant):
    assert variant in MODULES[architecture].VARIANTS
    model = built(request.getfixturevalue(f"{architecture}_checkpoint"), variant, tmp_path)
    placed = migraphx.assign(model, "MIGraphXExecutionProvider", plain=True)
    assert placed["subgraphs"] == {"MIGraphXExecutionProvider": 1}
    assert sum(placed["nodes"]["MIGraphXExecutionProvider"].values()) > 50


def test_migraphx_refuses_what_it_does_not_know(llama_checkpoint, migraphx, tmp_path):
    """One unknown operator, and the method shows nodes on the CPU."""
    model = built(llama_checkpoint, "cpu-int8", tmp_path)
    placed = migraphx.assign(model, "MIGraphXExecutionProvider", plain=True)
    assert "CPUExecutionProvider" in placed["subgraphs"]


MODULES = {"bert": bert, "llama": llama, "qwen3_5": qwen3_5}
# What each tiny model computes. The last of the decoders' layers attends with one query, in MatMuls.
CUDA_OPERATORS = {
    "bert": {"MultiHeadAttention": 3},
    "llama": {"GroupQueryAttention": 2, "SkipSimplifiedLayerNormalization": 6},
    # Of four layers three have linear attention.
    "qwen3_5": {"LinearAttention": 3, "LinearAttentionGate": 3, "Conv": 3},
}
# Products with weight matrices.
CUDA_PRODUCTS = {
    # qkv, out, up, down; in the last of three layers kv and q apart
    "bert": 2 * 4 + 5,
    # qkv, o, gate, up, down
    "llama": 2 * 5 + 6,
    # q, k, v, gate, o once; qkv, z, out three times; the feed-forward's three four times
    "qwen3_5": 5 + 3 * 3 + 3 * 4,
}


@pytest.mark.parametrize("architecture", MODULES)
@pytest.mark.parametrize(("variant", "product"), [("cuda-fp16", "Gemm"), ("cuda-int8", "MatMulNBits")])
def test_cuda_computes_everything_on_the_gpu(request, cuda, tmp_path, architecture, variant, product):
    assert variant in MODULES[architecture].VARIANTS
    model = built(request.getfixturevalue(f"{architecture}_checkpoint"), variant, tmp_path)
    placed = cuda.assign(model, "CUDAExecutionProvider", plain=False)
    assert set(placed["nodes"].get("CPUExecutionProvider", {})) <= SHAPE_OPERATORS
    on_gpu = placed["nodes"]["CUDAExecutionProvider"]
    expected = CUDA_OPERATORS[architecture]
    assert {name: on_gpu.get(name) for name in expected} == expected
    # A product with a bias is a Gemm once ONNX Runtime has optimised it.
    products = on_gpu.get(product, 0) + (on_gpu.get("MatMul", 0) if product == "Gemm" else 0)
    assert products >= CUDA_PRODUCTS[architecture]


def test_cuda_reads_the_delta_rule_in_chunks(cuda, tmp_path):
    """The provider takes GatedDeltaNet as we write it; nothing runs, so that its kernels are not tested."""
    checkpoint = tiny_qwen3_5(tmp_path / "checkpoint", linear_key_head_dim=128, linear_value_head_dim=128)
    placed = cuda.assign(
        built(checkpoint, "cuda-fp16-chunked", tmp_path / "model"), "CUDAExecutionProvider", plain=False
    )
    assert set(placed["nodes"].get("CPUExecutionProvider", {})) <= SHAPE_OPERATORS
    on_gpu = placed["nodes"]["CUDAExecutionProvider"]
    assert on_gpu["GatedDeltaNet"] == on_gpu["LinearAttentionGate"] == on_gpu["Conv"] == 3


@pytest.mark.parametrize("heads", [4, 16], ids=["lengths and offsets", "lengths"])
def test_both_masks_of_padded_texts_lie_on_the_gpu(cuda, tmp_path, heads):
    model = built(tiny_bert(tmp_path / "checkpoint", num_attention_heads=heads), "cuda-fp16", tmp_path / "model")
    placed = cuda.assign(model, "CUDAExecutionProvider", plain=False)
    assert placed["nodes"]["CUDAExecutionProvider"]["MultiHeadAttention"] == 3
    assert set(placed["nodes"].get("CPUExecutionProvider", {})) <= SHAPE_OPERATORS
