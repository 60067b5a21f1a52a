"""Betting against a mean: tests and confidence sequences that stay valid however long one looks.

A gambler bets that values in [0, 1] have a higher (lower) mean than m. If the mean is m, the expected wealth stays 1,
so a wealth of 1 / a is reached with probability a at the most, at any time (Ville's inequality). Bets follow the
values seen before (Waudby-Smith & Ramdas 2024, "Estimating means of bounded random variables by betting").
"""

from __future__ import annotations

import math

import numpy as np

from langchain_datashunt.exceptions import DataError
from langchain_datashunt.prediction import FloatArray

_GRID = 1001


def betting_p_value(values: FloatArray, mean: float) -> float:
    """A valid p-value of "the mean is at least `mean`", small where the values are lower.

    Args:
        values: Shape `[n]`, in [0, 1], independent, in an order that does not depend on them.
        mean: In (0, 1).
    """
    if not 0.0 < mean < 1.0:
        raise DataError(f"A mean of {mean} cannot be tested; it must lie between 0 and 1. Give a share.")
    if not len(values):
        return 1.0
    bound = 0.5 / (1.0 - mean)
    steps = np.maximum(-np.minimum(_bets(values, math.log(1 / 0.05)), bound) * (values - mean), -0.999)
    return float(min(1.0, math.exp(-np.cumsum(np.log1p(steps)).max())))


def _bets(values: FloatArray, weight: float) -> FloatArray:
    """Sizes of the bets, each from the values before it: about sqrt(2 log(1/a) / (variance t log t))."""
    n = len(values)
    before = np.arange(1, n + 1)
    spread = np.concatenate([[0.0], np.cumsum((values - (0.5 + np.cumsum(values)) / (before + 1)) ** 2)[:-1]])
    variance = (0.25 + spread) / before
    return np.asarray(np.sqrt(2.0 * weight / np.maximum(1e-12, variance * before * np.log(before + 1.0))))


class ConfidenceSequence:
    """An interval for a mean that holds at all times at once, with probability `level`.

    Two gamblers bet on every value of a grid, one on higher, one on lower means; what neither could become rich
    against is still possible. Constant memory.

    Args:
        level: In (0, 1).
    """

    def __init__(self, level: float = 0.95) -> None:
        if not 0.0 < level < 1.0:
            raise DataError(f"A confidence level of {level} makes no sense; give one between 0 and 1, as 0.95.")
        self.level = level
        self.n = 0
        self.total = 0.0
        self._squares = 0.0
        self._grid = np.linspace(0.0, 1.0, _GRID)
        self._higher = np.zeros(_GRID)
        self._lower = np.zeros(_GRID)
        self._low, self._high = 0.0, 1.0

    def add(self, value: float) -> None:
        """Take one value in [0, 1] in."""
        if not 0.0 <= value <= 1.0:
            raise DataError(f"A value of {value} cannot be used; it must lie in [0, 1]. Scale it first.")
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
            step = 1.0 / (_GRID - 1)
            self._low = max(self._low, float(possible[0]) - step)
            self._high = min(self._high, float(possible[-1]) + step)

    @property
    def mean(self) -> float:
        """Mean of the values so far; NaN without any."""
        return self.total / self.n if self.n else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """The interval so far; it never widens."""
        return max(0.0, self._low), min(1.0, self._high)
