"""Tests and confidence sequences for a mean by betting, valid however often they are checked.

A gambler bets that values in [0, 1] have a higher (lower) mean than m. If the mean is m, the expected wealth stays 1.
The wealth then ever reaches 1 / a with probability at most a (Ville's inequality). Each bet depends on earlier values
only (Waudby-Smith & Ramdas 2024, "Estimating means of bounded random variables by betting").
"""

from __future__ import annotations

import math

import numpy as np

from langchain_datashunt.exceptions import DataError
from langchain_datashunt.prediction import FloatArray

_GRID = 1001


def betting_p_value(values: FloatArray, mean: float) -> float:
    """Return a valid p-value of "the mean is at least `mean`", which is small if the values are lower.

    Args:
        values: Independent values in [0, 1], shape `[n]`, in an order that does not depend on them.
        mean: Mean under the null hypothesis, in (0, 1).

    Returns:
        P-value, 1.0 if there are no values.

    Raises:
        DataError: `mean` is not between 0 and 1.
    """
    if not 0.0 < mean < 1.0:
        raise DataError(f"Expected a number between 0 and 1 for `mean`, got {mean}. Pass a share, not a percentage.")
    if not len(values):
        return 1.0
    bound = 0.5 / (1.0 - mean)  # a bet may lose at most about half of the wealth
    steps = np.maximum(-np.minimum(_bets(values, math.log(1 / 0.05)), bound) * (values - mean), -0.999)
    return float(min(1.0, math.exp(-np.cumsum(np.log1p(steps)).max())))


def _bets(values: FloatArray, weight: float) -> FloatArray:
    """Return the sizes of the bets, each from earlier values only: about sqrt(2 log(1/a) / (variance t log t))."""
    n = len(values)
    before = np.arange(1, n + 1)
    spread = np.concatenate([[0.0], np.cumsum((values - (0.5 + np.cumsum(values)) / (before + 1)) ** 2)[:-1]])
    variance = (0.25 + spread) / before
    return np.asarray(np.sqrt(2.0 * weight / np.maximum(1e-12, variance * before * np.log(before + 1.0))))


class ConfidenceSequence:
    """Confidence interval for a mean that holds at all times at once, with probability `level`.

    Two gamblers bet against every mean of a grid, one on a higher mean and one on a lower one. A mean stays possible if
    neither has become rich by betting against it. Memory is constant.

    Args:
        level: Confidence level, in (0, 1).

    Raises:
        DataError: `level` is not between 0 and 1.
    """

    def __init__(self, level: float = 0.95) -> None:
        if not 0.0 < level < 1.0:
            raise DataError(f"Expected a number between 0 and 1 for `level`, got {level}. Pass 0.95, for example.")
        self.level = level
        self.n = 0
        self.total = 0.0
        self._squares = 0.0
        self._grid = np.linspace(0.0, 1.0, _GRID)
        self._higher = np.zeros(_GRID)
        self._lower = np.zeros(_GRID)
        self._low, self._high = 0.0, 1.0

    def add(self, value: float) -> None:
        """Add a value and update the interval.

        Args:
            value: Number in [0, 1].

        Raises:
            DataError: `value` is not in [0, 1].
        """
        if not 0.0 <= value <= 1.0:
            raise DataError(f"Expected a number in [0, 1] for `value`, got {value}. Scale the values first.")
        t = self.n + 1
        variance = (0.25 + self._squares) / t
        bet = math.sqrt(2.0 * math.log(2.0 / (1.0 - self.level)) / (variance * t * math.log(t + 1.0)))
        m, away = self._grid, value - self._grid
        with np.errstate(divide="ignore"):
            self._higher += np.log1p(np.minimum(bet, 0.5 / np.maximum(m, 1e-9)) * away)
            self._lower += np.log1p(-np.minimum(bet, 0.5 / np.maximum(1.0 - m, 1e-9)) * away)
        self.n, self.total = t, self.total + value
        self._squares += (value - (0.5 + self.total) / (t + 1)) ** 2
        rich = math.log(2.0 / (1.0 - self.level))
        possible = m[(self._higher < rich) & (self._lower < rich)]
        if possible.size:
            step = 1.0 / (_GRID - 1)  # the true limit may lie between two means of the grid
            self._low = max(self._low, float(possible[0]) - step)
            self._high = min(self._high, float(possible[-1]) + step)

    @property
    def mean(self) -> float:
        """Mean of the values so far, or NaN if there are none."""
        return self.total / self.n if self.n else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end of the interval so far, which never widens."""
        return max(0.0, self._low), min(1.0, self._high)
