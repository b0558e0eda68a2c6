"""A wrong or missing provider never gives a score under another provider's name: here with the CPU build alone.

The real GPU providers are asked in tests/placement.
"""

import json
import logging
import os
import shutil

import onnxruntime
import pytest

from samescore.runtime import Classifier, libraries, opening, providers, session
from samescore.runtime.bundle import Bundle
from samescore.runtime.errors import BundleError, ProviderError, UsageError
from samescore.runtime.placement import CPU, RECORD_ENTRY

CUDA, MIGRAPHX = "CUDAExecutionProvider", "MIGraphXExecutionProvider"
TEXT = "the model refuses to answer"


class Pretended:
    """The installed ONNX Runtime, saying that it has GPU providers; they compute on the CPU."""

    def __init__(self, *, fails=None, run_fails=None, used=None, nodes=None, report=True):
        self.opened = []
        self.preloaded = 0
        outer = self

        class InferenceSession:
            """`fails`: raised when made; `run_fails`: when run; `used`: the provider it ends on; `nodes`: its placement."""

            def __init__(self, graph, options, providers, enable_fallback):
                ((name, given),) = providers
                outer.opened.append((name, given, options, enable_fallback))
                if fails and name != CPU:
                    raise fails
                self.name = name if name == CPU else used or name
                self.real = onnxruntime.InferenceSession(graph, options, providers=[])  # the CPU, implicitly

            def __getattr__(self, name):
                if name == "get_provider_graph_assignment_info":
                    raise AttributeError(name)
                return getattr(self.real, name)

            def get_providers(self):
                return [self.name, CPU]

            def run(self, *arguments):
                if run_fails and self.name != CPU:
                    raise run_fails
                return self.real.run(*arguments)

        if report:
            InferenceSession.get_provider_graph_assignment_info = lambda self: [
                type(
                    "Piece",
                    (),
                    {"ep_name": where, "get_nodes": lambda _, name=name: [type("N", (), {"op_type": name})]},
                )()
                for where, names in (nodes or {}).items()
                for name in names
            ]
        self.InferenceSession = InferenceSession

    def __getattr__(self, name):
        return getattr(onnxruntime, name)

    def get_available_providers(self):
        return [CUDA, MIGRAPHX, CPU]

    def preload_dlls(self):
        self.preloaded += 1
        print("Failed to load libcublasLt.so.13")


@pytest.fixture
def pretend(monkeypatch):
    def start(**options):
        ort = Pretended(**options)
        monkeypatch.setattr(providers, "import_onnxruntime", lambda: ort)
        monkeypatch.setattr(session, "import_onnxruntime", lambda: ort)
        return ort

    yield start
    libraries.preload.cache_clear()


@pytest.fixture(scope="module")
def gpu_bundle(bert_bundle, tmp_path_factory):
    """The tiny BERT whose portable variant is called one for CUDA."""
    folder = tmp_path_factory.mktemp("gpu") / "bert"
    shutil.copytree(bert_bundle, folder)
    manifest = json.loads((folder / "bundle.json").read_text())
    for variant in manifest["variants"]:
        if variant["name"] == "migraphx-fp16":
            variant["target"] = "cuda"
    (folder / "bundle.json").write_text(json.dumps(manifest))
    return folder


def test_a_session_that_falls_back_is_an_error(pretend, gpu_bundle):
    pretend(used=CPU)
    with pytest.raises(ProviderError, match=f"{CUDA} was asked for, but ONNX Runtime .* fell back to {CPU}"):
        Classifier(gpu_bundle, provider="cuda")


def test_auto_never_falls_back_in_silence(pretend, gpu_bundle, caplog):
    pretend(used=CPU)
    caplog.set_level(logging.INFO, logger="samescore")
    classifier = Classifier(gpu_bundle, canary="off")
    assert (classifier.target, classifier.variant.name) == ("cpu", "cpu-int8")
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "cuda does not work here, trying cpu" in warnings[0]
    assert "provider auto: cpu with variant cpu-int8" in caplog.text


