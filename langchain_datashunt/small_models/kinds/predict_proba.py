"""PredictProbaClassifier: wraps any object with `predict_proba`, such as a scikit-learn pipeline."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from typing_extensions import override

from langchain_datashunt._utils.optional import require
from langchain_datashunt.calibration.temperature import fit_temperature
from langchain_datashunt.exceptions import BundleError, BundleMismatchError, ConfigurationError, PredictionError
from langchain_datashunt.prediction import FloatArray
from langchain_datashunt.small_models.base import SmallModel
from langchain_datashunt.small_models.bundles.bundle import BundleInfo
from langchain_datashunt.small_models.scores import Scores
from langchain_datashunt.small_models.training.training import (
    MIN_EXAMPLES_FOR_CALIBRATION,
    TrainingReport,
    TrainingSettings,
    lineage_of,
    split_examples,
)

ESTIMATOR_FILE = "estimator.skops"
_SMALLEST = 1e-12


class PredictProbaClassifier(SmallModel):
    """A wrapper of a fitted classifier whose `predict_proba` takes a list of texts.

    The log-probabilities serve as logits for temperature scaling. Bundles store scikit-learn estimators in the skops
    format, which loads only known types and runs no code from the bundle. Other objects cannot be saved.
    """

    labels: tuple[str, ...] = ()
    """Label names. Empty uses the estimator's `classes_`.

    If all `classes_` are among the labels, columns are matched by name, and labels outside `classes_` get probability
    0. Otherwise, the labels name the columns in order."""

    estimator: Any = Field(exclude=True)
    """The fitted classifier."""

    @model_validator(mode="after")
    def _take_classes(self) -> Self:
        if not hasattr(self.estimator, "predict_proba"):
            raise ConfigurationError(
                f"{type(self.estimator).__name__} has no predict_proba. Wrap it in a classifier that returns "
                f"probabilities, such as scikit-learn's CalibratedClassifierCV."
            )
        own = self._classes()
        if not self.labels and not own:
            raise ConfigurationError(
                f"{type(self.estimator).__name__} has no `classes_`. Fit it, or pass `labels` in the order of its "
                f"columns."
            )
        if self.labels and own and len(self.labels) != len(own) and set(own) - set(self.labels):
            raise ConfigurationError(
                f"Expected one label for each class in `labels`, got {len(self.labels)} labels for an estimator with "
                f"{len(own)} classes."
            )
        self.__dict__["labels"] = self.labels or own
        self.__dict__["model_id"] = self.model_id or type(self.estimator).__name__
        return self

    @override
    def predict_scores(self, texts: Sequence[str]) -> Scores:
        probabilities = np.asarray(self.estimator.predict_proba(list(texts)), dtype=np.float64)
        if probabilities.min(initial=0.0) < 0.0:
            raise PredictionError(
                f"{self.model_id}.predict_proba returned a negative probability. Check the wrapped estimator."
            )
        own = self._classes()
        if own != self.labels and set(own) <= set(self.labels) and own and probabilities.shape[1:] == (len(own),):
            given, probabilities = probabilities, np.zeros((len(texts), len(self.labels)))
            probabilities[:, [self.labels.index(label) for label in own]] = given
        return Scores(_logits(probabilities))

    def _classes(self) -> tuple[str, ...]:
        """Return the estimator's `classes_` in column order, or an empty tuple if it has none."""
        classes = getattr(self.estimator, "classes_", None)
        return () if classes is None else tuple(map(str, classes))

    @classmethod
    def train(
        cls,
        texts: Sequence[str],
        labels: Sequence[str],
        *,
        estimator: Any,
        validation: tuple[Sequence[str], Sequence[str]] | None = None,
        label_set: Sequence[str] | None = None,
        settings: TrainingSettings | None = None,
        model_id: str = "",
        input_key: str = "input",
    ) -> Self:
        """Fit a copy of a scikit-learn estimator and its temperature.

        The temperature is fitted on held-out texts. If no validation set is given, the estimator is then fitted again
        on all texts.

        Args:
            texts: `n` training texts.
            labels: Labels of the texts.
            estimator: Unfitted estimator that takes texts, for example a pipeline that starts with TF-IDF.
            validation: Texts and labels for calibration. None holds out a stratified part of `texts`.
            label_set: All labels in order. None uses the labels of the training set, sorted.
            settings: Training settings, of which only seed and validation fraction are used.
            model_id: Name of the model in predictions and logs. Empty uses the class name of the estimator.
            input_key: Key of the text in mapping inputs.

        Returns:
            A trained classifier.

        Raises:
            DataError: The training set cannot be used. The message gives the reason.
        """
        clone = require("sklearn.base", "calibration").clone
        chosen = settings or TrainingSettings()
        split = split_examples(texts, labels, validation=validation, settings=chosen, label_set=label_set)
        names = np.array(split.labels)
        started, fitted = time.perf_counter(), clone(estimator)
        fitted.fit(split.train.texts, names[split.train.targets.argmax(axis=1)])
        model = cls(labels=split.labels, estimator=fitted, model_id=model_id, input_key=input_key)
        report = TrainingReport()
        held, known = split.validation, set(model._classes())
        truth = held.targets.argmax(axis=1)
        seen = np.flatnonzero([label in known for label in names[truth].tolist()])
        if seen.size >= MIN_EXAMPLES_FOR_CALIBRATION:
            logits = np.asarray(model.predict_scores([held.texts[i] for i in seen.tolist()]).logits)
            model.temperature = fit_temperature(logits, truth[seen])
        if not split.validation_given:
            model.estimator = clone(estimator).fit(list(texts), list(labels))
        report.seconds = time.perf_counter() - started
        model.lineage = lineage_of(split, chosen, report) | {"validation_nll": None}
        return model

    # Bundles

    @classmethod
    @override
    def kind(cls) -> str:
        return "predict_proba"

    @override
    def weights(self) -> dict[str, NDArray[Any]]:
        return {}

    @override
    def write_files(self, folder: Path) -> None:
        try:
            require("skops.io", "calibration").dump(self.estimator, folder / ESTIMATOR_FILE)
        except (TypeError, AttributeError, ValueError) as error:
            raise BundleError(
                f"{type(self.estimator).__name__} cannot be saved without pickling ({error}). Save it separately and "
                f"wrap it again with PredictProbaClassifier(estimator=...)."
            ) from error
        if unknown := _untrusted(folder / ESTIMATOR_FILE):
            raise BundleError(
                f"{type(self.estimator).__name__} contains types that are not part of scikit-learn "
                f"({', '.join(unknown[:3])}), so loading it would run their code. Save it separately and wrap it again "
                f"with PredictProbaClassifier(estimator=...)."
            )

    @classmethod
    @override
    def from_weights(cls, info: BundleInfo, weights: dict[str, NDArray[Any]], folder: Path, **overrides: Any) -> Self:
        file = folder / ESTIMATOR_FILE
        if ESTIMATOR_FILE not in info.files:
            raise BundleMismatchError(
                f"The bundle {folder} of kind 'predict_proba' has no {ESTIMATOR_FILE}. Copy the complete bundle again."
            )
        if unknown := _untrusted(file):
            raise BundleError(
                f"{file} contains types that are not part of scikit-learn ({', '.join(unknown[:3])}) and was not "
                f"loaded. Load the estimator separately and wrap it with PredictProbaClassifier(estimator=...)."
            )
        estimator = require("skops.io", "calibration").load(file)
        own = [str(label) for label in getattr(estimator, "classes_", info.labels)]
        if len(own) != len(info.labels) and set(own) - set(info.labels):
            raise BundleMismatchError(
                f"Expected one class for each of the {len(info.labels)} labels of the bundle {folder}, got "
                f"{len(estimator.classes_)} classes. Save the bundle again from the trained model."
            )
        return cls(
            **info.shared(),
            estimator=estimator,
        )


def _logits(probabilities: FloatArray) -> FloatArray:
    return np.log(np.maximum(probabilities, _SMALLEST))


def _untrusted(file: Path) -> list[str]:
    found: list[str] = require("skops.io", "calibration").get_untrusted_types(file=file)
    return found
