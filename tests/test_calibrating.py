"""`samescore calibrate` on whole bundles: what is stored, what is refused, and that a bundle is never half-written."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from samescore import calibrate_bundle, export_bundle, load, verify
from samescore import calibrating as door
from samescore.calibrate.certificate import parse_certificate
from samescore.calibrate.golden import ReferenceInfo, encode_golden, read_golden, with_logits, write_golden
from samescore.calibrate.scores import read_scores
from samescore.cli import main
from samescore.runtime.bundle import Bundle
from samescore.runtime.errors import BundleError, InputError, UsageError
from samescore.runtime.prediction import probabilities_of
from samescore.runtime.tokenizer import TextEncoder

from .conftest import WORDS, tiny_bert

COUNT = 120


@pytest.fixture
def bundle(bert_bundle, tmp_path):
    return shutil.copytree(bert_bundle, tmp_path / "bundle")


def new_texts(count=COUNT, seed=0):
    chance = np.random.default_rng(seed)
    return [" ".join(chance.choice(WORDS.split(), chance.integers(2, 20))) + f" {i}" for i in range(count)]


def write_texts(path, texts, labels=None):
    lines = ({"text": text, **({"label": labels[i]} if labels else {})} for i, text in enumerate(texts))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def texts_with_reference(path, bundle, scale, variant="cpu-int8", texts=None):
    """Golden texts whose reference logits are `scale` times the variant's own."""
    plain = read_golden(write_texts(path, texts or new_texts()))
    with Bundle(bundle) as opened:
        encoder = TextEncoder(opened.read("tokenizer.json"), opened.manifest.contract)
        info = ReferenceInfo(opened.manifest.source.sha256, "float32", "0", "0", None, None, None, None)
    golden = encode_golden(plain, encoder)
    logits = load(bundle, variant=variant, raw=True).logits(golden.input_ids())
    path.write_bytes(write_golden(with_logits(golden, np.float32(scale * logits), info)))
    return path


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_correction_is_stored_applied_verified_and_removed(bundle, tmp_path):
    before, plain = contents(bundle), load(bundle, variant="cpu-int8").score(["bread and salt"])
    texts = texts_with_reference(tmp_path / "t.jsonl", bundle, 1.002)
    result = calibrate_bundle(bundle, texts=texts, variants=["cpu-int8"])
    outcome = result.variants["cpu-int8"]
    assert outcome.stored and not result.refused and list(result.variants) == ["cpu-int8"]
    found = result.manifest.variant("cpu-int8").recalibration
    assert found.scale == pytest.approx((1.002, 1.002), abs=1e-5)
    assert (found.texts_fitted, found.texts_held_out) == (80, 40)
    assert result.manifest.variant("cpu-fp32").recalibration is None
    after = contents(bundle)
    changed = {str(path) for path in after if after[path] != before.get(path)}
    assert changed == {"bundle.json", "parity.json", "README.md"} and after.keys() == before.keys()
    with Bundle(bundle) as opened:
        opened.verify_files()
        assert opened.manifest == result.manifest

    corrected = load(bundle, variant="cpu-int8").score(["bread and salt"])[0]
    assert corrected.logits == plain[0].logits
    assert corrected.margin == pytest.approx(1.002 * plain[0].margin, rel=1e-4)
    assert load(bundle, variant="cpu-int8", raw=True).score(["bread and salt"]) == plain
    stored = parse_certificate(after[next(p for p in after if p.name == "parity.json")]).variants["cpu-int8"]
    checked = verify(bundle, variant="cpu-int8").certificate.variants["cpu-int8"]
    assert checked.drift == stored.drift and checked.before == stored.before != stored.drift
    assert b"temperature 0.998 to the reference" in (bundle / "README.md").read_bytes()

    removed = calibrate_bundle(bundle, remove=True)
    assert list(removed.variants) == ["cpu-int8"] and contents(bundle) == before
    with pytest.raises(UsageError, match="nothing to remove"):
        calibrate_bundle(bundle, remove=True)


def test_the_certificate_judges_what_its_user_gets(bundle, tmp_path):
    """The stored drift is that of the corrected scores.npz against the golden reference."""
    texts = texts_with_reference(tmp_path / "t.jsonl", bundle, 1.004)
    result = calibrate_bundle(bundle, texts=texts, variants=["cpu-int8"])
    scores = read_scores((bundle / "scores.npz").read_bytes())["cpu-int8"].astype(np.float64)
    golden = read_golden(bundle / "golden.jsonl.gz").logits()
    scale = result.manifest.variant("cpu-int8").recalibration.scale[0]
    dp = [
        np.abs(probabilities_of(s * scores, "softmax") - probabilities_of(golden, "softmax")).max() for s in (1, scale)
    ]
    parity = result.certificate.variants["cpu-int8"]
    assert [parity.before.max_abs_dp, parity.drift.max_abs_dp] == pytest.approx(dp, rel=1e-9)


