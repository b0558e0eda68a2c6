"""Exports of the trained digit scorers against PyTorch, in the published classifier's prompt.

The models are tiny and trained here (see tests/assets/README.md); prompt, tokenizer and architecture are the published one's.
"""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from samescore import export_bundle, load, verify

pytest.importorskip("torch")
ASSETS = Path(__file__).parent.parent.parent / ".cache" / "assets"
SUBJECTS = ["qwen3_5-digits", "qwen3_5-digits-equal"]
SHORT, LONG = 120, 2

pytestmark = [pytest.mark.real, pytest.mark.torch]


def articles():
    path = ASSETS / "qwen-articles.jsonl"
    if not path.exists():
        pytest.skip("qwen-articles.jsonl is not built: run `make assets`")
    return [json.loads(line)["text"].strip() for line in path.read_text(encoding="utf-8").split("\n") if line]


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=SUBJECTS)
def subject(request):
    if not (ASSETS / request.param).exists():
        pytest.skip(f"{request.param} is not built: run `make assets`")
    return ASSETS / request.param


@pytest.fixture(scope="module")
def exported(subject, tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    texts = articles()
    few = [text for text in dict.fromkeys(texts) if len(text) < 1500]
    golden = [*few[:: len(few) // SHORT][:SHORT], *sorted(texts, key=len)[-LONG:]]
    calibration = [text for text in few[1 :: len(few) // 90] if text not in golden]
    return export_bundle(
        subject,
        folder / "bundle",
        profile="political-leaning",
        variants=["cpu-fp32", "cpu-int8", "migraphx-fp16"],
        golden=write(folder / "golden.jsonl", golden),
        calibration=write(folder / "calibration.jsonl", calibration),
        budget="gate",
        allow_drift=True,
    )


def test_fp32_is_pytorch(exported):
    parity = exported.certificate.variants["cpu-fp32"]
    assert parity.verdict.passed and parity.drift.max_abs_dp <= 5e-5 and parity.drift.texts >= SHORT
    assert max(map(len, exported_ids(exported))) == 8192  # cut, and read in chunks
    assert parity.invariance.prefix <= 1e-4 and parity.invariance.workers == 0


def exported_ids(exported):
    lines = gzip.decompress((exported.path / "golden.jsonl.gz").read_bytes()).decode().split("\n")[1:]
    return [json.loads(line)["input_ids"] for line in lines if line]


def test_a_budget_keeps_int8_about_inside_the_gate(exported):
    """On other texts than it was chosen with, some 90 of them: plain int8 has a mean of 5e-3 to 6e-3 here."""
    drift = exported.certificate.variants["cpu-int8"].drift
    assert drift.mean_abs_dp <= 3e-3 and drift.p99_abs_dp <= 3e-2 and drift.noise_ratio <= 0.8
    (int8,) = (variant for variant in exported.manifest.variants if variant.name == "cpu-int8")
    assert "model.layers.0.linear_attn=" in int8.recipe["parts"]


def test_the_expected_value_stays(exported):
    """On texts that judged nothing."""
    texts = [text for text in articles() if 1500 < len(text) < 3000][:20]
    exact, int8 = (load(exported.path, variant=name).score(texts) for name in ("cpu-fp32", "cpu-int8"))
    differences = [abs(a.expected_value - b.expected_value) for a, b in zip(exact, int8, strict=True)]
    assert max(differences) <= 0.1 and np.mean(differences) <= 0.02


def test_fp16_is_far_more_exact_than_bfloat16(exported):
    drift = exported.certificate.variants["migraphx-fp16"].drift
    assert drift.noise_ratio <= 0.1 and drift.max_abs_dp <= 5e-3


def test_the_labels_have_the_mass(exported):
    reference = exported.certificate.reference
    assert reference.label_mass_mean >= 0.85 and "prompt may be broken" not in (exported.warning or "")


@pytest.mark.parametrize("variant", ["cpu-fp32", "cpu-int8"])
def test_one_at_a_time_is_many_at_once(exported, variant):
    """Bit for bit, first or later: the prompt's beginning is read once, and texts never share a call."""
    texts = articles()[:12]
    together = load(exported.path, variant=variant, threads=2, workers=2).score(texts)
    classifier = load(exported.path, variant=variant, threads=2)
    alone = [classifier(text) for text in reversed(texts)]
    assert [p.logits for p in together] == [p.logits for p in reversed(alone)]


def test_pytorch_again(exported, subject):
    """transformers' own class reads some rare words of the multimodal one in pieces (`ignore_merges`): that is said."""
    result = verify(exported.path, reference=subject, variant="cpu-fp32")
    assert result.certificate.variants["cpu-fp32"].verdict.passed
    tokens = result.certificate.tokenization
    assert result.passed == (tokens.different == 0) and tokens.different <= tokens.texts // 50
