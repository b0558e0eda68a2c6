"""Every node of a GPU variant lies on the GPU, as the providers of the published wheels themselves say."""

import shutil
from pathlib import Path

import pytest

from samescore.export.build import MODEL_NAME, build_graph
from samescore.export.checkpoint import Checkpoint
from samescore.export.graphs import bert, llama, qwen3_5
from samescore.export.recipes import variant_spec
from samescore.export.scorer import TokenScorer

from ..conftest import label_tokens
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
    assert variant in {"bert": bert, "llama": llama, "qwen3_5": qwen3_5}[architecture].VARIANTS
    model = built(request.getfixturevalue(f"{architecture}_checkpoint"), variant, tmp_path)
    placed = migraphx.assign(model, "MIGraphXExecutionProvider", plain=True)
    assert placed["subgraphs"] == {"MIGraphXExecutionProvider": 1}
    assert sum(placed["nodes"]["MIGraphXExecutionProvider"].values()) > 50


def test_migraphx_refuses_what_it_does_not_know(llama_checkpoint, migraphx, tmp_path):
    """One unknown operator, and the method shows nodes on the CPU."""
    model = built(llama_checkpoint, "cpu-int8", tmp_path)
    placed = migraphx.assign(model, "MIGraphXExecutionProvider", plain=True)
    assert "CPUExecutionProvider" in placed["subgraphs"]


def test_cuda_computes_everything_on_the_gpu(llama_checkpoint, cuda, tmp_path):
    placed = cuda.assign(built(llama_checkpoint, "cuda-fp16", tmp_path), "CUDAExecutionProvider", plain=False)
    assert set(placed["nodes"].get("CPUExecutionProvider", {})) <= SHAPE_OPERATORS
    on_gpu = placed["nodes"]["CUDAExecutionProvider"]
    assert (
        on_gpu["GroupQueryAttention"] == 2
        and on_gpu["MatMul"] >= 19
        and on_gpu["SkipSimplifiedLayerNormalization"] == 6
    )


@pytest.mark.parametrize(("variant", "product"), [("cuda-fp16", "MatMul"), ("cuda-int8", "MatMulNBits")])
def test_cuda_computes_the_delta_rule_on_the_gpu(qwen3_5_checkpoint, cuda, tmp_path, variant, product):
    placed = cuda.assign(built(qwen3_5_checkpoint, variant, tmp_path), "CUDAExecutionProvider", plain=False)
    assert set(placed["nodes"].get("CPUExecutionProvider", {})) <= SHAPE_OPERATORS
    on_gpu = placed["nodes"]["CUDAExecutionProvider"]
    assert on_gpu["LinearAttention"] == on_gpu["LinearAttentionGate"] == on_gpu["Conv"] == 3
    # q, k, v, gate, o once; qkv, z, out three times; the feed-forward's three four times
    assert on_gpu[product] >= 5 + 3 * 3 + 3 * 4
