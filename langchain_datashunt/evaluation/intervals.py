"""Confidence intervals: vectorised bootstrap intervals (Efron 1979), and Wilson's interval for a share."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from langchain_datashunt.exceptions import DataError

_CELLS = 20_000_000  # array cells per step, to bound memory


class Interval(NamedTuple):
    """Estimate with the lower and upper end of its confidence interval."""

    value: float
    low: float
    high: float


def mean_interval(values: NDArray[Any], *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """Return the mean of per-example values with a percentile bootstrap interval.

    To compare two systems on the same examples, pass the difference of their per-example values (paired bootstrap).

    Args:
        values: Per-example values, shape `[n]`, for example 1 if right and 0 if wrong.
        level: Confidence level, the share of resamples inside the interval.
        resamples: Number of resamples.
        seed: Random seed of the resampling.

    Raises:
        DataError: There are no values.
    """
    data = np.asarray(values, dtype=np.float64)
    if not data.size:
        raise DataError("Expected at least one number for `values`, got none. Provide at least one example.")
    rng, n = np.random.default_rng(seed), len(data)
    distinct, counts = np.unique(data, return_counts=True)
    if len(distinct) <= 16:  # counts of few distinct values can be drawn at once, which is much faster
        drawn = rng.multinomial(n, counts / n, size=resamples)
        means = drawn @ distinct / n
    else:
        rows = max(1, _CELLS // n)
        parts = [
            data[rng.integers(0, n, size=(min(rows, resamples - start), n))].mean(axis=1)
            for start in range(0, resamples, rows)
        ]
        means = np.concatenate(parts)
    low, high = np.quantile(means, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(float(data.mean()), float(low), float(high))


def wilson_interval(hits: int, n: int, *, level: float = 0.95) -> Interval:
    """Return a share with its score interval, which is informative even at 0 and 1 (Wilson 1927).

    Args:
        hits: Number of hits among `n` cases.
        n: Number of cases, at least 1.
        level: Approximate confidence level.
    """
    z, share = NormalDist().inv_cdf((1.0 + level) / 2.0), hits / n
    middle, scale = share + z * z / (2 * n), 1.0 + z * z / n
    half = z * math.sqrt(share * (1.0 - share) / n + z * z / (4 * n * n))
    low, high = (middle - half) / scale, (middle + half) / scale
    return Interval(share, 0.0 if hits == 0 else low, 1.0 if hits == n else high)


def joint_intervals(
    columns: dict[str, NDArray[Any]],
    statistics: dict[str, Callable[[dict[str, NDArray[np.float64]]], NDArray[np.float64]]],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return bootstrap intervals for functions of means, all from the same resamples.

    Examples with equal values are drawn together, by a multinomial over distinct rows. A million examples with a few
    binary columns therefore cost as much as a thousand.

    Args:
        columns: Per-example values by name, shape `[n]` each.
        statistics: Functions by name, from resampled means of the columns (shape `[resamples]` each) to a figure (shape
            `[resamples]`).
        level: Confidence level, the share of resamples inside the interval.
        resamples: Number of resamples.
        seed: Random seed of the resampling.

    Raises:
        DataError: There are no examples.
    """
    names = list(columns)
    data = np.column_stack([np.asarray(columns[name], dtype=np.float64) for name in names])
    n = len(data)
    if not n:
        raise DataError("Expected at least one row in `columns`, got none. Provide at least one example.")
    rng = np.random.default_rng(seed)
    distinct, counts = np.unique(data, axis=0, return_counts=True)
    means = np.empty((resamples, len(names)))
    step = max(1, _CELLS // len(distinct))
    for start in range(0, resamples, step):
        stop = min(resamples, start + step)
        means[start:stop] = rng.multinomial(n, counts / n, size=stop - start) @ distinct / n
    drawn = {name: means[:, i] for i, name in enumerate(names)}
    own = {name: data[:, i].mean(keepdims=True) for i, name in enumerate(names)}
    found = {}
    for name, statistic in statistics.items():
        low, high = np.quantile(statistic(drawn), [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
        found[name] = Interval(float(statistic(own)[0]), float(low), float(high))
    return found


def resampled_interval(
    statistic: Callable[[NDArray[np.intp]], float],
    n: int,
    *,
    level: float = 0.95,
    resamples: int = 500,
    seed: int = 0,
    cells: int = 20_000_000,
) -> Interval:
    """Return a bootstrap interval for any statistic of the examples.

    Args:
        statistic: Function from indices of examples, shape `[n]`, to a figure.
        n: Number of examples.
        level: Confidence level, the share of resamples inside the interval.
        resamples: Maximum number of resamples.
        seed: Random seed of the resampling.
        cells: Maximum of examples times resamples, which reduces the resamples to no fewer than 50.

    Raises:
        DataError: There are no examples.
    """
    if not n:
        raise DataError("Expected a positive number of examples for `n`, got 0. Provide at least one example.")
    rng, times = np.random.default_rng(seed), max(50, min(resamples, cells // n))
    drawn = [statistic(rng.integers(0, n, size=n)) for _ in range(times)]
    low, high = np.quantile(drawn, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(statistic(np.arange(n)), float(low), float(high))
