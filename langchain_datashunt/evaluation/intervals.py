"""How sure a figure is: bootstrap intervals (Efron 1979), vectorised, and Wilson's for a share."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from langchain_datashunt.exceptions import DataError

_CELLS = 20_000_000


class Interval(NamedTuple):
    """An estimate with the ends of its interval."""

    value: float
    low: float
    high: float


def mean_interval(values: NDArray[Any], *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """Mean of per-example values with a percentile bootstrap interval.

    For a comparison of two systems on the same examples, pass the difference of their per-example values: that
    is the paired bootstrap.

    Args:
        values: Shape `[n]`, for example 1 for right and 0 for wrong.
        level: Share of resamples inside the interval.
        resamples: How many.
        seed: Of the resampling.

    Raises:
        DataError: There are no values.
    """
    data = np.asarray(values, dtype=np.float64)
    if not data.size:
        raise DataError("There are no values to estimate a mean from; give at least one.")
    rng, n = np.random.default_rng(seed), len(data)
    distinct, counts = np.unique(data, return_counts=True)
    if len(distinct) <= 16:
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
    """A share with its interval, which says something at 0 and at 1 too (Wilson 1927).

    Args:
        hits: How many of `n` it holds for.
        n: At least 1.
        level: Probability that the interval holds the truth, about.
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
    """Intervals of functions of means: every figure of one resample is computed from the same examples.

    Examples with equal values are drawn together (a multinomial over distinct rows), so that a million examples
    with a few yes/no columns cost what a thousand do.

    Args:
        columns: Per-example values, shape `[n]` each.
        statistics: From resampled means of the columns, shape `[resamples]` each, to a figure `[resamples]`.
        level: Share of resamples inside the interval.
        resamples: How many.
        seed: Of the resampling.

    Raises:
        DataError: There are no examples.
    """
    names = list(columns)
    data = np.column_stack([np.asarray(columns[name], dtype=np.float64) for name in names])
    n = len(data)
    if not n:
        raise DataError("There are no examples to estimate intervals from; give at least one.")
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
    """Interval of anything that is computed from examples, by index; fewer resamples where there are very many.

    Args:
        statistic: From indices of examples, shape `[n]`, to a figure.
        n: Examples.
        level: Share of resamples inside the interval.
        resamples: How many at the most.
        seed: Of the resampling.
        cells: Examples times resamples at the most; 50 resamples at the least.
    """
    if not n:
        raise DataError("There are no examples to estimate an interval from; give at least one.")
    rng, times = np.random.default_rng(seed), max(50, min(resamples, cells // n))
    drawn = [statistic(rng.integers(0, n, size=n)) for _ in range(times)]
    low, high = np.quantile(drawn, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(statistic(np.arange(n)), float(low), float(high))
