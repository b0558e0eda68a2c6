"""The doctor's facts and findings, under fabricated conditions: an ONNX Runtime that crashes, hangs or lacks a library."""

import dataclasses
import os
import shutil
import sys
from pathlib import Path

import onnx_ir as ir
import pytest

from samescore.runtime import doctor, doctor_probe, installed
from samescore.runtime.doctor import examine, read_versions
from samescore.runtime.doctor_findings import diagnose, exit_code
from samescore.runtime.doctor_probe import ask
from samescore.runtime.errors import BundleError, UsageError
from samescore.runtime.machine import Graphics

from .test_elf import library

FAKE = '''
"""Stands in for ONNX Runtime: a build with CUDA whose session does what a test says."""
__version__ = "1.31.1"
def get_available_providers():
    return ["CUDAExecutionProvider", "CPUExecutionProvider"]
class SessionOptions:
    def add_session_config_entry(self, *entry):
        pass
class InferenceSession:
    def __init__(self, graph, options, providers, enable_fallback=1):
        self.providers = providers
        if providers == ["CUDAExecutionProvider"]:
            {act}
    def get_providers(self):
        return self.providers
    def run(self, names, feeds):
        if len(feeds) != 2:
            raise RuntimeError("no kernel")
        return [feeds["a"] @ feeds["b"]{plus}]
'''


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Put a package `onnxruntime` before the real one, for the doctor's children; the package's folder."""

    def put(act="pass", plus=""):
        package = tmp_path / "site" / "onnxruntime"
        (package / "capi").mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text(FAKE.format(act=act, plus=plus))
        monkeypatch.setattr(sys, "path", [str(package.parent), *sys.path])
        return package

    return put


@pytest.fixture(scope="module")
def box():
    """The facts of this box, once."""
    return examine()


@pytest.fixture
def cuda_of(box):
    """The doctor's words on CUDA, from the fake package in a folder."""

    def of(package, timeout=60.0):
        names = ("CUDAExecutionProvider", "CPUExecutionProvider")
        software = dataclasses.replace(box.software, providers=names, folder=str(package))
        return doctor._provider("cuda", software, timeout)

    return of


def test_this_box(box):
    assert {p.target: p.state for p in box.providers}["cpu"] == "ready"
    assert box.software.onnxruntime and box.software.max_opset >= 21 and box.software.max_ir >= 10
    assert box.processor.threads >= 1 and box.memory.available > 0 and box.bundle is None
    assert isinstance(box.processor.saturates, bool)


def test_the_probe_is_one_product():
    values = {n: ir.Value(name=n, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2, 2])) for n in "aby"}
    a, b, y = values.values()
    graph = ir.Graph(
        [a, b], [y], nodes=[ir.Node("", "MatMul", [a, b], outputs=[y], name="n")], opset_imports={"": 13}, name="g"
    )
    assert ir.serde.serialize_model(ir.Model(graph, ir_version=8)).SerializeToString() == doctor_probe.PRODUCT


def test_versions_of_a_graph():
    for version, opset in ((8, 13), (10, 21)):
        graph = ir.Graph([], [], nodes=[], opset_imports={"com.microsoft": 1, "": opset}, name="g" * 300)
        raw = ir.serde.serialize_model(ir.Model(graph, ir_version=version)).SerializeToString()
        assert read_versions(raw) == (version, opset)
    assert read_versions(b"") == (None, None)
    assert read_versions(b"\xff\xff\xff") == (None, None)


def test_a_provider_that_computes(fake, cuda_of):
    package = fake()
    assert doctor._software(ask("build")).providers == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert cuda_of(package).state == "ready"


@pytest.mark.parametrize(
    ("act", "plus", "state", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "", "fails", "crashed (SIGSEGV)"),
        ("import os; os._exit(3)", "", "fails", "ended with exit code 3"),
        ("raise RuntimeError('no CUDA-capable device is detected')", "", "fails", "no CUDA-capable device is detected"),
        ("self.providers = ['CPUExecutionProvider']", "", "fails", "fell back to CPUExecutionProvider"),
        ("print('noise on stdout')", "", "ready", ""),
        ("pass", " + 1", "loads", "a product of two small matrices came out wrong"),
        ("pass", " + None", "loads", "unsupported operand"),
    ],
)
def test_a_provider_that_does_not(fake, cuda_of, act, plus, state, message):
    found = cuda_of(fake(act, plus))
    assert found.state == state
    assert message in found.message


