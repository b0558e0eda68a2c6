import dataclasses
import logging

import pytest

from samescore.runtime import providers
from samescore.runtime.errors import MissingDependencyError, ProviderError, UsageError
from samescore.runtime.manifest import Variant

from .test_manifest import MANIFEST

CPU = MANIFEST.variants[0]
CUDA = dataclasses.replace(CPU, name="cuda-fp16", target="cuda", precision="fp16")
AMD = dataclasses.replace(CPU, name="migraphx-fp16", target="migraphx", precision="fp16")
ALL = dataclasses.replace(MANIFEST, variants=(CPU, CUDA, AMD))


@pytest.fixture
def offers(monkeypatch):
    """Pretend that the ONNX Runtime build offers these targets."""

    def set_targets(*targets):
        monkeypatch.setattr(providers, "available_targets", lambda: list(targets))

    return set_targets


def chosen(manifest, **options):
    variant, target = providers.choose(manifest, **options)
    assert isinstance(variant, Variant)
    return variant.name, target


def test_auto_takes_the_best_target_and_says_so(offers, caplog):
    caplog.set_level(logging.INFO, logger="samescore")
    offers("cuda", "cpu")
    assert chosen(ALL) == ("cuda-fp16", "cuda")
    assert "provider auto: cuda with variant cuda-fp16" in caplog.text
    offers("cpu")
    assert chosen(ALL) == ("cpu-int8", "cpu")


def test_auto_skips_targets_without_a_variant(offers):
    offers("cuda", "cpu")
    assert chosen(MANIFEST) == ("cpu-int8", "cpu")


def test_auto_does_not_run_an_amd_file_on_the_cpu_in_silence(offers):
    offers("cpu")
    with pytest.raises(ProviderError, match=r"no variant of this bundle fits this box: it holds migraphx-fp16"):
        chosen(dataclasses.replace(MANIFEST, variants=(AMD,)))


def test_a_portable_file_runs_on_the_cpu_when_both_are_named(offers):
    offers("cpu")
    assert chosen(ALL, provider="cpu", variant="migraphx-fp16") == ("migraphx-fp16", "cpu")


def test_explicit_provider_absent_from_the_build(offers):
    offers("cpu")
    with pytest.raises(ProviderError, match=r"provider 'cuda' is not in this ONNX Runtime build.*samescore\[cuda\]"):
        chosen(ALL, provider="cuda")
    with pytest.raises(ProviderError, match="migraphx"):
        chosen(ALL, provider="rocm")
    with pytest.raises(ProviderError, match="cuda"):
        chosen(ALL, variant="cuda-fp16")


def test_explicit_provider_without_a_variant(offers):
    offers("cuda", "cpu")
    with pytest.raises(ProviderError, match="holds no variant for it: cpu-int8"):
        chosen(MANIFEST, provider="cuda")


def test_unknown_names(offers):
    offers("cpu")
    with pytest.raises(UsageError, match=r"unknown provider 'cudo'.*Did you mean 'cuda'"):
        chosen(ALL, provider="cudo")
    with pytest.raises(UsageError, match="no variant 'cpu-int4'"):
        chosen(ALL, variant="cpu-int4")


def test_this_box_offers_the_cpu():
    assert "cpu" in providers.available_targets()


def test_two_onnx_runtimes_are_an_error_that_says_which_to_remove(monkeypatch):
    monkeypatch.setattr(providers, "installed_distributions", lambda: ["onnxruntime", "onnxruntime-gpu"])
    with pytest.raises(ProviderError, match=r"pip uninstall -y onnxruntime onnxruntime-gpu"):
        providers.import_onnxruntime()


def test_no_onnx_runtime_names_the_extras(monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(providers, "installed_distributions", list)
    monkeypatch.setattr(providers.importlib, "import_module", absent)
    with pytest.raises(MissingDependencyError, match=r"samescore\[cpu\]"):
        providers.import_onnxruntime()


@pytest.mark.parametrize("name", [n for n in providers.ORT_DISTRIBUTIONS if n != "onnxruntime"])
def test_every_package_that_writes_onnxruntime_counts(name, tmp_path, monkeypatch):
    """As package metadata says, also where a name has an underscore there."""
    if providers.installed_distributions() != ["onnxruntime"]:
        pytest.skip("another ONNX Runtime build is installed")
    folder = tmp_path / f"{name.replace('-', '_')}-9.9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ProviderError, match=f"2 ONNX Runtime packages are installed .*{name}"):
        providers.import_onnxruntime()


def test_a_plugin_package_is_no_second_onnx_runtime(tmp_path, monkeypatch):
    folder = tmp_path / "onnxruntime_ep_openvino-1.8.1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-ep-openvino\nVersion: 1.8.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert providers.import_onnxruntime().__version__
