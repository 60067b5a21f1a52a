"""Which threshold to use: one call for all objectives, and what is to be expected of the choice."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

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
    """A threshold with what is to be expected of it.

    Attributes:
        policy: The policy to use.
        threshold: Its threshold; above 1 where everything is sent.
        accuracy: Of the shunt on the data it was chosen on (NaN without recorded large answers); choosing on it makes
            this a little too good.
        deferral_rate: Share asked on that data.
        selective_risk: Error among what the small model keeps; NaN where it keeps nothing.
        usd_per_1000: Cost of asking for 1,000 inputs; None where costs are not known.
        small_accuracy: Of the small model alone.
        large_accuracy: Of the large model alone; NaN without recorded answers.
        intervals: 95% bootstrap intervals of accuracy, deferral_rate and selective_risk at this threshold.
        fitted_on: How many examples it was chosen on.
        objective: What was aimed for, in words.
        guarantee: What is promised, in words.
        proven: Whether the objective's promise could be shown; False where everything is sent for want of data.
        curve: All points that were to be had.
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

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the curve."""
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
    """Choose the shunt threshold on held-out labelled examples.

    Args:
        predictions: Of the small model, for `n` examples that it was not trained on.
        labels: Their true labels, `n` names.
        large: The large model's answers, `n` names; None for an unparsable one, which counts as wrong. Needed by
            objectives that compare with the large model.
        objective: What to aim for; None for `MaxAccuracy()`.
        score: How sureness is measured; None for `MaxProbability()`.
        fusion: Fitted on these very examples: asked answers count as fused, each without its own example's count.
        large_cost: USD of asking, one number or `n`.
        labels_are: "large" where the labels are the large model's own answers: the guarantee says so.
        unknown_labels: What to make of true labels that the small model does not have: an error, or wrong answers.

    Raises:
        DataError: The data cannot be used, or cannot show what is asked for; the message says what to do.
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
            f"{type(aim).__name__} compares with the large model's answers, and none are given. Pass `large`, or use "
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
    """Check labelled examples, and say of each who was right; arguments as for `select_threshold`.

    Raises:
        DataError: The examples cannot be used; the message says why, and what to do.
    """
    measure, n = score or MaxProbability(), len(predictions)
    _check(predictions, labels, large, large_cost)
    truth = positions(predictions.labels, labels)
    if unknown_labels == "raise" and (truth == OTHER).any():
        strange = sorted({label for label, at in zip(labels, truth.tolist(), strict=True) if at == OTHER})
        raise DataError(
            f"{int((truth == OTHER).sum())} examples have labels that the small model does not know: "
            f"{', '.join(strange[:5])}. Train it with them, remove these rows, or count them as wrong "
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
    """Whether the fused answer is right, on the examples that the fusion was fitted on, each without its own count.

    Args:
        fusion: Fitted on these examples.
        predictions: `n` of them.
        truth: Shape `[n]`, index in the predictions' labels, `OTHER` for none.
        answers: Shape `[n]`, likewise.
    """
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
            f"{n} predictions, {len(labels)} labels{answers}: "
            f"give one of each for every example, and at least one example."
        )
    if strange := [label for label in labels if not isinstance(label, str)]:
        raise DataError(f"The label {strange[0]!r} is no text. Leave examples without a label out.")
    if not predictions.sound.all():
        bad = np.flatnonzero(~predictions.sound)
        raise DataError(
            f"{bad.size} predictions to calibrate on are no distributions. {predictions.complaint(int(bad[0]))}"
        )
    if len(set(labels)) < 2:
        raise DataError(
            f"All {n} examples have the label {next(iter(labels))!r}: nothing can be learnt about when to ask. Give "
            f"examples of two labels at least, as they come in your traffic."
        )
    if large is not None and len(set(large)) == 1:
        raise DataError(
            f"The large model's answer is {next(iter(large))!r} for all {n} examples. That is the wrong column, or a "
            f"model that does not read its input; check the column of large answers."
        )
    if large_cost is not None:
        try:
            cost = np.asarray(large_cost, dtype=np.float64)
        except (TypeError, ValueError):
            cost = np.array(np.nan)
        if cost.shape not in ((), (n,)) or not np.isfinite(cost).all() or (cost < 0).any():
            raise DataError("`large_cost` is USD of asking: one number, or one for each example, none negative or NaN.")


def _described(
    data: CalibrationData, pick: Pick, measure: ConfidenceScore, objective: str, guarantee: str
) -> ThresholdChoice:
    """The choice with its figures on the data, and their intervals."""
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
    """The policy of a choice: one that sends or keeps everything is a result here, not a mistake to warn of."""
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
