"""Learn-then-Test for the selective risk: p-values along a fixed grid, and sequential tests over them."""

from __future__ import annotations

import math

import numpy as np

from langchain_datashunt._utils.optional import require
from langchain_datashunt.prediction import BoolArray, FloatArray, IntArray

GRID_SIZE = 200
"""Number of thresholds in the fixed grid."""

_CLOSEST = 1e-5  # distance of the strictest threshold from the highest score, as a share of the range


def grid_of(bounds: tuple[float, float]) -> FloatArray:
    """Return a fixed grid of thresholds from strict to loose, shape `[GRID_SIZE]`.

    The grid does not depend on the data, as the guarantee requires. The distances from the highest score grow
    geometrically, because confident scores crowd there.

    Args:
        bounds: Lowest and highest possible value of the score.
    """
    low, high = bounds
    return np.asarray(high - (high - low) * np.geomspace(_CLOSEST, 1.0, GRID_SIZE))


def risk_p_values(score: FloatArray, right: BoolArray, grid: FloatArray, alpha: float) -> tuple[FloatArray, IntArray]:
    """Return the p-value and the number of local answers at each threshold.

    The null hypothesis is "the error among score >= threshold exceeds alpha". If k of j local answers are wrong, the
    p-value is P(Bin(j, alpha) <= k), which is exact given j.

    Args:
        score: Confidence scores, shape `[n]`.
        right: Whether the small model was right, shape `[n]`.
        grid: Thresholds, shape `[m]`.
        alpha: Upper bound of the error.

    Returns:
        P-values, shape `[m]`, 1.0 if there are no local answers, and numbers of local answers, shape `[m]`.
    """
    order = np.argsort(-score, kind="stable")
    wrong = np.concatenate([[0], np.cumsum(~right[order])])
    kept = np.searchsorted(-score[order], -grid, side="right")
    stats = require("scipy.stats", "calibration")
    p = stats.binom.cdf(wrong[kept], kept, alpha)
    return np.where(kept > 0, p, 1.0), np.asarray(kept, dtype=np.intp)


def examples_needed(alpha: float, confidence: float) -> int:
    """Return the fewest error-free local answers that show the bound, the smallest n with (1 - alpha)^n <= level.

    The level is 1 - `confidence`.
    """
    return max(1, math.ceil(math.log(1.0 - confidence) / math.log1p(-alpha) - 1e-9))


START_ERRORS = 2
"""Number of errors that the first test of a walk tolerates, if there are enough examples.

A walk that starts with the minimum of examples stops at the first unlucky one.
"""


def examples_to_start(alpha: float, level: float, n: int) -> int:
    """Return the number of local answers at which the walk starts.

    The number does not depend on the scores or labels of the examples.

    Args:
        alpha: Upper bound of the error.
        level: Significance level, 1 - confidence.
        n: Number of examples.
    """
    stats, needed = require("scipy.stats", "calibration"), examples_needed(alpha, 1.0 - level)
    wanted = needed
    while wanted < n // 2 and stats.binom.cdf(START_ERRORS, wanted, alpha) > level:
        wanted += 1
    return max(needed, min(wanted, n // 2))


def first_that_fails(p: FloatArray, kept: IntArray, level: float, needed: int) -> tuple[int, int] | None:
    """Return the indices at which the walk from strict to loose starts and stops, or None if it cannot start.

    The walk starts at the first threshold with enough local answers. This start depends on the scores only. It keeps
    the level if the error grows as the threshold falls. The walk can then err only at the first threshold whose error
    exceeds alpha, or at its own start if that lies beyond, and never at both.

    Args:
        p: P-values from strict to loose, shape `[m]`.
        kept: Number of local answers at each threshold, shape `[m]`.
        level: Significance level, 1 - confidence.
        needed: Number of local answers required at the start.

    Returns:
        Index of the start, and index of the first threshold that fails (`len(p)` if none fails).
    """
    enough = np.flatnonzero(kept >= needed)
    if not enough.size:
        return None
    start = int(enough[0])
    failing = np.flatnonzero(p[start:] > level)
    return start, start + int(failing[0]) if failing.size else len(p)


WALKS = 10
"""Number of starts of `last_of_several_walks`, spread evenly over the grid."""


def last_of_several_walks(p: FloatArray, level: float) -> int | None:
    """Return the index of the loosest threshold that passes a walk from any of several fixed starts.

    Each walk tests at `level / WALKS` (Angelopoulos et al. 2021, fixed sequence testing with several starts). Several
    starts are needed if the loss need not grow as the threshold falls: a walk from the strict end alone may never
    begin.

    Args:
        p: P-values from strict to loose, shape `[m]`.
        level: Significance level over all walks, 1 - confidence.

    Returns:
        Index of the threshold, or None if no threshold passes.
    """
    last: int | None = None
    passes = p <= level / WALKS
    for start in np.linspace(0, len(p), WALKS, endpoint=False).astype(int).tolist():
        failing = np.flatnonzero(~passes[start:])
        stop = start + (int(failing[0]) if failing.size else len(p) - start)
        if stop > start:
            last = stop - 1 if last is None else max(last, stop - 1)
    return last
