"""The start-up canary: it sings when this box's numbers are not the certified ones, and costs nothing where nothing differs."""

import hashlib
import json
import logging
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from samescore import export_bundle, load
from samescore.calibrate.canary import LEAST_TEXTS, TEXTS, choose_texts
from samescore.calibrate.gate import TOLERANCES
from samescore.calibrate.golden import read_golden
from samescore.calibrate.metrics import measure
from samescore.runtime import BundleError, CanaryError, UsageError, canary
from samescore.runtime.prefill import Reader

from ..conftest import train_tokenizer

pytestmark = pytest.mark.torch


def edited(bundle, folder, edit):
    """A copy whose canary.json went through `edit`, listed with its new digest."""
    copy = folder / "edited"
    shutil.copytree(bundle, copy)
    document = json.loads((copy / "canary.json").read_text())
    edit(document)
    raw = json.dumps(document).encode()
    (copy / "canary.json").write_bytes(raw)
    manifest = json.loads((copy / "bundle.json").read_text())
    manifest["files"]["canary.json"] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (copy / "bundle.json").write_text(json.dumps(manifest))
    return copy


def other_cpu(monkeypatch):
    monkeypatch.setattr(canary, "cpu_model", lambda: "Another CPU")


def biased(monkeypatch, shift=0.5):
    """Every first logit is off by that much."""
    logits = Reader.logits

    def wrong(self, ids, state=None):
        row = logits(self, ids, state).copy()
        row[0] += shift
        return row

    monkeypatch.setattr(Reader, "logits", wrong)


@pytest.mark.parametrize("name", ["bert_bundle", "llama_bundle", "scorer_bundle"])
def test_a_bundle_passes_where_it_was_made(request, name):
    """Bit for bit the certified logits, through the same prefix, for every variant."""
    bundle = request.getfixturevalue(name)
    document = json.loads((bundle / "canary.json").read_text())
    for variant in document["variants"]:
        result = load(bundle, provider="cpu", variant=variant, canary="refuse").canary
        assert (result.status, result.max_moved) == ("passed", 0.0)
        assert LEAST_TEXTS <= result.texts <= len(document["texts"]) <= TEXTS


def test_what_it_holds(bert_bundle):
    document = json.loads((bert_bundle / "canary.json").read_text())
    golden = read_golden(bert_bundle / "golden.jsonl.gz")
    known = {tuple(text.input_ids): [float(x).hex() for x in text.logits] for text in golden.texts}
    assert all(known[tuple(text["input_ids"])] == text["reference"] for text in document["texts"])
    parity = json.loads((bert_bundle / "parity.json").read_text())["environment"]
    for name, variant in document["variants"].items():
        p99 = TOLERANCES[name.rpartition("-")[2]].p99_abs_dp
        assert variant["allowed_max"] == p99 and variant["allowed_mean"] == max(p99 / 20, 5e-6)
        expected = {key: parity[key] for key in ("onnxruntime", "cpu", "int8_flags")}
        assert variant["environment"] == {"provider": "cpu", **expected}
    assert (bert_bundle / "canary.json").stat().st_size < 64 * 1024


def test_its_texts_are_a_sample(bert_bundle):
    """Every label, near and clear decisions, and so do the first few."""
    golden = read_golden(bert_bundle / "golden.jsonl.gz")
    rng = np.random.default_rng(0)
    logits = np.column_stack([np.linspace(-3, 1, len(golden.texts)), np.zeros(len(golden.texts))]).astype(np.float32)
    rng.shuffle(logits)
    texts = tuple(replace(text, logits=row) for text, row in zip(golden.texts, logits, strict=True))
    chosen = choose_texts(replace(golden, texts=texts), "softmax", np.zeros(0, np.int64))
    assert len(chosen) == len(set(chosen)) == TEXTS
    difference = logits[chosen, 0] - logits[chosen, 1]
    assert np.sum(difference > 0) >= 8 and np.ptp(difference) > 3.5
    assert {*np.sign(difference[:2])} == {-1, 1} and np.ptp(difference[:8]) > 1.5
    assert max(len(golden.texts[i].input_ids) for i in chosen) <= 64


