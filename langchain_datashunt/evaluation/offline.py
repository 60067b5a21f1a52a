"""Offline evaluation of a policy on labelled examples with recorded answers, without LLM calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from langchain_datashunt._utils.short_repr import short_repr
from langchain_datashunt.evaluation import metrics
from langchain_datashunt.evaluation.curves import (
    DeferralCurve,
    Reliability,
    RiskCoverage,
    deferral_curve,
    reliability,
    risk_coverage,
)
from langchain_datashunt.evaluation.intervals import Interval, joint_intervals, resampled_interval
from langchain_datashunt.exceptions import DataError
from langchain_datashunt.policies.fusion import AnswerFusion
from langchain_datashunt.policies.thresholds import Policy
from langchain_datashunt.prediction import BoolArray, FloatArray, IntArray, PredictionBatch

OTHER = -1
"""Index of a label outside the small model's label set."""

SHOWN_EXAMPLES = 20
"""Maximum examples of each kind that an evaluation stores for a report."""


@dataclass(frozen=True)
class LabelRow:
    """Figures of the examples with one true label.

    Attributes:
        label: Name of the label.
        n: Number of examples.
        small_accuracy: Accuracy of the small model.
        kept: Share of examples answered locally.
        selective_risk: Error among locally answered examples, or NaN if there are none.
        large_accuracy: Accuracy of the large model, or NaN without recorded answers.
        confused_with: Most frequent wrong prediction of the small model, or None if there is none.
    """

    label: str
    n: int
    small_accuracy: float
    kept: float
    selective_risk: float
    large_accuracy: float
    confused_with: str | None


@dataclass(frozen=True)
class ShownExample:
    """Example for a report, with its row, its true label, both models' answers, and the confidence."""

    row: int
    truth: str
    small: str
    large: str | None
    confidence: float


