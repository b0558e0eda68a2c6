"""Runs that were killed go on, and give what an uninterrupted run gives, byte for byte."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from samescore import export_bundle, verify
from samescore.calibrate import certify, reference

from .conftest import WORDS

pytestmark = pytest.mark.torch

COUNT = 400


@pytest.fixture(scope="module")
def many_texts(tmp_path_factory):
    chance, words = np.random.default_rng(0), WORDS.split()
    path = tmp_path_factory.mktemp("many") / "golden.jsonl"
    texts = [" ".join(chance.choice(words, chance.integers(2, 40))) + f" {i}" for i in range(COUNT)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def start(checkpoint, output, golden, cache, *options):
    command = [
        "export",
        checkpoint,
        "-o",
        output,
        "--golden",
        golden,
        "--variant",
        "cpu-fp32",
        "--tokenization-texts",
        0,
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "samescore", *map(str, command), "--profile", "refusal", *options],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "SAMESCORE_CACHE": str(cache)},
    )


def kept(cache, what):
    """Rows by the first line of each file of the cache that is of this kind."""
    found = {}
    for path in (cache / "logits").glob("*.jsonl") if (cache / "logits").is_dir() else ():
        head, *rows = path.read_bytes().split(b"\n")
        if head and json.loads(head)["key"]["what"] == what:
            found[head] = len([row for row in rows if row.endswith(b"}")])
    return found


def kill_when(process, condition):
    end = time.monotonic() + 120
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_killed_export_goes_on(bert_checkpoint, many_texts, tmp_path):
    cache = tmp_path / "cache"
    whole = start(bert_checkpoint, tmp_path / "whole", many_texts, tmp_path / "other")
    assert whole.wait(timeout=200) == 0, whole.stderr.read()
    whole.communicate()
    killed = start(bert_checkpoint, tmp_path / "b", many_texts, cache)
    assert kill_when(killed, lambda: max(kept(cache, "reference").values(), default=0) >= 50) == -signal.SIGKILL
    (before,) = kept(cache, "reference").values()
    assert 50 <= before < COUNT and not (tmp_path / "b").exists()
    again = start(bert_checkpoint, tmp_path / "b", many_texts, cache)
    _, said = again.communicate(timeout=200)
    assert again.returncode == 0, said
    assert f"PyTorch float32 reference on {COUNT} texts, {before} of {COUNT} from an earlier run" in said
    assert list(kept(cache, "reference").values()) == [COUNT, COUNT]  # no text twice, float32 and bfloat16
    assert contents(tmp_path / "b") == contents(tmp_path / "whole")
    third = start(bert_checkpoint, tmp_path / "b", many_texts, cache)
    _, said = third.communicate(timeout=200)
    assert said.count(f"{COUNT} of {COUNT} from an earlier run") == 3
    assert contents(tmp_path / "b") == contents(tmp_path / "whole")


@pytest.fixture
def computed(monkeypatch):
    """How many texts PyTorch and the variants computed."""
    counts = {"reference": 0, "variant": 0}
    compute, score_all = reference._compute, certify.score_all

    def counting(checkpoint, input_ids, *rest):
        counts["reference"] += len(input_ids)
        return compute(checkpoint, input_ids, *rest)

    def scoring(reader, sequences, *, rows, **options):
        counts["variant"] += sum(rows.get(ids) is None for ids in sequences)
        return score_all(reader, sequences, rows=rows, **options)

    monkeypatch.setattr(reference, "_compute", counting)
    monkeypatch.setattr(certify, "score_all", scoring)
    return counts


def taken(counts):
    """The counts since the last call."""
    found = dict(counts)
    counts.update(reference=0, variant=0)
    return found


def test_only_what_is_not_known_is_computed(bert_checkpoint, texts_files, tmp_path, computed):
    settings = {"profile": "refusal", "calibration": texts_files[1], "tokenization_texts": 0, "variants": ["cpu-fp32"]}
    lines = texts_files[0].read_text().splitlines()
    some = tmp_path / "some.jsonl"
    some.write_text("\n".join(lines[:20]))
    export_bundle(bert_checkpoint, tmp_path / "a", golden=some, **settings)
    assert taken(computed) == {"reference": 40, "variant": 20}  # float32 and bfloat16
    export_bundle(bert_checkpoint, tmp_path / "b", golden=texts_files[0], **settings)
    assert taken(computed) == {"reference": 80, "variant": 40}
    export_bundle(bert_checkpoint, tmp_path / "c", golden=texts_files[0], **settings)
    assert taken(computed) == {"reference": 0, "variant": 0}
    assert contents(tmp_path / "c") == contents(tmp_path / "b")
    export_bundle(bert_checkpoint, tmp_path / "d", golden=texts_files[0], fresh=True, **settings)
    assert taken(computed) == {"reference": 120, "variant": 60}
    assert contents(tmp_path / "d") == contents(tmp_path / "b")
    # Another variant needs its own numbers, and not PyTorch's again.
    export_bundle(bert_checkpoint, tmp_path / "e", golden=texts_files[0], **{**settings, "variants": ["migraphx-fp16"]})
    assert taken(computed) == {"reference": 0, "variant": 60}


def test_verify_measures_again_unless_told_to_resume(bert_bundle, bert_checkpoint, computed, capsys):
    verify(bert_bundle, reference=bert_checkpoint, variant="cpu-fp32")
    assert taken(computed) == {"reference": 60, "variant": 60}
    verify(bert_bundle, reference=bert_checkpoint, variant="cpu-fp32")
    assert taken(computed) == {"reference": 60, "variant": 60}
    resumed = verify(bert_bundle, reference=bert_checkpoint, variant="cpu-fp32", resume=True, progress=True)
    assert taken(computed) == {"reference": 0, "variant": 0} and resumed.passed
    assert capsys.readouterr().err.count("60 of 60 from an earlier run") == 2


@pytest.mark.parametrize("version", [("0.0", "5"), ("2", "0.0")])
def test_other_versions_do_not_mix(bert_bundle, bert_checkpoint, computed, monkeypatch, version):
    verify(bert_bundle, reference=bert_checkpoint, variant="cpu-fp32")
    taken(computed)
    monkeypatch.setattr(reference, "reference_versions", lambda: version)
    verify(bert_bundle, reference=bert_checkpoint, variant="cpu-fp32", resume=True)
    assert taken(computed) == {"reference": 60, "variant": 0}


def test_label_mass_is_kept_too(scorer_bundle, language_model, computed):
    first = verify(scorer_bundle, reference=language_model, variant="cpu-fp32")
    assert taken(computed)["reference"] > 0
    again = verify(scorer_bundle, reference=language_model, variant="cpu-fp32", resume=True)
    assert taken(computed) == {"reference": 0, "variant": 0}
    assert again.certificate.to_json() == first.certificate.to_json()
    assert again.certificate.reference.label_mass_mean is not None
