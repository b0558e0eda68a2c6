"""Real trained weights against PyTorch: multilingual-e5-small and MiniLM, fine-tuned as refusal classifiers by `make assets`.

The e5 weights are 4-bit values in float32 tensors (no other form of them is packaged); architecture, tokenizer and
activation scale are the original's. MiniLM's weights are the original float32 ones.
"""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from samescore import export_bundle, load
from samescore.calibrate.gate import TOLERANCES, judge
from samescore.calibrate.golden import read_golden

pytest.importorskip("torch")
ASSETS = Path(__file__).parent.parent.parent / ".cache" / "assets"
CALIBRATION = Path(__file__).parent.parent.parent / "embedded" / "texts" / "calibration.jsonl"
TEXTS = 330
VARIANTS = ["cpu-int8", "cpu-fp32", "migraphx-fp16"]

pytestmark = [pytest.mark.real, pytest.mark.torch]


def checkpoint(name):
    folder = ASSETS / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not built: run `make assets`")
    return folder


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    checkpoint("e5-refusal")
    path = tmp_path_factory.mktemp("texts") / "golden.jsonl"
    with (ASSETS / "texts.jsonl").open(encoding="utf-8") as lines:
        path.write_text("".join(itertools.islice(lines, TEXTS)), encoding="utf-8")
    return path


def exported(name, golden, folder):
    settings = {"profile": "refusal", "variants": VARIANTS, "golden": golden, "calibration": CALIBRATION}
    return export_bundle(checkpoint(name), folder / name, allow_drift=True, **settings)


@pytest.fixture(scope="module")
def e5(golden, tmp_path_factory):
    return exported("e5-refusal", golden, tmp_path_factory.mktemp("e5"))


@pytest.fixture(scope="module")
def minilm(golden, tmp_path_factory):
    return exported("minilm-refusal", golden, tmp_path_factory.mktemp("minilm"))


def test_the_texts_are_many_and_varied(e5, golden):
    records = [json.loads(line) for line in golden.read_text(encoding="utf-8").split("\n") if line]
    lengths = [len(ids) for ids in read_golden(e5.path / "golden.jsonl.gz").input_ids()]
    assert len(records) == TEXTS >= 300
    assert len({record["language"] for record in records}) >= 6
    assert min(lengths) <= 4 and max(lengths) == 512


@pytest.mark.parametrize("model", ["e5", "minilm"])
def test_fp32_is_pytorch(model, request):
    drift = request.getfixturevalue(model).certificate.variants["cpu-fp32"].drift
    assert drift.texts == TEXTS
    assert drift.max_abs_dp <= 2e-5
    assert drift.agreement == 1


@pytest.mark.parametrize("model", ["e5", "minilm"])
def test_fp16_is_inside_its_gate(model, request):
    parity = request.getfixturevalue(model).certificate.variants["migraphx-fp16"]
    assert parity.verdict.passed, parity.verdict.failures


def test_int8_is_inside_its_gate_on_minilm(minilm):
    parity = minilm.certificate.variants["cpu-int8"]
    assert parity.verdict.passed, parity.verdict.failures


def test_int8_on_e5_is_as_measured(e5):
    """Not inside the int8 gate: one scale per token costs about four times this model's own bfloat16 noise.

    Measured: max 1.6e-1, p99 5.3e-2, mean 3.9e-3, 99.4 % same label, noise ratio 4.0. The bounds are looser and leave
    max and p99 free, so they catch a broken recipe, not a slightly worse one; docs/recipes.md says what was tried.
    """
    drift = e5.certificate.variants["cpu-int8"].drift
    assert drift.mean_abs_dp <= 6e-3
    assert drift.agreement >= 0.985
    assert drift.noise_ratio is not None and drift.noise_ratio <= 6
    assert not judge(drift, TOLERANCES["fp16"]).passed


@pytest.mark.parametrize("model", ["e5", "minilm"])
@pytest.mark.parametrize("variant", VARIANTS[:2])
def test_sixty_four_texts_at_once_equal_one_by_one(model, variant, request, golden):
    classifier = load(request.getfixturevalue(model).path, variant=variant)
    texts = [json.loads(line)["text"] for line in golden.read_text(encoding="utf-8").split("\n")[:64]]
    together = np.array([p.logits for p in classifier.score(texts, workers=4)])
    alone = np.array([classifier(text).logits for text in texts])
    assert np.abs(together - alone).max() <= 1e-6


@pytest.mark.parametrize("model", ["e5", "minilm"])
def test_nothing_depends_on_neighbours(model, request):
    for name, parity in request.getfixturevalue(model).certificate.variants.items():
        assert parity.invariance.workers <= 1e-6, name
        assert parity.invariance.neighbours <= (1e-2 if name == "migraphx-fp16" else 2e-6), name


@pytest.mark.parametrize("name", ["e5-refusal", "minilm-refusal"])
def test_token_ids_equal_the_hugging_face_tokenizer(name, golden):
    """On the texts that fit; MiniLM's file asks for truncation and padding, which the runtime must ignore."""
    from transformers import AutoTokenizer

    from samescore.export.checkpoint import Checkpoint
    from samescore.export.profiles import contract_for, profile_named
    from samescore.runtime.tokenizer import TextEncoder

    source = Checkpoint(checkpoint(name))
    encoder = TextEncoder(source.tokenizer_bytes(), contract_for(source, profile_named("refusal")))
    reference = AutoTokenizer.from_pretrained(source.folder)
    compared = 0
    for line in golden.read_text(encoding="utf-8").split("\n"):
        if not line:
            continue
        text = json.loads(line)["text"]
        encoded = encoder.encode(text)
        if not encoded.truncated:
            assert encoded.input_ids.tolist() == reference(text, truncation=False, padding=False)["input_ids"]
            compared += 1
    assert compared > 280


def test_a_text_that_normalises_to_nothing_is_an_error(e5):
    from samescore.runtime import InputError

    with pytest.raises(InputError, match="empty"):
        load(e5.path, variant="cpu-int8")("\u200b\u200b")


def test_the_int8_bundle_is_small(golden, tmp_path):
    result = export_bundle(
        checkpoint("e5-refusal"),
        tmp_path / "bundle",
        profile="refusal",
        variants=["cpu-int8"],
        golden=golden,
        calibration=CALIBRATION,
        allow_drift=True,
    )
    files = {path.name: path.stat().st_size for path in result.path.rglob("*") if path.is_file()}
    assert files["model.onnx"] + files["model.onnx.data"] < 121e6
    assert sum(files.values()) < 125 * 2**20