@dataclass(frozen=True)
class Evaluation:
    """Figures of a policy on recorded answers, with the curves and examples of a report.

    Attributes:
        figures: Figures by name, with 95% intervals. `to_dict` describes them.
        n: Number of examples.
        policy: Text form of the policy.
        guarantee: Guarantee given when the policy was chosen, or an empty string.
        curve: Deferral curve without fusion, or None without large answers.
        fused_curve: Deferral curve with fused answers, or None without a fusion or large answers.
        reliability_before: Reliability before calibration, or None if the model has no logits.
        reliability_after: Reliability of the current probabilities.
        risk_coverage: Risk-coverage curve.
        labels: Per-label figures, least accurate first.
        kept_wrongly: Examples answered locally and wrongly, most confident first.
        deferred_needlessly: Deferred examples that only the small model got right, most confident first.
    """

    figures: dict[str, Interval]
    n: int
    policy: str
    guarantee: str
    curve: DeferralCurve | None
    fused_curve: DeferralCurve | None
    reliability_before: Reliability | None
    reliability_after: Reliability
    risk_coverage: RiskCoverage
    labels: list[LabelRow]
    kept_wrongly: list[ShownExample] = field(default_factory=list)
    deferred_needlessly: list[ShownExample] = field(default_factory=list)

    __repr__ = short_repr

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as a JSON-serialisable dictionary with stable keys.

        A figure is None if it cannot be computed. Each figure has a 95% interval `<name>_interval`, None if unknown.

        - `n`, `policy`, `guarantee`: As in the attributes.
        - `small_accuracy`, `large_accuracy`: Accuracy of each model alone.
        - `shunt_accuracy`: Accuracy of local and deferred answers together, without fusion.
        - `fused_accuracy`: Accuracy of local and deferred answers together, with fusion.
        - `random_mix_accuracy`: Expected accuracy if a random sample of the same size is deferred.
        - `deferral_rate`: Share of examples deferred.
        - `selective_risk`: Error among local answers.
        - `aurc`, `e_aurc`, `augrc`: Areas under the (excess, generalised) risk-coverage curve.
        - `ece_before`, `ece_after`: Expected calibration error before and after calibration.
        - `brier`, `nll`: Brier score and mean negative log-likelihood.
        - `deferral_area`, `apgr`, `cpt50`, `cpt80`: Figures of the deferral curve.
        - `cost_to_match`: Lowest cost per input in USD at which the shunt is as accurate as the large model, or the
          deferral rate if costs are unknown.
        - `cost_usd_per_1000`: Cost of both models in USD per 1,000 inputs.
        - `savings_usd_per_1000`: Savings against always deferring in USD per 1,000 inputs.
        """
        result: dict[str, Any] = {"n": self.n, "policy": self.policy, "guarantee": self.guarantee}
        for name, found in self.figures.items():
            known = np.isfinite(found.value)
            result[name] = found.value if known else None
            result[f"{name}_interval"] = [found.low, found.high] if known and np.isfinite(found.low) else None
        return result


def positions(labels: tuple[str, ...], names: Sequence[str | None]) -> IntArray:
    """Return the index of each name in `labels`, or `OTHER` if it is not there, shape `[n]`."""
    where: dict[str | None, int] = {label: i for i, label in enumerate(labels)}
    return np.array([where.get(name, OTHER) for name in names], dtype=np.intp)


def evaluate(
    predictions: PredictionBatch,
    labels: Sequence[str],
    policy: Policy,
    *,
    large: Sequence[str | None] | None = None,
    fusion: AnswerFusion | None = None,
    large_cost: float | Sequence[float] | None = None,
    small_cost_usd: float = 0.0,
    guarantee: str = "",
) -> Evaluation:
    """Evaluate a policy on labelled examples that were used neither for training nor for calibration.

    Args:
        predictions: Predictions of the small model for `n` examples.
        labels: True labels, `n` names. The small model is wrong on labels outside its label set.
        policy: Policy to evaluate.
        large: Recorded answers of the large model, `n` names. None marks an unparsable answer, which counts as wrong.
        fusion: Answer fusion fitted on other examples. None means no fusion.
        large_cost: LLM cost in USD, one number or `n`. None means unknown.
        small_cost_usd: Cost of one input on the small model in USD.
        guarantee: Guarantee given when the policy was chosen, for the report.

    Raises:
        DataError: There are no examples, the lengths differ, or predictions are not probability distributions.
    """
    n = len(predictions)
    if not n or n != len(labels) or (large is not None and n != len(large)):
        answers = "" if large is None else f" and {len(large)} large answers"
        raise DataError(
            f"Expected equal, non-zero counts, got {n} predictions, {len(labels)} "
            f"labels{answers}. Provide one of each for every example."
        )
    if not predictions.sound.all():
        raise DataError(predictions.complaint(int(np.flatnonzero(~predictions.sound)[0])))
    truth = positions(predictions.labels, labels)
    small = predictions.best == truth
    keep, score, _ = policy.evaluate(predictions)
    order = np.where(np.isnan(score), predictions.confidence, score)  # some policies decide without a score
    answers_at = None if large is None else positions(predictions.labels, large)
    asked = None
    if large is not None:
        asked = np.array([a is not None and a == b for a, b in zip(large, labels, strict=True)])
    fused = None if fusion is None or answers_at is None else _fused(fusion, predictions, truth, answers_at)
    cost = None if large_cost is None else np.broadcast_to(np.asarray(large_cost, np.float64), n)
    before = None if predictions.logits is None else _uncalibrated(predictions.logits)
    columns, statistics = _columns(small, keep, asked, fused, cost, small_cost_usd)
    figures = joint_intervals(columns, statistics)
    figures |= _resampled(predictions, truth, small, order, before)
    curve = None if asked is None else deferral_curve(order, small, asked, None if cost is None else cost.copy())
    figures |= _of_curve(curve)
    for name in _ALWAYS:
        figures.setdefault(name, _UNKNOWN)
    return Evaluation(
        figures=figures,
        n=n,
        policy=str(policy),
        guarantee=guarantee,
        curve=curve,
        fused_curve=None if fused is None else deferral_curve(order, small, fused),
        reliability_before=None if before is None else reliability(before, small),
        reliability_after=reliability(predictions.confidence, small),
        risk_coverage=risk_coverage(order, small),
        labels=_by_label(predictions, labels, small, keep, asked),
        kept_wrongly=_shown(keep & ~small, predictions, labels, large),
        deferred_needlessly=[] if asked is None else _shown(~keep & small & ~asked, predictions, labels, large),
    )


_UNKNOWN = Interval(float("nan"), float("nan"), float("nan"))

_ALWAYS = (
    "small_accuracy", "large_accuracy", "shunt_accuracy", "deferral_rate", "fused_accuracy", "random_mix_accuracy",
    "selective_risk", "aurc", "e_aurc", "augrc", "ece_before", "ece_after", "brier", "nll", "deferral_area", "apgr",
    "cpt50", "cpt80", "cost_to_match", "cost_usd_per_1000", "savings_usd_per_1000",
)  # fmt: skip
"""Figures that every evaluation has, NaN if unknown."""


def _columns(
    small: BoolArray,
    keep: BoolArray,
    asked: BoolArray | None,
    fused: BoolArray | None,
    cost: FloatArray | None,
    small_cost_usd: float,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return per-example columns, and the figures that are functions of their means."""
    columns: dict[str, Any] = {"small": small, "keep": keep, "kept_wrong": keep & ~small}
    statistics: dict[str, Any] = {
        "small_accuracy": lambda mean: mean["small"],
        "deferral_rate": lambda mean: 1.0 - mean["keep"],
        "selective_risk": lambda mean: _ratio(mean["kept_wrong"], mean["keep"]),
    }
    if asked is not None:
        columns |= {"large": asked, "shunt": np.where(keep, small, asked)}
        statistics |= {
            "large_accuracy": lambda mean: mean["large"],
            "shunt_accuracy": lambda mean: mean["shunt"],
            "random_mix_accuracy": lambda mean: mean["keep"] * mean["small"] + (1.0 - mean["keep"]) * mean["large"],
        }
    if fused is not None:
        columns["fused"] = np.where(keep, small, fused)
        statistics["fused_accuracy"] = lambda mean: mean["fused"]
    if cost is not None:
        columns |= {"saved": np.where(keep, cost, 0.0), "spent": np.where(keep, 0.0, cost)}
        statistics |= {
            "savings_usd_per_1000": lambda mean: 1000.0 * (mean["saved"] - small_cost_usd),
            "cost_usd_per_1000": lambda mean: 1000.0 * (mean["spent"] + small_cost_usd),
        }
    return columns, statistics


