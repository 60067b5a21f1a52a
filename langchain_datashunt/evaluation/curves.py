"""Deferral, risk-coverage and reliability curves as arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from langchain_datashunt._utils.short_repr import short_repr
from langchain_datashunt.prediction import BoolArray, FloatArray

SEND_ALL = float(np.nextafter(1.0, 2.0))
"""Smallest threshold above 1, which defers everything."""


@dataclass(frozen=True)
class DeferralCurve:
    """Accuracy, deferral rate and cost of a shunt at each threshold, on labelled examples.

    Attributes:
        thresholds: Thresholds from strict to loose, shape `[m]`. The first defers everything, and each distinct score
            follows.
        accuracy: Accuracy over local and deferred answers together, shape `[m]`.
        deferral_rate: Share of examples deferred, falling from 1 to 0, shape `[m]`.
        cost: Mean LLM cost per example in USD, shape `[m]`, or None if unknown.
    """

    thresholds: FloatArray
    accuracy: FloatArray
    deferral_rate: FloatArray
    cost: FloatArray | None = None

    __repr__ = short_repr

    def thinned(self, points: int = 200) -> DeferralCurve:
        """Return at most `points` points of the curve, evenly spaced by index and including both ends."""
        if len(self.thresholds) <= points:
            return self
        at = np.unique(np.linspace(0, len(self.thresholds) - 1, points).round().astype(np.intp))
        cost = None if self.cost is None else self.cost[at]
        return DeferralCurve(self.thresholds[at], self.accuracy[at], self.deferral_rate[at], cost)


def deferral_curve(
    score: FloatArray,
    small_right: BoolArray | FloatArray,
    large_right: BoolArray | FloatArray,
    large_cost: FloatArray | None = None,
) -> DeferralCurve:
    """Compute accuracy, deferral rate and cost at every distinct threshold, in one pass over the sorted scores.

    Args:
        score: Confidence scores of the small model, shape `[n]`.
        small_right: Whether the small model was right, or the probability of that, shape `[n]`.
        large_right: Whether the answer after deferring was right, or the probability of that, shape `[n]`.
        large_cost: LLM cost of each example in USD, shape `[n]`, or None if unknown.
    """
    n = len(score)
    order = np.argsort(-score, kind="stable")
    ranked = score[order]
    gained = np.cumsum(small_right[order].astype(np.float64) - large_right[order])
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    base = float(large_right.mean())
    cost = None
    if large_cost is not None:
        spent = float(large_cost.sum()) - np.cumsum(large_cost[order])[last]
        cost = np.concatenate([[large_cost.sum()], np.maximum(spent, 0.0)]) / n
    # A custom score may exceed 1, so the first threshold must lie above the highest score as well.
    return DeferralCurve(
        np.concatenate([[max(SEND_ALL, float(np.nextafter(ranked[0], np.inf)))], ranked[last]]),
        np.concatenate([[base], base + gained[last] / n]),
        np.concatenate([[1.0], 1.0 - (last + 1.0) / n]),
        cost,
    )


@dataclass(frozen=True)
class RiskCoverage:
    """Selective risk at each coverage, with the most confident answers first (El-Yaniv & Wiener 2010).

    Attributes:
        coverage: Coverage 1/n, 2/n, ..., 1, shape `[n]`.
        risk: Expected selective risk, with equal scores in random order, shape `[n]`.
        generalised_risk: Wrong local answers as a share of all `n` examples, shape `[n]` (Traub et al. 2024).
    """

    coverage: FloatArray
    risk: FloatArray
    generalised_risk: FloatArray

    __repr__ = short_repr


def risk_coverage(score: FloatArray, right: BoolArray) -> RiskCoverage:
    """Compute the risk-coverage curve of a confidence score.

    Args:
        score: Confidence scores, shape `[n]`, larger if more confident.
        right: Whether the answers were right, shape `[n]`.
    """
    n = len(score)
    order = np.argsort(-score, kind="stable")
    ranked, wrong = score[order], (~right[order]).astype(np.float64)
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    sizes = np.diff(np.concatenate([[-1], last]))
    totals = np.add.reduceat(wrong, np.concatenate([[0], last[:-1] + 1]))
    errors = np.cumsum(np.repeat(totals / sizes, sizes))
    kept = np.arange(1, n + 1)
    return RiskCoverage(kept / n, errors / kept, errors / n)


@dataclass(frozen=True)
class Reliability:
    """Accuracy at each level of confidence.

    Attributes:
        confidence: Mean confidence in each non-empty bin, shape `[b]`.
        accuracy: Accuracy in each bin, shape `[b]`.
        count: Number of examples in each bin, shape `[b]`.
    """

    confidence: FloatArray
    accuracy: FloatArray
    count: FloatArray

    __repr__ = short_repr


def reliability(confidence: FloatArray, right: BoolArray, bins: int = 15) -> Reliability:
    """Compute a reliability diagram with bins of equal width (DeGroot & Fienberg 1983).

    Args:
        confidence: Confidences in [0, 1], shape `[n]`.
        right: Whether the answers were right, shape `[n]`.
        bins: Number of bins.
    """
    which = np.clip((confidence * bins).astype(np.intp), 0, bins - 1)
    count = np.bincount(which, minlength=bins).astype(np.float64)
    filled = count > 0
    mean = np.bincount(which, weights=confidence, minlength=bins)[filled] / count[filled]
    share = np.bincount(which, weights=right.astype(np.float64), minlength=bins)[filled] / count[filled]
    return Reliability(mean, share, count[filled])
