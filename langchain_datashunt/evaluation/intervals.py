"""How sure a figure is: bootstrap intervals (Efron 1979), vectorised."""

from __future__ import annotations

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
        raise DataError("There are no values to estimate a mean from.")
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
