"""Statistics of next-token distributions against what they mean, written out."""

import math

import numpy as np
import pytest

from samescore.calibrate.generation_gate import GENERATION_TOLERANCES, failures_of
from samescore.calibrate.generation_metrics import Rows, compare, greedy_agreement, token_drift

VOCABULARY, POSITIONS = 50, 12


def logits(seed, scale=3.0):
    return np.random.default_rng(seed).normal(0, scale, (POSITIONS, VOCABULARY)).astype(np.float32)


def softmax(x):
    e = np.exp(x.astype(np.float64))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.fixture
def pair():
    reference = logits(0)
    following = np.random.default_rng(1).integers(0, VOCABULARY, POSITIONS)
    return Rows.whole(reference, following), reference + 0.1 * logits(2), following


def test_statistics_are_their_definitions(pair):
    rows, other, following = pair
    p, q = softmax(rows.logits), softmax(other)
    found = compare(rows, other)
    best, at = p.argmax(axis=1), np.arange(POSITIONS)
    np.testing.assert_allclose(found.kld, (p * np.log(p / q)).sum(axis=1), rtol=1e-9)
    np.testing.assert_allclose(found.dp, q[at, best] - p[at, best], atol=1e-12)
    np.testing.assert_allclose(found.loss, -np.log(q[at, following]), rtol=1e-9)
    assert found.same.tolist() == (best == q.argmax(axis=1)).tolist()
    drift = token_drift([found])
    ratio = math.exp(np.mean(np.log(p[at, following] / q[at, following])))
    assert drift.perplexity_ratio == pytest.approx(ratio)
    assert drift.perplexity == pytest.approx(math.exp(-np.log(p[at, following]).mean()), rel=1e-5)
    both = token_drift([found, compare(rows, rows.logits)])
    assert both.mean_kld_low < both.mean_kld < both.mean_kld_high and both.positions == 2 * POSITIONS
    assert drift.dp_percentiles["p50"] == pytest.approx(np.median(found.dp))


def test_tiny_differences_keep_their_digits():
    reference = logits(0).astype(np.float64)
    noise = 1e-6 * logits(3)
    p = softmax(reference)
    # The second-order term: half of the variance of the noise under p.
    expected = ((p * noise**2).sum(axis=1) - (p * noise).sum(axis=1) ** 2) / 2
    rows = Rows.whole(reference, np.zeros(POSITIONS, np.int64))
    np.testing.assert_allclose(compare(rows, reference + noise).kld, expected, rtol=1e-2)


def test_stored_tokens_give_a_lower_bound(pair):
    rows, other, _ = pair
    whole, top = compare(rows, other), compare(rows.top(10), other)
    assert (top.kld <= whole.kld + 1e-12).all() and (top.kld > 0.2 * whole.kld).all()
    np.testing.assert_array_equal(top.dp, whole.dp)
    np.testing.assert_array_equal(top.same, whole.same)
    np.testing.assert_array_equal(top.loss, whole.loss)
    assert rows.top(10).ids[:, 0].tolist() == rows.logits.argmax(axis=1).tolist()


def test_ties_and_divergences():
    reference = np.zeros((3, 4), np.float32)
    reference[:, 0], reference[:, 1], reference[:, 2] = 5, 4.999, 1
    rows = Rows.whole(reference, np.zeros(3, np.int64))
    tie, far = reference.copy(), reference.copy()
    tie[1, 1] = 6  # takes the second best, 0.001 behind
    far[1, 2], far[2, 1] = 9, 9  # only the first divergence counts
    found = [compare(rows, one) for one in (reference, tie, far)]
    greedy = greedy_agreement(found, [np.zeros(3, np.int64)] * 3, tie=0.01)
    assert (greedy.identical, greedy.near_ties, greedy.outside, greedy.tokens) == (1, 1, 1, 5 / 3)
    first, second = greedy.divergences
    assert (first.prompt, first.position, first.token) == (2, 1, 2) and first.gap == pytest.approx(4)
    assert (second.prompt, second.token) == (1, 1) and second.gap == pytest.approx(1e-3, rel=1e-2)
    drift = token_drift(found)
    said = failures_of(drift, drift, greedy, GENERATION_TOLERANCES["fp32"])
    assert any("1 of 3 greedy answers are not the reference's" in line for line in said)
    unknown = compare(rows.top(2), far)
    assert unknown.gap[1] == math.inf


@pytest.mark.parametrize("broken", [1, POSITIONS])
def test_what_is_no_number_fails(pair, broken):
    rows, other, _ = pair
    other[:broken] = np.nan
    found = compare(rows, other)
    drift = token_drift([found])
    greedy = greedy_agreement([found], [rows.logits.argmax(axis=1)], tie=1.0)
    assert drift.not_finite == broken and drift.positions == POSITIONS - broken
    said = failures_of(drift, drift, greedy, GENERATION_TOLERANCES["int4"])
    assert f"{broken} positions of answers gave NaN or infinite logits" in said
    assert greedy.outside == 1