def _ratio(part: FloatArray, whole: FloatArray) -> FloatArray:
    return np.asarray(np.where(whole > 0, part, np.nan) / np.where(whole > 0, whole, 1.0))


def _resampled(
    predictions: PredictionBatch, truth: IntArray, small: BoolArray, score: FloatArray, before: FloatArray | None
) -> dict[str, Interval]:
    """Return the figures that are computed from resampled examples, with their intervals."""
    n, p = len(small), predictions.probabilities
    own = np.where(truth >= 0, p[np.arange(n), np.maximum(truth, 0)], 0.0)
    squares = np.einsum("nk,nk->n", p, p) - 2.0 * own + 1.0
    log = -np.log(np.maximum(own, 1e-12))
    wanted: dict[str, Any] = {
        "aurc": lambda rows: metrics.aurc(score[rows], small[rows]),
        "e_aurc": lambda rows: metrics.e_aurc(score[rows], small[rows]),
        "augrc": lambda rows: metrics.augrc(score[rows], small[rows]),
        "ece_after": lambda rows: metrics.expected_calibration_error(predictions.confidence[rows], small[rows]),
        "brier": lambda rows: float(squares[rows].mean()),
        "nll": lambda rows: float(log[rows].mean()),
    }
    if before is not None:
        wanted["ece_before"] = lambda rows: metrics.expected_calibration_error(before[rows], small[rows])
    return {name: resampled_interval(statistic, n) for name, statistic in wanted.items()}