def test_the_same_environment_needs_no_canary(bert_bundle, monkeypatch, caplog):
    monkeypatch.setattr(Reader, "logits", lambda *_: pytest.fail("nothing is to be scored"))
    with caplog.at_level(logging.DEBUG, "samescore"):
        result = load(bert_bundle).canary
    assert (result.status, result.texts, result.seconds) == ("skipped", 0, 0.0)
    assert "not needed" in caplog.text


def test_another_cpu_with_the_same_numbers_passes(bert_bundle, monkeypatch, caplog):
    other_cpu(monkeypatch)
    with caplog.at_level(logging.INFO, "samescore"):
        result = load(bert_bundle).canary
    assert result.status == "passed" and result.max_moved == 0.0 and "CPU Another CPU (was " in caplog.text


@pytest.mark.parametrize(("bundle", "allowed"), [("bert_bundle", "2e-02"), ("scorer_bundle", "1e-05")])
def test_a_planted_fault_is_flagged(request, bundle, allowed, monkeypatch, caplog):
    other_cpu(monkeypatch)
    biased(monkeypatch)
    classifier = load(request.getfixturevalue(bundle), provider="cpu")
    assert classifier.canary.status == "tripped" and classifier.canary.max_moved > 0.02
    record = next(record for record in caplog.records if record.levelno == logging.WARNING)
    said = record.getMessage()
    assert "CPU Another CPU (was " in said and "samescore verify BUNDLE" in said and f"allowed {allowed}" in said
    assert classifier("bread").label, "flag goes on"


def test_refuse_always_checks_and_raises(bert_bundle, monkeypatch):
    biased(monkeypatch)
    with pytest.raises(
        CanaryError, match=r"canary of cpu-int8 tripped, and nothing is scored.*differs from there: nothing known"
    ):
        load(bert_bundle, canary="refuse")
    assert load(bert_bundle, canary="off").canary.status == "skipped"


def test_certified_numbers_that_are_others_trip_it(bert_bundle, tmp_path):
    """A bundle that says it gave other probabilities where it was certified."""

    def edit(document):
        rows = document["variants"]["cpu-int8"]["logits"]
        rows[-1] = [(float.fromhex(value) + sign).hex() for value, sign in zip(rows[-1], (1, -1), strict=True)]

    copy = edited(bert_bundle, tmp_path, edit)
    with pytest.raises(CanaryError, match="tripped"):
        load(copy, canary="refuse")
    assert load(copy, variant="cpu-fp32", canary="refuse").canary.status == "passed"
    command = [sys.executable, "-m", "samescore", "classify", str(copy), "bread", "--canary"]
    done = {policy: subprocess.run([*command, policy], capture_output=True, text=True) for policy in ("refuse", "off")}
    assert done["refuse"].returncode == 1 and done["refuse"].stdout == ""
    assert "samescore: canary of cpu-int8 tripped" in done["refuse"].stderr
    assert done["off"].returncode == 0 and "canary" not in done["off"].stderr


def test_logits_that_are_not_finite_trip_it(bert_bundle, monkeypatch):
    biased(monkeypatch, shift=np.nan)
    with pytest.raises(CanaryError, match="tripped.*moved by up to inf"):
        load(bert_bundle, canary="refuse")


def test_no_time_is_no_proof(bert_bundle, monkeypatch, caplog):
    """Over the budget after the first text: skipped with a reason, unless proof was asked for."""
    monkeypatch.setattr(canary, "BUDGET_SECONDS", -1.0)
    other_cpu(monkeypatch)
    with caplog.at_level(logging.INFO, "samescore"):
        result = load(bert_bundle).canary
    assert (result.status, result.texts) == ("skipped", 1) and "only 1 of" in caplog.text
    # Proof was asked for: all texts, however long that takes.
    proven = load(bert_bundle, canary="refuse").canary
    assert (proven.status, proven.texts) == ("passed", TEXTS)


