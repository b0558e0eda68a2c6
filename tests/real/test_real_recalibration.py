"""Recalibration of real int8 variants towards PyTorch: what is stored helped texts that the fit never saw, or nothing is."""

import json
from pathlib import Path

import pytest

from samescore import calibrate_bundle, export_bundle, verify

pytest.importorskip("torch")
ROOT = Path(__file__).parent.parent.parent
ASSETS = ROOT / ".cache" / "assets"
GOLDEN, FITTED = 30, 90
# Characters: short texts keep the reference fast.
LONGEST = 400

SUBJECTS = [
    (
        "e5-refusal",
        "texts.jsonl",
        {"profile": "refusal", "calibration": ROOT / "embedded" / "texts" / "calibration.jsonl"},
    ),
    ("qwen3_5-digits", "qwen-articles.jsonl", {"profile": "political-leaning"}),
]

pytestmark = [pytest.mark.real, pytest.mark.torch, pytest.mark.slow]


@pytest.mark.parametrize(("name", "source", "settings"), SUBJECTS, ids=[name for name, *_ in SUBJECTS])
def test_only_what_helps_is_stored(name, source, settings, tmp_path):
    if not (ASSETS / name).is_dir():
        pytest.skip(f"{name} is not built: run `make assets`")
    lines = (ASSETS / source).read_text(encoding="utf-8").split("\n")
    texts = dict.fromkeys(json.loads(line)["text"][:LONGEST] for line in lines if line)
    chosen = [json.dumps({"text": text}) + "\n" for text in texts][: GOLDEN + FITTED]
    golden, fitted = tmp_path / "golden.jsonl", tmp_path / "fit.jsonl"
    golden.write_text("".join(chosen[:GOLDEN]))
    fitted.write_text("".join(chosen[GOLDEN:]))
    folder = tmp_path / "bundle"
    export_bundle(ASSETS / name, folder, variants=["cpu-int8"], golden=golden, allow_drift=True, **settings)
    raw = (folder / "bundle.json").read_bytes()

    outcome = calibrate_bundle(folder, texts=fitted, reference=ASSETS / name).variants["cpu-int8"]
    numbers = outcome.fit.recalibration
    assert (numbers.texts_fitted, numbers.texts_held_out) == (60, 30)
    # int8 rounding neither halves nor doubles what the model says.
    assert 0.5 < numbers.scale[0] < 2
    if outcome.stored:
        assert numbers.after.kld < numbers.before.kld
        parity = verify(folder).certificate.variants["cpu-int8"]
        assert (parity.drift, parity.before) == (outcome.golden.drift, outcome.golden.before)
    else:
        assert outcome.reason and (folder / "bundle.json").read_bytes() == raw