def test_auto_raises_when_nothing_is_left(pretend, gpu_bundle):
    pretend(used=CPU)
    with pytest.raises(ProviderError, match="fell back"):
        Classifier(gpu_bundle, variant="migraphx-fp16")


def test_operators_on_the_cpu_are_named(pretend, gpu_bundle):
    pretend(
        nodes={CUDA: ["MatMul", "Softmax"], CPU: ["Shape", "DynamicQuantizeLinear", "MatMulInteger", "MatMulInteger"]}
    )
    with pytest.raises(
        ProviderError, match=r"leaves 3 nodes .*: 2 MatMulInteger, 1 DynamicQuantizeLinear \(it takes 2\)"
    ):
        Classifier(gpu_bundle, provider="cuda")


@pytest.mark.parametrize(
    "text", ['Unknown provider option: "nonsense".', 'Failed to parse provider option "device_id"']
)
def test_a_refused_option_is_no_bundle_error(pretend, gpu_bundle, text):
    pretend(fails=RuntimeError(text))
    with pytest.raises(ProviderError, match="refuses a provider option .asked: nonsense=1.") as raised:
        Classifier(gpu_bundle, provider="cuda", provider_options={"nonsense": 1})
    assert text in str(raised.value)


def test_a_device_that_fails_is_no_bundle_error(pretend, gpu_bundle):
    pretend(fails=RuntimeError("CUDA failure 2: out of memory"))
    with pytest.raises(ProviderError, match="out of memory"):
        Classifier(gpu_bundle, provider="cuda")


def test_a_damaged_graph_is_no_provider_error(pretend, gpu_bundle):
    from onnxruntime.capi.onnxruntime_pybind11_state import InvalidProtobuf

    pretend(fails=InvalidProtobuf("Protobuf parsing failed."))
    with pytest.raises(BundleError, match="Protobuf parsing failed"):
        Classifier(gpu_bundle, provider="cuda")


def test_a_run_that_fails_gives_no_score(pretend, gpu_bundle):
    pretend(nodes={CUDA: ["MatMul"]}, run_fails=RuntimeError("EP_FAIL"))
    classifier = Classifier(gpu_bundle, provider="cuda", canary="off")
    with pytest.raises(ProviderError, match=f"{CUDA} failed while it ran this graph: EP_FAIL"):
        classifier(TEXT)


def test_auto_takes_the_next_when_a_run_fails(pretend, gpu_bundle, caplog):
    """And the CPU's session, not the one that could be made and not run."""
    ort = pretend(nodes={CUDA: ["MatMul"]}, run_fails=RuntimeError("EP_FAIL"))
    classifier = Classifier(gpu_bundle, canary="off")
    assert (classifier.target, ort.opened[-1][0]) == ("cpu", CPU) and "EP_FAIL" in caplog.text
    expected = Classifier(gpu_bundle, provider="cpu", canary="off")(TEXT)
    assert classifier(TEXT).logits == expected.logits


def test_options_go_to_the_provider(pretend, gpu_bundle, capsys):
    ort = pretend(nodes={CUDA: ["MatMul"]})
    options = {"device_id": 1, "gpu_mem_limit": 8 << 30, "use_tf32": 1}
    classifier = Classifier(gpu_bundle, provider="cuda", provider_options=options, canary="off")
    ((name, given, session_options, fallback),) = ort.opened
    assert name == CUDA and fallback == 0
    assert given == {
        "arena_extend_strategy": "kSameAsRequested",
        "device_id": "1",
        "gpu_mem_limit": "8589934592",
        "use_tf32": "1",
    }
    assert session_options.get_session_config_entry(RECORD_ENTRY) == "1"
    classifier.score([TEXT, TEXT], workers=2)  # another session
    assert [given for _, given, _, _ in ort.opened][-1]["device_id"] == "1"
    assert ort.preloaded == 1 and capsys.readouterr().out == ""


