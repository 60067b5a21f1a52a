"""LearnedDeferral: a confidence score fitted to predict which model is right."""

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
"""Candidate values of scikit-learn's `C` (inverse strength of the L2 penalty), selected by cross-validation."""

FOLDS = 5


class LearnedDeferral(ConfidenceScore):
    """Score P(small model right) - P(large model right), both estimated by logistic regression, in [-1, 1].

    The regressions use three scores of the small model's probabilities. If predictions carry features (the embedding,
    see `keep_features` of `OnEmbeddings`), they use those too. A threshold of 0 defers if the large model is more
    likely to be right: two-sided deferral (Jitkrittum et al. 2023). If it is fitted without LLM answers, the score is
    P(small model right) alone, in [0, 1]. Choose the threshold on other examples than the ones that the score was
    fitted on.
    """

    small: tuple[float, ...] = Field(repr=False)
    """Weights of P(small model right) over the standardised columns. The last one is the intercept."""

    large: tuple[float, ...] | None = Field(default=None, repr=False)
    """Weights of P(large model right) in the same form, or None if no LLM answers were given."""

    mean: tuple[float, ...] = Field(repr=False)
    """Means of the columns."""

    scale: tuple[float, ...] = Field(repr=False)
    """Standard deviations of the columns."""

    @classmethod
    def fit(
        cls, predictions: PredictionBatch, small_right: BoolArray, large_right: BoolArray | None = None, seed: int = 0
    ) -> Self:
        """Fit the score on `n` examples.

        Args:
            predictions: Predictions of a small model that was not trained on these examples.
            small_right: Whether the small model is right, shape `[n]`.
            large_right: Whether the large model is right, shape `[n]`. None fits the small model's part alone.
            seed: Random seed of the cross-validation that selects the penalty.

        Raises:
            DataError: There are too few examples on which a model is right, or too few on which it is wrong.
        """
        raw = _columns(predictions)
        return cls.fit_columns(raw, small_right, large_right, seed)

    @classmethod
    def fit_columns(
        cls, columns: FloatArray, small_right: BoolArray, large_right: BoolArray | None = None, seed: int = 0
    ) -> Self:
        """Fit the score on arbitrary numeric columns, shape `[n, c]`.

        Score new inputs with `of_columns`. See `fit` for the other arguments.
        """
        for name, right in (("small", small_right), ("large", large_right)):
            if right is not None and (len(right) != len(columns) or min(right.sum(), (~right).sum()) < FOLDS):
                raise DataError(
                    f"Expected at least {FOLDS} examples on which the {name} model is right and {FOLDS} on which it "
                    f"is wrong, one entry per row, got {int(right.sum())} and {int((~right).sum())} for "
                    f"{len(columns)} rows. Add examples."
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
        """Return the score of each prediction, shape `[n]`."""
        return self.of_columns(_columns(batch))

    def of_columns(self, columns: FloatArray) -> FloatArray:
        """Return the scores of inputs given by their columns `[n, c]`, shape `[n]`.

        Raises:
            ConfigurationError: The number of columns differs from the one that the score was fitted on.
        """
        if columns.shape[1] != len(self.mean):
            raise ConfigurationError(
                f"Expected {len(self.mean)} columns per prediction, the number that this LearnedDeferral was fitted "
                f"on, got {columns.shape[1]}. Set `keep_features` of the small model to the same value as for fitting."
            )
        standard = (columns - np.array(self.mean)) / np.array(self.scale)
        score = _sigmoid(_weighed(standard, self.small))
        if self.large is not None:
            score = score - _sigmoid(_weighed(standard, self.large))
        return np.asarray(score)

    @override
    def bounds(self, n_labels: int | None) -> tuple[float, float]:
        """Return -1.0 (only the large model is right), or 0.0 without LLM answers, and 1.0."""
        return (0.0 if self.large is None else -1.0, 1.0)


def _columns(batch: PredictionBatch) -> FloatArray:
    """Return the regression columns of each prediction, shape `[n, c]`: three scores and the features, if any."""
    p = np.clip(batch.confidence, 1e-6, 1.0 - 1e-6)
    own = np.column_stack([np.log(p / (1.0 - p)), Margin()(batch), Entropy()(batch)])
    return own if batch.features is None else np.column_stack([own, batch.features])


def _weighed(columns: FloatArray, weights: Sequence[float]) -> FloatArray:
    """Return each row's weighted sum plus the intercept (the last weight), shape `[n]`.

    Rows are summed one by one, because a matrix product rounds a row in a batch differently from the same row alone.
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
