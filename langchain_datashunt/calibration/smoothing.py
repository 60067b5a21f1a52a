"""How right a model is at each score, as a smooth curve: the best point of a raw curve is luck to a good part."""

from __future__ import annotations

import numpy as np

from langchain_datashunt.prediction import BoolArray, FloatArray

SMOOTH_FROM = 200
"""Examples from which a curve is smoothed; fewer are taken as they are."""

_RIDGE = 0.1
_STEPS = 50


def smoothed_right(score: FloatArray, bounds: tuple[float, float], right: BoolArray) -> FloatArray:
    """P(right | score) by logistic regression on the score's logit and its square, shape `[n]`.

    Args:
        score: Shape `[n]`.
        bounds: The lowest and highest value of the score.
        right: Shape `[n]`.
    """
    low, high = bounds
    share = np.clip((score - low) / (high - low), 1e-9, 1.0 - 1e-9)
    logit = np.log(share / (1.0 - share))
    columns = np.column_stack([np.ones(len(score)), logit, logit**2 / 4.0])
    weights = np.zeros(columns.shape[1])
    for _ in range(_STEPS):  # Newton's method; the penalty leaves the constant free
        p = 1.0 / (1.0 + np.exp(-np.clip(columns @ weights, -30.0, 30.0)))
        penalty = _RIDGE * np.array([1e-6, 1.0, 1.0])
        slope = columns.T @ (p - right) + penalty * weights
        bend = (columns * np.maximum(p * (1.0 - p), 1e-9)[:, None]).T @ columns + np.diag(penalty)
        step = np.linalg.solve(bend, slope)
        weights -= np.clip(step, -5.0, 5.0)
        if np.abs(step).max() < 1e-8:
            break
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(columns @ weights, -30.0, 30.0))))
