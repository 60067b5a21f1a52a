"""Learn-then-Test for the error among what is kept: p-values along a fixed grid, and where they stop passing."""

from __future__ import annotations

import math

import numpy as np

from langchain_datashunt._utils.optional import require
from langchain_datashunt.prediction import BoolArray, FloatArray, IntArray

GRID_SIZE = 200
"""Thresholds of the fixed grid."""

_CLOSEST = 1e-5


def grid_of(bounds: tuple[float, float]) -> FloatArray:
    """Thresholds from strict to loose, shape `[GRID_SIZE]`, fixed before any data is seen.

    Their distances from the score's highest value grow geometrically, since confident scores crowd there.

    Args:
        bounds: The lowest and highest value of the score.
    """
    low, high = bounds
    return np.asarray(high - (high - low) * np.geomspace(_CLOSEST, 1.0, GRID_SIZE))


def risk_p_values(score: FloatArray, right: BoolArray, grid: FloatArray, alpha: float) -> tuple[FloatArray, IntArray]:
    """P-values of "the error among score >= threshold exceeds alpha", and how many are kept.

    With n kept and k wrong the p-value is P(Bin(n, alpha) <= k), which is exact given n.

    Args:
        score: Shape `[n]`.
        right: Shape `[n]`.
        grid: Shape `[m]`, thresholds.
        alpha: The bound on the error.

    Returns:
        P-values `[m]`, 1.0 where nothing is kept, and the numbers kept `[m]`.
    """
    order = np.argsort(-score, kind="stable")
    wrong = np.concatenate([[0], np.cumsum(~right[order])])
    kept = np.searchsorted(-score[order], -grid, side="right")
    stats = require("scipy.stats", "calibration")
    p = stats.binom.cdf(wrong[kept], kept, alpha)
    return np.where(kept > 0, p, 1.0), np.asarray(kept, dtype=np.intp)


def examples_needed(alpha: float, confidence: float) -> int:
    """Kept examples without a single error from which a bound on the error can be shown: (1 - alpha)^n <= level."""
    return max(1, math.ceil(math.log(1.0 - confidence) / math.log1p(-alpha) - 1e-9))


START_ERRORS = 2
"""The walk begins where so many errors among the kept would still pass, if the examples allow it: a walk that begins
with the first few examples ends with the first unlucky one."""


def examples_to_start(alpha: float, level: float, n: int) -> int:
    """Kept examples with which the walk begins: from alpha, level and the number of examples alone."""
    stats, needed = require("scipy.stats", "calibration"), examples_needed(alpha, 1.0 - level)
    wanted = needed
    while wanted < n // 2 and stats.binom.cdf(START_ERRORS, wanted, alpha) > level:
        wanted += 1
    return max(needed, min(wanted, n // 2))


def first_that_fails(p: FloatArray, kept: IntArray, level: float, needed: int) -> tuple[int, int] | None:
    """Where the walk from strict to loose begins and ends; None where it cannot begin.

    It begins at the first threshold that keeps enough examples. That choice looks at the scores only,
    and keeps the level where the error grows as the threshold falls: the walk errs only at the first threshold whose
    error exceeds alpha, or at its own start if that lies beyond, and never at both.

    Args:
        p: P-values, from strict to loose.
        kept: Examples kept at each.
        level: One less the confidence.
        needed: Examples that must be kept for a start.

    Returns:
        Index of the start, and of the first threshold that does not pass (the number of thresholds for none).
    """
    enough = np.flatnonzero(kept >= needed)
    if not enough.size:
        return None
    start = int(enough[0])
    failing = np.flatnonzero(p[start:] > level)
    return start, start + int(failing[0]) if failing.size else len(p)


WALKS = 10
"""Starts of `last_of_several_walks`, evenly spread over the grid."""


def last_of_several_walks(p: FloatArray, level: float) -> int | None:
    """The loosest threshold that is shown by walks from several fixed starts, each at level / WALKS; None for none.

    For a loss that need not grow as the threshold falls, so that a walk from the strict end alone may never begin
    (Angelopoulos et al. 2021, fixed sequence testing with several starts).

    Args:
        p: P-values, from strict to loose.
        level: One less the confidence.
    """
    last: int | None = None
    passes = p <= level / WALKS
    for start in np.linspace(0, len(p), WALKS, endpoint=False).astype(int).tolist():
        failing = np.flatnonzero(~passes[start:])
        stop = start + (int(failing[0]) if failing.size else len(p) - start)
        if stop > start:
            last = stop - 1 if last is None else max(last, stop - 1)
    return last
