"""The benchmarks run and say what they should; what they measure is no test's business."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from .conftest import label_tokens, tiny_qwen3_5, train_tokenizer

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


def test_generator(tmp_path):
    """Reading and writing, ours against PyTorch, and ours behind longer texts."""
    checkpoint = tiny_qwen3_5(tmp_path / "checkpoint", multimodal=True)
    command = [sys.executable, str(BENCHMARKS / "generator.py"), "--checkpoint", str(checkpoint)]
    command += ["--work", str(tmp_path / "work"), "--contenders", "ours-int8,torch-bf16", "--rounds", "2"]
    command += ["--lengths", "16,32", "--prompt", "8", "--decode", "4", "--contexts", "20,300"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    rows = {(row["workload"], row["contender"]): row for row in document["rows"]}
    both, alone = ("read 16", "read 32", "write 4"), ("write 4 at 20", "write 4 at 300")
    assert set(rows) == {
        *((workload, name) for workload in both for name in ("ours-int8", "torch-bf16")),
        *((workload, "ours-int8") for workload in alone),
    }
    for (workload, name), row in rows.items():
        assert len(row["times"]) == 2 and row["tokens_per_s"] > 0 and row["peak_rss_mib"] > 10
        assert ("over_shortest" in row) == (workload in alone)
        assert set(row.get("ratios", ())) == ({"torch-bf16"} if name == "ours-int8" and workload in both else set())
    for entry in document["contenders"].values():
        assert "error" not in entry
        assert entry["load_s"] > 0 and entry["file_mib"] > 0 and entry["idle_cpu"] < 0.2


def test_generator_compares_numbers(llama_base, tmp_path):
    """With PyTorch in float32 among the contenders: the same logits and the same tokens. Another cannot be made, and says so."""
    config = json.loads((llama_base / "config.json").read_text())
    work = tmp_path / "work"
    (work / "cpu-int8").mkdir(parents=True)
    (work / "cpu-int8.log").mkdir()  # where nothing can be written
    command = [sys.executable, str(BENCHMARKS / "generator.py"), "--checkpoint", str(llama_base), "--work", str(work)]
    command += ["--contenders", "ours-int8,ours-fp32,torch-fp32", "--rounds", "1", "--lengths", "16"]
    command += ["--prompt", "8", "--decode", "4", "--contexts", "20"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["config"]["vocab_size"] == config["vocab_size"]
    rows = {(row["workload"], row["contender"]): row for row in document["rows"]}
    assert rows["read 16", "ours-fp32"]["max_logit_difference"] < 1e-4
    assert rows["read 16", "ours-fp32"]["kld"] < 1e-8 and rows["read 16", "ours-fp32"]["same_top"]
    assert rows["write 4", "ours-fp32"]["same_tokens"] == 5
    for workload in ("read 16", "write 4", "write 4 at 20"):
        assert "cpu-int8.log" in rows[workload, "ours-int8"]["error"]
    assert "cpu-int8.log" in document["contenders"]["ours-int8"]["error"]


GPU = [sys.executable, str(BENCHMARKS / "gpu.py")]


def test_gpu_on_the_cpu(tmp_path):
    """The whole path over tiny shapes: every model's parity, placement and times against PyTorch."""
    train_tokenizer(tmp_path / "tokenizer")
    labels = ",".join(label_tokens(tmp_path / "tokenizer", 3))
    command = [*GPU, "--device", "cpu", "--tiny", "--tokenizer", str(tmp_path / "tokenizer"), "--label-tokens", labels]
    command += ["--work", str(tmp_path / "work"), "--batches", "1,2", "--lengths", "16", "--rounds", "2"]
    done = subprocess.run([*command, "--contenders", "torch-bf16"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert set(document["models"]) == {"realigned", "e5", "qwen-0.8b", "political-leaning"}
    assert document["failures"] == []
    for name, model in document["models"].items():
        assert set(model["parity"]) == set(model["placement"]) and len(model["parity"]) >= 1
        for variant, parity in model["parity"].items():
            assert parity["max_dp"] <= (5e-3 if "fp16" in variant else 5e-2)
        for placed in model["placement"].values():
            assert set(placed["live"]) == {"CPUExecutionProvider"} and placed["same"] is None
        rows = [row for row in document["rows"] if row["model"] == name]
        assert {(row["contender"], row["batch"]) for row in rows} == {
            (contender, batch) for contender in [*model["parity"], "torch-bf16"] for batch in (1, 2)
        }
        assert all(row["x_torch-bf16"] > 0 and len(row["times"]) == 2 for row in rows)


def test_gpu_says_what_is_missing(tmp_path):
    """Without a device: exit code 4 and a sentence. Where there is one, this box is no subject."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = subprocess.run([*GPU, "--work", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 4 and not done.stdout
    assert "finds no CUDA device; --device cpu --tiny" in done.stderr
    assert list(tmp_path.iterdir()) == []
