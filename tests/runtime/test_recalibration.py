"""A stored correction: applied to probabilities and never to raw logits; anything odd in the manifest is refused."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest

from samescore import Classifier, RewardFunction, load
from samescore.runtime.errors import BundleError
from samescore.runtime.manifest import parse_manifest
from samescore.runtime.prediction import predict, probabilities_of
from samescore.runtime.recalibration import Curve, FitNumbers, Recalibration, calibrated

NUMBERS = FitNumbers(1e-3, 1e-2, 2e-2, None, None, None)
HALF = Recalibration("temperature", "reference", (0.5, 0.5), (0.0, 0.0), (), 60, 30, "a" * 64, NUMBERS, NUMBERS)
VECTOR = dataclasses.replace(HALF, method="vector", scale=(0.5, 2.0), bias=(0.25, -1.0))
CURVE = Curve((-2.0, 0.0, 4.0), (-1.0, 0.5, 0.5))
ISOTONIC = dataclasses.replace(HALF, method="isotonic", scale=(), bias=(), curves=(CURVE,))


def corrected(bundle, folder, recalibration, variant="cpu-int8"):
    """A copy of the bundle whose variant has the correction."""
    shutil.copytree(bundle, folder)
    document = json.loads((folder / "bundle.json").read_text())
    for entry in document["variants"]:
        if entry["name"] == variant:
            entry["recalibration"] = dataclasses.asdict(recalibration)
    (folder / "bundle.json").write_text(json.dumps(document))
    return folder


def test_without_a_correction_the_very_array_comes_back():
    logits = np.array([[0.1, -3.0]], np.float32)
    assert calibrated(logits, None) is logits


def test_scale_and_bias_per_label():
    np.testing.assert_allclose(calibrated(np.array([[2.0, 3.0]]), VECTOR), [[1.25, 5.0]])


def test_a_curve_maps_the_log_odds_and_goes_on_with_slope_one():
    np.testing.assert_allclose(
        CURVE(np.array([-5.0, -2.0, -1.0, 0.0, 2.0, 4.0, 14.0])), [-4, -1, -0.25, 0.5, 0.5, 0.5, 10.5]
    )
    two = calibrated(np.array([[1.0, 0.0], [0.0, 14.0]]), ISOTONIC)
    np.testing.assert_allclose(two[:, 1] - two[:, 0], [-0.25, 10.5])
    np.testing.assert_allclose(two.mean(axis=1), [0.5, 7.0])
    each = dataclasses.replace(ISOTONIC, curves=(CURVE, Curve((0.0, 1.0), (3.0, 4.0))))
    np.testing.assert_allclose(calibrated(np.array([[-1.0, 5.0]]), each), [[-0.25, 8.0]])


def test_everything_but_the_logits_follows_the_correction():
    row = np.array([800.0, -600.0], np.float32)
    raw, soft = (predict(row, ("a", "b"), "softmax", tokens=1, truncated=False, recalibration=r) for r in (None, HALF))
    assert soft.logits == raw.logits == (800.0, -600.0) and raw.calibrated_logits is None
    assert (raw.margin, soft.margin) == (-1400.0, -700.0)
    assert soft.log_odds("a") == 700.0 and soft.probability == 1.0  # p saturates, its log-odds do not
    row = np.array([2.0, 0.0], np.float32)
    soft = predict(row, ("a", "b"), "softmax", tokens=1, truncated=False, values=(0, 1), recalibration=HALF)
    p = 1 / (1 + math.exp(-1))
    assert soft.probability == pytest.approx(p) and soft.expected_value == pytest.approx(1 - p)
    assert soft.entropy == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p))
    assert math.log(p / (1 - p)) == pytest.approx(soft.log_odds("a"))


def test_sigmoid_labels():
    soft = predict(
        np.array([2.0, 0.0], np.float32), ("a", "b"), "sigmoid", tokens=1, truncated=False, recalibration=VECTOR
    )
    assert soft.probabilities == pytest.approx({"a": 1 / (1 + math.exp(-1.25)), "b": 1 / (1 + math.exp(1))})


def test_a_classifier_applies_it_and_raw_does_not(bert_bundle, tmp_path):
    folder = corrected(bert_bundle, tmp_path / "b", VECTOR)
    texts = ["bread and salt", "the model refuses"]
    plain, raw, soft = (
        load(path, variant="cpu-int8", **options).score(texts)
        for path, options in ((bert_bundle, {}), (folder, {"raw": True}), (folder, {}))
    )
    assert raw == plain
    for before, after in zip(plain, soft, strict=True):
        assert after.logits == before.logits
        wanted = probabilities_of(calibrated(np.array(before.logits), VECTOR), "softmax")
        assert list(after.probabilities.values()) == wanted.tolist()
        assert after.probabilities != before.probabilities
    other = load(folder, variant="cpu-fp32").score(texts)
    assert other == load(bert_bundle, variant="cpu-fp32").score(texts)


def test_rewards_follow(llama_bundle, tmp_path):
    folder = corrected(llama_bundle, tmp_path / "b", HALF)
    prompts, responses = ["bread?", "bread?"], ["flour and water", "merci"]
    label = Classifier(folder).labels[1]
    settings = {"label": label, "kind": "log_odds", "variant": "cpu-int8"}
    plain, soft = (RewardFunction(path, **settings)(prompts, responses) for path in (llama_bundle, folder))
    assert soft == pytest.approx([value / 2 for value in plain]) and soft != plain
    assert RewardFunction(folder, **settings, raw=True)(prompts, responses) == plain


@pytest.mark.parametrize("recalibration", [HALF, VECTOR, ISOTONIC])
def test_round_trip(bert_bundle, tmp_path, recalibration):
    folder = corrected(bert_bundle, tmp_path / "b", recalibration)
    manifest = parse_manifest((folder / "bundle.json").read_bytes())
    assert manifest.variant("cpu-int8").recalibration == recalibration
    assert parse_manifest(manifest.to_json()) == manifest
    assert recalibration.summary.endswith("60 texts; KLD of 30 others 1.00e-03 → 1.00e-03")


def change(base, **fields):
    return dataclasses.asdict(dataclasses.replace(base, **fields))


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (change(HALF, scale=(0.5,)), "1 scales and 2 biases for 2 labels"),
        (change(HALF, bias=()), "2 scales and 0 biases"),
        (change(HALF, scale=(0.0, 0.0)), "scales must be above 0"),
        (change(HALF, scale=(-1.0, -1.0)), "scales must be above 0"),
        (change(HALF, scale=(math.nan, math.nan)), "scales must be above 0"),
        (change(HALF, scale=(math.inf, math.inf)), "scales must be above 0"),
        (change(HALF, scale=(0.5, 0.6)), "one scale for all labels"),
        (change(HALF, bias=(0.0, 1.0)), "temperature has no bias"),
        (change(VECTOR, bias=(math.inf, 0.0)), "biases must be finite"),
        (change(VECTOR, curves=(CURVE,)), "vector has no curves"),
        (change(VECTOR, method="platt"), "one scale for all labels"),
        (change(ISOTONIC, scale=(1.0, 1.0)), "neither scale nor bias"),
        (change(ISOTONIC, curves=(CURVE, CURVE)), "2 curves where 1 belong"),
        (change(ISOTONIC, curves=(Curve((0.0, 0.0), (1.0, 2.0)),)), "x must increase"),
        (change(ISOTONIC, curves=(Curve((0.0, 1.0), (2.0, 1.0)),)), "y must not decrease"),
        (change(ISOTONIC, curves=(Curve((0.0,), (2.0,)),)), "at least two points"),
        (change(ISOTONIC, curves=(Curve((0.0, 1.0), (2.0,)),)), "at least two points"),
        (change(ISOTONIC, curves=(Curve((0.0, math.inf), (1.0, 2.0)),)), "must be finite"),
        (change(HALF, texts_fitted=0), "at least 1"),
        (change(HALF, texts_sha256="x"), "no SHA-256"),
        (change(HALF, before=dataclasses.replace(NUMBERS, kld=math.nan)), "finite numbers"),
        (change(HALF, after=dataclasses.replace(NUMBERS, kld=None)), "judged by"),
        (change(HALF, fitted_to="labels"), "judged by"),
        (change(HALF) | {"method": "magic"}, "'magic' is none of"),
        (change(HALF) | {"extra": 1}, "unknown key 'extra'"),
        ({"method": "temperature"}, "missing"),
    ],
)
def test_a_tampered_correction_is_refused(bert_bundle, document, said):
    manifest = json.loads((bert_bundle / "bundle.json").read_text())
    manifest["variants"][0]["recalibration"] = document
    with pytest.raises(BundleError, match=said):
        parse_manifest(json.dumps(manifest).encode())


def test_three_labels_have_no_curve(scorer_bundle):
    manifest = json.loads((scorer_bundle / "bundle.json").read_text())
    manifest["variants"][0]["recalibration"] = dataclasses.asdict(ISOTONIC)
    with pytest.raises(BundleError, match="isotonic is for two labels or sigmoid labels, not for 5"):
        parse_manifest(json.dumps(manifest).encode())
