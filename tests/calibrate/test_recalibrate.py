"""Fits of known corrections, and fits that held-out texts refuse."""

import sys

import numpy as np
import pytest

from samescore.calibrate import recalibrate
from samescore.calibrate.recalibrate import Evidence, cross_entropy, fit, held_out_rows, judged_pair, numbers_of
from samescore.runtime.errors import GateError, MissingDependencyError, UsageError
from samescore.runtime.prediction import probabilities_of
from samescore.runtime.recalibration import calibrated

N = 300
HELD_OUT = held_out_rows([f"{i:064x}" for i in range(N)])
MODELS = [(2, "softmax"), (3, "softmax"), (5, "softmax"), (1, "sigmoid"), (4, "sigmoid")]


def fitted(evidence, activation="softmax", method="temperature", to="reference", held_out=HELD_OUT):
    labels = [f"label {k}" for k in range(evidence.logits.shape[1])]
    return fit(evidence, held_out, method=method, to=to, activation=activation, labels=labels, digest="a" * 64)


def random_logits(labels, seed=0):
    return np.random.default_rng(seed).normal(size=(N, labels)) * 3


def drawn(logits, activation="softmax", seed=1):
    """Classes drawn from the probabilities of the logits."""
    p = probabilities_of(logits, activation)
    return (p.cumsum(axis=1) > np.random.default_rng(seed).uniform(size=(N, 1))).argmax(axis=1)


@pytest.mark.parametrize(("labels", "activation"), MODELS)
def test_a_temperature_is_recovered(labels, activation):
    logits = random_logits(labels)
    found = fitted(Evidence(logits, logits / 2, None), activation)
    assert found.outcome == "gain"
    np.testing.assert_allclose(found.recalibration.scale, 0.5, atol=1e-6)
    assert found.recalibration.bias == (0.0,) * labels
    assert found.recalibration.before.kld > 0.01 and found.recalibration.after.kld < 1e-12


@pytest.mark.parametrize(("labels", "activation"), MODELS)
def test_vector_scaling_is_recovered(labels, activation):
    logits = random_logits(labels)
    chance = np.random.default_rng(2)
    scale, bias = chance.uniform(0.5, 2, labels), chance.normal(size=labels)
    found = fitted(Evidence(logits, logits * scale + bias, None), activation, "vector").recalibration
    np.testing.assert_allclose(found.scale, scale, atol=1e-5)
    # A softmax does not see a bias that all labels share.
    difference = np.array(found.bias) - bias
    np.testing.assert_allclose(difference, difference.mean() if activation == "softmax" else 0, atol=1e-5)


def test_the_fit_is_the_minimum_of_the_training_texts():
    logits, reference = random_logits(3), random_logits(3) + np.random.default_rng(5).normal(size=(N, 3))
    found = fitted(Evidence(logits, reference, None), method="vector").recalibration
    targets = probabilities_of(reference, "softmax")[~HELD_OUT]

    def loss(scale, bias):
        return cross_entropy(logits[~HELD_OUT] * scale + bias, targets, "softmax").mean()

    least = loss(np.array(found.scale), np.array(found.bias))
    for k in range(3):
        for step in (-1e-3, 1e-3):
            moved = np.eye(3)[k] * step
            assert loss(np.array(found.scale) + moved, np.array(found.bias)) > least
            assert loss(np.array(found.scale), np.array(found.bias) + moved) > least


def test_the_same_texts_give_the_same_bits():
    logits = random_logits(3)
    evidence = Evidence(logits, logits * 0.7 + random_logits(3, 4) * 0.1, None)
    assert fitted(evidence, method="vector") == fitted(evidence, method="vector")


def test_worse_held_out_texts_refuse_the_fit():
    logits = random_logits(2)
    reference = np.where(HELD_OUT[:, None], logits * 1.5, logits * 0.5)
    found = fitted(Evidence(logits, reference, None))
    assert found.outcome == "worse" and found.recalibration.after.kld > found.recalibration.before.kld
    assert "KLD rises by" in found.reason


def test_no_gain_without_a_difference_and_within_noise():
    logits = random_logits(3)
    same = fitted(Evidence(logits, logits, None), method="vector")
    assert same.outcome == "no gain" and "changes probabilities by" in same.reason
    # One held-out text of a hundred gains: chance.
    reference = np.where(HELD_OUT[:, None], logits, logits * 0.99)
    reference[np.flatnonzero(HELD_OUT)[0]] *= 0.2
    found = fitted(Evidence(logits, reference, None))
    assert found.outcome == "no gain" and "within its 95 % noise" in found.reason


@pytest.mark.parametrize(("labels", "activation"), [(2, "softmax"), (3, "softmax"), (3, "sigmoid")])
def test_labels_soften_an_overconfident_model(labels, activation):
    truth = random_logits(labels) / 3
    evidence = Evidence(truth * 6, None, drawn(truth, "softmax"))
    found = fitted(evidence, activation, "vector", "labels")
    numbers = found.recalibration
    assert found.outcome == "gain" and numbers.before.kld is None
    assert numbers.after.nll < numbers.before.nll and numbers.after.ece < numbers.before.ece
    if activation == "softmax":
        assert np.mean(numbers.scale) == pytest.approx(1 / 6, abs=0.06)


