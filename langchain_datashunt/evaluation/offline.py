"""Offline evaluation: what a policy would have done on labelled examples with recorded answers. No call is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

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
"""Stands for a label that the small model does not have."""

SHOWN_EXAMPLES = 20
"""Examples of each kind that an evaluation keeps for a report."""


@dataclass(frozen=True)
class LabelRow:
    """One label in the per-label table.

    Attributes:
        label: Its name.
        n: Examples with it.
        small_accuracy: Of the small model on them.
        kept: Share of them that the small model answers.
        selective_risk: Error among what is kept of them; NaN for nothing.
        large_accuracy: Of the large model on them; NaN without recorded answers.
        confused_with: What the small model says instead, most often.
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
    """One example for a report: its row, its true label, what was said, and how sure."""

    row: int
    truth: str
    small: str
    large: str | None
    confidence: float


@dataclass(frozen=True)
class Evaluation:
    """Figures of a policy on recorded answers, and what a report draws of them.

    Attributes:
        figures: By name, with 95% intervals; see `to_dict` for what each is.
        policy: The policy in words.
        guarantee: What was promised when the policy was chosen, in words; empty for nothing.
        curve: Accuracy and share asked at each threshold (asked answers not fused).
        fused_curve: The same with fused answers; None without a fusion.
        reliability_before: Before calibration; None where the model gives no logits.
        reliability_after: As the model answers now.
        risk_coverage: Error among the kept.
        labels: Per-label figures, the worst first.
        kept_wrongly: Kept, and wrong, the surest first.
        deferred_needlessly: Asked, though the small model was right and the large one wrong.
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

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready. Keys are stable; a figure that cannot be known is null, its interval too.

        n; small_accuracy, large_accuracy; shunt_accuracy: kept and asked together; deferral_rate; fused_accuracy: with
        fused answers where asked; random_mix_accuracy: a random part of the same size asked; selective_risk: error
        among local answers; aurc, e_aurc, augrc;
        ece_before, ece_after: before and after calibration; brier, nll; deferral_area;
        apgr, cpt50, cpt80; cost_to_match: least share asked (USD an input, where costs are known) as accurate as the
        large model; cost_usd_per_1000; savings_usd_per_1000: against asking always; and for each `<name>_interval`.
        """
        told: dict[str, Any] = {"n": self.n, "policy": self.policy, "guarantee": self.guarantee}
        for name, found in self.figures.items():
            known = np.isfinite(found.value)
            told[name] = found.value if known else None
            told[f"{name}_interval"] = [found.low, found.high] if known and np.isfinite(found.low) else None
        return told


def positions(labels: tuple[str, ...], names: Sequence[str | None]) -> IntArray:
    """Index of each name, `OTHER` for one that is not among the labels; shape `[n]`."""
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
    """Score a policy on labelled examples that nothing was trained or chosen on.

    Args:
        predictions: Of the small model, `n` examples.
        labels: Their true labels; one that the small model does not have counts as wrong.
        policy: When to keep.
        large: The large model's recorded answers; None for an unparsable one.
        fusion: Fitted on other examples.
        large_cost: USD of asking, one number or `n`.
        small_cost_usd: USD of one input on the small model.
        guarantee: What was promised when the policy was chosen.

    Raises:
        DataError: Nothing to score, unequal lengths, or predictions that are no distributions.
    """
    n = len(predictions)
    if not n or n != len(labels) or (large is not None and n != len(large)):
        answers = "" if large is None else f" and {len(large)} large answers"
        raise DataError(f"{n} predictions, {len(labels)} labels{answers}: give one of each, and one example at least.")
    if not predictions.sound.all():
        raise DataError(predictions.complaint(int(np.flatnonzero(~predictions.sound)[0])))
    truth = positions(predictions.labels, labels)
    small = predictions.best == truth
    keep, score, _ = policy.evaluate(predictions)
    order = np.where(np.isnan(score), predictions.confidence, score)
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
"""Figures that are always there, NaN where they cannot be known."""


def _columns(
    small: BoolArray,
    keep: BoolArray,
    asked: BoolArray | None,
    fused: BoolArray | None,
    cost: FloatArray | None,
    small_cost_usd: float,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Per-example columns, and the figures that are functions of their means."""
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
    """Figures that are no functions of means."""
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
    """Figures of the whole curve; no intervals."""
    if curve is None:
        return {}
    found = {"deferral_area": metrics.deferral_area(curve), "cost_to_match": metrics.cost_to_match(curve)}
    if curve.accuracy[0] > curve.accuracy[-1]:  # without a gap to the large model there is nothing to recover
        found |= {
            "apgr": metrics.apgr(curve),
            "cpt50": metrics.call_performance_threshold(curve, 0.5),
            "cpt80": metrics.call_performance_threshold(curve, 0.8),
        }
    return {name: Interval(value, float("nan"), float("nan")) for name, value in found.items()}


def _fused(fusion: AnswerFusion, batch: PredictionBatch, truth: IntArray, answers: IntArray) -> BoolArray:
    aligned = fusion.aligned(batch)
    order = np.array([aligned.labels.index(label) for label in batch.labels] + [len(aligned.labels)])
    right, step = np.zeros(len(truth), dtype=np.bool_), max(1, 20_000_000 // len(batch.labels))
    for start in range(0, len(truth), step):
        rows = slice(start, start + step)
        best = fusion.posterior(aligned.probabilities[rows], order[answers[rows]]).argmax(axis=1)
        right[rows] = (truth[rows] != OTHER) & (best == order[truth[rows]])
    return right


def _uncalibrated(logits: FloatArray) -> FloatArray:
    """Highest probability at temperature 1, shape `[n]`."""
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
