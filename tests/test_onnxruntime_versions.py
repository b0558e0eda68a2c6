"""Files for AMD GPUs on every ONNX Runtime that AMD's and others' builds are made from, and another vendor's provider.

The CPU provider computes here: what is shown is that these files load and give the same numbers, not that a GPU does.
"""

import subprocess
import sys

import numpy as np
import pytest

from samescore import export_bundle, load
from samescore.export.build import build_graph
from samescore.export.checkpoint import Checkpoint
from samescore.export.recipes import variant_spec
from samescore.export.scorer import TokenScorer

from . import lean
from .conftest import label_tokens

pytestmark = [pytest.mark.packaging, pytest.mark.torch]
PAIRS = [{"prompt": "bread?", "response": "flour water salt"}, {"prompt": "hi", "response": "the model refuses " * 20}]
TEXTS = ["hello the model", "ich kann leider nicht " * 9, "<|user|>numbers?<|assistant|>1 2 3"]
# What the gate allows a float16 variant, of probabilities; logits of these models differ by about four times that.
FLOAT16 = 5e-3

RUN = """
import json, sys
import numpy as np
from pathlib import Path
from samescore.runtime.bundle import ModelBytes
from samescore.runtime.errors import SamescoreError
from samescore.runtime.prefill import Reader
from samescore.runtime.session import Session
folder = Path(sys.argv[1])
model = ModelBytes((folder / "model.onnx").read_bytes(), {"model.onnx.data": (folder / "model.onnx.data").read_bytes()})
try:
    reader = Reader(Session(model, "cpu", intra_op_threads=1))
    print(json.dumps({"logits": reader.logits(np.arange(3, 90, dtype=np.int64)).tolist()}))
except SamescoreError as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error)}))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return lean.site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def llama(llama_checkpoint, pair_files, tmp_path_factory):
    """A bundle of the tiny Llama with the portable variants."""
    output = tmp_path_factory.mktemp("bundle") / "llama"
    golden, calibration = pair_files
    export_bundle(
        llama_checkpoint,
        output,
        profile="realigned",
        variants=["migraphx-fp16", "migraphx-int8"],
        golden=golden,
        calibration=calibration,
        allow_drift=True,
    )
    return output


@pytest.fixture(scope="module", params=["1.23.2", "1.27.0", "1.29.0"])
def other(request, tmp_path_factory):
    """(version, folder) of another onnxruntime. 1.27.1 exists for AMD alone: tests/placement has it."""
    return request.param, install(f"onnxruntime=={request.param}", tmp_path_factory.mktemp("onnxruntime"))


def install(requirement, folder):
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def difference(bundle, texts, variant, paths, **options):
    """The answer of the other ONNX Runtime, and how far its probabilities are from ours."""
    answer = lean.score(bundle, texts, {"provider": "cpu", "variant": variant, **options}, paths=paths)
    assert "logits" in answer, answer
    ours = load(bundle, provider="cpu", variant=variant, threads=1, canary="off").score(texts)
    delta = np.abs(softmax(answer["logits"]) - softmax([p.logits for p in ours])).max()
    return answer, delta


def softmax(logits):
    powers = np.exp(np.array(logits))
    return powers / powers.sum(axis=1, keepdims=True)


def test_a_bert_bundle(other, site, bert_bundle):
    version, package = other
    answer, delta = difference(bert_bundle, TEXTS, "migraphx-fp16", [package, site])
    assert answer["version"] == version and delta < FLOAT16


@pytest.mark.parametrize(("variant", "limit"), [("migraphx-fp16", FLOAT16), ("migraphx-int8", 5e-2)])
def test_a_llama_bundle(other, site, llama, variant, limit):
    version, package = other
    answer, delta = difference(llama, PAIRS, variant, [package, site])
    assert answer["version"] == version and delta < limit


def test_qwen(other, site, qwen3_5_checkpoint, tmp_path):
    """The portable graph runs; the one with ONNX Runtime's own linear attention needs a newer ONNX Runtime and says so."""
    version, package = other
    opened = TokenScorer(Checkpoint(qwen3_5_checkpoint), label_tokens(qwen3_5_checkpoint))
    answers = {}
    for variant in ("migraphx-fp16", "cpu-fp32"):
        folder = tmp_path / variant
        folder.mkdir()
        build_graph(opened, variant_spec(variant).recipe, folder)
        answers[variant] = lean.answer(lean.run(RUN, str(folder), paths=[package, site]))
    exact = np.array(lean.answer(lean.run(RUN, str(tmp_path / "migraphx-fp16"), paths=[installed(), site]))["logits"])
    assert np.abs(np.array(answers["migraphx-fp16"]["logits"]) - exact).max() < 4 * FLOAT16
    assert answers["cpu-fp32"]["error"] == "ProviderError"
    assert f"ONNX Runtime {version} does not know all operators of this graph" in answers["cpu-fp32"]["message"]
    assert (
        "LinearAttention" in answers["cpu-fp32"]["message"] or "CausalConvWithState" in answers["cpu-fp32"]["message"]
    )
    assert "migraphx-fp16" in answers["cpu-fp32"]["message"]


def test_openvino_runs_the_portable_file(site, bert_bundle, tmp_path):
    """Another vendor's provider, for real: OpenVINO computes the whole graph on this CPU, and refuses a fused one."""
    package = install("onnxruntime-openvino==1.24.1", tmp_path / "openvino")
    answer, delta = difference(bert_bundle, TEXTS, "migraphx-fp16", [package, site], provider="openvino")
    assert answer["first"] == "OpenVINOExecutionProvider" and set(answer["nodes"]) == {"OpenVINOExecutionProvider"}
    assert delta < FLOAT16
    options = {"provider": "openvino", "variant": "cpu-int8"}
    refused = lean.score(bert_bundle, TEXTS, options, paths=[package, site])
    assert refused["error"] == "ProviderError" and "MatMulIntegerToFloat" in refused["message"]


def installed():
    """The folder above the installed onnxruntime, of which the process that asks sees all."""
    import onnxruntime

    return lean.Path(onnxruntime.__file__).parents[1]
