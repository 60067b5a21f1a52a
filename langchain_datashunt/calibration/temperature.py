"""Temperature scaling (Guo et al. 2017): calibrate probabilities with one parameter."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from langchain_datashunt.exceptions import DataError
from langchain_datashunt.prediction import FloatArray

_BETA_RANGE = (1e-3, 1e3)
_STEPS = 100


def fit_temperature(logits: FloatArray, truth: NDArray[np.intp]) -> float:
    """Return the temperature T that minimises the mean negative log-likelihood of softmax(logits / T).

    The loss is convex in 1 / T, so bisection on its derivative finds the minimum.

    Args:
        logits: Logits of examples that the model was not trained on, shape `[n, k]`.
        truth: Indices of the true labels, shape `[n]`.

    Returns:
        Temperature in [0.001, 1000], or 1.0 if the loss still falls at the lower end.

    Raises:
        DataError: There are no examples, or logits are not finite.
    """
    if not len(logits):
        raise DataError("Expected at least one example for `logits`, got none. Provide held-out examples.")
    if not np.isfinite(logits).all():
        raise DataError("Expected finite values for `logits`, got NaN or infinity. Remove these examples.")
    scores = logits - logits.max(axis=1, keepdims=True)
    chosen = scores[np.arange(len(scores)), truth].mean()

    def slope(beta: float) -> float:
        raised = np.exp(beta * scores)
        return float(((raised * scores).sum(axis=1) / raised.sum(axis=1)).mean() - chosen)

    low, high = _BETA_RANGE
    if slope(high) <= 0.0:  # every example is right by a margin and the loss has no minimum: keep the logits
        return 1.0
    if slope(low) >= 0.0:
        return 1.0 / low
    for _ in range(_STEPS):
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if slope(middle) < 0.0 else (low, middle)
    return 1.0 / float(np.sqrt(low * high))