def test_a_correction_that_leaves_the_gate_is_refused(bundle, tmp_path):
    before = contents(bundle)
    texts = texts_with_reference(tmp_path / "t.jsonl", bundle, 0.5, "cpu-fp32")
    result = calibrate_bundle(bundle, texts=texts, variants=["cpu-fp32"])
    outcome = result.variants["cpu-fp32"]
    assert outcome.fit.outcome == "gain" and outcome.refused and not outcome.stored
    assert "it takes the golden set outside the tolerance: max_abs_dp" in outcome.reason
    assert outcome.fit.recalibration.scale == pytest.approx((0.5, 0.5), abs=1e-3)
    assert contents(bundle) == before


def test_worse_held_out_texts_leave_the_bundle_alone(bundle, tmp_path, capsys):
    texts = texts_with_reference(tmp_path / "t.jsonl", bundle, 1.0)
    golden = read_golden(texts)
    with Bundle(bundle) as opened:
        contract = opened.manifest.contract
    digests = [door.text_digest(text, contract) for text in golden.texts]
    sign = np.where(door.held_out_rows(digests), 1.3, 0.7).astype(np.float32)
    texts.write_bytes(write_golden(with_logits(golden, golden.logits() * sign[:, None], golden.reference)))
    before = contents(bundle)
    assert main(["calibrate", str(bundle), "--texts", str(texts), "--variant", "cpu-int8"]) == 1
    said = capsys.readouterr().out
    assert "not stored: refused, the held-out texts' KLD rises by" in said and "held out, after" in said
    assert contents(bundle) == before


@pytest.mark.torch
def test_pytorch_is_the_reference_and_exact_variants_have_nothing_to_gain(bundle, bert_checkpoint, tmp_path, capsys):
    texts, before = write_texts(tmp_path / "t.jsonl", new_texts()), contents(bundle)
    arguments = ["calibrate", bundle, "--texts", texts, "--reference", bert_checkpoint, "--variant", "cpu-fp32"]
    assert main([*map(str, arguments), "--method", "vector"]) == 0
    assert "not stored: no gain, it changes probabilities by" in capsys.readouterr().out
    assert contents(bundle) == before
    other = tiny_bert(tmp_path / "other", num_hidden_layers=2)
    with pytest.raises(UsageError, match="is not the checkpoint that the bundle was made from"):
        calibrate_bundle(bundle, texts=texts, reference=other)


def test_labels_need_no_reference_and_verify_still_passes(bundle, tmp_path):
    texts = new_texts(300)
    p = [list(x.probabilities.values()) for x in load(bundle, variant="cpu-fp32").score(texts)]
    soft = probabilities_of(np.log(p) * 0.3, "softmax")
    names = np.where(np.random.default_rng(0).uniform(size=300) < soft[:, 0], "Non-refusal", "Refusal").tolist()
    path = write_texts(tmp_path / "t.jsonl", texts, names)
    result = calibrate_bundle(bundle, texts=path, to="labels", variants=["cpu-fp32"])
    outcome = result.variants["cpu-fp32"]
    assert outcome.stored, outcome.reason
    numbers = outcome.fit.recalibration
    assert numbers.fitted_to == "labels" and numbers.before.kld is None
    assert numbers.after.nll < numbers.before.nll and numbers.after.ece < numbers.before.ece
    # Three standard errors: the tiny model says nearly the same of every text.
    assert numbers.scale[0] == pytest.approx(0.3, abs=0.35)
    assert verify(bundle, variant="cpu-fp32").passed


@pytest.mark.torch
def test_a_sigmoid_model_with_three_labels(tmp_path, texts_files):
    labels = {0: "a", 1: "b", 2: "c"}
    checkpoint = tiny_bert(
        tmp_path / "checkpoint",
        id2label=labels,
        label2id={name: k for k, name in labels.items()},
        problem_type="multi_label_classification",
    )
    folder = tmp_path / "bundle"
    export_bundle(
        checkpoint, folder, variants=["cpu-int8"], golden=texts_files[0], calibration=texts_files[1], allow_drift=True
    )
    texts = texts_with_reference(tmp_path / "t.jsonl", folder, 1.003)
    result = calibrate_bundle(folder, texts=texts, method="vector")
    assert result.manifest.activation == "sigmoid" and result.variants["cpu-int8"].stored
    assert result.manifest.variants[0].recalibration.scale == pytest.approx((1.003,) * 3, abs=1e-4)
    prediction = load(folder)("bread")
    wanted = probabilities_of(np.array(prediction.calibrated_logits), "sigmoid")
    assert list(prediction.probabilities.values()) == wanted.tolist()


def test_golden_texts_are_refused(bundle, tmp_path):
    texts = [text.record["text"] for text in read_golden(bundle / "golden.jsonl.gz").texts[:3]]
    path = texts_with_reference(tmp_path / "t.jsonl", bundle, 1.1, texts=[*new_texts(), *texts])
    with pytest.raises(UsageError, match=f"3 of {COUNT + 3} texts in .* are golden texts of the bundle"):
        calibrate_bundle(bundle, texts=path)