def test_max_abs_dp_is_the_certificates(bert_bundle):
    """The drift it names is that of the certificate over the same texts."""
    document = json.loads((bert_bundle / "canary.json").read_text())
    reference = np.array([[float.fromhex(x) for x in text["reference"]] for text in document["texts"]], np.float32)
    classifier = load(bert_bundle, canary="refuse")
    logits = classifier.logits([np.array(text["input_ids"]) for text in document["texts"]])
    drift = measure(reference, logits, classifier.labels, "softmax")
    assert classifier.canary.max_abs_dp == drift.max_abs_dp > 0


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(schema_version=2), "schema version 2; this samescore reads 1"),
        (lambda d: d["variants"].pop("cpu-int8"), "knows no variant 'cpu-int8'; it knows: cpu-fp32"),
        (lambda d: d["variants"]["cpu-int8"]["logits"].pop(), "needs a row of 2 logits for each text"),
        (lambda d: d["texts"][0].update(input_ids=[]), "each with token ids"),
        (lambda d: d["texts"][0].update(input_ids=["x"]), r"texts\[0\]\.input_ids\[0\]: expected int"),
        (lambda d: d["texts"][0].update(reference=["zz", "0x1p+0"]), "not a hexadecimal float"),
        (lambda d: d.update(extra=1), "unknown key 'extra'"),
    ],
)
def test_a_wrong_file_is_refused_by_name(bert_bundle, tmp_path, edit, message):
    copy = edited(bert_bundle, tmp_path, edit)
    with pytest.raises(BundleError, match=message):
        load(copy, canary="refuse")


def test_a_bundle_without_one(bert_bundle, tmp_path):
    copy = edited(bert_bundle, tmp_path, lambda document: None)
    manifest = json.loads((copy / "bundle.json").read_text())
    del manifest["files"]["canary.json"]
    (copy / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"holds no canary\.json: export it again, or load it with canary='off'"):
        load(copy)
    assert load(copy, canary="off")("bread").label


def test_an_unknown_policy_is_named(bert_bundle):
    with pytest.raises(UsageError, match=r"unknown canary policy 'refused'; policies are flag, refuse, off.*'refuse'"):
        load(bert_bundle, canary="refused")


def test_long_texts_are_few(bert_bundle):
    """At most so many tokens in all, and no long text among short ones; but never fewer texts than prove something."""
    golden = read_golden(bert_bundle / "golden.jsonl.gz")
    for lengths, expected in (([100] * 30, 20), ([2000] + [64] * 40, 32), ([3000] * 8, 4), ([5, 6, 7], 3)):
        texts = tuple(
            replace(text, input_ids=np.ones(length, np.int64))
            for text, length in zip(golden.texts, lengths, strict=False)
        )
        chosen = choose_texts(replace(golden, texts=texts), "softmax", np.zeros(0, np.int64))
        assert len(chosen) == expected and (0 not in chosen or lengths[0] != 2000)


def test_a_traced_graph_has_one_too(texts_files, tmp_path, monkeypatch):
    """An architecture of the generic route: certified, passed, and tripped by a fault."""
    torch = pytest.importorskip("torch")
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    vocabulary = train_tokenizer(tmp_path / "checkpoint")
    torch.manual_seed(3)
    sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 64}
    config = DistilBertConfig(vocab_size=vocabulary, num_labels=2, **sizes)
    DistilBertForSequenceClassification(config).eval().save_pretrained(tmp_path / "checkpoint")
    export_bundle(tmp_path / "checkpoint", tmp_path / "b", golden=texts_files[0], calibration=texts_files[1])
    result = load(tmp_path / "b", canary="refuse").canary
    assert (result.status, result.texts, result.max_moved) == ("passed", TEXTS, 0.0)
    biased(monkeypatch)
    with pytest.raises(CanaryError, match="canary of cpu-fp32 tripped"):
        load(tmp_path / "b", canary="refuse")


@pytest.mark.parametrize(("shift", "status"), [(0.04, "passed"), (2.0, "tripped")])
def test_another_provider_is_held_against_pytorch(bert_bundle, monkeypatch, shift, status):
    """Its kernels round otherwise everywhere: the gate's largest counts, not the move from the certified box."""
    biased(monkeypatch, shift=shift)
    read = canary.read_canary

    def certified_elsewhere(bundle, variant):
        found = read(bundle, variant)
        entry = found.variants[variant]
        moved = replace(entry, environment=replace(entry.environment, provider="cuda"))
        return replace(found, variants={variant: moved})

    monkeypatch.setattr("samescore.runtime.classifier.read_canary", certified_elsewhere)
    assert load(bert_bundle).canary.status == status
