"""Answer fusion: combine the small model's probabilities with the large model's answer by Bayes' rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from pydantic import Field, PrivateAttr

from langchain_datashunt._utils.settings import Strategy
from langchain_datashunt.exceptions import ConfigurationError, DataError
from langchain_datashunt.prediction import FloatArray, IntArray, Prediction, PredictionBatch

DEFAULT_STRENGTH = 10.0
"""Weight of the prior in each row of the confusion matrix, in number of answers."""

_CELLS = 20_000_000


class AnswerFusion(Strategy):
    """Combine both models: posterior(y) is proportional to p_small(y) * P(large model answers a | true label y).

    P is the large model's confusion matrix, estimated by `fit` on calibration data. Its Dirichlet prior assumes that
    the large model is right with its overall accuracy and errs toward the labels that it answers often. Answers outside
    the label set have a column of their own ("abstained"). The rule assumes that both models err independently given
    the true label. Kerrigan, Smyth & Steyvers (2021) combine one model's probabilities with another's labels in this
    way.

    The LLM's prompt must not contain the small model's probabilities, because they would count twice. Shunts raise a
    `ConfigurationError` in that case.
    """

    labels: tuple[str, ...] = Field(min_length=2)
    """Label set, `k` names."""

    counts: tuple[tuple[float, ...], ...] = Field(repr=False)
    """Calibration examples by true label (row) and LLM answer (column, the last is "abstained"), shape `[k][k + 1]`."""

    strength: float = Field(default=DEFAULT_STRENGTH, gt=0.0)
    """Weight of the prior in each row, in number of answers."""

    _likelihood: FloatArray = PrivateAttr()
    _prior: FloatArray = PrivateAttr()
    _position: dict[str, int] = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Compute the likelihood from the counts."""
        super().model_post_init(context)
        k = len(self.labels)
        if len(self.counts) != k or any(len(row) != k + 1 for row in self.counts):
            raise ConfigurationError(
                f"Expected counts of shape [{k}][{k + 1}] for {k} labels. Add a last column for abstained answers."
            )
        counts = np.array(self.counts, dtype=np.float64)
        self._position = {label: i for i, label in enumerate(self.labels)}
        self._prior = self._prior_rows(counts)
        self._likelihood = self._smoothed(counts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AnswerFusion):
            return NotImplemented
        return (self.labels, self.counts, self.strength) == (other.labels, other.counts, other.strength)

    def __hash__(self) -> int:
        return hash((self.labels, self.counts, self.strength))

    def _prior_rows(self, counts: FloatArray) -> FloatArray:
        """Return the prior of each row, shape `[k, k + 1]`.

        Every row has the overall accuracy and abstention rate. Wrong labels share the rest in proportion to how often
        the large model answers them.
        """
        k, silent = len(self.labels), counts[:, -1].sum()
        abstains = (silent + 0.5) / (counts.sum() + 1.0)
        accuracy = (np.trace(counts) + 1.0) / (counts.sum() - silent + 2.0)
        wrong = np.tile(counts[:, :k].sum(axis=0) + 0.5, (k, 1))
        np.fill_diagonal(wrong, 0.0)
        answered = (1.0 - accuracy) * wrong / wrong.sum(axis=1, keepdims=True)
        np.fill_diagonal(answered, accuracy)
        return np.column_stack([(1.0 - abstains) * answered, np.full(k, abstains)])

    def _smoothed(self, counts: FloatArray) -> FloatArray:
        rows = counts + self.strength * self._prior
        return np.asarray(rows / rows.sum(axis=1, keepdims=True))

    @classmethod
    def fit(
        cls,
        labels: Sequence[str],
        truth: Sequence[str],
        large: Sequence[str | None],
        *,
        strength: float = DEFAULT_STRENGTH,
    ) -> Self:
        """Estimate the large model's confusion matrix from calibration answers.

        Args:
            labels: Label set.
            truth: True labels of `n` calibration examples.
            large: Answers of the large model. None or a name outside the label set counts as abstained.
            strength: Weight of the prior in each row, in number of answers.

        Raises:
            DataError: There are no examples, the lengths differ, or a true label is outside the label set.
        """
        if not truth or len(truth) != len(large):
            raise DataError(
                f"Expected as many true labels as large answers, and at least one, got {len(truth)} and "
                f"{len(large)}. Pass one answer for each label."
            )
        position, k = {label: i for i, label in enumerate(labels)}, len(labels)
        if unknown := sorted(set(truth) - set(labels)):
            raise DataError(
                f"Found true labels outside the label set: {', '.join(unknown[:5])}. Add them to the labels, or "
                f"remove their rows."
            )
        counts = np.zeros((k, k + 1))
        np.add.at(counts, ([position[t] for t in truth], [position.get(a or "", k) for a in large]), 1.0)
        return cls(labels=tuple(labels), counts=tuple(map(tuple, counts.tolist())), strength=strength)

    @classmethod
    def uniform(cls, labels: Sequence[str], accuracy: float, *, abstains: float = 0.01) -> Self:
        """Return the fusion for a large model with a known accuracy and evenly distributed errors.

        Args:
            labels: Label set, `k` names.
            accuracy: Accuracy of the large model, in (0, 1).
            abstains: Fraction of its errors that are not in the label set.

        Raises:
            ConfigurationError: The accuracy is not between 0 and 1.
        """
        if not 0.0 < accuracy < 1.0:
            raise ConfigurationError(f"Expected an `accuracy` between 0 and 1 (exclusive), got {accuracy}.")
        k, certain = len(labels), 1e6
        rows = np.full((k, k + 1), (1.0 - accuracy) * (1.0 - abstains) / max(1, k - 1))
        rows[:, k] = (1.0 - accuracy) * abstains
        rows[np.arange(k), np.arange(k)] = accuracy
        return cls(labels=tuple(labels), counts=tuple(map(tuple, (certain * rows).tolist())))

    @property
    def likelihood(self) -> FloatArray:
        """P(answer | true label), shape `[k, k + 1]`."""
        return self._likelihood

    def columns(self, answers: Sequence[str | None]) -> IntArray:
        """Return the column of each answer in `likelihood`, shape `[n]`. The last column is "abstained"."""
        k = len(self.labels)
        return np.array([self._position.get(a, k) if a is not None else k for a in answers], dtype=np.intp)

    def posterior(self, probabilities: FloatArray, answers: IntArray) -> FloatArray:
        """Return the probabilities of the labels given both models' outputs.

        Args:
            probabilities: Probabilities of the small model, shape `[n, k]`.
            answers: Columns of the LLM's answers in `likelihood`, shape `[n]`.

        Returns:
            Posterior probabilities, shape `[n, k]`, rows summing to 1.
        """
        joint = probabilities * self._likelihood.T[answers]
        return np.asarray(joint / joint.sum(axis=1, keepdims=True))

    def fuse(self, prediction: Prediction, answer: str | None) -> str:
        """Return the most probable label after the LLM's answer. None means that it abstained.

        Raises:
            ConfigurationError: The prediction has another label set.
        """
        p = self.aligned(prediction.as_batch()).probabilities
        return self.labels[int(self.posterior(p, self.columns([answer]))[0].argmax())]

    def aligned(self, batch: PredictionBatch) -> PredictionBatch:
        """Return the batch with its columns in the order of `labels`.

        Raises:
            ConfigurationError: The batch has another label set.
        """
        if batch.labels == self.labels:
            return batch
        if set(batch.labels) != set(self.labels):
            raise ConfigurationError(
                f"The fusion was fitted on {len(self.labels)} labels that differ from the small model's "
                f"{len(batch.labels)} labels. Fit it again with the labels of this model."
            )
        order = [batch.labels.index(label) for label in self.labels]
        return PredictionBatch(self.labels, batch.probabilities[:, order], None, batch.model_id)

    def cross_fitted(self, probabilities: FloatArray, truth: IntArray, answers: IntArray) -> IntArray:
        """Return leave-one-out fused answers on the calibration data.

        The row counts exclude the example being fused. The prior is that of the whole data.

        Args:
            probabilities: Probabilities of the small model, shape `[n, k]`, in the order of `labels`.
            truth: Indices of the true labels, shape `[n]`.
            answers: Columns of the LLM's answers, shape `[n]`.

        Returns:
            Indices of the fused labels, shape `[n]`.
        """
        counts = np.array(self.counts, dtype=np.float64)
        sizes = counts.sum(axis=1)
        best = np.empty(len(truth), dtype=np.intp)
        step = max(1, _CELLS // len(self.labels))
        for start in range(0, len(truth), step):
            rows = slice(start, start + step)
            t, a = truth[rows], answers[rows]
            joint = probabilities[rows] * self._likelihood.T[a]
            own = (counts[t, a] - 1.0 + self.strength * self._prior[t, a]) / (sizes[t] - 1.0 + self.strength)
            joint[np.arange(len(t)), t] = probabilities[rows][np.arange(len(t)), t] * own
            best[rows] = joint.argmax(axis=1)
        return best

    def value_of_asking(self, probabilities: FloatArray) -> FloatArray:
        """Return the expected accuracy gain of calling the LLM, shape `[n]`, never negative.

        It is sum_l max_y p(y) P(l | y) - max_y p(y).

        Args:
            probabilities: Probabilities of the small model, shape `[n, k]`, in the order of `labels`.
        """
        n, k = probabilities.shape
        gain, step = np.empty(n), max(1, _CELLS // (k * (k + 1)))
        for start in range(0, n, step):
            p = probabilities[start : start + step]
            after = np.zeros(len(p))
            for column in self._likelihood.T:  # one answer at a time, to need [step, k] of memory only
                after += (p * column).max(axis=1)
            gain[start : start + step] = after - p.max(axis=1)
        return np.where(gain > 1e-12, gain, 0.0)  # smaller values are rounding errors