def _of_curve(curve: DeferralCurve | None) -> dict[str, Interval]:
    """Return the figures of the whole curve, without intervals."""
    if curve is None:
        return {}
    found = {"deferral_area": metrics.deferral_area(curve), "cost_to_match": metrics.cost_to_match(curve)}
    if curve.accuracy[0] > curve.accuracy[-1]:  # the recovered gap is defined only if the large model is better
        found |= {
            "apgr": metrics.apgr(curve),
            "cpt50": metrics.call_performance_threshold(curve, 0.5),
            "cpt80": metrics.call_performance_threshold(curve, 0.8),
        }
    return {name: Interval(value, float("nan"), float("nan")) for name, value in found.items()}


def _fused(fusion: AnswerFusion, batch: PredictionBatch, truth: IntArray, answers: IntArray) -> BoolArray:
    """Return whether the fused answer is right, for each example."""
    aligned = fusion.aligned(batch)
    order = np.array([aligned.labels.index(label) for label in batch.labels] + [len(aligned.labels)])
    right, step = np.zeros(len(truth), dtype=np.bool_), max(1, 20_000_000 // len(batch.labels))
    for start in range(0, len(truth), step):
        rows = slice(start, start + step)
        best = fusion.posterior(aligned.probabilities[rows], order[answers[rows]]).argmax(axis=1)
        right[rows] = (truth[rows] != OTHER) & (best == order[truth[rows]])
    return right


def _uncalibrated(logits: FloatArray) -> FloatArray:
    """Return the highest probability at temperature 1, shape `[n]`."""
    return np.asarray(1.0 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1))


def _by_label(
    predictions: PredictionBatch, labels: Sequence[str], small: BoolArray, keep: BoolArray, asked: BoolArray | None
) -> list[LabelRow]:
    names, at = np.unique(np.array(labels, dtype=object).astype(str), return_inverse=True)
    k = len(names)
    total: FloatArray = np.bincount(at, minlength=k).astype(np.float64)

    def share(values: BoolArray, weights: BoolArray | None = None) -> FloatArray:
        part: FloatArray = np.bincount(at, weights=values.astype(np.float64), minlength=k).astype(np.float64)
        whole: FloatArray = total
        if weights is not None:
            whole = np.bincount(at, weights=weights.astype(np.float64), minlength=k).astype(np.float64)
        return _ratio(part, whole)

    small_share, kept, selective_risk = share(small), share(keep), share(keep & ~small, keep)
    large = np.full(k, np.nan) if asked is None else share(asked)
    confusions = np.zeros((k, len(predictions.labels)))
    np.add.at(confusions, (at[~small], predictions.best[~small]), 1.0)
    rows = [
        LabelRow(
            str(names[i]),
            int(total[i]),
            float(small_share[i]),
            float(kept[i]),
            float(selective_risk[i]),
            float(large[i]),
            predictions.labels[int(confusions[i].argmax())] if confusions[i].any() else None,
        )
        for i in range(k)
    ]
    return sorted(rows, key=lambda row: (row.small_accuracy, row.label))


def _shown(
    which: BoolArray,
    predictions: PredictionBatch,
    labels: Sequence[str],
    large: Sequence[str | None] | None,
) -> list[ShownExample]:
    rows = np.flatnonzero(which)
    order = np.argsort(-predictions.confidence[rows], kind="stable")
    return [
        ShownExample(
            int(i),
            str(labels[i]),
            predictions.labels[int(predictions.best[i])],
            None if large is None else large[i],
            float(predictions.confidence[i]),
        )
        for i in rows[order[:SHOWN_EXAMPLES]].tolist()
    ]
