"""Vector scaling (Guo et al. 2017): one factor and one shift per label, for tasks with many examples per label."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from langchain_datashunt._utils.optional import require
from langchain_datashunt._utils.short_repr import short_repr
from langchain_datashunt.calibration.temperature import fit_temperature
from langchain_datashunt.exceptions import DataError
from langchain_datashunt.prediction import FloatArray

EXAMPLES_A_LABEL = 10
"""Minimum examples per label. With fewer, the fit is noise and temperature scaling is better."""


@dataclass(frozen=True)
class VectorScaling:
    """Fitted vector scaling, with probabilities softmax(logits * scale + shift).

    Attributes:
        scale: Factor of each label, shape `[k]`.
        shift: Shift of each label, shape `[k]`.
    """

    scale: FloatArray
    shift: FloatArray

    __repr__ = short_repr

    def __call__(self, logits: FloatArray) -> FloatArray:
        """Return calibrated probabilities, shape `[n, k]`."""
        scores = logits * self.scale + self.shift
        raised = np.exp(scores - scores.max(axis=1, keepdims=True))
        return np.asarray(raised / raised.sum(axis=1, keepdims=True))


def fit_vector_scaling(logits: FloatArray, truth: NDArray[np.intp], *, penalty: float = 0.01) -> VectorScaling:
    """Fit a vector scaling to held-out logits.

    The loss is the mean negative log-likelihood plus `penalty` times the squared distance from plain temperature
    scaling, averaged over the labels.

    Args:
        logits: Logits of examples that the model was not trained on, shape `[n, k]`.
        truth: Indices of the true labels, shape `[n]`.
        penalty: Weight of the distance from temperature scaling.

    Raises:
        DataError: There are fewer than `EXAMPLES_A_LABEL * k` examples, or logits are not finite.
    """
    n, k = logits.shape
    if n < EXAMPLES_A_LABEL * k:
        raise DataError(
            f"Expected at least {EXAMPLES_A_LABEL * k} examples for vector scaling of {k} labels, got {n}. Use "
            f"temperature scaling (`fit_temperature`), or provide more examples."
        )
    start = 1.0 / fit_temperature(logits, truth)
    optimize, hot = require("scipy.optimize", "calibration"), np.eye(k)[truth]

    def loss(parameters: FloatArray) -> tuple[float, FloatArray]:
        scale, shift = parameters[:k], parameters[k:]
        scores = logits * scale + shift
        scores = scores - scores.max(axis=1, keepdims=True)
        log_p = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
        error = (np.exp(log_p) - hot) / n
        value = -(log_p * hot).sum() / n + penalty * (((scale / start - 1.0) ** 2).sum() + (shift**2).sum()) / k
        slope = (error * logits).sum(axis=0) + 2 * penalty * (scale / start - 1.0) / start / k
        return float(value), np.concatenate([slope, error.sum(axis=0) + 2 * penalty * shift / k])

    begin = np.concatenate([np.full(k, start), np.zeros(k)])
    found = optimize.minimize(loss, begin, jac=True, method="L-BFGS-B", options={"maxiter": 300}).x
    return VectorScaling(found[:k], found[k:])
