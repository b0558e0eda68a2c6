import numpy as np
import pytest

from samescore.calibrate.intervals import (
    bootstrap_interval,
    mean_interval,
    quantile_interval,
    rule_of_three,
    wilson,
)


@pytest.mark.parametrize(
    # Reference values: R, binom::binom.confint(x, n, methods = "wilson").
    ("successes", "trials", "low", "high"),
    [(300, 300, 0.98736, 1.0), (0, 10, 0.0, 0.27753), (5, 10, 0.23659, 0.76341), (299, 300, 0.98136, 0.99941)],
)
def test_wilson(successes, trials, low, high):
    assert wilson(successes, trials) == pytest.approx((low, high), abs=1e-5)


def test_rule_of_three():
    assert rule_of_three(3000) == pytest.approx(3 / 3000, rel=2e-3)
    assert rule_of_three(0) == 1


@pytest.mark.parametrize(
    # Order statistics of the median: tables of Hollander and Wolfe (1999), n = 20 and 100; the p99 of few values has no end.
    ("count", "q", "low", "high"),
    [(100, 0.5, 40, 61), (20, 0.5, 6, 15), (100, 0.99, 97, None), (3000, 0.99, 2959, 2981)],
)
def test_quantile_interval(count, q, low, high):
    values = np.random.default_rng(0).permutation(np.arange(1, count + 1).astype(float))
    assert quantile_interval(values, q) == (low, high)


def test_quantile_intervals_hold_the_quantile_as_often_as_they_say():
    chance = np.random.default_rng(1)
    quantile = -np.log(0.01)  # of the exponential distribution
    held = 0
    for _ in range(400):
        low, high = quantile_interval(chance.exponential(size=800), 0.99)
        held += low <= quantile <= high
    assert 0.93 <= held / 400 <= 1


def test_mean_interval():
    low, high = mean_interval(np.array([1.0, 2.0, 3.0, 4.0]))
    assert (low, high) == pytest.approx((2.5 - 1.959964 * 1.290994 / 2, 2.5 + 1.959964 * 1.290994 / 2))
    assert mean_interval(np.array([1.0])) == (0.0, None)


def test_bootstrap_repeats_itself():
    values = np.random.default_rng(2).normal(size=500)

    def mean(rows):
        return float(values[rows].mean())

    low, high = bootstrap_interval(mean, 500)
    assert (low, high) == bootstrap_interval(mean, 500)
    half = 1.96 * values.std() / 500**0.5
    assert low == pytest.approx(values.mean() - half, abs=0.02) and high == pytest.approx(
        values.mean() + half, abs=0.02
    )
