"""Prompt Pruning: strategies that put the small model's prediction into the large model's prompt."""

from __future__ import annotations

import json
import math
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from langchain_datashunt._utils.settings import Strategy
from langchain_datashunt.exceptions import ConfigurationError, PruningWarning
from langchain_datashunt.policies.thresholds import Policy
from langchain_datashunt.prediction import (
    ANSWER_LABELS,
    BoolArray,
    CandidateProbabilities,
    Candidates,
    PredictionBatch,
    answer_text,
)

PRUNING_VARIABLES = ("candidates", "candidate_probabilities", "small_label", "small_confidence")
"""Prompt variables that every strategy fills, in addition to the caller's own."""

OPINION_VARIABLES = frozenset({"candidate_probabilities", "small_label", "small_confidence"})
"""Prompt variables that disclose the small model's prediction."""


class Pruning(Strategy):
    """Base class of strategies that turn a deferred prediction into prompt variables.

    Every probability in a prompt is disclosed to the large model's provider. `decimals` rounds the probabilities,
    `top_k` limits their number, and `NoPruning` discloses none.
    """

    narrows: ClassVar[bool] = False
    """Whether the candidates depend on the prediction for the input."""

    variables: ClassVar[frozenset[str]]
    """Prompt variables that carry this strategy's information. A template must use one of them."""

    paragraph: ClassVar[str]
    """Paragraph that the default prompt adds to the list of candidates, a template over the variables."""

    decimals: int = Field(default=2, ge=0, le=6)
    """Number of decimals that probabilities are rounded to."""

    def prepare(
        self,
        batch: PredictionBatch,
        labels: Sequence[str] | None = None,
        descriptions: Mapping[str, str] | None = None,
    ) -> list[dict[str, Any]]:
        """Return the prompt variables for each of `n` predictions.

        Args:
            batch: Predictions of the small model, `n` rows.
            labels: All labels of the task. Labels unknown to the small model always stay candidates.
            descriptions: Description of each label.
        """
        if batch.answers is not None:
            written = zip(batch.answers, batch.confidence.tolist(), strict=True)
            return [self._of_answer(answer_text(answer), p) for answer, p in written]
        known = set(batch.labels)
        unknown = [label for label in labels or () if label not in known]
        keep, show = self.candidates(batch), self.shown(batch)
        rounded = np.round(batch.probabilities, self.decimals)
        order = np.argsort(-batch.probabilities, axis=1, kind="stable")
        names = np.array(batch.labels, dtype=object)
        everything = Candidates([*batch.labels, *unknown], descriptions)
        prepared = []
        for row in range(len(batch)):
            likely = order[row][show[row][order[row]]]
            prepared.append(
                {
                    "candidates": everything
                    if keep[row].all()
                    else Candidates([*names[keep[row]], *unknown], descriptions),
                    "candidate_probabilities": CandidateProbabilities(
                        zip(names[likely].tolist(), rounded[row][likely].tolist(), strict=True)
                    ),
                    "small_label": batch.labels[batch.best[row]],
                    "small_confidence": float(rounded[row][batch.best[row]]),
                }
            )
        return prepared

    def _of_answer(self, answer: str, confidence: float) -> dict[str, Any]:
        """Return the prompt variables for an answer written by the small model."""
        p = round(confidence, self.decimals)
        return {
            "candidates": Candidates([answer]),
            "candidate_probabilities": CandidateProbabilities({answer: p}),
            "small_label": answer,
            "small_confidence": p,
        }

    def without_prediction(
        self, labels: Sequence[str] | None, descriptions: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Return the prompt variables if the small model failed: all candidates and no probabilities."""
        names = () if labels is None or tuple(labels) == ANSWER_LABELS else labels
        return {
            "candidates": Candidates(names, descriptions),
            "candidate_probabilities": CandidateProbabilities(),
            "small_label": "unknown",
            "small_confidence": 0.0,
        }

    def disclosed(self, variables: Mapping[str, Any], labels: Sequence[str] | None) -> str:
        """Return what a prompt with these variables discloses of the prediction, as JSON for the call log.

        Args:
            variables: The prompt variables, as from `prepare`.
            labels: All labels of the task; None if they are not known.
        """
        candidates = list(variables.get("candidates", ()))
        found: dict[str, Any] = {"pruning": type(self).__name__, "probabilities": bool(self.variables)}
        if labels is not None and 0 < len(candidates) < len(labels):
            found["candidates"] = candidates
        return json.dumps(found, ensure_ascii=False)

    @abstractmethod
    def candidates(self, batch: PredictionBatch) -> BoolArray:
        """Return a mask of the labels that stay candidates, shape `[n, k]`."""

    @abstractmethod
    def shown(self, batch: PredictionBatch) -> BoolArray:
        """Return a mask of the labels whose probabilities are shown, shape `[n, k]`."""

    def check(self, labels: tuple[str, ...] | None) -> None:
        """Raise a `ConfigurationError` if the strategy cannot work for these labels (None: unknown)."""


class SoftPruning(Pruning):
    """Keep all candidates and show the probabilities of likely and proficient labels.

    Args:
        top_k: Number of most likely labels shown. None shows all.
        proficient: Labels on which the small model performs well (see `measure_proficiency`). They are always shown,
            since a low probability for them is informative.
    """

    variables: ClassVar[frozenset[str]] = frozenset({"candidate_probabilities"})
    paragraph: ClassVar[str] = (
        "A small classifier trained for this task, which is not sure here, gives these labels:\n"
        "{candidate_probabilities}\nUse this as a hint; it may be wrong."
    )

    top_k: int | None = Field(default=5, ge=1)
    proficient: tuple[str, ...] = ()

    def candidates(self, batch: PredictionBatch) -> BoolArray:
        """Keep all labels."""
        return np.ones(batch.probabilities.shape, dtype=np.bool_)

    def shown(self, batch: PredictionBatch) -> BoolArray:
        """Show the `top_k` most likely and the proficient labels."""
        k = len(batch.labels)
        if self.top_k is None or self.top_k >= k:
            return np.ones(batch.probabilities.shape, dtype=np.bool_)
        shown = np.tile(_is_among(batch.labels, self.proficient), (len(batch), 1))
        likely = np.argsort(-batch.probabilities, axis=1, kind="stable")[:, : self.top_k]
        np.put_along_axis(shown, likely, True, axis=1)
        return shown

    def check(self, labels: tuple[str, ...] | None) -> None:
        """Raise a `ConfigurationError` if a proficient label does not exist."""
        _check_known("SoftPruning.proficient", self.proficient, labels)


class HardPruning(Pruning):
    """Remove the labels on which the small model is proficient.

    The small model would have answered inputs with these labels locally.

    Args:
        proficient: Labels to remove, measured on held-out data (`measure_proficiency`, or `HardPruning.fit`).
    """

    variables: ClassVar[frozenset[str]] = frozenset({"candidates"})
    paragraph: ClassVar[str] = ""

    proficient: tuple[str, ...]

    @classmethod
    def fit(
        cls,
        predictions: PredictionBatch,
        labels: Sequence[str],
        policy: Policy,
        *,
        minimum: float = 0.9,
        min_examples: int = 5,
        **settings: Any,
    ) -> HardPruning:
        """Create the strategy from held-out examples. `measure_proficiency` describes the arguments."""
        found = measure_proficiency(predictions, labels, policy, minimum=minimum, min_examples=min_examples)
        return cls(proficient=found, **settings)

    def candidates(self, batch: PredictionBatch) -> BoolArray:
        """Keep all labels except the proficient ones, or all labels if none would be left."""
        rest = ~_is_among(batch.labels, self.proficient)
        return np.tile(rest if rest.any() else np.ones_like(rest), (len(batch), 1))

    def shown(self, batch: PredictionBatch) -> BoolArray:
        """Show no probabilities."""
        return np.zeros(batch.probabilities.shape, dtype=np.bool_)

    def check(self, labels: tuple[str, ...] | None) -> None:
        """Raise a `ConfigurationError` if a label does not exist, and warn if no candidate would be left."""
        _check_known("HardPruning.proficient", self.proficient, labels)
        if labels and set(labels) <= set(self.proficient):
            warnings.warn(
                "HardPruning would remove every label, so it removes none. Measure proficiency with a higher "
                "`minimum`, or answer every input locally with AlwaysSmall().",
                PruningWarning,
                stacklevel=2,
            )


class ConformalPruning(Pruning):
    """Keep a conformal set of labels, which contains the true label with probability >= 1 - alpha.

    The method is split conformal prediction (Angelopoulos & Bates 2021) with the score 1 - p. It is fitted on deferred
    calibration examples, since the large model receives only deferred inputs. CROQ (ICML 2025) shows that fewer
    candidates improve the large model's answers. The guarantee holds on average over deferred inputs like the
    calibration examples, not for each input.

    Args:
        alpha: Accepted share of deferred inputs whose true label is removed, in (0, 1).
        quantile: Largest 1 - p that stays; set by `fit`.
        n_calibration: Number of deferred examples used by `fit`; 0 before.
    """

    narrows: ClassVar[bool] = True
    variables: ClassVar[frozenset[str]] = frozenset({"candidates"})
    paragraph: ClassVar[str] = ""

    alpha: float = Field(default=0.05, gt=0.0, lt=1.0)
    quantile: float | None = None
    n_calibration: int = Field(default=0, ge=0)

    def fit(
        self, predictions: PredictionBatch, labels: Sequence[str], policy: Policy | None = None
    ) -> ConformalPruning:
        """Return a copy fitted on the examples that `policy` defers, or on all examples if it is None.

        Args:
            predictions: Predictions for calibration examples that the small model was not trained on, `n` rows.
            labels: True labels, `n` names.
            policy: Policy used in production.

        Raises:
            ConfigurationError: `labels` and `predictions` differ in length, or the small model lacks a true label.
        """
        truth = _indices_of(predictions, labels)
        deferred = np.ones(len(predictions), dtype=np.bool_) if policy is None else ~policy.evaluate(predictions).keep
        misfit = np.sort(1.0 - predictions.probabilities[np.arange(len(predictions)), truth][deferred])
        n = len(misfit)
        rank = math.ceil(
            (n + 1) * (1.0 - self.alpha) - 1e-9
        )  # the tolerance absorbs rounding errors: 20 * 0.95 is 19, not 19.000000000000004
        if rank > n:
            warnings.warn(
                f"{n} deferred calibration examples are too few for alpha={self.alpha} "
                f"({math.ceil(1.0 / self.alpha - 1e-9) - 1} are needed), so all candidates are kept.",
                PruningWarning,
                stacklevel=2,
            )
        return self.model_copy(update={"quantile": float(misfit[rank - 1]) if rank <= n else 1.0, "n_calibration": n})

    def candidates(self, batch: PredictionBatch) -> BoolArray:
        """Keep the conformal set, or all labels if it is empty, since the prediction is then least reliable."""
        if self.quantile is None:
            raise ConfigurationError(_NOT_FITTED)
        keep = 1.0 - batch.probabilities <= self.quantile
        keep[~keep.any(axis=1)] = True
        return np.asarray(keep, dtype=np.bool_)

    def shown(self, batch: PredictionBatch) -> BoolArray:
        """Show no probabilities."""
        return np.zeros(batch.probabilities.shape, dtype=np.bool_)

    def check(self, labels: tuple[str, ...] | None) -> None:
        """Raise a `ConfigurationError` if the strategy is not fitted."""
        if self.quantile is None:
            raise ConfigurationError(_NOT_FITTED)


class TopHint(Pruning):
    """Keep all candidates and show the small model's label and confidence (SuperICL 2023)."""

    variables: ClassVar[frozenset[str]] = frozenset({"small_label", "small_confidence"})
    paragraph: ClassVar[str] = (
        "A small classifier trained for this task says {small_label}, with confidence {small_confidence}. "
        "Use this as a hint; it may be wrong."
    )

    def candidates(self, batch: PredictionBatch) -> BoolArray:
        """Keep all labels."""
        return np.ones(batch.probabilities.shape, dtype=np.bool_)

    def shown(self, batch: PredictionBatch) -> BoolArray:
        """Show the top label only."""
        shown = np.zeros(batch.probabilities.shape, dtype=np.bool_)
        shown[np.arange(len(batch)), batch.best] = True
        return shown


class NoPruning(Pruning):
    """Keep all candidates and disclose nothing about the prediction."""

    variables: ClassVar[frozenset[str]] = frozenset()
    paragraph: ClassVar[str] = ""

    def prepare(
        self,
        batch: PredictionBatch,
        labels: Sequence[str] | None = None,
        descriptions: Mapping[str, str] | None = None,
    ) -> list[dict[str, Any]]:
        """Return the same variables for every input: all candidates and no probabilities."""
        if batch.answers is not None:
            return [self.without_prediction(None)] * len(batch)
        return [self.without_prediction(list(dict.fromkeys([*batch.labels, *(labels or ())])), descriptions)] * len(
            batch
        )

    def candidates(self, batch: PredictionBatch) -> BoolArray:
        """Keep all labels."""
        return np.ones(batch.probabilities.shape, dtype=np.bool_)

    def shown(self, batch: PredictionBatch) -> BoolArray:
        """Show no probabilities."""
        return np.zeros(batch.probabilities.shape, dtype=np.bool_)


def measure_proficiency(
    predictions: PredictionBatch,
    labels: Sequence[str],
    policy: Policy,
    *,
    minimum: float = 0.9,
    min_examples: int = 5,
) -> tuple[str, ...]:
    """Return the labels that the small model answers locally and correctly in nearly all cases.

    Args:
        predictions: Predictions for held-out examples, `n` rows.
        labels: True labels, `n` names.
        policy: Policy used in production. Deferred examples count against their label.
        minimum: Minimum share of a label's examples that are answered locally and correctly, in (0, 1].
        min_examples: Minimum number of held-out examples for a label to be proficient.

    Raises:
        ConfigurationError: `labels` and `predictions` differ in length, or the small model lacks a true label.
    """
    truth = _indices_of(predictions, labels)
    served = policy.evaluate(predictions).keep & (predictions.best == truth)
    total = np.bincount(truth, minlength=len(predictions.labels))
    good = np.bincount(truth[served], minlength=len(predictions.labels))
    counted = zip(predictions.labels, total, good, strict=True)
    return tuple(label for label, n, k in counted if n >= min_examples and k >= minimum * n)


_NOT_FITTED = (
    "ConformalPruning has not been fitted. Call ConformalPruning(alpha=...).fit(predictions, labels, policy) "
    "on calibration examples that the small model was not trained on."
)


def _is_among(labels: Sequence[str], some: Sequence[str]) -> BoolArray:
    chosen = set(some)
    return np.array([label in chosen for label in labels], dtype=np.bool_)


def _check_known(what: str, named: Sequence[str], labels: tuple[str, ...] | None) -> None:
    unknown = sorted(set(named) - set(labels)) if labels else []
    if unknown:
        raise ConfigurationError(
            f"{what} names labels that do not exist: {', '.join(unknown[:5])}. Use the small model's label names."
        )


def _indices_of(predictions: PredictionBatch, labels: Sequence[str]) -> np.ndarray[Any, np.dtype[np.intp]]:
    if len(labels) != len(predictions):
        raise ConfigurationError(
            f"Expected one true label per prediction, got {len(predictions)} predictions and {len(labels)} true labels."
        )
    position = {label: i for i, label in enumerate(predictions.labels)}
    if unknown := sorted(set(labels) - set(position)):
        raise ConfigurationError(
            f"`labels` has true labels that the small model lacks: {', '.join(unknown[:5])}. "
            f"Remove these examples, or train the small model on them."
        )
    return np.array([position[label] for label in labels], dtype=np.intp)
