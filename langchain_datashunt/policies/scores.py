"""Confidence scores, which policies compare with their thresholds."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
from pydantic import Field

from langchain_datashunt._utils.settings import Strategy
from langchain_datashunt.exceptions import PredictionError
from langchain_datashunt.prediction import FloatArray, PredictionBatch


class ConfidenceScore(Strategy):
    """Base class of scores that map each prediction to one number. Larger means more confident."""

    @abstractmethod
    def __call__(self, batch: PredictionBatch) -> FloatArray:
        """Return the score of each prediction, shape `[n]`."""

    @abstractmethod
    def bounds(self, n_labels: int | None) -> tuple[float, float]:
        """Return the minimum and maximum of the score for a number of labels. None means that it is unknown."""


class MaxProbability(ConfidenceScore):
    """Probability of the most probable label (Data Shunt, eq. 1), in `[1/k, 1]`."""

    def __call__(self, batch: PredictionBatch) -> FloatArray:
        """Return the score of each prediction, shape `[n]`."""
        return batch.confidence

    def bounds(self, n_labels: int | None) -> tuple[float, float]:
        """Return the scores of a uniform and of a certain distribution."""
        return (1.0 / n_labels if n_labels else 0.0, 1.0)


class Margin(ConfidenceScore):
    """Difference between the two highest probabilities, in `[0, 1]`."""

    def __call__(self, batch: PredictionBatch) -> FloatArray:
        """Return the score of each prediction, shape `[n]`."""
        if batch.probabilities.shape[1] < 2:
            return batch.confidence
        top_two = np.partition(batch.probabilities, -2, axis=1)[:, -2:]
        return np.asarray(top_two[:, 1] - top_two[:, 0])

    def bounds(self, n_labels: int | None) -> tuple[float, float]:
        """Return 0.0 (a tie) and 1.0 (a certain distribution)."""
        return (0.0, 1.0)


class Entropy(ConfidenceScore):
    """One minus the normalised entropy, `1 - H(p) / log k`: 0 for a uniform, 1 for a certain distribution."""

    def __call__(self, batch: PredictionBatch) -> FloatArray:
        """Return the score of each prediction, shape `[n]`."""
        k = batch.probabilities.shape[1]
        if k < 2:
            return np.ones(len(batch))
        p = batch.probabilities
        # A contiguous copy, so that a row in a batch rounds like the same row alone.
        parts = np.ascontiguousarray(p * np.log(np.where(p > 0.0, p, 1.0)))
        entropy = -parts.sum(axis=1)
        return np.asarray(np.clip(1.0 - entropy / np.log(k), 0.0, 1.0))

    def bounds(self, n_labels: int | None) -> tuple[float, float]:
        """Return 0.0 (a uniform distribution) and 1.0 (a certain one)."""
        return (0.0, 1.0)


class TokenScore(ConfidenceScore):
    """Base class of scores of a generated answer from the probabilities of its tokens, in `[0, 1]`."""

    @abstractmethod
    def of_tokens(self, logprobs: FloatArray) -> float:
        """Return the score of one answer from its token log-probabilities, shape `[t]`, `t >= 1`."""

    def __call__(self, batch: PredictionBatch) -> FloatArray:
        """Return the score of each prediction, shape `[n]`, 0.0 for an answer without tokens.

        Raises:
            PredictionError: The predictions have no token log-probabilities.
        """
        if batch.token_logprobs is None:
            raise PredictionError(
                f"{type(self).__name__} requires token log-probabilities, but the predictions of "
                f"{batch.model_id or 'the small model'!r} have none. Use a generating small model, or MaxProbability."
            )
        return np.array([self.of_tokens(one) if len(one) else 0.0 for one in batch.token_logprobs])

    def bounds(self, n_labels: int | None) -> tuple[float, float]:
        """Return 0.0 (an impossible answer) and 1.0 (a certain one)."""
        return (0.0, 1.0)


class MeanTokenProbability(TokenScore):
    """Arithmetic mean of the token probabilities (Data Shunt, eq. 8)."""

    def of_tokens(self, logprobs: FloatArray) -> float:
        """Return the mean of `exp(logprobs)`."""
        return float(np.exp(logprobs).mean())


class MinTokenProbability(TokenScore):
    """Minimum of the token probabilities."""

    def of_tokens(self, logprobs: FloatArray) -> float:
        """Return the minimum of `exp(logprobs)`."""
        return float(np.exp(logprobs.min()))


class TokenQuantile(TokenScore):
    """Low quantile of the token probabilities, less biased by length than mean or sum (Gupta et al. 2024).

    Args:
        alpha: Quantile in [0, 1]. 0 is the minimum, 0.5 the median.
    """

    alpha: float = Field(default=0.1, ge=0.0, le=1.0)

    def of_tokens(self, logprobs: FloatArray) -> float:
        """Return `exp` of the quantile of `logprobs`, interpolated between log-probabilities."""
        return float(np.exp(np.quantile(logprobs, self.alpha)))


class LengthNormalizedProbability(TokenScore):
    """Geometric mean of the token probabilities, `exp(mean log p)`, the inverse of the perplexity."""

    def of_tokens(self, logprobs: FloatArray) -> float:
        """Return `exp` of the mean of `logprobs`."""
        return float(np.exp(logprobs.mean()))