def test_a_provider_that_hangs_is_given_up(fake, cuda_of):
    found = cuda_of(fake("import time; time.sleep(600)"), timeout=3.0)
    assert found.state == "fails" and found.message == "did not answer in 3 s"


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
def test_every_missing_library_is_named(fake, cuda_of, tmp_path):
    """Those that the provider is linked against, and one that a found library needs in turn."""
    package = fake("self.providers = ['CPUExecutionProvider']")
    gone = [
        library(tmp_path / name)
        for name in ("libdoesnotexist.so.9", "libcublas.so.13", "libcuda.so.99", "libdeep.so.2")
    ]
    (package / "capi/vendor").mkdir()
    middle = library(package / "capi/vendor/libmiddle.so.1", gone[3])
    library(package / "capi/libonnxruntime_providers_cuda.so", *gone[:3], middle, "-Wl,-rpath,$ORIGIN/vendor")
    for path in gone:
        path.unlink()
    found = cuda_of(package)
    assert list(found.missing) == ["libdoesnotexist.so.9", "libcublas.so.13", "libcuda.so.99", "libdeep.so.2"]
    assert "cannot open shared object file" in found.missing["libdeep.so.2"]


def test_no_onnxruntime(fake, box):
    package = fake()
    (package / "__init__.py").write_text("raise ImportError('libonnxruntime.so.1: cannot open shared object file')")
    software = doctor._software(ask("build"))
    assert software.onnxruntime is None and "libonnxruntime.so.1" in software.problem
    facts = dataclasses.replace(box, software=software)
    assert exit_code(diagnose(facts)) == 4
    assert "ONNX Runtime cannot be imported: libonnxruntime.so.1" in diagnose(facts)[0].problem
    none = dataclasses.replace(facts, software=dataclasses.replace(software, distributions={}))
    assert diagnose(none)[0].advice == "pip install 'samescore[cpu]'"


def with_provider(box, target, **changes):
    providers = tuple(dataclasses.replace(p, **changes) if p.target == target else p for p in box.providers)
    return dataclasses.replace(box, providers=providers)


def test_a_healthy_box_has_no_findings(box):
    calm = dataclasses.replace(box, environment={})
    assert diagnose(calm) == () and exit_code(()) == 0
    assert diagnose(calm, "cpu") == ()


def test_the_provider_that_was_asked_for(box):
    findings = diagnose(box, "migraphx")
    assert exit_code(findings) == 4
    assert "migraphx was asked for, but is not in this" in findings[0].problem
    assert findings[0].advice == "pip uninstall -y onnxruntime && pip install 'samescore[migraphx]'"


def test_missing_libraries_say_what_to_install(box):
    missing = dict.fromkeys(("libcublas.so.13", "libcuda.so.1"), "cannot open")
    broken = with_provider(box, "cuda", state="fails", missing=missing, message="libcublas.so.13: cannot open")
    (finding,) = diagnose(broken)
    assert finding.code == 0, "the CPU works"
    assert "missing: libcublas.so.13, libcuda.so.1" in finding.problem
    assert "NVIDIA driver, 580 or newer" in finding.advice and "samescore[cuda]" in finding.advice
    assert exit_code(diagnose(broken, "cuda")) == 4
    rocm = with_provider(box, "migraphx", state="fails", missing={"libmigraphx_c.so.3": "x"}, message="x")
    assert "ROCm 7.2 with MIGraphX" in diagnose(rocm)[0].advice
    other = with_provider(box, "cuda", state="fails", missing={"libdoesnotexist.so.9": "x"}, message="x")
    assert "the packages that hold libdoesnotexist.so.9" in diagnose(other)[0].advice


def test_no_provider_at_all(box):
    broken = with_provider(box, "cpu", state="fails", message="crashed (SIGILL)")
    assert exit_code(diagnose(broken)) == 4
    assert "crashed (SIGILL)" in diagnose(broken)[0].problem


