"""The doctor on the real GPU builds of ONNX Runtime: without their vendors' libraries, and with stand-ins for them."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import numpy
import pytest

from samescore import export_bundle
from samescore.runtime.elf import read_shared_library

from .test_placement import provider, pytestmark  # noqa: F401

ROOT = Path(__file__).parents[2]
LIBRARIES = {"cuda": "libonnxruntime_providers_cuda.so", "migraphx": "libonnxruntime_providers_migraphx.so"}
WHEELS = {"cuda": "onnxruntime_gpu", "migraphx": "onnxruntime_migraphx"}


class Box:
    """A virtual environment with one GPU build of ONNX Runtime and nothing else of that name."""

    def __init__(self, target, folder):
        wheel = provider(WHEELS[target])
        self.target, self.stubs = target, wheel.stubs
        self.library = wheel.package / "onnxruntime" / "capi" / LIBRARIES[target]
        venv.create(folder, symlinks=True)
        self.python = folder / "bin" / "python"
        site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        shared = Path(numpy.__file__).parents[1]
        left_out = ("onnxruntime", "samescore", "__editable__", "_")
        for entry in shared.iterdir():
            if not entry.name.startswith(left_out) and entry.suffix != ".pth":
                (site / entry.name).symlink_to(entry)
        for entry in wheel.package.iterdir():
            (site / entry.name).symlink_to(entry)
        package = site / "samescore"
        package.mkdir()
        for entry in (ROOT / "samescore").iterdir():
            (package / entry.name).symlink_to(entry)
        for room in ("runtime", "export", "calibrate"):
            (package / room).symlink_to(ROOT / room)

    def doctor(self, *arguments, stubs):
        environment = {**os.environ, "LD_LIBRARY_PATH": str(self.stubs) if stubs else ""}
        command = [self.python, "-P", "-m", "samescore", "doctor", "--json", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode in (0, 4), done.stderr
        document = json.loads(done.stdout)
        assert document["exit_code"] == done.returncode
        return document, {p["target"]: p for p in document["providers"]}[self.target]


@pytest.fixture(scope="module", params=["cuda", "migraphx"])
def box(request, tmp_path_factory):
    return Box(request.param, tmp_path_factory.mktemp(request.param) / "venv")


def loads(library, folders):
    """Whether the dynamic loader finds a library, asked in a fresh process."""
    names = [str(path) for folder in folders if (path := Path(folder) / library).exists()] or [library]
    code = f"import ctypes; ctypes.CDLL({names[0]!r})"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_missing_vendor_libraries_are_named(box):
    linked = read_shared_library(box.library)
    expected = {name for name in linked.needed if not loads(name, linked.search)}
    if not expected:
        pytest.skip("this box has the vendor's libraries")
    document, found = box.doctor("--provider", box.target, stubs=False)
    assert document["exit_code"] == 4
    assert found["state"] == "fails" and set(found["missing"]) == expected
    assert {"cuda": "libcuda.so.1", "migraphx": "libmigraphx_c.so.3"}[box.target] in expected
    advice = document["findings"][0]["advice"]
    assert {"cuda": "NVIDIA driver", "migraphx": "ROCm 7.2 with MIGraphX"}[box.target] in advice
    assert len(document["software"]["distributions"]) == 1 and document["software"]["mixture"] == []


@pytest.fixture(scope="module")
def llama_files(llama_checkpoint, pair_files, tmp_path_factory):
    """A bundle of the tiny Llama with a variant for each provider."""
    output = tmp_path_factory.mktemp("bundle") / "llama"
    golden, calibration = pair_files
    export_bundle(
        llama_checkpoint,
        output,
        profile="realigned",
        variants=["cpu-int8", "cuda-fp16", "migraphx-fp16"],
        golden=golden,
        calibration=calibration,
        allow_drift=True,
    )
    return output


def test_where_nodes_lie_with_stand_ins(box, llama_files):
    """A session can be made, so that placement is known; a stand-in computes nothing, so that it is not called ready."""
    document, found = box.doctor(llama_files, "--provider", "cpu", stubs=True)
    assert found["state"] == "loads" and not found["missing"]
    placed = {
        (variant["name"], p["target"]): p for variant in document["bundle"]["variants"] for p in variant["placed"]
    }
    assert set(placed) == {
        (name, target) for name in ("cpu-int8", "cuda-fp16", "migraphx-fp16") for target in (box.target, "cpu")
    }
    own = placed[(f"{box.target}-fp16", box.target)]
    assert own["problem"] is None and own["strays"] == {}
    name = {"cuda": "CUDAExecutionProvider", "migraphx": "MIGraphXExecutionProvider"}[box.target]
    assert own["nodes"][name] > 50
    if box.target == "migraphx":
        assert own["subgraphs"] == {name: 1}
        assert placed[("cpu-int8", "migraphx")]["strays"], "MatMulIntegerToFloat is not MIGraphX's"
    assert document["bundle"]["chosen"] == ["cpu-int8", "cpu"] and document["exit_code"] == 0


def test_auto_leaves_a_provider_that_does_not_compute(box, llama_files):
    """A stand-in's session can be made and not run: `load` tries it, and takes the CPU."""
    document, _ = box.doctor(llama_files, stubs=True)
    assert document["bundle"]["chosen"] == ["cpu-int8", "cpu"] and document["exit_code"] == 0
    assert box.target in json.dumps(document["bundle"]["rejected"])
    # Named, nothing else is taken, and loading with it fails.
    document, _ = box.doctor(llama_files, "--provider", box.target, stubs=True)
    assert document["bundle"]["chosen"] is None and document["exit_code"] == 4
    assert "was tried and failed" in document["bundle"]["rejected"][f"{box.target}-fp16"]
