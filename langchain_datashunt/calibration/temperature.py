"""Temperature scaling (Guo et al. 2017): one number that makes probabilities mean what they say."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from langchain_datashunt.exceptions import DataError
from langchain_datashunt.prediction import FloatArray

_BETA_RANGE = (1e-3, 1e3)
_STEPS = 100


def fit_temperature(logits: FloatArray, truth: NDArray[np.intp]) -> float:
    """The temperature T > 0 for which softmax(logits / T) has the least mean negative log-likelihood.

    The loss is convex in 1 / T, so bisection on its derivative finds the one minimum.

    Args:
        logits: Shape `[n, k]`, of examples that the model was not trained on.
        truth: Shape `[n]`, index of the true label.

    Raises:
        DataError: There are no examples, or logits are not finite.
    """
    if not len(logits):
        raise DataError("There are no examples to fit a temperature on; give some.")
    if not np.isfinite(logits).all():
        raise DataError("Logits to calibrate on have NaN or infinity; remove these examples.")
    scores = logits - logits.max(axis=1, keepdims=True)
    chosen = scores[np.arange(len(scores)), truth].mean()

    def slope(beta: float) -> float:
        raised = np.exp(beta * scores)
        return float(((raised * scores).sum(axis=1) / raised.sum(axis=1)).mean() - chosen)

    low, high = _BETA_RANGE
    if slope(high) <= 0.0:  # every example is right by a margin: the sharper the better, so stay where we are
        return 1.0
    if slope(low) >= 0.0:
        return 1.0 / low
    for _ in range(_STEPS):
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if slope(middle) < 0.0 else (low, middle)
    return 1.0 / float(np.sqrt(low * high))