def test_two_distributions(box):
    software = dataclasses.replace(box.software, distributions={"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"})
    finding = diagnose(dataclasses.replace(box, software=software))[0]
    assert finding.code == 4
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'samescore[cpu]'" in finding.advice


def test_two_distributions_are_seen(tmp_path, monkeypatch):
    for name in ("onnxruntime_openvino", "onnxruntime_ep_webgpu"):
        folder = tmp_path / f"{name}-1.2.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.2\n")
        (folder / "RECORD").write_text("onnxruntime/__init__.py,,\n")
        (folder / "top_level.txt").write_text("onnxruntime\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert installed.onnxruntime_distributions().keys() == {"onnxruntime", "onnxruntime-openvino"}
    assert installed.plugin_distributions() == {"onnxruntime-ep-webgpu": "1.2"}


@pytest.fixture
def distribution(tmp_path, monkeypatch):
    """An installed `onnxruntime-fake` 1.0 with two libraries; the package's folder."""
    capi = tmp_path / "onnxruntime" / "capi"
    capi.mkdir(parents=True)
    lines = ["onnxruntime/__init__.py,,"]
    for name in ("libonnxruntime.so.1.0", "state.so"):
        (capi / name).write_bytes(b"x" * 100)
        lines.append(f"onnxruntime/capi/{name},,100")
    information = tmp_path / "onnxruntime_fake-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-fake\nVersion: 1.0\n")
    (information / "RECORD").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return capi.parent


def test_a_folder_as_its_record_says(distribution):
    assert installed.mixture("onnxruntime-fake", "1.0", distribution, "1.0") == ()


def test_a_mixture_of_two_builds(distribution, box):
    capi = distribution / "capi"
    (capi / "libonnxruntime_providers_cuda.so").write_bytes(b"left over")
    (capi / "state.so").write_bytes(b"y" * 90)
    (capi / "libonnxruntime.so.1.0").unlink()
    said = installed.mixture("onnxruntime-fake", "1.0", distribution, "0.9")
    assert said == (
        "metadata says onnxruntime-fake 1.0, but the imported module is 0.9",
        "libonnxruntime_providers_cuda.so is there, but not part of onnxruntime-fake: another build left it",
        "libonnxruntime.so.1.0 of onnxruntime-fake is gone",
        "state.so is not the one of onnxruntime-fake (90 bytes, not 100): another build overwrote it",
    )
    software = dataclasses.replace(box.software, mixture=said, folder=str(distribution))
    assert any(
        "is a mixture: metadata says" in f.problem for f in diagnose(dataclasses.replace(box, software=software))
    )


def test_imported_from_another_folder(distribution, tmp_path):
    other = tmp_path / "other"
    (other / "capi").mkdir(parents=True)
    assert "installed elsewhere" in installed.mixture("onnxruntime-fake", "1.0", other, "1.0")[0]


CARDS = Graphics((), (), None, None, None)


@pytest.mark.parametrize(
    ("cards", "said", "advice"),
    [
        ({"nvidia": ("NVIDIA H200",), "nvidia_driver": "580.82"}, "has NVIDIA H200, but this", "samescore[cuda]"),
        ({"nvidia": ("NVIDIA H200",), "nvidia_driver": "550.54.15"}, "driver is 550.54.15", "580"),
        ({"nvidia": ("NVIDIA PCI device 0x2335",)}, "its driver is not loaded", "nvidia-smi"),
        ({"amd": ("gfx942",), "kfd": True}, "has gfx942, but this", "samescore[migraphx]"),
        ({"amd": ("gfx942",), "kfd": False}, "may not be opened by this user", "render"),
        ({"amd": ("AMD PCI device 0x74a1",)}, "/dev/kfd is not", "--device /dev/kfd"),
    ],
)
def test_cards_without_their_provider_or_driver(box, cards, said, advice):
    findings = diagnose(dataclasses.replace(box, graphics=dataclasses.replace(CARDS, **cards)))
    assert exit_code(findings) == 0
    assert any(said in finding.problem and advice in finding.advice for finding in findings)


