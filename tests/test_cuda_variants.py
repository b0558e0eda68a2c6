"""`samescore export` of the variants for CUDA on a box without one: certified on the CPU provider, padding included."""

import json

import pytest

from samescore import export_bundle, load
from samescore.runtime.manifest import parse_manifest

pytestmark = pytest.mark.torch
VARIANTS = ["cuda-fp16", "cuda-int8"]


def test_variants_for_cuda_pass_their_gates(bert_checkpoint, texts_files, tmp_path):
    """Next to another text, padded to the longer of the two, a text scores as alone."""
    golden, calibration = texts_files
    settings = {"golden": golden, "calibration": calibration, "variants": VARIANTS}
    bundle = export_bundle(bert_checkpoint, tmp_path / "bundle", **settings).path
    parity = json.loads((bundle / "parity.json").read_text())["variants"]
    manifest = parse_manifest((bundle / "bundle.json").read_bytes())
    for variant in manifest.variants:
        assert variant.target == "cuda" and variant.inputs == ("input_ids", "lengths")
        assert variant.recipe["graph"] == "fused operators, lengths of padded texts"
        measured = parity[variant.name]
        assert measured["verdict"]["outcome"] == "PASS"
        assert measured["invariance"]["neighbours"] < 2e-3
    assert parity["cuda-fp16"]["drift"]["max_abs_dp"] < 5e-3
    assert "(CPU provider)" in (bundle / "README.md").read_text()
    assert load(bundle, provider="cpu", variant="cuda-fp16")("A text.").label in manifest.labels
