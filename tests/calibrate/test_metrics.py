import math

import numpy as np
import pytest

from samescore.calibrate.gate import TOLERANCES, Tolerance, judge
from samescore.calibrate.metrics import expected_calibration_error, measure

LABELS = ("no", "yes")


def logits_of(p):
    """Two-label logits whose softmax is (1 - p, p)."""
    p = np.asarray(p, np.float64)
    return np.stack([np.zeros_like(p), np.log(p / (1 - p))], axis=1).astype(np.float32)


def test_numbers_of_a_known_case():
    reference, variant = logits_of([0.5, 0.9, 0.2, 0.6]), logits_of([0.5, 0.8, 0.2, 0.45])
    drift = measure(reference, variant, LABELS, "softmax", truth=["yes", "yes", "no", None])
    assert drift.texts == 4
    assert drift.max_abs_dp == pytest.approx(0.15, abs=1e-6)
    assert drift.mean_abs_dp == pytest.approx((0.1 + 0.15) / 4, abs=1e-6)
    assert drift.p99_abs_dp == pytest.approx(np.quantile([0, 0.1, 0, 0.15], 0.99), abs=1e-6)
    kld = (
        0.9 * math.log(0.9 / 0.8) + 0.1 * math.log(0.1 / 0.2) + 0.6 * math.log(0.6 / 0.45) + 0.4 * math.log(0.4 / 0.55)
    ) / 4
    assert drift.kld == pytest.approx(kld, rel=1e-5)
    assert drift.agreement == 0.75
    (flip,) = drift.flips
    assert (flip.text, flip.reference, flip.variant) == (3, "yes", "no")
    assert flip.margin == pytest.approx(0.2, abs=1e-6)
    # Brier score over both labels: 2 (1 - p_true)^2, on the three texts whose label is known.
    assert drift.labelled == 3
    assert drift.labels.brier_shift == pytest.approx(2 * (0.2**2 - 0.1**2) / 3, abs=1e-6)
    assert drift.labels.brier == pytest.approx(2 * (0.5**2 + 0.2**2 + 0.2**2) / 3, abs=1e-6)
    assert drift.labels.brier_shift_low <= drift.labels.brier_shift <= drift.labels.brier_shift_high
    # The four-text quantile has no upper bound.
    assert drift.p99_abs_dp_high is None and drift.beyond_max_high == pytest.approx(1 - 0.05**0.25)


def test_identical_logits_have_no_drift():
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    drift = measure(x, x, ("a", "b", "c"), "softmax")
    assert drift.max_abs_dp == drift.kld == drift.max_abs_dlogit == 0
    assert drift.agreement == 1 and not drift.flips
    assert drift.labels is None and drift.labelled == 0 and drift.noise_ratio is None


def test_sigmoid_labels_are_independent():
    reference, variant = np.array([[0.0, 2.0]], np.float32), np.array([[0.0, 1.0]], np.float32)
    drift = measure(reference, variant, LABELS, "sigmoid")
    p, q = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))
    assert drift.max_abs_dp == pytest.approx(p - q)
    assert drift.kld == pytest.approx(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))


def test_a_sigmoid_s_label_changes_at_one_half():
    """One label alone, and sets of labels: argmax would see neither."""
    one = measure(np.array([[0.1], [2.0]], np.float32), np.array([[-0.1], [2.0]], np.float32), ("spam",), "sigmoid")
    (flip,) = one.flips
    assert (flip.text, flip.reference, flip.variant) == (0, "spam", "none") and one.agreement == 0.5
    assert flip.margin == pytest.approx(2 / (1 + math.exp(-0.1)) - 1)
    reference, variant = np.array([[3.0, 0.2, -0.4]], np.float32), np.array([[3.0, -0.2, 0.4]], np.float32)
    (flip,) = measure(reference, variant, ("a", "b", "c"), "sigmoid", truth=["a"]).flips
    assert (flip.reference, flip.variant) == ("a+b", "a+c")
    assert flip.margin == pytest.approx(1 - 2 / (1 + math.exp(0.4)))
    assert measure(reference, variant, ("a", "b", "c"), "sigmoid", truth=["a"]).labels is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_counted_and_fails(bad):
    reference, variant = logits_of([0.5] * 100), logits_of([0.5] * 100)
    variant[7, 1] = bad
    with np.errstate(invalid="ignore"):
        drift = measure(reference, variant, LABELS, "softmax")
    assert drift.not_finite == 1 and drift.max_abs_dp == 1
    verdict = judge(drift, TOLERANCES["int4"])
    assert not verdict.passed and "1 of 100 texts gave NaN" in verdict.failures[0]


