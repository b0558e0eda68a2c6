"""`export_bundle` and `verify` from end to end, on tiny checkpoints."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from samescore import export_bundle, load, verify
from samescore.calibrate.golden import read_golden
from samescore.calibrate.metrics import measure
from samescore.calibrate.scores import read_scores
from samescore.cli import main
from samescore.exporting import compact_json
from samescore.packaged import packaged
from samescore.runtime import Bundle, BundleError, CheckpointError, GateError, InputError, ProviderError, UsageError
from samescore.runtime.manifest import parse_manifest

from .conftest import tiny_bert

pytestmark = pytest.mark.torch


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_what_a_bundle_holds(bert_bundle):
    variants = ("cpu-fp32", "cpu-int8", "migraphx-fp16")
    model_files = [f"{variant}/model.onnx{suffix}" for variant in variants for suffix in ("", ".data")]
    assert names(bert_bundle) == sorted(
        [
            "README.md",
            "bundle.json",
            "canary.json",
            "golden.jsonl.gz",
            "parity.json",
            "scores.npz",
            "tokenizer.json",
            *model_files,
        ]
    )
    with Bundle(bert_bundle) as bundle:
        manifest = bundle.manifest
    assert [variant.name for variant in manifest.variants] == ["cpu-int8", "cpu-fp32", "migraphx-fp16"]
    assert manifest.contract.max_tokens == 64 and manifest.contract.kind == "conversation"
    assert manifest.source.kind == "folder" and len(manifest.source.sha256) == 64
    card = (bert_bundle / "README.md").read_text()
    assert "The gate passed" in card and "60 texts" in card and "cpu-int8" in card


def test_the_certificate_says_what_was_measured(bert_bundle):
    parity = json.loads((bert_bundle / "parity.json").read_text())
    fp32 = parity["variants"]["cpu-fp32"]
    assert fp32["verdict"] == {"outcome": "PASS", "failures": [], "notes": []}
    assert fp32["drift"]["texts"] == 60 and fp32["drift"]["max_abs_dp"] < 5e-6
    assert fp32["drift"]["agreement_low"] == pytest.approx(60 / (60 + 1.959964**2))
    assert parity["variants"]["cpu-int8"]["drift"]["noise_ratio"] > 0
    assert parity["variants"]["cpu-int8"]["invariance"] == {
        "neighbours": pytest.approx(0, abs=1e-6),
        "workers": 0.0,
        "prefix": None,
    }
    assert parity["reference"]["dtype"] == "float32" and parity["reference"]["torch"].startswith("2.")
    for key in ("onnxruntime", "cpu", "threads", "int8_flags", "python", "numpy"):
        assert key in parity["environment"]


def test_the_scores_give_the_certificate_s_numbers_again(bert_bundle):
    scores = read_scores((bert_bundle / "scores.npz").read_bytes())
    golden = read_golden(bert_bundle / "golden.jsonl.gz")
    manifest = parse_manifest((bert_bundle / "bundle.json").read_bytes())
    parity = json.loads((bert_bundle / "parity.json").read_text())
    assert list(scores) == ["bfloat16", *parity["variants"]]
    for name, variant in parity["variants"].items():
        drift = measure(golden.logits(), scores[name], manifest.labels, manifest.activation)
        assert (drift.max_abs_dp, drift.kld) == (variant["drift"]["max_abs_dp"], variant["drift"]["kld"])
    bf16 = measure(golden.logits(), scores["bfloat16"], manifest.labels, manifest.activation)
    assert bf16.mean_abs_dp == parity["reference"]["bf16_mean_abs_dp"]


def test_the_golden_logits_are_pytorch_s(bert_bundle, bert_checkpoint):
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(bert_checkpoint).eval()
    golden = read_golden(bert_bundle / "golden.jsonl.gz")
    with torch.inference_mode():
        for text in golden.texts[::7]:
            expected = model(torch.from_numpy(text.input_ids[None])).logits[0].numpy()
            np.testing.assert_allclose(text.logits, expected, atol=1e-6)


def test_a_golden_set_with_logits_needs_no_pytorch(bert_bundle, bert_checkpoint, texts_files, tmp_path):
    script = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        "from samescore import export_bundle, verify\n"
        "checkpoint, output, golden, calibration = sys.argv[1:]\n"
        "export_bundle(checkpoint, output, profile='refusal', golden=golden, calibration=calibration)\n"
        "assert verify(output).passed\n"
    )
    output = tmp_path / "bundle"
    arguments = [bert_checkpoint, output, bert_bundle / "golden.jsonl.gz", texts_files[1]]
    subprocess.run([sys.executable, "-c", script, *map(str, arguments)], check=True, timeout=120)
    assert (output / "golden.jsonl.gz").read_bytes() == (bert_bundle / "golden.jsonl.gz").read_bytes()
    assert (output / "cpu-int8/model.onnx.data").read_bytes() == (bert_bundle / "cpu-int8/model.onnx.data").read_bytes()


def test_logits_of_another_checkpoint_are_refused(bert_bundle, tmp_path, texts_files):
    other = tiny_bert(tmp_path / "other", hidden_size=16)
    with pytest.raises(UsageError, match="made from another checkpoint"):
        export_bundle(other, tmp_path / "b", golden=bert_bundle / "golden.jsonl.gz", calibration=texts_files[1])


def test_a_variant_that_drifts_fails_and_leaves_nothing(
    bert_checkpoint, bert_bundle, texts_files, tmp_path, monkeypatch
):
    """Break the int8 weights on purpose: the gate must see it, say the numbers, and write nothing."""
    import samescore.export.graphs.row_linears as linears

    original = linears.quantize_columns
    monkeypatch.setattr(linears, "quantize_columns", lambda w: (np.roll(original(w)[0], 1, axis=0), original(w)[1]))
    output = tmp_path / "bundle"
    settings = {
        "profile": "refusal",
        "golden": bert_bundle / "golden.jsonl.gz",
        "calibration": texts_files[1],
        "budget": "none",
    }
    with pytest.raises(GateError, match=r"cpu-int8: max_abs_dp .* > 5e-02.*Nothing was written"):
        export_bundle(bert_checkpoint, output, **settings)
    assert list(tmp_path.iterdir()) == []
    result = export_bundle(bert_checkpoint, output, allow_drift=True, **settings)
    assert not result.certificate.variants["cpu-int8"].verdict.passed
    assert "The gate FAILED" in (output / "README.md").read_text()
    assert not verify(output).passed


def test_a_budget_gives_parts_finer_formats(bert_checkpoint, bert_bundle, texts_files, tmp_path, capsys):
    """Half of what plain int8 drifts on the calibration texts: the manifest and `inspect` name the parts."""
    drift = json.loads((bert_bundle / "parity.json").read_bytes())["variants"]["cpu-int8"]["drift"]
    settings = {"profile": "refusal", "golden": bert_bundle / "golden.jsonl.gz", "calibration": texts_files[1]}
    result = export_bundle(
        bert_checkpoint, tmp_path / "b", budget=f"mean={drift['mean_abs_dp']:.2e}", allow_drift=True, **settings
    )
    (variant,) = result.manifest.variants
    parts = dict(entry.split("=") for entry in variant.recipe["parts"].split())
    assert parts and set(parts.values()) <= {"int8-row-a16", "int16-row", "float16"}
    assert all(part.startswith("bert.e") for part in parts)
    assert 1 < result.times["cpu-int8"] < 2.6
    parity = result.certificate.variants["cpu-int8"]
    assert parity.drift.mean_abs_dp < drift["mean_abs_dp"] and set(parts) <= set(parity.sensitivity)
    assert main(["inspect", str(tmp_path / "b")]) == 0
    assert f"finer: {variant.recipe['parts']}" in capsys.readouterr().out
    assert load(tmp_path / "b")("hello bread").label in result.manifest.labels
    # Another export with its recipe searches nothing, and makes the same file.
    again = export_bundle(bert_checkpoint, tmp_path / "c", recipe=tmp_path / "b", allow_drift=True, **settings)
    assert again.manifest.files["cpu-int8/model.onnx.data"] == result.manifest.files["cpu-int8/model.onnx.data"]
    assert again.manifest.variants[0].recipe == variant.recipe


def test_a_recipe_or_a_budget(bert_checkpoint, bert_bundle, tmp_path):
    with pytest.raises(UsageError, match="name one of the two"):
        export_bundle(bert_checkpoint, tmp_path / "b", budget="gate", recipe=bert_bundle)


def test_calibration_texts_that_are_all_golden(bert_checkpoint, tmp_path):
    with pytest.raises(UsageError, match="none is left to find a recipe on: name others with --calibration"):
        export_bundle(bert_checkpoint, tmp_path / "b", profile="refusal", golden=packaged(None, "calibration"))


def test_a_recipe_that_does_not_fit(bert_checkpoint, bert_bundle, tmp_path):
    with pytest.raises(UsageError, match="no variant 'cpu-int4'; it has: cpu-int8, cpu-fp32"):
        export_bundle(bert_checkpoint, tmp_path / "b", variants=["cpu-int4"], recipe=bert_bundle)


@pytest.mark.parametrize(
    ("variants", "budget", "said"),
    [
        (["cpu-fp32"], "gate", "--budget gate chooses number formats of a quantized variant, and cpu-fp32 quantizes"),
        (["cpu-int8"], "p95=1", "'p95' is none of gate, max, p99, mean"),
    ],
)
def test_budgets_are_read_before_anything_is_done(bert_checkpoint, tmp_path, variants, budget, said):
    with pytest.raises(UsageError, match=said):
        export_bundle(bert_checkpoint, tmp_path / "b", variants=variants, budget=budget)
    assert list(tmp_path.iterdir()) == []


def test_calibration_texts_must_not_be_golden(bert_checkpoint, texts_files, tmp_path):
    golden, _ = texts_files
    with pytest.raises(UsageError, match="60 calibration texts are golden texts too"):
        export_bundle(bert_checkpoint, tmp_path / "b", golden=golden, calibration=golden)
    assert list(tmp_path.iterdir()) == []


def test_a_variant_named_twice(bert_checkpoint, tmp_path):
    with pytest.raises(UsageError, match="named twice"):
        export_bundle(bert_checkpoint, tmp_path / "b", variants=["migraphx-fp16", "portable-fp16"])


def test_a_checkpoint_without_a_head_is_refused(bert_checkpoint, texts_files, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "headless"
    shutil.copytree(bert_checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.startswith("classifier")}, folder / "model.safetensors")
    golden, calibration = texts_files
    with pytest.raises(CheckpointError, match="lacks classifier.bias, classifier.weight"):
        export_bundle(folder, tmp_path / "b", golden=golden, calibration=calibration)
    assert not (tmp_path / "b").exists()


def test_verify_against_the_checkpoint(bert_bundle, bert_checkpoint, tmp_path):
    result = verify(bert_bundle, reference=bert_checkpoint, variant="cpu-fp32")
    assert result.passed and result.note is None
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "flour and water"}\n{"messages": [{"role": "user", "content": "yeast"}]}\n')
    result = verify(bert_bundle, reference=bert_checkpoint, texts=texts)
    assert result.passed and result.certificate.variants["cpu-int8"].drift.texts == 2
    with pytest.raises(UsageError, match="no reference logits: name the checkpoint too"):
        verify(bert_bundle, texts=texts)
    other = tiny_bert(tmp_path / "other", num_hidden_layers=1)
    result = verify(bert_bundle, reference=other, variant="cpu-fp32")
    assert not result.passed and "is not the checkpoint" in str(result.note)


def test_verify_sees_a_changed_tokenizer(bert_bundle, tmp_path):
    import hashlib

    copy = tmp_path / "bundle"
    shutil.copytree(bert_bundle, copy)
    document = json.loads((copy / "tokenizer.json").read_text())
    document["normalizer"] = {"type": "Lowercase"}
    document["model"]["vocab"][10:] = document["model"]["vocab"][:9:-1]
    raw = json.dumps(document).encode()
    (copy / "tokenizer.json").write_bytes(raw)
    manifest = json.loads((copy / "bundle.json").read_text())
    manifest["files"]["tokenizer.json"] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (copy / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="golden texts tokenize to other ids"):
        verify(copy)


def test_many_labels_and_sigmoid(tmp_path, texts_files):
    labels = {i: f"topic {i}" for i in range(4)}
    checkpoint = tiny_bert(tmp_path / "c", id2label=labels, problem_type="multi_label_classification")
    golden, calibration = texts_files
    export_bundle(checkpoint, tmp_path / "b", golden=golden, calibration=calibration, variants=["cpu-fp32"])
    prediction = load(tmp_path / "b")("bread")
    assert set(prediction.probabilities) == set(labels.values())
    assert sum(prediction.probabilities.values()) != pytest.approx(1, abs=1e-3)


def test_compact_json_changes_white_space_only(bert_checkpoint):
    raw = (bert_checkpoint / "tokenizer.json").read_bytes()
    compact = compact_json(raw)
    assert len(compact) < len(raw) and json.loads(compact) == json.loads(raw)
    with pytest.raises(CheckpointError, match="not JSON"):
        compact_json(b"{")


def test_bad_golden_files(bert_checkpoint, tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        export_bundle(bert_checkpoint, tmp_path / "b", golden=tmp_path / "missing.jsonl")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_export_keeps_the_old_bundle(bert_bundle, tmp_path, how):
    """Kill `samescore export` over an existing bundle at several moments: the old one still verifies."""
    target = tmp_path / "bundle"
    shutil.copytree(bert_bundle, target)
    before = (target / "bundle.json").read_bytes()
    for seconds in (0.4, 0.9, 1.4):
        process = subprocess.Popen(
            [sys.executable, "-m", "samescore", "export", "refusal-tiny", "-o", str(target)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(seconds)
        process.send_signal(how)
        process.wait(timeout=60)
        if (target / "bundle.json").read_bytes() != before:
            break  # it was published before the signal came: then the new bundle must be whole
    assert verify(target).passed
    if how == signal.SIGTERM:
        assert os.listdir(tmp_path) == ["bundle"]


def test_verify_of_a_bundle_that_this_box_cannot_run_is_no_pass(bert_bundle, tmp_path):
    """Nothing measured must never read as passed."""
    copy = tmp_path / "bundle"
    shutil.copytree(bert_bundle, copy)
    manifest = json.loads((copy / "bundle.json").read_text())
    manifest["variants"] = [variant | {"target": "cuda"} for variant in manifest["variants"][:1]]
    (copy / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(ProviderError, match=r"no variant of this bundle can run here: it holds cpu-int8 \(for cuda\)"):
        verify(copy)
