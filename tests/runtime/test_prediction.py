"""Probabilities, entropy and expected values from logits."""

import math

import numpy as np
import pytest

from samescore.runtime.prediction import entropy_of, predict, probabilities_of


def make(logits, **options):
    row = np.array(logits, np.float32)
    labels = [str(i) for i in range(len(logits))]
    return predict(row, labels, options.pop("activation", "softmax"), tokens=3, truncated=False, **options)


def test_entropy_is_in_nats():
    assert make([1.0, 1.0, 1.0, 1.0]).entropy == pytest.approx(math.log(4))
    assert make([math.log(3), 0.0]).entropy == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert make([500.0, -500.0]).entropy == 0.0  # 0 ln 0
    assert entropy_of(probabilities_of(np.array([30.0, 0.0]), "softmax")) == pytest.approx(30 * math.exp(-30), rel=0.05)


def test_expected_value_is_the_mean_label():
    prediction = make([math.log(3), 0.0, -1000.0], values=(0.0, 2.0, 1e6))
    assert prediction.expected_value == pytest.approx(0.5)
    assert make([0.0, 0.0], values=(-1.5, 4.0)).expected_value == pytest.approx(1.25)


def test_records_hold_what_there_is():
    plain = make([0.0, 1.0])
    assert plain.expected_value is None and "expected_value" not in plain.to_record()
    assert plain.to_record()["entropy"] == plain.entropy
    record = make([0.0, 1.0], values=(0, 1)).to_record()
    assert record["expected_value"] == pytest.approx(record["probabilities"]["1"])
    independent = make([0.0, 1.0], activation="sigmoid")
    assert independent.entropy is None and "entropy" not in independent.to_record()
