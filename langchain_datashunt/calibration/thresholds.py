"""Threshold selection: one function for all objectives, with the expected figures of the choice."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from langchain_datashunt._utils.short_repr import short_repr
from langchain_datashunt.calibration.objectives import CalibrationData, MaxAccuracy, Objective, Pick
from langchain_datashunt.evaluation.curves import SEND_ALL, DeferralCurve
from langchain_datashunt.evaluation.intervals import Interval, joint_intervals
from langchain_datashunt.evaluation.offline import OTHER, positions
from langchain_datashunt.exceptions import DataError, ThresholdWarning
from langchain_datashunt.policies.fusion import AnswerFusion
from langchain_datashunt.policies.scores import ConfidenceScore, MaxProbability
from langchain_datashunt.policies.thresholds import AlwaysLarge, AlwaysSmall, PerLabelThreshold, Policy, Threshold
from langchain_datashunt.prediction import BoolArray, FloatArray, IntArray, PredictionBatch


@dataclass(frozen=True)
class ThresholdChoice:
    """Selected threshold with its figures on the calibration data.

    The figures are slightly optimistic, because the threshold was chosen on the same data.

    Attributes:
        policy: Policy that applies the threshold.
        threshold: Lowest score that is answered locally. A value above 1 defers everything, or with per-label
            thresholds every label without its own.
        accuracy: Accuracy of the shunt, or NaN without large answers.
        deferral_rate: Share of examples deferred to the large model.
        selective_risk: Error among locally answered examples, or NaN if there are none.
        usd_per_1000: LLM cost of 1,000 inputs in USD, or None if unknown.
        small_accuracy: Accuracy of the small model alone.
        large_accuracy: Accuracy of the large model alone, or NaN without large answers.
        fitted_on: Number of calibration examples.
        objective: Text form of the objective.
        guarantee: Guarantee as a sentence that starts with "None" if nothing is guaranteed.
        proven: False if everything is deferred because no threshold could be shown to meet the objective.
        curve: Accuracy and deferral rate at every threshold.
        intervals: 95% bootstrap intervals of `deferral_rate`, `selective_risk` and, with large answers, `accuracy`.
    """

    policy: Policy
    threshold: float
    accuracy: float
    deferral_rate: float
    selective_risk: float
    usd_per_1000: float | None
    small_accuracy: float
    large_accuracy: float
    fitted_on: int
    objective: str
    guarantee: str
    proven: bool
    curve: DeferralCurve
    intervals: dict[str, Interval] = field(default_factory=dict)

    __repr__ = short_repr

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as a JSON-serialisable dictionary without the curve. NaN becomes None."""
        names = (
            "accuracy", "deferral_rate", "selective_risk", "usd_per_1000", "small_accuracy", "large_accuracy",
            "fitted_on", "objective", "guarantee", "proven",
        )  # fmt: skip
        plain = {name: _finite(getattr(self, name)) for name in names}
        intervals = {name: [_finite(found.low), _finite(found.high)] for name, found in self.intervals.items()}
        return {"policy": str(self.policy), "threshold": self.threshold, **plain, "intervals": intervals}