def test_options_need_a_provider(gpu_bundle):
    with pytest.raises(UsageError, match=r"provider_options \(device_id\) need the provider"):
        Classifier(gpu_bundle, provider_options={"device_id": 1})
    with pytest.raises(ProviderError, match="cpu has no options, got device_id"):
        Classifier(gpu_bundle, provider="cpu", provider_options={"device_id": 1})


def test_an_onnx_runtime_that_does_not_tell(pretend, bert_bundle, gpu_bundle, caplog):
    """MIGraphX is told to refuse the CPU; for CUDA, where shapes are computed there, a warning must do."""
    ort = pretend(report=False)
    with pytest.raises(ProviderError, match="fallback to CPU EP has been explicitly disabled"):
        Classifier(bert_bundle, provider="migraphx")
    assert ort.opened[-1][2].get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
    assert Classifier(gpu_bundle, provider="cuda", canary="off").target == "cuda"
    assert "does not tell whether all operators run on CUDAExecutionProvider" in caplog.text


def test_a_report_that_fails_is_no_placement_to_rely_on(pretend, bert_bundle, monkeypatch):
    pretend(nodes={MIGRAPHX: ["MatMul"]})
    monkeypatch.setattr(opening, "placement_of", lambda opened: None)
    with pytest.raises(ProviderError, match="does not tell where the operators lie"):
        Classifier(bert_bundle, provider="migraphx")


@pytest.mark.parametrize("precision", ["FP16", "INT8"])
def test_the_environment_changes_no_precision(pretend, bert_bundle, monkeypatch, precision):
    pretend(nodes={MIGRAPHX: ["MatMul"]})
    monkeypatch.setenv(f"ORT_MIGRAPHX_{precision}_ENABLE", "0")
    assert Classifier(bert_bundle, provider="rocm", canary="off").target == "migraphx"
    monkeypatch.setenv(f"ORT_MIGRAPHX_{precision}_ENABLE", "1")
    with pytest.raises(ProviderError, match=f"ORT_MIGRAPHX_{precision}_ENABLE=1"):
        Classifier(bert_bundle, provider="rocm")


def test_a_shared_folder_of_programs_is_refused(pretend, bert_bundle, monkeypatch):
    """Its names do not tell models apart; every session on MIGraphX refuses it, not only those of buckets."""
    pretend(nodes={MIGRAPHX: ["MatMul"]})
    with Bundle(bert_bundle) as bundle:
        model = bundle.model(bundle.manifest.variant("migraphx-fp16"))
    monkeypatch.setenv("ORT_MIGRAPHX_MODEL_CACHE_PATH", "/var/cache/mgx")
    with pytest.raises(ProviderError, match="'/var/cache/mgx'.*unset ORT_MIGRAPHX_MODEL_CACHE_PATH"):
        session.Session(model, "migraphx", intra_op_threads=1)


def test_an_option_changes_no_precision(pretend, bert_bundle):
    pretend(nodes={MIGRAPHX: ["MatMul"]})
    with pytest.raises(ProviderError, match="migraphx_fp16_enable=1 changes the precision"):
        Classifier(bert_bundle, provider="migraphx", provider_options={"migraphx_fp16_enable": 1})


def test_auto_goes_on_without_a_cache_folder(pretend, bert_bundle, monkeypatch, tmp_path, caplog):
    """MIGraphX's programs have nowhere to go (a read-only home): the CPU scores, and why is said."""
    pretend(nodes={MIGRAPHX: ["MatMul"]})
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAMESCORE_CACHE", str(tmp_path / "file" / "cache"))
    classifier = Classifier(bert_bundle, canary="off")
    assert classifier.target == "cpu" and "Set SAMESCORE_CACHE" in classifier.rejected["migraphx-fp16"]
    assert "migraphx does not work here, trying cpu" in caplog.text


