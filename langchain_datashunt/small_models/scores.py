"""What small models compute of inputs, before it is a prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from langchain_datashunt.prediction import BoolArray, PredictionBatch

if TYPE_CHECKING:
    pass


class Scores(NamedTuple):
    """What a model computes for `n` prepared inputs.

    Attributes:
        logits: Shape `[n, k]`, before temperature and softmax.
        truncated: Shape `[n]`: which inputs were cut; None for none.
        features: Shape `[n, d]`: what the model saw of each input, where that is to be kept.
        answers: `n` answers, where the model writes them.
        token_logprobs: `n` arrays of shape `[t]`: log-probabilities of the answers' tokens.
        errors: What was wrong with single inputs, by position; their other values do not count.
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
"""Settings that can change without changing what is computed for a text."""


class Remembered(NamedTuple):
    """One text's part of `Scores`."""

    logits: NDArray[Any]
    truncated: bool
    features: NDArray[Any] | None
    answer: Any
    token_logprobs: NDArray[Any] | None
    error: Exception | None


class Outcome(NamedTuple):
    """What became of `n` inputs of which some may have failed.

    Attributes:
        batch: The predictions of those that did not fail, `m` rows.
        rows: Shape `[m]`: which inputs these are.
        errors: The others, by position.
    """

    batch: PredictionBatch | None
    rows: NDArray[np.intp]
    errors: dict[int, Exception]


def softmax(logits: NDArray[np.float64], temperature: float = 1.0) -> NDArray[np.float64]:
    """Row-wise softmax of `logits / temperature`, shape `[n, k]`; NaN where a row has NaN, or no finite largest."""
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = logits / temperature
        raised = np.exp(scaled - np.maximum.reduce(scaled, axis=1, keepdims=True))
        return np.asarray(raised / np.add.reduce(raised, axis=1, keepdims=True))