def select_threshold(
    predictions: PredictionBatch,
    labels: Sequence[str],
    *,
    large: Sequence[str | None] | None = None,
    objective: Objective | None = None,
    score: ConfidenceScore | None = None,
    fusion: AnswerFusion | None = None,
    large_cost: float | Sequence[float] | None = None,
    labels_are: Literal["true", "large"] = "true",
    unknown_labels: Literal["raise", "wrong"] = "raise",
) -> ThresholdChoice:
    """Select the threshold of a shunt on held-out labelled examples.

    Args:
        predictions: Predictions of the small model for `n` examples that it was not trained on.
        labels: True labels, `n` names.
        large: Answers of the large model, `n` names. None marks an unparsable answer, which counts as wrong. Required
            by objectives that compare with the large model.
        objective: Objective of the selection. None means `MaxAccuracy()`.
        score: Confidence score. None means `MaxProbability()`.
        fusion: Answer fusion fitted on these same examples. Deferred answers are then fused, each without the count of
            its own example.
        large_cost: LLM cost in USD, one number or `n`.
        labels_are: "large" if `labels` are answers of the large model. The guarantee then mentions it.
        unknown_labels: "raise" to reject true labels outside the small model's label set, or "wrong" to count the small
            model as wrong on them.

    Raises:
        DataError: The data is invalid, or cannot support the objective. The message names the remedy.
    """
    aim = objective or MaxAccuracy()
    measure = score or MaxProbability()
    data = calibration_data(
        predictions,
        labels,
        large=large,
        score=measure,
        fusion=fusion,
        large_cost=large_cost,
        unknown_labels=unknown_labels,
    )
    if data.large_right is None and aim.needs_large:
        raise DataError(
            f"{type(aim).__name__} requires the large model's answers, but `large` is None. Pass `large`, or use "
            f"RiskControl or MaxDeferralRate."
        )
    pick = aim.choose(data)
    guarantee = pick.guarantee
    if labels_are == "large" and not guarantee.startswith("None"):
        guarantee += " The labels are the large model's answers, so this bounds disagreement with it, not error."
    return _described(data, pick, measure, str(aim), guarantee)


def calibration_data(
    predictions: PredictionBatch,
    labels: Sequence[str],
    *,
    large: Sequence[str | None] | None = None,
    score: ConfidenceScore | None = None,
    fusion: AnswerFusion | None = None,
    large_cost: float | Sequence[float] | None = None,
    unknown_labels: Literal["raise", "wrong"] = "raise",
) -> CalibrationData:
    """Validate labelled examples and compute on which of them each model was right.

    The arguments are those of `select_threshold`.

    Raises:
        DataError: The examples are invalid. The message names the remedy.
    """
    measure, n = score or MaxProbability(), len(predictions)
    _check(predictions, labels, large, large_cost)
    truth = positions(predictions.labels, labels)
    if unknown_labels == "raise" and (truth == OTHER).any():
        strange = sorted({label for label, at in zip(labels, truth.tolist(), strict=True) if at == OTHER})
        raise DataError(
            f"{int((truth == OTHER).sum())} examples have labels outside the small model's label set: "
            f"{', '.join(strange[:5])}. Train the model with these labels, remove the examples, or count them as wrong "
            f"(unknown_labels='wrong')."
        )
    alone = after = None
    if large is not None:
        answers = positions(predictions.labels, large)
        alone = after = np.array([answer == label for answer, label in zip(large, labels, strict=True)], dtype=np.bool_)
        if fusion is not None:
            after = fused_right(fusion, predictions, truth, answers)
    values = measure(predictions)
    return CalibrationData(
        score=values,
        bounds=measure.bounds(None if predictions.answers is not None else len(predictions.labels)),
        predicted=predictions.best,
        labels=predictions.labels,
        small_right=predictions.best == truth,
        large_right=after,
        alone_right=alone,
        large_cost=None if large_cost is None else np.broadcast_to(np.asarray(large_cost, np.float64), n).copy(),
    )


def fused_right(fusion: AnswerFusion, predictions: PredictionBatch, truth: IntArray, answers: IntArray) -> BoolArray:
    """Return whether the fused answer is right, for each example that the fusion was fitted on.

    Each answer is fused without the count of its own example (cross-fitting).

    Args:
        fusion: Answer fusion fitted on these examples.
        predictions: Predictions of the small model for `n` examples.
        truth: Indices of the true labels in `predictions.labels`, shape `[n]`, `OTHER` if outside.
        answers: Indices of the large model's answers in `predictions.labels`, shape `[n]`, `OTHER` if outside.
    """
    # `back` maps labels of the predictions to columns of the fusion. `OTHER` is -1, so it maps to the last column,
    # "abstained".
    own = np.array([predictions.labels.index(label) for label in fusion.labels])
    back = np.full(len(own) + 1, len(own))
    back[own] = np.arange(len(own))
    p = fusion.aligned(predictions).probabilities
    known = truth != OTHER
    right = np.zeros(len(truth), dtype=np.bool_)
    t, a = back[truth[known]], back[answers[known]]
    right[known] = fusion.cross_fitted(p[known], t, a) == t
    return right


