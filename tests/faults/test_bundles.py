"""Faults in finished bundles: what verify and export print."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from samescore import export_bundle, verify
from samescore.cli import main
from samescore.runtime import BundleError, GateError

from .planting import edit_weight, flip_bit

pytestmark = pytest.mark.torch

FILES = [
    "golden.jsonl.gz",
    "parity.json",
    "README.md",
    "tokenizer.json",
    "cpu-int8/model.onnx",
    "cpu-int8/model.onnx.data",
]


def flip_on_disk(path, place):
    raw = bytearray(path.read_bytes())
    raw[int(place * (len(raw) - 1))] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("place", [0.0, 0.37, 1.0])
@pytest.mark.parametrize("name", FILES)
def test_a_bit_flipped_on_disk(bert_bundle, tmp_path, name, place):
    copy = tmp_path / "bundle"
    shutil.copytree(bert_bundle, copy)
    flip_on_disk(copy / name, place)
    with pytest.raises(BundleError, match=f"{name} is damaged: its SHA-256 is not the manifest's"):
        verify(copy)


def test_a_bit_flipped_in_a_digest(bert_bundle, tmp_path):
    """The manifest's own digests are no exception: the file that they are of is named."""
    for name, entry in json.loads((bert_bundle / "bundle.json").read_text())["files"].items():
        copy = tmp_path / name.replace("/", "_")
        shutil.copytree(bert_bundle, copy)
        raw = (copy / "bundle.json").read_text()
        digest = entry["sha256"]
        (copy / "bundle.json").write_text(raw.replace(digest, digest[:-1] + ("0" if digest[-1] != "0" else "1")))
        with pytest.raises(BundleError, match=f"{name} is damaged"):
            verify(copy)


def renew_digests(bundle):
    """As if the fault had happened before the digests were made."""
    manifest = json.loads((bundle / "bundle.json").read_text())
    for name, entry in manifest["files"].items():
        raw = (bundle / name).read_bytes()
        entry.update(size=len(raw), sha256=hashlib.sha256(raw).hexdigest())
    (bundle / "bundle.json").write_text(json.dumps(manifest))


def flip_largest_exponent_bit(array):
    flip_bit(array, int(np.argmin(np.abs(array.reshape(-1) - 0.05))), 30)


def test_verify_names_the_layer(llama_bundle, llama_checkpoint, tmp_path, capsys):
    copy = tmp_path / "bundle"
    shutil.copytree(llama_bundle, copy)
    edit_weight(copy / "cpu-fp32", "model.layers.1.mlp.down_proj.weight", flip_largest_exponent_bit)
    renew_digests(copy)
    said = verify(copy, variant="cpu-fp32").certificate.variants["cpu-fp32"].diagnosis
    assert "samescore verify BUNDLE --reference CKPT looks for the layer" in said
    command = ["verify", str(copy), "--reference", str(llama_checkpoint), "--variant", "cpu-fp32"]
    assert main(command) == 1
    printed = capsys.readouterr().out
    assert "the drift enters at layer 1 of 3 (counted from 0), its feed-forward: relative error" in printed
    assert "  diagnosis: " in printed and "token ids: as transformers' on " in printed
    assert main([*command, "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert "layer 1 of 3" in document["variants"]["cpu-fp32"]["diagnosis"]
    assert document["tokenization"]["different"] == 0 and document["tokenization"]["texts"] > 300


def test_export_names_the_layer(bert_checkpoint, bert_bundle, texts_files, tmp_path, monkeypatch):
    """A bad bit while exporting: the gate's error says where."""
    from samescore import building

    original = building.build_variant

    def with_a_flipped_bit(checkpoint, spec, bundle, **options):
        variant = original(checkpoint, spec, bundle, **options)
        name = "bert.encoder.layer.1.intermediate.dense.weight"
        edit_weight(bundle / spec.name, name, flip_largest_exponent_bit)
        return variant

    monkeypatch.setattr(building, "build_variant", with_a_flipped_bit)
    settings = {"profile": "refusal", "golden": bert_bundle / "golden.jsonl.gz", "calibration": texts_files[1]}
    with pytest.raises(
        GateError, match=r"cpu-fp32: .*\(diagnosis: .*the drift enters at layer 1 of 3 .*, its feed-forward"
    ):
        export_bundle(bert_checkpoint, tmp_path / "b", variants=["cpu-fp32"], **settings)
    assert list(tmp_path.iterdir()) == []


def test_a_passing_variant_has_no_diagnosis(bert_bundle):
    certificate = verify(bert_bundle).certificate
    assert all(parity.diagnosis is None for parity in certificate.variants.values())
    assert all(
        v["diagnosis"] is None for v in json.loads((bert_bundle / "parity.json").read_text())["variants"].values()
    )


def test_a_tiny_tolerance_is_rounding(bert_bundle, bert_checkpoint, monkeypatch):
    """Nothing is wrong with the variant but the tolerance: the diagnosis does not invent a fault, nor a pass."""
    from dataclasses import replace

    from samescore.calibrate.gate import TOLERANCES

    monkeypatch.setitem(TOLERANCES, "int8", replace(TOLERANCES["int8"], max_abs_dp=1e-9, mean_abs_dp=1e-9))
    result = verify(bert_bundle, reference=bert_checkpoint, variant="cpu-int8")
    assert not result.passed
    assert result.certificate.variants["cpu-int8"].diagnosis.startswith("spread over all layers: rounding")
