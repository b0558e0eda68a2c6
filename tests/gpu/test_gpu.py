"""What must hold on an NVIDIA GPU, through the public API.

Every test also runs with provider `cpu` on the same files, so that its body is executed where there is no GPU: that says the
test works, and nothing about a GPU.
"""

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from samescore import export_bundle, load
from samescore.export.checkpoint import Checkpoint
from samescore.export.graphs import bert, llama, qwen3_5
from samescore.export.recipes import variant_spec
from samescore.export.scorer import TokenScorer
from samescore.runtime.errors import ProviderError
from samescore.runtime.providers import EXECUTION_PROVIDERS

from ..conftest import WORDS, label_tokens
from ..placement.providers import Provider
from ..placement.test_placement import SHAPE_OPERATORS
from .device import missing_cuda

pytest.importorskip("torch")
from samescore.calibrate.reference import reference_logits

pytestmark = pytest.mark.torch
ASSETS = Path(__file__).parents[2] / ".cache" / "assets"
GRAPHS = {"bert": bert, "llama": llama, "qwen3_5": qwen3_5}
REAL = {"bert": "e5-refusal", "llama": "smollm2-refusal", "qwen3_5": "qwen3_5-digits"}
# The largest |Δp| that a precision's gate allows; and between batches, which choose other kernels.
TOLERANCE = {"fp16": 5e-3, "int8": 5e-2}
BETWEEN_BATCHES = {"cpu": 1e-6, "cuda": 1e-3}
# The chunked delta rule wants heads of 128 channels and a GPU: exporting it is its test.
FILES = [
    (name, variant)
    for name, graph in GRAPHS.items()
    for variant in graph.VARIANTS
    if variant_spec(variant).target == "cuda" and not variant_spec(variant).recipe.chunked
]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def provider(request):
    if request.param == "cuda" and (reason := missing_cuda()):
        pytest.skip(reason)
    return request.param


@pytest.fixture(scope="module")
def bundles(request, tmp_path_factory):
    """By architecture and provider: a checkpoint and its bundle. Real weights on a GPU where they were built, else tiny ones."""
    made = {}

    def make(architecture, provider):
        folder = ASSETS / REAL[architecture]
        real = provider != "cpu" and folder.is_dir()
        key = architecture, real
        if key not in made:
            source = folder if real else request.getfixturevalue(f"{architecture}_checkpoint")
            tokens = [] if architecture != "qwen3_5" else list("01234") if real else label_tokens(source)
            golden, calibration = request.getfixturevalue("texts_files")
            output = tmp_path_factory.mktemp("gpu") / architecture
            # A random model is no subject for int8's gate; what is measured here is measured below.
            export_bundle(
                source,
                output,
                variants=[variant for name, variant in FILES if name == architecture],
                label_tokens=tokens,
                golden=golden,
                calibration=calibration,
                allow_drift=True,
            )
            checkpoint = Checkpoint(source)
            made[key] = (TokenScorer(checkpoint, tokens) if tokens else checkpoint), output
        return made[key]

    return make


def texts(count=24):
    words = WORDS.split()
    return [" ".join(words[i : i + 1 + 3 * i % 40]) for i in range(count)]


def probabilities(logits):
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("architecture", "variant"), FILES)
def test_parity(bundles, provider, architecture, variant):
    """Probabilities within the gate of PyTorch float32."""
    checkpoint, bundle = bundles(architecture, provider)
    classifier = load(bundle, provider=provider, variant=variant, canary="off")
    # The tiny tokenizers end texts in the pad token, before which transformers would pool.
    ids = [classifier.encoder.encode(text).input_ids[:-1] for text in texts()]
    expected = probabilities(reference_logits(checkpoint, ids))
    got = probabilities(classifier.logits(ids))
    precision = variant_spec(variant).precision
    # Random models without margins are no subject for int8's gate.
    limit = TOLERANCE[precision] * (2 if precision == "int8" and checkpoint.folder.name == "checkpoint" else 1)
    # Agreement means nothing where all texts have the same probabilities.
    limit = min(limit, np.ptp(expected, axis=0).max() / 2)
    assert limit > 1e-3
    assert np.isfinite(got).all() and np.abs(got - expected).max() <= limit


@pytest.mark.parametrize(("architecture", "variant"), FILES)
def test_scores_do_not_depend_on_the_batch(bundles, provider, architecture, variant):
    """Alone, in one call with others, and with the others in another order."""
    _, bundle = bundles(architecture, provider)
    classifier = load(bundle, provider=provider, variant=variant, canary="off")
    items = texts()
    together = np.array([list(one.probabilities.values()) for one in classifier.score(items)])
    alone = np.array([list(classifier.score([text])[0].probabilities.values()) for text in items])
    backwards = np.array([list(one.probabilities.values()) for one in classifier.score(items[::-1])])[::-1]
    for other in (alone, backwards):
        np.testing.assert_allclose(together, other, atol=BETWEEN_BATCHES[provider], rtol=0)


def placed(model: Path, provider: str) -> dict[str, Counter]:
    """Operators by provider, of a session on this box."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(model, options, providers=[EXECUTION_PROVIDERS[provider]])
    assert session.get_providers()[0] == EXECUTION_PROVIDERS[provider]
    found: dict[str, Counter] = {}
    for part in session.get_provider_graph_assignment_info():
        found.setdefault(part.ep_name, Counter()).update(node.op_type for node in part.get_nodes())
    return found


@pytest.mark.parametrize(("architecture", "variant"), FILES)
def test_every_node_that_computes_lies_on_the_provider(bundles, provider, architecture, variant):
    """And, on a GPU, just where the provider with stand-ins for its libraries had said (tests/placement)."""
    _, bundle = bundles(architecture, provider)
    model = bundle / variant / "model.onnx"
    nodes = placed(model, provider)
    assert sum(nodes[EXECUTION_PROVIDERS[provider]].values()) > 20
    elsewhere = set().union(*(ops for name, ops in nodes.items() if name != EXECUTION_PROVIDERS[provider]))
    assert elsewhere <= SHAPE_OPERATORS
    wheels = sorted((ASSETS / "wheels").glob("onnxruntime_gpu-*.whl"))
    if provider == "cuda" and wheels and shutil.which("gcc") and shutil.which("readelf"):
        simulated = Provider(wheels[-1], ASSETS / "placement" / "onnxruntime_gpu")
        expected = simulated.assign(model, "CUDAExecutionProvider", plain=False)["nodes"]
        assert {name: dict(ops) for name, ops in nodes.items()} == expected


def test_another_provider_cannot_produce_a_score(bundles, provider):
    """MIGraphX is not in a CUDA or CPU build; CUDA without a device ends in an error, never in a score from the CPU."""
    _, bundle = bundles("llama", provider)
    with pytest.raises(ProviderError):
        load(bundle, provider="migraphx", canary="off")
    script = (
        "import sys, samescore\n"
        "try:\n"
        "    c = samescore.load(sys.argv[1], provider='cuda', canary='off')\n"
        "    print('scored', c('bread').label)\n"
        "except samescore.SamescoreError as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(bundle)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("ProviderError", "BundleError")), done.stdout


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert "pip install 'samescore[cuda]'" in str(missing_cuda())
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])

    def no_library(name):
        raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", no_library)
    assert missing_cuda() == "there is no NVIDIA driver (libcuda.so.1)"