def _check(
    predictions: PredictionBatch,
    labels: Sequence[str],
    large: Sequence[str | None] | None,
    large_cost: float | Sequence[float] | None,
) -> None:
    n = len(predictions)
    if not n or n != len(labels) or (large is not None and n != len(large)):
        answers = "" if large is None else f" and {len(large)} large answers"
        raise DataError(
            f"Expected equal, non-zero counts, got {n} predictions, {len(labels)} "
            f"labels{answers}. Provide one of each for every example."
        )
    if strange := [label for label in labels if not isinstance(label, str)]:
        raise DataError(f"Expected strings for `labels`, got {strange[0]!r}. Remove examples without a label.")
    if not predictions.sound.all():
        bad = np.flatnonzero(~predictions.sound)
        raise DataError(
            f"Expected probability distributions for `predictions`, got {bad.size} invalid. "
            f"{predictions.complaint(int(bad[0]))}"
        )
    if len(set(labels)) < 2:
        raise DataError(
            f"Expected at least two distinct labels, got {next(iter(labels))!r} for all {n} examples. Provide examples "
            f"with the labels that occur in your traffic."
        )
    if large is not None and len(set(large)) == 1:
        raise DataError(
            f"Expected varying answers of the large model, got {next(iter(large))!r} for all {n} examples. Check that "
            f"this is the right column, and that the prompt contains the input."
        )
    if large_cost is not None:
        try:
            cost = np.asarray(large_cost, dtype=np.float64)
        except (TypeError, ValueError):
            cost = np.array(np.nan)
        if cost.shape not in ((), (n,)) or not np.isfinite(cost).all() or (cost < 0).any():
            raise DataError(
                "Expected non-negative, finite costs for `large_cost`, got other values or another number of them. "
                "Pass one number in USD, or one for each example."
            )


def _described(
    data: CalibrationData, pick: Pick, measure: ConfidenceScore, objective: str, guarantee: str
) -> ThresholdChoice:
    """Return the choice with its figures on the data and their intervals."""
    policy = _policy(pick, measure, data.bounds[0])
    limit: FloatArray | float = pick.threshold
    if pick.by_label is not None:
        own = np.array([pick.by_label.get(label, pick.threshold) for label in data.labels])
        limit = own[data.predicted]
    keep = data.score >= limit
    columns = {"keep": keep, "kept_wrong": keep & ~data.small_right}
    statistics: dict[str, Any] = {
        "deferral_rate": lambda mean: 1.0 - mean["keep"],
        "selective_risk": lambda mean: (
            np.where(mean["keep"] > 0, mean["kept_wrong"], np.nan) / np.where(mean["keep"] > 0, mean["keep"], 1.0)
        ),
    }
    if data.large_right is not None:
        columns["right"] = np.where(keep, data.small_right, data.large_right)
        statistics["accuracy"] = lambda mean: mean["right"]
    found = joint_intervals(columns, statistics)
    cost = None if data.large_cost is None else float(1000.0 * np.where(keep, 0.0, data.large_cost).mean())
    return ThresholdChoice(
        policy=policy,
        threshold=float(pick.threshold),
        accuracy=found["accuracy"].value if "accuracy" in found else float("nan"),
        deferral_rate=found["deferral_rate"].value,
        selective_risk=found["selective_risk"].value,
        usd_per_1000=cost,
        small_accuracy=float(data.small_right.mean()),
        large_accuracy=float("nan") if data.alone_right is None else data.large_accuracy,
        fitted_on=len(data),
        objective=objective,
        guarantee=guarantee,
        proven=pick.proven,
        curve=data.curve,
        intervals=found,
    )


def _policy(pick: Pick, measure: ConfidenceScore, lowest: float) -> Policy:
    """Return the policy of a choice.

    Deferring or answering everything is a valid result here, so `ThresholdWarning` is suppressed.
    """
    if not pick.proven:
        return AlwaysLarge()
    if pick.by_label is None and pick.threshold <= lowest + 1e-9:
        return AlwaysSmall()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ThresholdWarning)
        if pick.by_label is not None:
            return PerLabelThreshold(pick.by_label, SEND_ALL, score=measure)
        return Threshold(pick.threshold, score=measure)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value
