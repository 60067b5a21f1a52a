"""Smooth estimates of accuracy by score, because the best point of a raw curve is partly luck."""

from __future__ import annotations

import numpy as np

from langchain_datashunt.prediction import BoolArray, FloatArray

SMOOTH_FROM = 200
"""Minimum examples for smoothing. With fewer, the raw curve is used."""

_RIDGE = 0.1
_STEPS = 50


def smoothed_right(score: FloatArray, bounds: tuple[float, float], right: BoolArray) -> FloatArray:
    """Return P(right | score), shape `[n]`, by logistic regression on the logit of the score and its square.

    Args:
        score: Confidence scores, shape `[n]`.
        bounds: Lowest and highest possible value of the score.
        right: Whether the answers were right, shape `[n]`.
    """
    low, high = bounds
    share = np.clip((score - low) / (high - low), 1e-9, 1.0 - 1e-9)
    logit = np.log(share / (1.0 - share))
    columns = np.column_stack([np.ones(len(score)), logit, logit**2 / 4.0])
    weights = np.zeros(columns.shape[1])
    for _ in range(_STEPS):  # Newton's method, with a ridge penalty that leaves the intercept almost free
        p = 1.0 / (1.0 + np.exp(-np.clip(columns @ weights, -30.0, 30.0)))
        penalty = _RIDGE * np.array([1e-6, 1.0, 1.0])
        slope = columns.T @ (p - right) + penalty * weights
        bend = (columns * np.maximum(p * (1.0 - p), 1e-9)[:, None]).T @ columns + np.diag(penalty)
        step = np.linalg.solve(bend, slope)
        weights -= np.clip(step, -5.0, 5.0)  # full steps can overshoot on nearly separable data
        if np.abs(step).max() < 1e-8:
            break
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(columns @ weights, -30.0, 30.0))))