def test_noise_ratio():
    drift = measure(logits_of([0.5]), logits_of([0.52]), LABELS, "softmax", bf16_mean_abs_dp=0.01)
    assert drift.noise_ratio == pytest.approx(2, rel=1e-4)


def test_expected_calibration_error():
    p = np.array([[0.1, 0.9], [0.1, 0.9], [0.4, 0.6], [0.4, 0.6]])
    correct = np.array([True, False, True, True])
    assert expected_calibration_error(p, correct) == pytest.approx((abs(0.9 - 0.5) + abs(0.6 - 1.0)) / 2)


class TestGate:
    def test_each_number_has_its_own_failure(self):
        drift = measure(logits_of([0.9] * 99 + [0.8]), logits_of([0.9] * 99 + [0.4]), LABELS, "softmax")
        verdict = judge(drift, TOLERANCES["int8"])
        said = "; ".join(verdict.failures)
        assert "max_abs_dp 4.00e-01 > 5e-02" in said
        assert "mean_abs_dp" in said
        assert "label agreement 0.9900 < 0.995 (1 of 100 flipped, 0 of them near ties)" in said
        assert "text 99 flipped with margin 0.600 > 0.1" in said

    def test_a_near_tie_may_flip_in_int8_but_not_in_fp32(self):
        reference, variant = logits_of([0.9] * 399 + [0.5001]), logits_of([0.9] * 399 + [0.4999])
        drift = measure(reference, variant, LABELS, "softmax")
        assert judge(drift, TOLERANCES["int8"]).outcome == "PASS"
        assert judge(drift, TOLERANCES["fp32"]).outcome == "FAIL"

    def test_labels_of_near_ties_are_ambiguous(self):
        tie = 1e-6
        reference = logits_of([0.9] * 50 + [0.5 + tie])
        drift = measure(reference, logits_of([0.9] * 50 + [0.5 - tie]), LABELS, "softmax")
        verdict = judge(drift, TOLERANCES["fp32"])
        assert verdict.outcome == "AMBIGUOUS" and verdict.passed and not verdict.failures
        assert "of 1 flipped texts only 0 had a reference margin above 2e-05" in verdict.notes[0]

    def test_one_far_flip_fails_whatever_else_is_a_tie(self):
        tie = 1e-6
        reference, variant = [0.9] * 300 + [0.5 + tie, 0.52], [0.9] * 300 + [0.5 - tie, 0.48]
        verdict = judge(measure(logits_of(reference), logits_of(variant), LABELS, "softmax"), TOLERANCES["int8"])
        assert verdict.outcome == "AMBIGUOUS"  # int8 may move either by 0.02: both are ties
        verdict = judge(measure(logits_of(reference), logits_of(variant), LABELS, "softmax"), TOLERANCES["fp16"])
        assert verdict.outcome == "FAIL" and "2 of 302 flipped, 1 of them near ties" in "; ".join(verdict.failures)

    def test_many_near_ties_are_a_fault(self):
        """Every text undecided, and every label another one: that is no noise."""
        tie = 1e-6
        drift = measure(logits_of([0.5 + tie] * 100), logits_of([0.5 - tie] * 100), LABELS, "softmax")
        assert judge(drift, TOLERANCES["int8"]).outcome == "FAIL"

    def test_a_free_p99_knows_no_near_ties(self):
        tolerance = Tolerance(1.0, 1.0, None, agreement=0.999, flip_margin=None)
        drift = measure(logits_of([0.5001] * 100), logits_of([0.5001] * 99 + [0.4999]), LABELS, "softmax")
        assert tolerance.near_tie == 0 and judge(drift, tolerance).outcome == "FAIL"

    def test_few_texts_are_said_to_be_few(self):
        same = logits_of([0.3] * 100)
        (note,) = judge(measure(same, same, LABELS, "softmax"), TOLERANCES["int8"]).notes
        assert "100 texts only bound the rate of changes by 2.95%" in note and "600 texts are needed for 0.50%" in note
        same = logits_of([0.3] * 600)
        assert not judge(measure(same, same, LABELS, "softmax"), TOLERANCES["int8"]).notes

    @pytest.mark.parametrize("precision", list(TOLERANCES))
    def test_no_drift_passes(self, precision):
        drift = measure(logits_of([0.3, 0.7]), logits_of([0.3, 0.7]), LABELS, "softmax")
        assert judge(drift, TOLERANCES[precision]).passed
