"""Answer fusion: what both models say together. Numbers only; who is asked, and how, is decided elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from pydantic import Field, PrivateAttr

from langchain_datashunt._utils.settings import Strategy
from langchain_datashunt.exceptions import ConfigurationError, DataError
from langchain_datashunt.prediction import FloatArray, IntArray, Prediction, PredictionBatch

DEFAULT_STRENGTH = 10.0
"""How many answers the prior of a label's row counts for."""

_CELLS = 20_000_000


class AnswerFusion(Strategy):
    """After asking: posterior(y) proportional to p_small(y) * P(large says its answer | true label y).

    P is the large model's confusion matrix, estimated by `fit` on calibration data, with a Dirichlet prior in which
    the large model is right with its overall accuracy and errs toward the answers that it gives often. An answer
    that is no label is a column of its own ("abstained"). This is Bayes' rule for two judges that err independently
    given the true label; the combination of a model's probabilities with another's labels by a confusion matrix is
    Kerrigan, Smyth & Steyvers (2021).

    The large prompt must not carry the small model's probabilities: they would count twice. A shunt refuses that.
    """

    labels: tuple[str, ...] = Field(min_length=2)
    """The label set, `k` names."""

    counts: tuple[tuple[float, ...], ...] = Field(repr=False)
    """Calibration examples by true label (row) and large answer (column; the last is "abstained"), `[k][k + 1]`."""

    strength: float = Field(default=DEFAULT_STRENGTH, gt=0.0)
    """How many answers the prior counts for, in each row."""

    _likelihood: FloatArray = PrivateAttr()
    _prior: FloatArray = PrivateAttr()
    _position: dict[str, int] = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Work the likelihood out of the counts."""
        super().model_post_init(context)
        k = len(self.labels)
        if len(self.counts) != k or any(len(row) != k + 1 for row in self.counts):
            raise ConfigurationError(f"{k} labels need counts of shape [{k}][{k + 1}], the last column for no label.")
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
        """Silent, or right, as often as overall; wrong answers as often as they are given. Shape `[k, k + 1]`."""
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
        """Count a large model's answers by true label.

        Args:
            labels: The label set.
            truth: True labels of `n` calibration examples.
            large: The large model's answers; None or a name outside the label set counts as abstained.
            strength: How many answers the prior counts for.

        Raises:
            DataError: Nothing to count, unequal lengths, or a true label outside the label set.
        """
        if not truth or len(truth) != len(large):
            raise DataError(f"{len(truth)} true labels and {len(large)} large answers: give one for each, and some.")
        position, k = {label: i for i, label in enumerate(labels)}, len(labels)
        if unknown := sorted(set(truth) - set(labels)):
            raise DataError(
                f"True labels outside the label set: {', '.join(unknown[:5])}. Add them, or remove their rows."
            )
        counts = np.zeros((k, k + 1))
        np.add.at(counts, ([position[t] for t in truth], [position.get(a or "", k) for a in large]), 1.0)
        return cls(labels=tuple(labels), counts=tuple(map(tuple, counts.tolist())), strength=strength)

    @classmethod
    def uniform(cls, labels: Sequence[str], accuracy: float, *, abstains: float = 0.01) -> Self:
        """A large model of which only an accuracy is known: its errors are spread evenly.

        Args:
            labels: The label set, `k` names.
            accuracy: In (0, 1).
            abstains: Share of its errors that are no label.

        Raises:
            ConfigurationError: The accuracy is not between 0 and 1.
        """
        if not 0.0 < accuracy < 1.0:
            raise ConfigurationError(f"An accuracy of {accuracy} leaves nothing to weigh; give one between 0 and 1.")
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
        """Column of each answer, shape `[n]`; the last is "abstained"."""
        k = len(self.labels)
        return np.array([self._position.get(a, k) if a is not None else k for a in answers], dtype=np.intp)

    def posterior(self, probabilities: FloatArray, answers: IntArray) -> FloatArray:
        """What to believe after the answers.

        Args:
            probabilities: Shape `[n, k]`, the small model's.
            answers: Shape `[n]`, columns of `likelihood`.

        Returns:
            Shape `[n, k]`, rows summing to 1.
        """
        joint = probabilities * self._likelihood.T[answers]
        return np.asarray(joint / joint.sum(axis=1, keepdims=True))

    def fuse(self, prediction: Prediction, answer: str | None) -> str:
        """The label to answer with, after the large model said `answer` (None: no label).

        Raises:
            ConfigurationError: The prediction has another label set.
        """
        p = self.aligned(prediction.as_batch()).probabilities
        return self.labels[int(self.posterior(p, self.columns([answer]))[0].argmax())]

    def aligned(self, batch: PredictionBatch) -> PredictionBatch:
        """The batch with its columns in the order of `labels`.

        Raises:
            ConfigurationError: It has another label set.
        """
        if batch.labels == self.labels:
            return batch
        if set(batch.labels) != set(self.labels):
            raise ConfigurationError(
                f"The small model has {len(batch.labels)} labels and the fusion was fitted on {len(self.labels)} "
                f"others. Fit it again with the labels of this model."
            )
        order = [batch.labels.index(label) for label in self.labels]
        return PredictionBatch(self.labels, batch.probabilities[:, order], None, batch.model_id)

    def cross_fitted(self, probabilities: FloatArray, truth: IntArray, answers: IntArray) -> IntArray:
        """Fused answers on the calibration data itself, each from the counts without that example.

        Args:
            probabilities: Shape `[n, k]`, in the order of `labels`.
            truth: Shape `[n]`, index of the true label.
            answers: Shape `[n]`, columns of the large answers.

        Returns:
            Shape `[n]`, indices of labels.
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
        """Expected gain in accuracy from asking: sum_l max_y p(y) P(l | y) - max_y p(y), shape `[n]`, never negative.

        Args:
            probabilities: Shape `[n, k]`, in the order of `labels`.
        """
        n, k = probabilities.shape
        gain, step = np.empty(n), max(1, _CELLS // (k * (k + 1)))
        for start in range(0, n, step):
            p = probabilities[start : start + step]
            after = np.zeros(len(p))
            for column in self._likelihood.T:  # one answer at a time: [step, k] is enough memory
                after += (p * column).max(axis=1)
            gain[start : start + step] = after - p.max(axis=1)
        return np.where(gain > 1e-12, gain, 0.0)  # where no answer changes the decision there is rounding only
