"""Raw outputs of small models, before they become predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from langchain_datashunt.prediction import BoolArray, PredictionBatch


class Scores(NamedTuple):
    """Raw outputs of a model for `n` prepared inputs.

    Attributes:
        logits: Logits before temperature and softmax, shape `[n, k]`.
        truncated: Whether each input was truncated, shape `[n]`. None means that none was.
        features: Features of the inputs, shape `[n, d]`, or None if they are not kept.
        answers: `n` generated answers, or None for models that only classify.
        token_logprobs: Log-probabilities of the answer tokens, `n` arrays of shape `[t]`.
        errors: Errors of single inputs, by position. The other values of such inputs are ignored.
    """

    logits: NDArray[Any]
    truncated: BoolArray | None = None
    features: NDArray[Any] | None = None
    answers: tuple[Any, ...] | None = None
    token_logprobs: tuple[NDArray[Any], ...] | None = None
    errors: Mapping[int, Exception] = {}


NOT_OF_SCORES = frozenset(
    {"temperature", "threshold", "policy", "fusion", "model_id", "lineage", "dynamic_batching", "cache_size", "labels"}
)
"""Settings that do not affect the computed scores, so that changing them keeps the cache."""


class Remembered(NamedTuple):
    """Cached scores of one input."""

    logits: NDArray[Any]
    truncated: bool
    features: NDArray[Any] | None
    answer: Any
    token_logprobs: NDArray[Any] | None
    error: Exception | None


class Outcome(NamedTuple):
    """Predictions and errors for `n` inputs.

    Attributes:
        batch: Predictions of the `m` inputs that did not fail, or None if there are none.
        rows: Positions of these inputs, shape `[m]`.
        errors: Errors of the other inputs, by position.
    """

    batch: PredictionBatch | None
    rows: NDArray[np.intp]
    errors: dict[int, Exception]


def softmax(logits: NDArray[np.float64], temperature: float = 1.0) -> NDArray[np.float64]:
    """Return the row-wise softmax of `logits / temperature`, shape `[n, k]`.

    A row becomes NaN if it contains NaN or its maximum is not finite.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = logits / temperature
        raised = np.exp(scaled - np.maximum.reduce(scaled, axis=1, keepdims=True))
        return np.asarray(raised / np.add.reduce(raised, axis=1, keepdims=True))