def test_what_cannot_be_fitted_to(bundle, tmp_path):
    few = texts_with_reference(tmp_path / "few.jsonl", bundle, 1.1, texts=new_texts(50) * 2)
    with pytest.raises(UsageError, match="50 different texts leave 16 to judge the fit by.* hand in 40 more"):
        calibrate_bundle(bundle, texts=few)
    plain = write_texts(tmp_path / "plain.jsonl", new_texts())
    with pytest.raises(UsageError, match="holds no reference logits"):
        calibrate_bundle(bundle, texts=plain)
    with pytest.raises(
        InputError, match=r"120 of 120 texts have no label that the bundle knows: `label` must be one of Non"
    ):
        calibrate_bundle(bundle, texts=plain, to="labels")
    odd = write_texts(tmp_path / "odd.jsonl", new_texts(), ["Refusal"] * 119 + ["Perhaps"])
    with pytest.raises(InputError, match=r"1 of 120 texts .* \(but 'Perhaps'\)"):
        calibrate_bundle(bundle, texts=odd, to="labels")
    with pytest.raises(UsageError, match="--texts FILE"):
        calibrate_bundle(bundle)
    with pytest.raises(UsageError, match="there is no method 'magic'; there are: temperature"):
        calibrate_bundle(bundle, texts=few, method="magic")
    with pytest.raises(UsageError, match="one of reference, labels, not to 'truth'"):
        calibrate_bundle(bundle, texts=few, to="truth")
    with pytest.raises(UsageError, match="name the adapter with --reference"):
        calibrate_bundle(bundle, texts=few, base="base")
    with pytest.raises(UsageError, match="has no variant 'cpu-int9'.*Did you mean 'cpu-int8'"):
        calibrate_bundle(bundle, texts=few, variants=["cpu-int9"])


def test_another_checkpoints_logits_are_refused(bundle, tmp_path):
    texts = texts_with_reference(tmp_path / "t.jsonl", bundle, 1.1)
    golden = read_golden(texts)
    texts.write_bytes(write_golden(replace(golden, reference=replace(golden.reference, checkpoint_sha256="f" * 64))))
    with pytest.raises(BundleError, match="belong to another checkpoint"):
        calibrate_bundle(bundle, texts=texts)


@pytest.mark.parametrize("where", ["model_card", "parse_manifest", "publish"])
def test_a_failure_leaves_the_old_bundle(bundle, tmp_path, monkeypatch, where):
    texts, before = texts_with_reference(tmp_path / "t.jsonl", bundle, 1.002), contents(bundle)

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(door, where, fail)
    with pytest.raises(OSError, match="no space left"):
        calibrate_bundle(bundle, texts=texts, variants=["cpu-int8"])
    assert contents(bundle) == before
    assert sorted(os.listdir(tmp_path)) == ["bundle", "t.jsonl"]


def test_a_damaged_or_mixed_bundle_is_not_rewritten(bundle, tmp_path):
    texts = texts_with_reference(tmp_path / "t.jsonl", bundle, 1.002)
    (bundle / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match=r"also holds notes\.txt, which would be lost"):
        calibrate_bundle(bundle, texts=texts, variants=["cpu-int8"])
    (bundle / "notes.txt").unlink()
    weights = bundle / "cpu-fp32" / "model.onnx.data"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(BundleError, match=r"cpu-fp32/model\.onnx\.data is damaged"):
        calibrate_bundle(bundle, texts=texts, variants=["cpu-int8"])
    assert sorted(os.listdir(tmp_path)) == ["bundle", "t.jsonl"]


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_scikit_learns_methods(bundle, tmp_path, method):
    pytest.importorskip("sklearn")
    texts = texts_with_reference(tmp_path / "t.jsonl", bundle, 1.002)
    result = calibrate_bundle(bundle, texts=texts, variants=["cpu-int8"], method=method)
    found = result.variants["cpu-int8"].fit.recalibration
    assert found.after.kld < found.before.kld and result.variants["cpu-int8"].stored
    load(bundle, variant="cpu-int8").score(["bread"])


def test_the_command(bundle, tmp_path, capsys):
    texts = texts_with_reference(tmp_path / "t.jsonl", bundle, 1.002)
    assert main(["calibrate", str(bundle), "--texts", str(texts), "--variant", "cpu-int8", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert not document["refused"] and document["variants"]["cpu-int8"]["stored"]
    assert main(["inspect", str(bundle)]) == 0
    assert (
        "recalibrated: temperature 0.998 to the reference, fitted on 80 texts; KLD of 40 others"
        in capsys.readouterr().out
    )
    rows = []
    for raw in ([], ["--raw"]):
        assert main(["classify", str(bundle), "bread", "--variant", "cpu-int8", *raw]) == 0
        rows.append(json.loads(capsys.readouterr().out))
    assert rows[0]["logits"] == rows[1]["logits"] and rows[0]["probability"] != rows[1]["probability"]
    assert main(["calibrate", str(bundle), "--texts", str(texts), "--variant", "cpu-int8"]) == 0
    table = capsys.readouterr().out
    assert ": stored" in table and "golden, before" in table and "PASS" in table
    assert main(["calibrate", str(bundle), "--remove"]) == 0
    assert "cpu-int8: the correction is removed" in capsys.readouterr().out
    assert main(["calibrate", str(bundle)]) == 2
    assert main(["calibrate", str(tmp_path / "none"), "--remove"]) == 3
