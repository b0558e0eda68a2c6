"""`samescore compare`: one bundle against another, on the same texts, without a reference."""

import hashlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from samescore import compare
from samescore.comparing import parse_tolerance
from samescore.runtime.errors import InputError, UsageError


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "samescore", "compare", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )


def edited(bundle, folder, change, **files):
    """A copy of a bundle with another manifest (`change(document)`) and other bytes in some files."""
    shutil.copytree(bundle, folder)
    document = json.loads((folder / "bundle.json").read_text())
    for name, raw in files.items():
        name = name.replace("_json", ".json")
        (folder / name).write_bytes(raw)
        document["files"][name] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    change(document)
    (folder / "bundle.json").write_text(json.dumps(document))
    return folder


def test_a_bundle_equals_itself(bert_bundle):
    result = compare(bert_bundle, bert_bundle)
    assert result.passed and result.identical and result.other_ids == 0 and result.flips == ()
    assert result.drift.max_abs_dp == 0 and result.drift.texts == 60
    assert (result.a.variant, result.b.variant, result.tolerance_name) == ("cpu-int8", "cpu-int8", "int8")
    assert result.quality_a == result.quality_b and result.quality_a.texts == 60


def test_int8_against_fp32_is_what_the_certificate_measured(bert_bundle):
    result = compare(bert_bundle, bert_bundle, variant_a="cpu-fp32", variant_b="cpu-int8")
    certified = json.loads((bert_bundle / "parity.json").read_text())["variants"]["cpu-int8"]["drift"]
    assert result.passed and not result.identical and result.tolerance_name == "int8"
    # The fp32 variant differs from the reference by some 1e-6.
    assert result.drift.max_abs_dp == pytest.approx(certified["max_abs_dp"], abs=1e-5)
    assert result.drift.mean_abs_dp == pytest.approx(certified["mean_abs_dp"], abs=1e-6)
    strict = compare(bert_bundle, bert_bundle, variant_a="cpu-fp32", variant_b="cpu-int8", tolerance="fp32")
    assert not strict.passed and "max_abs_dp" in strict.verdict.failures[0]


def test_labels_are_matched_by_name(bert_bundle, tmp_path):
    def swap(document):
        document["labels"].reverse()

    swapped = edited(bert_bundle, tmp_path / "swapped", swap)
    result = compare(bert_bundle, swapped)
    # The graph was not swapped, so each label now has the other's probability: p against 1 - p.
    margins = [flip.margin_a for flip in result.flips]
    assert not result.passed and len(result.flips) == result.drift.texts
    assert result.drift.max_abs_dp == pytest.approx(max(margins), abs=1e-9)
    assert all(flip.label_a != flip.label_b and flip.margin_a == flip.margin_b for flip in result.flips)
    assert result.quality_a.accuracy == pytest.approx(1 - result.quality_b.accuracy)
    assert any("matched by name" in note for note in result.notes)


def test_other_labels_are_refused(bert_bundle, tmp_path):
    def rename(document):
        document["labels"] = ["yes", "no"]

    with pytest.raises(UsageError, match=r"has Non-refusal, Refusal \(softmax\); .* has yes, no \(softmax\)"):
        compare(bert_bundle, edited(bert_bundle, tmp_path / "renamed", rename))

    def sigmoid(document):
        document["activation"] = "sigmoid"

    with pytest.raises(UsageError, match=r"other things by a probability.*\(softmax\);.*\(sigmoid\)"):
        compare(bert_bundle, edited(bert_bundle, tmp_path / "sigmoid", sigmoid))


def test_another_tokenizer_is_counted(bert_bundle, tmp_path):
    tokenizer = json.loads((bert_bundle / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "bread"}, "content": "salt"}
    raw = json.dumps(tokenizer, ensure_ascii=False).encode()
    other = edited(bert_bundle, tmp_path / "other", lambda document: None, tokenizer_json=raw)
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "bread and salt"}\n{"text": "salt"}\n{"text": "here is bread"}\n')
    result = compare(bert_bundle, other, texts=texts)
    assert result.drift.texts == 3 and result.other_ids == 2
    assert result.quality_a is None and result.quality_b is None
    assert result.drift.max_abs_dp > 0


def test_a_text_that_only_one_can_read(bert_bundle, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "bread"}\n{"prompt": "p", "response": "r"}\n')
    with pytest.raises(InputError, match=r"A \(.*\) cannot read text 1: a line needs exactly one of `text`"):
        compare(bert_bundle, bert_bundle, texts=texts)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("int7", "Did you mean 'int8'"),
        ("p99=small", "is no number"),
        ("p99=2", "between 0 and 1"),
        ("p98=1e-3", "Did you mean 'p99'"),
        ("p99=nan", "between 0 and 1"),
    ],
)
def test_bad_tolerances(text, said):
    with pytest.raises(UsageError, match=said):
        parse_tolerance(text)


def test_a_tolerance_bounds_only_what_it_names(bert_bundle):
    sides = {"variant_a": "cpu-fp32", "variant_b": "cpu-int8"}
    measured = compare(bert_bundle, bert_bundle, **sides).drift.mean_abs_dp
    assert compare(bert_bundle, bert_bundle, tolerance=f"mean={measured * 1.5}", **sides).passed
    failed = compare(bert_bundle, bert_bundle, tolerance=f"mean={measured / 1.5},max=1", **sides)
    assert len(failed.verdict.failures) == 1 and "mean_abs_dp" in failed.verdict.failures[0]


def test_the_command(bert_bundle):
    same = run(bert_bundle, bert_bundle)
    assert same.returncode == 0 and "bit for bit" in same.stdout and "PASS" in same.stdout
    sides = ("--variant-a", "cpu-fp32", "--variant-b", "cpu-int8")
    beyond = run(bert_bundle, bert_bundle, *sides, "--tolerance", "p99=1e-6")
    assert beyond.returncode == 1 and "FAIL" in beyond.stdout and "p99_abs_dp" in beyond.stdout
    document = json.loads(run(bert_bundle, bert_bundle, *sides, "--json").stdout)
    assert document["passed"] and document["drift"]["texts"] == 60 and document["a"]["variant"] == "cpu-fp32"
    assert np.isfinite(document["drift"]["kld"]) and document["tolerance_name"] == "int8"
    wrong = run(bert_bundle, bert_bundle, "--variant-b", "cpu-int9")
    assert wrong.returncode == 2 and "Did you mean 'cpu-int8'" in wrong.stderr
    assert run(bert_bundle, "nowhere").returncode == 3


def test_a_recalibration_is_what_a_user_gets(bert_bundle, tmp_path):
    numbers = {"kld": 0.0, "mean_abs_dp": 0.0, "p99_abs_dp": 0.0, "ece": None, "brier": None, "nll": None}
    correction = {
        "method": "temperature",
        "fitted_to": "reference",
        "scale": [0.5, 0.5],
        "bias": [0.0, 0.0],
        "curves": [],
        "texts_fitted": 60,
        "texts_held_out": 30,
        "texts_sha256": "0" * 64,
        "before": numbers,
        "after": numbers,
    }

    def halve(document):
        document["variants"][0]["recalibration"] = correction

    changed = edited(bert_bundle, tmp_path / "b", halve)
    result = compare(bert_bundle, changed)
    assert not result.identical and result.drift.max_abs_dlogit > 0.1
