"""The package as users get it: sdist and wheel built, installed into fresh environments, tried from another folder."""

import json
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.packaging

TRY = """
import importlib, sys
import samescore
for bare in ("export", "runtime", "calibrate", "tests", "benchmarks"):
    try:
        importlib.import_module(bare)
    except ImportError:
        continue
    raise SystemExit(f"a bare {bare} leaked")
import samescore.export.graphs.bert, samescore.calibrate.metrics, samescore.runtime
print(samescore.__version__)
"""


def run(*arguments, **options):
    done = subprocess.run([*map(str, arguments)], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """An sdist of the working tree and a wheel built from that sdist."""
    output = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", output, ROOT)
    (wheel,), (sdist,) = output.glob("*.whl"), output.glob("*.tar.gz")
    return sdist, wheel


def test_the_wheel_holds_the_rooms_and_the_embedded_model(distributions):
    _, wheel = distributions
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (
        "samescore/cli.py",
        "samescore/py.typed",
        "samescore/runtime/classifier.py",
        "samescore/runtime/py.typed",
        "samescore/export/graphs/bert.py",
        "samescore/calibrate/gate.py",
        "samescore/models/refusal-tiny/model.safetensors",
        "samescore/models/refusal-tiny/tokenizer.json",
        "samescore/models/refusal-tiny/golden.jsonl",
        "samescore/models/refusal-tiny/NOTICE.txt",
    ):
        assert path in names
    assert {name.split("/")[0] for name in names} == {"samescore", "samescore-0.1.0.dist-info"}
    assert wheel.stat().st_size < 8_000_000


def test_the_sdist_builds_the_same(distributions):
    sdist, _ = distributions
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"pyproject.toml", "LICENSE", "README.md", "runtime/classifier.py", "export/graphs/bert.py"} <= names


@pytest.mark.parametrize("how", ["wheel", "folder", "editable"])
def test_installed_and_tried(distributions, tmp_path, how):
    """A fresh environment: import, export the embedded model without PyTorch, score, verify."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    target = {"wheel": f"{distributions[1]}[cpu,export]", "folder": f"{ROOT}[cpu,export]"}.get(how)
    source = [target] if target else ["-e", f"{ROOT}[cpu,export]"]
    run(python, "-m", "pip", "install", "--quiet", *source)
    assert run(python, "-c", TRY, cwd=tmp_path).strip() == "0.1.0"
    samescore = home / "bin" / "samescore"
    run(samescore, "export", "refusal-tiny", "-o", "bundle", cwd=tmp_path)
    assert json.loads(run(samescore, "verify", "bundle", "--json", cwd=tmp_path))["passed"]
    answer = json.loads(
        run(samescore, "classify", "bundle", "<|user|>Hi<|assistant|>Hello, how are you?", cwd=tmp_path)
    )
    assert answer["label"] == "Non-refusal"
    installed = run(python, "-m", "pip", "list", "--format", "freeze")
    assert not {"torch", "transformers"} & {line.partition("==")[0] for line in installed.splitlines()}


def test_the_runtime_alone(distributions, tmp_path):
    """`samescore[cpu]` scores a bundle; asking it to export names the extra."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    run(home / "bin" / "python", "-m", "pip", "install", "--quiet", f"{distributions[1]}[cpu]")
    run(sys.executable, "-m", "samescore", "export", "refusal-tiny", "-o", tmp_path / "bundle")
    samescore = home / "bin" / "samescore"
    answer = json.loads(
        run(samescore, "classify", "bundle", "<|user|>Hi<|assistant|>I'm sorry, I can't.", cwd=tmp_path)
    )
    assert answer["label"] == "Refusal"
    run(samescore, "verify", "bundle", cwd=tmp_path)
    done = subprocess.run(
        [samescore, "export", "refusal-tiny", "-o", "other"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 4 and "pip install 'samescore[export]'" in done.stderr
