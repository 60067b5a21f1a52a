"""Scores of how sure a prediction is; whether that is sure enough is the policies' affair."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
from pydantic import Field

from langchain_datashunt._utils.settings import Strategy
from langchain_datashunt.exceptions import PredictionError
from langchain_datashunt.prediction import FloatArray, Prediction, PredictionBatch


class ConfidenceScore(Strategy):
    """Turns predictions into one number each; the larger, the surer."""

    @abstractmethod
    def __call__(self, batch: PredictionBatch) -> FloatArray:
        """Score a batch, shape `[n]`."""

    def of_one(self, prediction: Prediction) -> float:
        """Score one prediction, as for a batch of one; may be quicker."""
        return float(self(PredictionBatch.stack([prediction]))[0])

    @abstractmethod
    def bounds(self, n_labels: int | None) -> tuple[float, float]:
        """The lowest and the highest value that the score can take for a number of labels (None: unknown)."""


class MaxProbability(ConfidenceScore):
    """The probability of the most probable label (Data Shunt, eq. 1): in `[1/k, 1]`."""

    def __call__(self, batch: PredictionBatch) -> FloatArray:
        """Score a batch, shape `[n]`."""
        return batch.confidence

    def of_one(self, prediction: Prediction) -> float:
        """The confidence that the prediction carries."""
        return prediction.confidence

    def bounds(self, n_labels: int | None) -> tuple[float, float]:
        """From the uniform distribution to certainty."""
        return (1.0 / n_labels if n_labels else 0.0, 1.0)


class Margin(ConfidenceScore):
    """The most probable label's probability less that of the second: in `[0, 1]`."""

    def __call__(self, batch: PredictionBatch) -> FloatArray:
        """Score a batch, shape `[n]`."""
        if batch.probabilities.shape[1] < 2:
            return batch.confidence
        top_two = np.partition(batch.probabilities, -2, axis=1)[:, -2:]
        return np.asarray(top_two[:, 1] - top_two[:, 0])

    def bounds(self, n_labels: int | None) -> tuple[float, float]:
        """From a tie to certainty."""
        return (0.0, 1.0)


class Entropy(ConfidenceScore):
    """One less the entropy in units of its maximum, `1 - H(p) / log k`: 0 for uniform, 1 for certain."""

    def __call__(self, batch: PredictionBatch) -> FloatArray:
        """Score a batch, shape `[n]`."""
        k = batch.probabilities.shape[1]
        if k < 2:
            return np.ones(len(batch))
        p = batch.probabilities
        parts = np.ascontiguousarray(p * np.log(np.where(p > 0.0, p, 1.0)))  # so that each row is summed as if alone
        entropy = -parts.sum(axis=1)
        return np.asarray(np.clip(1.0 - entropy / np.log(k), 0.0, 1.0))

    def bounds(self, n_labels: int | None) -> tuple[float, float]:
        """From uniform to certain."""
        return (0.0, 1.0)


class TokenScore(ConfidenceScore):
    """A score of a written answer, from the probabilities of its tokens; in `[0, 1]`."""

    @abstractmethod
    def of_tokens(self, logprobs: FloatArray) -> float:
        """Score the log-probabilities of one answer's tokens, shape `[t]`, `t >= 1`."""

    def __call__(self, batch: PredictionBatch) -> FloatArray:
        """Score a batch, shape `[n]`.

        Raises:
            PredictionError: The predictions have no token probabilities.
        """
        if batch.token_logprobs is None:
            raise PredictionError(
                f"{type(self).__name__} needs the probabilities of the answer's tokens, and the predictions of "
                f"{batch.model_id or 'the small model'!r} have none. Use a generating small model, or MaxProbability."
            )
        return np.array([self.of_tokens(one) if len(one) else 0.0 for one in batch.token_logprobs])

    def bounds(self, n_labels: int | None) -> tuple[float, float]:
        """From impossible to certain."""
        return (0.0, 1.0)


class MeanTokenProbability(TokenScore):
    """The arithmetic mean of the tokens' probabilities (Data Shunt, eq. 8)."""

    def of_tokens(self, logprobs: FloatArray) -> float:
        """The mean of `exp(logprobs)`."""
        return float(np.exp(logprobs).mean())


class MinTokenProbability(TokenScore):
    """The smallest of the tokens' probabilities."""

    def of_tokens(self, logprobs: FloatArray) -> float:
        """The least of `exp(logprobs)`."""
        return float(np.exp(logprobs.min()))


class TokenQuantile(TokenScore):
    """A low quantile of the tokens' probabilities; less biased by length than mean or sum (Gupta et al. 2024).

    Args:
        alpha: Which quantile, in [0, 1]; 0 is the least probability, 0.5 the median.
    """

    alpha: float = Field(default=0.1, ge=0.0, le=1.0)

    def of_tokens(self, logprobs: FloatArray) -> float:
        """The quantile of `exp(logprobs)`, taken between log-probabilities."""
        return float(np.exp(np.quantile(logprobs, self.alpha)))


class LengthNormalizedProbability(TokenScore):
    """The geometric mean of the tokens' probabilities, `exp(mean log p)`: the inverse of the perplexity."""

    def of_tokens(self, logprobs: FloatArray) -> float:
        """`exp` of the mean."""
        return float(np.exp(logprobs.mean()))