def test_variables_that_change_scores(box):
    variables = {"ORT_MIGRAPHX_FP16_ENABLE": "1", "ORT_MIGRAPHX_INT8_ENABLE": "0", "OMP_NUM_THREADS": "4"}
    (finding,) = diagnose(dataclasses.replace(box, environment=variables))
    assert "ORT_MIGRAPHX_FP16_ENABLE=1" in finding.problem and finding.advice == "unset ORT_MIGRAPHX_FP16_ENABLE"
    hidden = dataclasses.replace(with_provider(box, "cuda", state="fails"), environment={"CUDA_VISIBLE_DEVICES": ""})
    assert any("hides every GPU" in finding.problem for finding in diagnose(hidden))


@pytest.fixture(scope="module")
def tiny_bundle(tmp_path_factory):
    """The embedded model's bundle."""
    from samescore import export_bundle

    path = tmp_path_factory.mktemp("tiny") / "bundle"
    export_bundle("refusal-tiny", path, variants=["cpu-int8"], golden_limit=8)
    return path


def test_a_bundle(tiny_bundle):
    facts = examine(tiny_bundle)
    bundle = facts.bundle
    assert bundle.chosen == ("cpu-int8", "cpu") and bundle.rejected == {} and bundle.damaged == ()
    (variant,) = bundle.variants
    assert (variant.ir, variant.opset) == (10, 21)
    (placed,) = variant.placed
    assert placed.target == "cpu" and placed.nodes["CPUExecutionProvider"] > 50 and not placed.strays
    assert bundle.differs == () and bundle.canary["status"] == "skipped"
    assert bundle.size == sum(
        path.stat().st_size for path in tiny_bundle.rglob("*") if path.name != "bundle.json" and path.is_file()
    )


def test_every_damaged_file_is_named(tiny_bundle, tmp_path):
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, copy)
    for name in ("tokenizer.json", "cpu-int8/model.onnx.data"):
        raw = bytearray((copy / name).read_bytes())
        raw[len(raw) // 2] ^= 1
        (copy / name).write_bytes(raw)
    facts = examine(copy)
    assert len(facts.bundle.damaged) == 2 and facts.bundle.chosen is None and facts.bundle.canary is None
    findings = diagnose(facts)
    assert exit_code(findings) == 3
    named = {Path(finding.problem.split()[0]).name for finding in findings if finding.code == 3}
    assert named == {"tokenizer.json", "model.onnx.data"}


def test_bundles_that_do_not_exist(tiny_bundle, tmp_path):
    with pytest.raises(BundleError, match="there is no bundle"):
        examine(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="no variant 'cpu-int7'"):
        examine(tiny_bundle, variant="cpu-int7")


def test_too_little_memory(tiny_bundle, monkeypatch):
    real = doctor.memory()
    monkeypatch.setattr(doctor, "memory", lambda: dataclasses.replace(real, mem_available=1_000_000))
    facts = examine(tiny_bundle)
    assert "not opened: it holds" in facts.bundle.variants[0].placed[0].problem
    assert facts.bundle.problem.startswith("not tried") and facts.bundle.canary is None
    assert any(
        "GB of memory are left" in finding.problem and "--low-memory" in finding.advice for finding in diagnose(facts)
    )


def test_a_tripped_canary_and_strays(tiny_bundle, box):
    facts = examine(tiny_bundle)
    canary = {"status": "tripped", "reason": "over 8 of 8 texts probabilities moved"}
    tripped = dataclasses.replace(facts, bundle=dataclasses.replace(facts.bundle, canary=canary))
    assert exit_code(diagnose(tripped)) == 1
    placed = dataclasses.replace(facts.bundle.variants[0].placed[0], strays={"MatMul": 3, "Gelu": 1})
    variant = dataclasses.replace(facts.bundle.variants[0], placed=(placed,), ir=99)
    odd = dataclasses.replace(facts, bundle=dataclasses.replace(facts.bundle, variants=(variant,)))
    problems = [finding.problem for finding in diagnose(odd)]
    assert any("lie on the CPU: 3 MatMul, 1 Gelu" in problem for problem in problems)
    assert any("has IR 99; ONNX Runtime" in problem for problem in problems)


def test_the_child_has_this_import_path(tmp_path, monkeypatch):
    (tmp_path / "onnxruntime.py").write_text("__version__ = '9.9'")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert ask("build").facts["version"] == "9.9"
    assert "9.9" not in os.environ.get("PYTHONPATH", "")
