"""The runtime's own sessions on the real GPU providers, whose vendor libraries are empty stand-ins: made, never run.

What must not happen is a score under a provider's name that this provider did not compute.
"""

import shutil
import subprocess

import numpy as np
import onnx
import pytest

from samescore import export_bundle, load

from .. import lean
from .providers import Provider
from .test_placement import provider

pytestmark = [
    pytest.mark.placement,
    pytest.mark.torch,
    pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("readelf")), reason="needs gcc and readelf"),
]
WHEELS = {"cuda": "onnxruntime_gpu", "migraphx": "onnxruntime_migraphx"}
NAMES = {"cuda": "CUDAExecutionProvider", "migraphx": "MIGraphXExecutionProvider"}
PAIRS = [{"prompt": "bread?", "response": "flour water salt"}, {"prompt": "hi", "response": "the model refuses " * 9}]


@pytest.fixture(scope="module")
def bundle(llama_checkpoint, pair_files, tmp_path_factory):
    """A bundle of the tiny Llama with variants for every target."""
    output = tmp_path_factory.mktemp("bundle") / "llama"
    golden, calibration = pair_files
    variants = ["cpu-fp32", "cpu-int8", "cuda-fp16", "migraphx-fp16"]
    export_bundle(
        llama_checkpoint,
        output,
        profile="realigned",
        variants=variants,
        golden=golden,
        calibration=calibration,
        allow_drift=True,
    )
    return output


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return lean.site(tmp_path_factory.mktemp("site"))


@pytest.fixture(params=["cuda", "migraphx"])
def target(request):
    return request.param


@pytest.fixture
def build(target) -> Provider:
    return provider(WHEELS[target])


def opened(build, site, bundle, libraries=None, texts=(), environment=None, **options):
    return lean.score(
        bundle, list(texts), options, paths=[build.package, site], libraries=libraries, **(environment or {})
    )


def test_the_named_provider_is_used(build, target, site, bundle):
    found = lean.open_session(bundle, f"{target}-fp16", target, paths=[build.package, site], libraries=build.stubs)
    assert found["first"] == NAMES[target]
    assert found["nodes"][NAMES[target]]["MatMul"] >= 19
    if target == "migraphx":
        assert set(found["nodes"]) == {NAMES[target]}


def test_a_provider_that_does_not_compute_gives_no_score(build, target, site, bundle):
    """The stand-ins' sessions can be made and not run: an error for who named it, the CPU for `auto`, which says so."""
    named = opened(build, site, bundle, build.stubs, PAIRS, provider=target)
    assert named["error"] == "ProviderError" and "logits" not in named
    answer = opened(build, site, bundle, build.stubs, provider="auto")
    assert (answer["target"], answer["variant"], answer["first"]) == ("cpu", "cpu-fp32", "CPUExecutionProvider")
    assert f"provider auto: {target} does not work here, trying cpu: " in answer["log"]


def test_a_missing_library_is_named(build, target, site, bundle):
    answer = opened(build, site, bundle, None, PAIRS, provider=target)
    assert answer["error"] == "ProviderError" and "logits" not in answer
    library = {"cuda": "libcublasLt.so.13", "migraphx": "libmigraphx_c.so.3"}[target]
    assert f"{library}: cannot open shared object file" in answer["message"]
    assert {"cuda": "samescore[cuda]", "migraphx": "ROCm with MigraphX"}[target].lower() in answer["message"].lower()


def test_each_missing_library_is_named(build, target, site, bundle, tmp_path):
    library = {"cuda": "libcurand.so.10", "migraphx": "libamdhip64.so.7"}[target]
    stubs = tmp_path / "stubs"
    shutil.copytree(build.stubs, stubs)
    (stubs / library).unlink()
    answer = opened(build, site, bundle, stubs, provider=target)
    assert answer["error"] == "ProviderError" and library in answer["message"]


def test_auto_says_why_and_takes_the_next(build, target, site, bundle):
    """The scores are then those of the CPU variant, and are called so."""
    answer = opened(build, site, bundle, None, PAIRS, provider="auto")
    assert (answer["target"], answer["variant"], answer["first"]) == ("cpu", "cpu-fp32", "CPUExecutionProvider")
    assert f"provider auto: {target} does not work here, trying cpu: " in answer["log"]
    assert "cannot open shared object file" in answer["log"]
    ours = [p.logits for p in load(bundle, provider="cpu", variant="cpu-fp32", threads=1, canary="off").score(PAIRS)]
    np.testing.assert_allclose(answer["logits"], ours, atol=1e-5)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"nonsense": 1}, "Unknown provider option"),
        ({"device_id": 7}, "Invalid device ID: 7"),
        ({"device_id": "abc"}, "Failed to parse provider option"),
    ],
)
def test_a_refused_option_is_an_error(build, target, site, bundle, option, message):
    answer = opened(build, site, bundle, build.stubs, provider=target, provider_options=option)
    assert answer["error"] == "ProviderError" and message in answer["message"]
    assert f"{next(iter(option))}=" in answer["message"]


