"""`samescore doctor` as a user runs it."""

import json
import shutil

import pytest

from .test_cli import run


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """The embedded model's bundle."""
    from samescore import export_bundle

    path = tmp_path_factory.mktemp("tiny") / "bundle"
    export_bundle("refusal-tiny", path, variants=["cpu-int8", "cpu-fp32"], golden_limit=8)
    return path


def test_without_a_bundle():
    result = run("doctor", env={"OMP_NUM_THREADS": "3"})
    assert result.returncode == 0, result.stderr
    titles = [line for line in result.stdout.splitlines() if line and not line.startswith(" ")]
    assert titles[:5] == ["Software", "Providers", "CPU", "Memory", "Graphics cards"]
    assert "Environment" in titles and "OMP_NUM_THREADS=3" in result.stdout
    assert "ready: computed a test product" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 130
    assert "Traceback" not in result.stderr


def test_with_a_bundle(bundle):
    result = run("doctor", bundle)
    assert result.returncode == 0, result.stderr
    for said in (
        "all digests match",
        "IR 10, opset 21",
        "nodes on CPU",
        "load takes      cpu-int8 on cpu",
        "not cpu-fp32: cpu-int8 stands before it",
        "the one it was certified in",
        "canary          skipped: the environment is the certified one",
    ):
        assert said in result.stdout
    other = run("doctor", bundle, "--variant", "cpu-fp32", "--json")
    document = json.loads(other.stdout)
    assert document["bundle"]["chosen"] == ["cpu-fp32", "cpu"]
    assert document["bundle"]["rejected"] == {"cpu-int8": "cpu-fp32 was asked for"}


def test_json(bundle):
    result = run("doctor", bundle, "--json", "--provider", "rocm")
    assert result.returncode == 4
    document = json.loads(result.stdout)
    assert document["exit_code"] == 4 and document["asked"] == "migraphx"
    assert {p["target"]: p["state"] for p in document["providers"]} == {
        "cuda": "absent",
        "migraphx": "absent",
        "cpu": "ready",
    }
    (finding,) = [finding for finding in document["findings"] if finding["code"] == 4]
    assert "pip install 'samescore[migraphx]'" in finding["advice"]
    assert document["bundle"]["chosen"] is None and "not in this ONNX Runtime build" in document["bundle"]["problem"]
    assert set(document) == {
        *("exit_code", "asked", "findings", "software", "providers", "processor", "memory", "graphics"),
        *("environment", "bundle"),
    }


def test_the_bundle_on_another_box(bundle, tmp_path):
    """The canary's answer where the environment is not the certified one, passed and tripped."""
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    canary = json.loads((copy / "canary.json").read_text())
    for index in (0, 1):
        certified = canary["variants"]["cpu-int8"]
        certified["environment"]["cpu"] = "Another CPU"
        if index:
            certified["logits"] = [list(reversed(row)) for row in certified["logits"]]
        rewrite(copy, "canary.json", json.dumps(canary).encode())
        result = run("doctor", copy)
        assert result.returncode == index, result.stdout
        assert "(was Another CPU)" in result.stdout
        assert f"canary          {('passed', 'tripped')[index]}: over" in result.stdout
    assert "1. the canary of cpu-int8 tripped" in result.stdout and "→ samescore verify" in result.stdout


def rewrite(bundle, name, raw):
    """Replace a file, and its digest in the manifest."""
    import hashlib

    (bundle / name).write_bytes(raw)
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["files"][name] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (bundle / "bundle.json").write_text(json.dumps(manifest))


def test_a_damaged_bundle(bundle, tmp_path):
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    (copy / "tokenizer.json").write_bytes(b"{}")
    result = run("doctor", copy)
    assert result.returncode == 3
    assert "1 damaged" in result.stdout and "tokenizer.json holds 2 bytes" in result.stdout
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["doctor", "nowhere"], 3, "no bundle at nowhere"),
        (["doctor", "--provider", "tpu"], 2, "unknown provider 'tpu'"),
        (["doctor", "--variant", "cpu-int8"], 2, "samescore doctor BUNDLE --variant"),
        (["doctor", "--timeout", "0"], 2, "--timeout must be above 0"),
        (["doctor", "{bundle}", "--variant", "cpu-int7"], 2, "Did you mean 'cpu-int8'"),
    ],
)
def test_wrong_use(bundle, arguments, code, said):
    result = run(*(argument.format(bundle=bundle) for argument in arguments))
    assert result.returncode == code and said in result.stderr
    assert "Traceback" not in result.stderr


def test_two_onnx_runtimes(bundle, tmp_path):
    """The runtime refuses to load; the doctor says why, and goes on."""
    folder = tmp_path / "onnxruntime_gpu-1.31.1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.31.1\n")
    result = run("doctor", bundle, env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 4
    assert "2 ONNX Runtime packages are installed and overwrite each other" in result.stdout
    assert "uint8 × int8 products: not asked" in result.stdout
    assert "Traceback" not in result.stderr
