"""The benchmarks run and say what they should; what they measure is no test's business."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.slow]
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_llama(llama_checkpoint, tmp_path):
    """Ours in float32 against PyTorch: same logits in every mode, ratios, memory, and processes that idle."""
    command = [sys.executable, str(BENCHMARKS / "llama.py"), "--checkpoint", str(llama_checkpoint)]
    command += ["--work", str(tmp_path / "work"), "--contenders", "ours,torch-fp32", "--variant", "cpu-fp32"]
    command += ["--rounds", "2", "--lengths", "16,32", "--mixed", "8,20,5", "--group", "20:4,6"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    rows = {(row["workload"], row["contender"], row["mode"]): row for row in document["rows"]}
    assert set(rows) == {
        *((f"1 x {n} tokens", name, "one_by_one") for n in (16, 32) for name in ("ours", "torch-fp32")),
        *(("3 mixed texts", *row) for row in (("ours", "one_by_one"), ("ours", "workers"))),
        *(("20 + 2 responses", *row) for row in (("ours", "one_by_one"), ("ours", "group"))),
        *((workload, "torch-fp32", "one_by_one") for workload in ("3 mixed texts", "20 + 2 responses")),
    }
    for row in rows.values():
        assert row["max_logit_difference"] < 1e-4
        assert row["x_torch_fp32"] > 0
        assert row["x_best_openvino"] is None
        assert len(row["times"]) == 2
    for entry in document["contenders"].values():
        assert "error" not in entry
        assert entry["idle_cpu"] < 0.2
        assert entry["memory"]["load"]["peak_rss_mib"] > 10


def test_llama_says_which_contender_failed(llama_checkpoint, tmp_path):
    command = [sys.executable, str(BENCHMARKS / "llama.py"), "--checkpoint", str(llama_checkpoint)]
    command += ["--work", str(tmp_path / "work"), "--contenders", "ours", "--variant", "no-such"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert "no-such" in document["contenders"]["ours"]["error"]
    assert document["rows"] == []


def test_scorer(llama_base, tmp_path):
    """The scores of a language model's label tokens, ours against PyTorch; a prompt's beginning read once changes nothing."""
    tokenizer = Tokenizer.from_file(str(llama_base / "tokenizer.json"))
    labels = [text for text in "abcdefghij0123456789" if len(tokenizer.encode(text, add_special_tokens=False).ids) == 1]
    command = [sys.executable, str(BENCHMARKS / "scorer.py"), "--checkpoint", str(llama_base)]
    command += ["--label-tokens", ",".join(labels[:3]), "--work", str(tmp_path / "work")]
    command += ["--contenders", "ours-fp32,torch-fp32", "--rounds", "2", "--lengths", "16,32"]
    command += ["--before", "20", "--after", "4", "--articles", "8"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    rows = {(row["workload"], row["contender"], row["mode"]): row for row in document["rows"]}
    assert set(rows) == {
        *((f"1 x {n} tokens", name, "one_by_one") for n in (16, 32) for name in ("ours-fp32", "torch-fp32")),
        *(("article of 8", "ours-fp32", mode) for mode in ("one_by_one", "prefixed")),
    }
    assert all("error" not in entry for entry in document["contenders"].values())
    for row in rows.values():
        if row["workload"] != "article of 8":
            assert row["max_logit_difference"] < 1e-4 and row["x_torch_fp32"] > 0
    (saving,) = document["prefix_saves"]
    assert saving["workload"] == "article of 8" and saving["share"] < 1
    assert saving["max_logit_change"] < 1e-5
