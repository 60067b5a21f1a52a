"""LearnedDeferral: a confidence score that was learnt from who was right on which inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from pydantic import Field
from typing_extensions import override

from langchain_datashunt._utils.optional import require
from langchain_datashunt.exceptions import ConfigurationError, DataError
from langchain_datashunt.policies.scores import ConfidenceScore, Entropy, Margin
from langchain_datashunt.prediction import BoolArray, FloatArray, PredictionBatch

STRENGTHS = (0.001, 0.01, 0.1, 1.0)
"""Inverse strengths of the L2 penalty that are tried by cross-validation, as scikit-learn counts them."""

FOLDS = 5


class LearnedDeferral(ConfidenceScore):
    """P(small model right) less P(large model right), both learnt by logistic regression: in [-1, 1].

    Read from the small model's probabilities and, where predictions carry them, from the input's features (the
    embedding; see `keep_features` of `OnEmbeddings`). A threshold of 0 asks where the large model is the likelier to be
    right: two-sided deferral (Jitkrittum et al. 2023). Without large answers it is P(small model right) alone, in
    [0, 1]. Choose its threshold on other examples than it was fitted on.
    """

    small: tuple[float, ...] = Field(repr=False)
    """Weights of P(small right) over standardised columns; the last is the constant."""

    large: tuple[float, ...] | None = Field(default=None, repr=False)
    """The same of P(large right); None where no large answers were given."""

    mean: tuple[float, ...] = Field(repr=False)
    """Of the columns."""

    scale: tuple[float, ...] = Field(repr=False)
    """Standard deviation of the columns."""

    @classmethod
    def fit(
        cls, predictions: PredictionBatch, small_right: BoolArray, large_right: BoolArray | None = None, seed: int = 0
    ) -> Self:
        """Learn from `n` examples.

        Args:
            predictions: Of the small model, that was not trained on them.
            small_right: Shape `[n]`.
            large_right: Shape `[n]`, or None.
            seed: Of the cross-validation that chooses the penalty.

        Raises:
            DataError: Too few examples, or one of the models is always right or always wrong.
        """
        raw = _columns(predictions)
        return cls.fit_columns(raw, small_right, large_right, seed)

    @classmethod
    def fit_columns(
        cls, columns: FloatArray, small_right: BoolArray, large_right: BoolArray | None = None, seed: int = 0
    ) -> Self:
        """As `fit`, from any numbers of each input, shape `[n, c]`; `of_columns` then scores them."""
        for name, right in (("small", small_right), ("large", large_right)):
            if right is not None and (len(right) != len(columns) or min(right.sum(), (~right).sum()) < FOLDS):
                raise DataError(
                    f"To learn when the {name} model is right needs {FOLDS} examples at least where it is and {FOLDS} "
                    f"where it is not, one for each row; there are {int(right.sum())} and {int((~right).sum())} for "
                    f"{len(columns)} rows."
                )
        mean, scale = columns.mean(axis=0), columns.std(axis=0)
        scale = np.where(scale > 1e-9, scale, 1.0)
        standard = (columns - mean) / scale
        return cls(
            small=_fit(standard, small_right, seed),
            large=None if large_right is None else _fit(standard, large_right, seed),
            mean=tuple(mean.tolist()),
            scale=tuple(scale.tolist()),
        )

    @override
    def __call__(self, batch: PredictionBatch) -> FloatArray:
        """Score a batch, shape `[n]`."""
        return self.of_columns(_columns(batch))

    def of_columns(self, columns: FloatArray) -> FloatArray:
        """Score inputs by their columns `[n, c]`, shape `[n]`.

        Raises:
            ConfigurationError: They are not the columns that it was fitted on.
        """
        if columns.shape[1] != len(self.mean):
            raise ConfigurationError(
                f"This LearnedDeferral was fitted on {len(self.mean)} numbers of each prediction and gets "
                f"{columns.shape[1]}: the small model keeps its features in one case and not in the other. Set "
                f"keep_features alike."
            )
        standard = (columns - np.array(self.mean)) / np.array(self.scale)
        score = _sigmoid(_weighed(standard, self.small))
        if self.large is not None:
            score = score - _sigmoid(_weighed(standard, self.large))
        return np.asarray(score)

    @override
    def bounds(self, n_labels: int | None) -> tuple[float, float]:
        """From "only the large one is right" to "only the small one is"."""
        return (0.0 if self.large is None else -1.0, 1.0)


def _columns(batch: PredictionBatch) -> FloatArray:
    """What is known of each prediction, shape `[n, c]`: three scores of its probabilities, and its features."""
    p = np.clip(batch.confidence, 1e-6, 1.0 - 1e-6)
    own = np.column_stack([np.log(p / (1.0 - p)), Margin()(batch), Entropy()(batch)])
    return own if batch.features is None else np.column_stack([own, batch.features])


def _weighed(columns: FloatArray, weights: Sequence[float]) -> FloatArray:
    """Each row's weighted sum, shape `[n]`, the last weight being added.

    Summed row by row: a matrix product would round a row of a batch otherwise than the same row alone.
    """
    products = np.ascontiguousarray(columns * np.array(weights[:-1]))
    return np.asarray(products.sum(axis=1) + weights[-1])


def _sigmoid(z: FloatArray) -> FloatArray:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(z, -50.0, 50.0))))


def _fit(columns: FloatArray, right: BoolArray, seed: int) -> tuple[float, ...]:
    linear, selection = (
        require("sklearn.linear_model", "calibration"),
        require("sklearn.model_selection", "calibration"),
    )
    folds = selection.StratifiedKFold(FOLDS, shuffle=True, random_state=seed)

    def loss(strength: float) -> float:
        model = linear.LogisticRegression(C=strength, max_iter=500)
        p = selection.cross_val_predict(model, columns, right, cv=folds, method="predict_proba")[:, 1]
        own: Any = np.where(right, p, 1.0 - p)
        return float(-np.log(np.maximum(own, 1e-9)).mean())

    best = min(STRENGTHS, key=loss)
    model = linear.LogisticRegression(C=best, max_iter=500).fit(columns, right)
    return (*model.coef_[0].tolist(), float(model.intercept_[0]))