def test_a_worse_ece_refuses_a_fit_to_labels(monkeypatch):
    truth = random_logits(2) / 3
    evidence = Evidence(truth * 6, None, drawn(truth))
    rising = iter([0.1, 0.2])
    monkeypatch.setattr(recalibrate, "expected_calibration_error", lambda *_: next(rising))
    found = fitted(evidence, to="labels")
    assert found.outcome == "worse" and "ECE rises by" in found.reason


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_platt_is_recovered(activation):
    pytest.importorskip("sklearn")
    logits = random_logits(2)
    bias = np.array([-0.5, 0.5])
    found = fitted(Evidence(logits, logits * 1.5 + bias, None), activation, "platt").recalibration
    np.testing.assert_allclose(found.scale, 1.5, atol=1e-4)
    np.testing.assert_allclose(found.bias, bias, atol=1e-4)


def test_platt_smooths_labels():
    """Perfectly separated labels have no finite maximum likelihood, but Platt's targets are never 0 or 1."""
    pytest.importorskip("sklearn")
    logits = random_logits(2)
    classes = (logits[:, 1] > logits[:, 0]).astype(int)
    found = fitted(Evidence(logits, None, classes), method="platt", to="labels").recalibration
    assert 1 < found.scale[0] < 100
    with pytest.raises(GateError, match="no sensible correction over 200 texts and 2 labels"):
        fitted(Evidence(logits * 1e-4, None, classes), to="labels")


@pytest.mark.parametrize(("labels", "activation"), [(2, "softmax"), (3, "sigmoid")])
def test_isotonic_finds_a_bent_curve(labels, activation):
    pytest.importorskip("sklearn")
    logits = random_logits(labels)
    bent = np.sign(logits) * np.abs(logits) ** 1.5 / 2
    if activation == "softmax":
        odds = logits[:, 1] - logits[:, 0]
        bent = np.stack([0 * odds, np.sign(odds) * np.abs(odds) ** 1.5 / 2], axis=1)
    evidence = Evidence(logits, bent, None)
    curved, straight = fitted(evidence, activation, "isotonic"), fitted(evidence, activation, "platt")
    assert curved.outcome == "gain"
    assert curved.recalibration.after.kld < straight.recalibration.after.kld / 10
    assert len(curved.recalibration.curves) == (1 if activation == "softmax" else labels)


def test_isotonic_keeps_labels_away_from_certainty():
    pytest.importorskip("sklearn")
    logits = random_logits(2)
    classes = (logits[:, 1] > logits[:, 0]).astype(int)
    (curve,) = fitted(Evidence(logits, None, classes), method="isotonic", to="labels").recalibration.curves
    assert curve.y[0] == pytest.approx(-np.log(201)) and curve.y[-1] == pytest.approx(np.log(201))


def test_methods_and_labels_that_do_not_suit():
    logits = random_logits(3)
    with pytest.raises(UsageError, match="--method isotonic is for two labels or sigmoid labels; this bundle has 3"):
        fitted(Evidence(logits, logits, None), method="isotonic")
    with pytest.raises(UsageError, match="no text to fit on has the label label 2"):
        fitted(Evidence(logits, None, np.arange(N) % 2), to="labels")
    with pytest.raises(UsageError, match="a model of one label"):
        fitted(Evidence(logits[:, :1], None, np.zeros(N, int)), "sigmoid", to="labels")
    logits[3] = np.nan
    with pytest.raises(GateError, match="1 of 300 texts gave NaN"):
        fitted(Evidence(logits, logits, None))


def test_scikit_learn_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.isotonic", None)
    logits = random_logits(2)
    with pytest.raises(MissingDependencyError, match=r"samescore\[recalibrate\]"):
        fitted(Evidence(logits, logits, None), method="isotonic")


def test_every_third_text_is_held_out_whatever_the_order():
    digests = [f"{i * 7919 % 1000:064x}" for i in range(100)]
    rows = held_out_rows(digests)
    assert rows.sum() == 33
    backwards = held_out_rows(digests[::-1])
    assert {d for d, r in zip(digests, rows, strict=True) if r} == {
        d for d, r in zip(digests[::-1], backwards, strict=True) if r
    }
    with pytest.raises(
        UsageError, match="80 different texts leave 26 to judge the fit by, and it takes 30: hand in 10 more"
    ):
        held_out_rows(digests[:80])
    assert held_out_rows(digests[:90]).sum() == 30


def test_numbers_of_a_known_case():
    evidence = Evidence(np.array([[0.0, 0.0], [0.0, 0.0]]), np.array([[0.0, 0.0], [0.0, np.log(3)]]), np.array([0, 1]))
    numbers = numbers_of(evidence, None, "softmax")
    assert numbers.mean_abs_dp == pytest.approx(0.125) and numbers.p99_abs_dp == pytest.approx(0.25 * 0.99)
    assert numbers.kld == pytest.approx((0.25 * np.log(0.5) + 0.75 * np.log(1.5)) / 2)
    assert numbers.nll == pytest.approx(np.log(2)) and numbers.brier == pytest.approx(0.5)
    assert numbers.ece == pytest.approx(0.0)


def test_the_reference_follows_a_fit_to_labels_only():
    logits = random_logits(2)
    to_reference = fitted(Evidence(logits, logits / 2, None)).recalibration
    to_labels = fitted(Evidence(logits, None, drawn(logits / 2)), to="labels").recalibration
    assert judged_pair(logits, logits, None) == (logits, logits)
    reference, variant = judged_pair(logits, logits, to_reference)
    assert reference is logits and not np.array_equal(variant, logits)
    reference, variant = judged_pair(logits, logits, to_labels)
    np.testing.assert_array_equal(reference, variant)
    np.testing.assert_array_equal(variant, calibrated(logits, to_labels))