def test_a_box_without_a_device(build, target, site, bundle, tmp_path):
    """The libraries are there, the GPU is not: explicit fails, auto goes on."""
    name, library = {"cuda": ("cuda", "libcudart.so.13"), "migraphx": ("hip", "libamdhip64.so.7")}[target]
    stubs = tmp_path / "stubs"
    shutil.copytree(build.stubs, stubs)
    source = stubs / f"{library}.c"
    before = f"long {name}SetDevice(void) {{ return 0; }}"
    assert before in source.read_text()
    source.write_text(source.read_text().replace(before, before.replace("0;", "100;")))  # no device
    script = [f"-Wl,--version-script={stubs / library}.map"] if (stubs / f"{library}.map").is_file() else []
    command = ["gcc", "-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{library}", *script]
    subprocess.run([*command, "-o", str(stubs / library), str(source)], check=True)
    answer = opened(build, site, bundle, stubs, provider=target)
    assert answer["error"] == "ProviderError" and "failure 100" in answer["message"]
    assert opened(build, site, bundle, stubs, provider="auto")["target"] == "cpu"


def test_cuda_computes_float32_in_float32(site, bundle):
    build = provider(WHEELS["cuda"])
    used = opened(build, site, bundle, build.stubs, provider="cuda")["options"][NAMES["cuda"]]
    assert used["use_tf32"] == "0" and used["arena_extend_strategy"] == "kSameAsRequested"
    chosen = {"gpu_mem_limit": 8 << 30, "use_tf32": 1}
    answer = opened(build, site, bundle, build.stubs, provider="cuda", provider_options=chosen)
    used = answer["options"][NAMES["cuda"]]
    assert used["gpu_mem_limit"] == str(8 << 30) and used["use_tf32"] == "1"


def test_migraphx_refuses_a_graph_that_it_cannot_take_whole(site, bundle):
    build = provider(WHEELS["migraphx"])
    answer = opened(build, site, bundle, build.stubs, provider="rocm", variant="cpu-int8")
    assert answer["error"] == "ProviderError"
    assert "43 MatMulIntegerToFloat" in answer["message"] and "it takes 0" in answer["message"]


def test_migraphx_keeps_the_precision_of_the_file(site, bundle):
    build = provider(WHEELS["migraphx"])
    environment = {"ORT_MIGRAPHX_FP16_ENABLE": "1"}
    answer = opened(build, site, bundle, build.stubs, provider="migraphx", environment=environment)
    assert answer["error"] == "ProviderError" and "ORT_MIGRAPHX_FP16_ENABLE=1" in answer["message"]


def test_cuda_build_without_migraphx(site, bundle):
    build = provider(WHEELS["cuda"])
    answer = opened(build, site, bundle, build.stubs, provider="rocm")
    assert answer["error"] == "ProviderError"
    assert "onnxruntime-gpu 1.31.1" in answer["message"] and "samescore[migraphx]" in answer["message"]


LARGE = """
import sys
from samescore.runtime import opening, session
from samescore.runtime.bundle import Bundle
opening.INLINE_BYTES = int(sys.argv[2])
with Bundle(sys.argv[1]) as bundle:
    model = bundle.model(bundle.manifest.variant("migraphx-fp16"))
opened = session.Session(model, "migraphx", intra_op_threads=1, dimensions={"batch": 2, "sequence": 16})
print(opened.placement.count("MIGraphXExecutionProvider"), [i.shape for i in opened._session.get_inputs()])
"""


@pytest.mark.parametrize("limit", [0, 10**9])
def test_large_weights_stay_outside_the_graph_that_migraphx_gets(site, bundle, tmp_path, monkeypatch, limit):
    """Weights in the graph are bounded by a protobuf's 2 GiB; the copy beside it goes when the process does."""
    build = provider(WHEELS["migraphx"])
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "kept"
    kept.mkdir()
    environment = {"ORT_MIGRAPHX_DUMP_MODEL_OPS": "1", "TMPDIR": str(kept)}
    paths = [build.package, site]
    said = lean.run(LARGE, str(bundle), str(limit), paths=paths, libraries=build.stubs, **environment)
    assert "[2, 16]" in said
    (dumped,) = tmp_path.glob("MIGraphXExecutionProvider_*.onnx")
    graph = onnx.load(str(dumped), load_external_data=False).graph
    outside = [i for i in graph.initializer if i.data_location == onnx.TensorProto.EXTERNAL]
    assert bool(outside) == (limit == 0)
    assert not list(kept.iterdir())


def test_amds_build_computes_the_same_on_the_cpu(site, bundle):
    """The build that runs on AMD GPUs is an older ONNX Runtime."""
    build = provider(WHEELS["migraphx"])
    answer = opened(build, site, bundle, None, PAIRS, provider="cpu", variant="migraphx-fp16")
    assert answer["version"].startswith("1.27.") and answer["target"] == "cpu"
    ours = load(bundle, provider="cpu", variant="migraphx-fp16", threads=1, canary="off").score(PAIRS)
    np.testing.assert_allclose(answer["logits"], [p.logits for p in ours], atol=5e-3)
