"""The command line as a user runs it: a subprocess, its streams and exit codes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest


def run(*arguments, stdin=None, env=None):
    return subprocess.run(
        [sys.executable, "-m", "samescore", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=not isinstance(stdin, bytes),
        env={**os.environ, **(env or {})},
        timeout=300,
    )


def objects(text):
    return [json.loads(line) for line in text.splitlines()]


def test_profiles():
    result = run("profiles")
    assert result.returncode == 0 and "agentlans/multilingual-e5-small-refusal-classifier" in result.stdout
    names = [profile["name"] for profile in json.loads(run("profiles", "--json").stdout)]
    assert names == ["refusal", "refusal-tiny", "realigned", "news-bias", "political-leaning", "civic-aligned"]


def test_classify_texts(bert_bundle):
    result = run("classify", bert_bundle, "bread and salt", "the model refuses")
    assert result.returncode == 0, result.stderr
    first, second = objects(result.stdout)
    assert first["text"] == "bread and salt" and second["label"] in ("Refusal", "Non-refusal")
    assert "provider auto: cpu with variant cpu-int8" in result.stderr


def test_classify_files(bert_bundle, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"id": 1, "text": "bread"}\n{"id": 2, "messages": [{"role": "user", "content": "salt"}]}\n')
    output = tmp_path / "out.jsonl"
    result = run("classify", bert_bundle, "-i", source, "-o", output, "--workers", "2", "--variant", "cpu-fp32")
    assert result.returncode == 0 and result.stdout == ""
    assert [record["id"] for record in objects(output.read_text())] == [1, 2]
    text = tmp_path / "in.txt"
    text.write_text("bread\nsalt\n")
    from_text = objects(run("classify", bert_bundle, "-i", text, "--variant", "cpu-fp32").stdout)
    assert from_text[0]["logits"] == objects(output.read_text())[0]["logits"]
    from_stdin = run("classify", bert_bundle, "-i", "-", "--variant", "cpu-fp32", stdin='{"text": "bread"}\n')
    assert objects(from_stdin.stdout)[0]["logits"] == from_text[0]["logits"]


def test_bad_lines_are_reported_and_the_rest_is_scored(bert_bundle, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"text": "bread"}\n{"text": "\xff"}\n{"other": 1}\n{"text": "salt"}\n')
    result = run("classify", bert_bundle, "-i", source)
    assert result.returncode == 3
    records = objects(result.stdout)
    assert ["label" in record for record in records] == [True, False, False, True]
    assert "line 2: not UTF-8" in result.stderr and "line 3: a line needs exactly one of" in result.stderr
    assert "2 of 4 lines could not be scored" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["classify", "{bundle}"], 2, "name texts to score, or a file with -i"),
        (["classify", "{bundle}", "x", "-i", "y.jsonl"], 2, "not both"),
        (["classify", "{bundle}", "-i", "missing.jsonl"], 3, "missing.jsonl cannot be read"),
        (["classify", "{bundle}", "-i", "table.csv"], 2, "neither .jsonl nor .txt"),
        (["classify", "{bundle}", "x", "-o", "no/such/folder/out.jsonl"], 2, "is no folder"),
        (["classify", "nowhere", "x"], 3, "no bundle at nowhere"),
        (["classify", "{bundle}", "x", "--provider", "tpu"], 2, "unknown provider 'tpu'; providers are auto"),
        (["classify", "{bundle}", "x", "--provider", "cuda"], 4, "not in this ONNX Runtime build"),
        (["classify", "{bundle}", "x", "--variant", "cpu-int7"], 2, "Did you mean 'cpu-int8'"),
        (["classify", "{bundle}", "x", "--workers", "0"], 2, "workers must be at least 1"),
        (["classify", "{bundle}", ""], 3, "the text is empty"),
        (["inspect", "nowhere"], 3, "no bundle at nowhere"),
        (["verify", "nowhere"], 3, "no bundle at nowhere"),
        (["export", "refusal", "-o", "{tmp}/b", "--profile", "refusl"], 2, "Did you mean 'refusal'"),
        (["export", "refusal-tiny", "-o", "{tmp}/b", "--label-tokens", "0,1"], 2, "is one already"),
        (["export", "{tmp}", "-o", "{tmp}/b"], 3, "holds no config.json"),
        (["export", "not-a-source", "-o", "{tmp}/b"], 2, "neither a profile"),
        (["export", "refusal-tiny", "-o", "{tmp}"], 2, "is not a bundle"),
        (["export", "refusal-tiny", "-o", "{tmp}/b", "--variant", "cpu-int9"], 2, "unknown variant 'cpu-int9'"),
        (["export", "refusal-tiny", "-o", "{tmp}/b", "--revision", "main"], 2, "names a hub commit"),
        (["export", "refusal-tiny", "-o", "{tmp}/b", "--golden", "missing.jsonl"], 3, "missing.jsonl cannot be read"),
        (["explode"], 2, "invalid choice"),
        ([], 2, "required: COMMAND"),
    ],
)
def test_wrong_use(bert_bundle, tmp_path, arguments, code, said):
    (tmp_path / "keep.txt").write_text("x")
    result = run(*(a.format(bundle=bert_bundle, tmp=tmp_path) for a in arguments))
    assert (result.returncode, result.stdout) == (code, "") or "the text is empty" in result.stdout
    assert said in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["keep.txt"]


def test_inspect(bert_bundle):
    result = run("inspect", bert_bundle)
    assert result.returncode == 0
    for said in ("BertForSequenceClassification", "conversation, 64 tokens", "cpu-int8", "migraphx-fp16", "gate PASS"):
        assert said in result.stdout
    document = json.loads(run("inspect", bert_bundle, "--json").stdout)
    assert document["manifest"]["labels"] == ["Non-refusal", "Refusal"]
    assert set(document["parity"]["variants"]) == {"cpu-int8", "cpu-fp32", "migraphx-fp16"}


def test_verify(bert_bundle, tmp_path):
    result = run("verify", bert_bundle, "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["passed"] and set(document["variants"]) == {"cpu-int8", "cpu-fp32", "migraphx-fp16"}
    assert document["variants"]["cpu-int8"]["invariance"]["workers"] == 0
    one = run("verify", bert_bundle, "--variant", "cpu-fp32")
    assert one.returncode == 0 and "cpu-fp32" in one.stdout and "cpu-int8" not in one.stdout


def test_verify_fails_when_the_reference_logits_are_others(bert_bundle, tmp_path):
    """A bundle that drifted: exit code 1 and the numbers."""
    import gzip
    import hashlib

    copy = tmp_path / "bundle"
    shutil.copytree(bert_bundle, copy)
    lines = gzip.decompress((copy / "golden.jsonl.gz").read_bytes()).decode().split("\n")
    record = json.loads(lines[5])
    record["logits"] = [x.hex() for x in (3.0, -3.0)]
    lines[5] = json.dumps(record)
    raw = "\n".join(lines).encode()
    (copy / "golden.jsonl.gz").write_bytes(raw)
    manifest = json.loads((copy / "bundle.json").read_text())
    manifest["files"]["golden.jsonl.gz"] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (copy / "bundle.json").write_text(json.dumps(manifest))
    result = run("verify", copy)
    assert result.returncode == 1
    assert "FAIL" in result.stdout and "max_abs_dp" in result.stdout


def test_output_appears_whole_or_not_at_all(bert_bundle, tmp_path):
    fifo = tmp_path / "in.jsonl"
    os.mkfifo(fifo)
    output = tmp_path / "out.jsonl"
    output.write_text("old\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "samescore", "classify", str(bert_bundle), "-i", str(fifo), "-o", str(output)],
        stderr=subprocess.PIPE,
    )
    with fifo.open("w") as writer:
        writer.write('{"text": "bread"}\n' * 3000)
        writer.flush()
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert b"Traceback" not in errors
    assert output.read_text() == "old\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_closed_pipe_is_no_error(bert_bundle, tmp_path):
    source = tmp_path / "in.txt"
    source.write_text("bread\n" * 5000)
    command = f"{sys.executable} -m samescore classify {bert_bundle} -i {source} | head -n 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert len(objects(result.stdout)) == 1
    assert "Traceback" not in result.stderr and "BrokenPipe" not in result.stderr


def test_two_onnx_runtimes_installed(bert_bundle, tmp_path):
    """A second distribution's metadata on the path, as a second `pip install` leaves it."""
    folder = tmp_path / "onnxruntime_gpu-1.31.1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.31.1\n")
    result = run("classify", bert_bundle, "x", env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 4
    assert "2 ONNX Runtime packages are installed (onnxruntime, onnxruntime-gpu)" in result.stderr
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in result.stderr
