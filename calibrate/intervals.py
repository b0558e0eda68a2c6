"""95 % intervals of what is measured on a sample of texts. All but the mean's hold for any distribution."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Z95 = 1.959964
RESAMPLES = 200


def wilson(successes: int, trials: int, z: float = Z95) -> tuple[float, float]:
    """The Wilson score interval (95 % by default) of a proportion."""
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def rule_of_three(trials: int) -> float:
    """The 95 % upper bound of a rate of which no case was seen: 1 - 0.05^(1/n), about 3/n (Hanley and Lippman-Hand 1983)."""
    return 1.0 if trials == 0 else 1 - 0.05 ** (1 / trials)


def mean_interval(values: FloatArray) -> tuple[float, float | None]:
    """The normal interval of the mean of values >= 0: too narrow for few, heavy-tailed ones. One value has no upper end."""
    mean = float(values.mean())
    if len(values) < 2:
        return 0.0, None
    half = Z95 * float(values.std(ddof=1)) / math.sqrt(len(values))
    return max(0.0, mean - half), mean + half


def quantile_interval(values: FloatArray, q: float) -> tuple[float, float | None]:
    """Order statistics that hold the q-quantile between them with at least 95 % (David and Nagaraja 2003, 7.1).

    The upper end is None where the largest of these values is not beyond the quantile often enough: too few texts.
    """
    ordered = np.sort(values)
    count = len(ordered)
    below = _binomial_cdf(count, q)
    # P(X_(low) <= quantile) >= .975 and P(X_(high) >= quantile) >= .975, with 1-based order statistics.
    low = int(np.searchsorted(below, 0.025, side="right"))
    high = int(np.searchsorted(below, 0.975)) + 1
    return float(ordered[max(low, 1) - 1]) if low else 0.0, float(ordered[high - 1]) if high <= count else None


def _binomial_cdf(trials: int, p: float) -> FloatArray:
    """P(at most k of `trials`) for k = 0 … trials."""
    k = np.arange(trials + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, trials + 1)))])
    choose = logs[-1] - logs - logs[::-1]
    result: FloatArray = np.cumsum(np.exp(choose + k * math.log(p) + (trials - k) * math.log1p(-p)))
    return result


def bootstrap_interval(statistic: Callable[[npt.NDArray[np.int64]], float], count: int) -> tuple[float, float]:
    """The percentile interval of a statistic of `count` rows, resampled with a fixed seed (Efron 1979).

    statistic: gets the numbers of the rows to use.
    """
    chance = np.random.default_rng(0)
    found = [statistic(chance.integers(0, count, count)) for _ in range(RESAMPLES)]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)