def test_attention_that_misreads_padding_is_refused(pretend, gpu_bundle, monkeypatch):
    pretend(nodes={CUDA: ["MatMul"]})
    with pytest.raises(ProviderError, match="sdpa_kernel=17 leaves out memory-efficient attention"):
        Classifier(gpu_bundle, provider="cuda", provider_options={"sdpa_kernel": 17})
    assert Classifier(gpu_bundle, provider="cuda", provider_options={"sdpa_kernel": 3}, canary="off").target == "cuda"
    monkeypatch.setenv("ORT_DISABLE_MEMORY_EFFICIENT_ATTENTION", "1")
    with pytest.raises(ProviderError, match="unset ORT_DISABLE_MEMORY_EFFICIENT_ATTENTION"):
        Classifier(gpu_bundle, provider="cuda")


@pytest.mark.skipif(
    "AzureExecutionProvider" not in onnxruntime.get_available_providers(), reason="another ONNX Runtime build"
)
@pytest.mark.parametrize("name", ["azure", "AzureExecutionProvider"])
def test_a_real_provider_that_takes_nothing(bert_bundle, name):
    """The CPU build lists one that computes no ordinary operator, and puts it first all the same."""
    with pytest.raises(ProviderError, match=r"AzureExecutionProvider was asked for, but .* MatMul.*\(it takes 0\)"):
        Classifier(bert_bundle, provider=name)


def test_a_missing_library_is_quoted(tmp_path):
    capi = tmp_path / "capi"
    capi.mkdir()
    ort = type("Build", (), {"__file__": str(tmp_path / "__init__.py")})
    assert libraries.missing_library(ort, CUDA) is None
    (capi / libraries.PROVIDER_LIBRARIES[CUDA]).write_bytes(b"no library")
    assert libraries.missing_library(ort, CUDA) is None
    assert libraries.missing_library(ort, CPU) is None


def test_weights_on_disk_are_private_and_go(bert_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Bundle(bert_bundle) as bundle:
        model = bundle.model(bundle.manifest.variant("migraphx-fp16"))
    folder = model.on_disk
    assert model.on_disk == folder and folder.parent == tmp_path
    assert folder.stat().st_mode & 0o077 == 0
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {k: bytes(v) for k, v in model.data.items()}
    del model
    assert not folder.exists()


def test_weights_that_fit_nowhere(pretend, bert_bundle, monkeypatch):
    pretend(nodes={MIGRAPHX: ["MatMul"]})
    monkeypatch.setattr(opening, "INLINE_BYTES", 0)

    def full(*arguments, **options):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("tempfile.mkdtemp", full)
    with pytest.raises(ProviderError, match="private copy of them .* could not be written: No space left.*TMPDIR"):
        Classifier(bert_bundle, provider="migraphx")


def test_plugins_run_the_portable_variant(monkeypatch, bert_bundle):
    monkeypatch.setattr(providers, "other_providers", lambda: ["OpenVINOExecutionProvider"])
    with Bundle(bert_bundle) as bundle:
        manifest = bundle.manifest
    for name in ("openvino", "OpenVINO", "OpenVINOExecutionProvider"):
        variant, target = providers.choose(manifest, provider=name)
        assert (variant.name, target) == ("migraphx-fp16", "OpenVINOExecutionProvider")
    assert providers.choose(manifest, provider="openvino", variant="cpu-fp32")[0].name == "cpu-fp32"
    with pytest.raises(UsageError, match=r"unknown provider 'openvin'.*Did you mean 'openvino'"):
        providers.choose(manifest, provider="openvin")


def test_an_older_onnx_runtime_is_named(pretend, gpu_bundle):
    ort = pretend()
    ort.__version__ = "1.23.2"
    error = opening._explained(ort, "cpu", {}, RuntimeError("LinearAttention(1) is not a registered function/op"))
    assert isinstance(error, ProviderError) and "ONNX Runtime 1.23.2 does not know all operators" in str(error)
