"""Curves over all thresholds at once: what is asked, what is right, what it costs. Pure arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from langchain_datashunt.prediction import BoolArray, FloatArray

SEND_ALL = float(np.nextafter(1.0, 2.0))
"""The smallest threshold above certainty: everything is asked."""


@dataclass(frozen=True)
class DeferralCurve:
    """What each threshold would have given on `n` labelled examples with recorded large answers.

    Attributes:
        thresholds: Shape `[m]`, from sending all (the strictest) to keeping all; one for each distinct score.
        accuracy: Shape `[m]`: of the shunt, kept and asked together.
        deferral_rate: Shape `[m]`: share asked, falling from 1 to 0.
        cost: Shape `[m]`: mean USD of an example, where the large model's cost is known.
    """

    thresholds: FloatArray
    accuracy: FloatArray
    deferral_rate: FloatArray
    cost: FloatArray | None = None

    def thinned(self, points: int = 200) -> DeferralCurve:
        """At most so many points of it, evenly spaced in what is asked; the ends are among them."""
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
    """The shunt's accuracy and share asked at every distinct threshold, in one pass over the sorted scores.

    Args:
        score: Shape `[n]`: confidence of the small model.
        small_right: Shape `[n]`: whether it was right, or with what probability.
        large_right: Shape `[n]`: whether the answer after asking was, or with what probability.
        large_cost: Shape `[n]`: USD of asking; None where it is not known.
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
    return DeferralCurve(
        np.concatenate([[max(SEND_ALL, float(np.nextafter(ranked[0], np.inf)))], ranked[last]]),
        np.concatenate([[base], base + gained[last] / n]),
        np.concatenate([[1.0], 1.0 - (last + 1.0) / n]),
        cost,
    )


@dataclass(frozen=True)
class RiskCoverage:
    """Error among what is kept, for each share that is kept, the surest first (El-Yaniv & Wiener 2010).

    Attributes:
        coverage: Shape `[n]`: 1/n, 2/n, ... 1.
        risk: Shape `[n]`: expected error among the kept; equal scores count as if in random order.
        generalised_risk: Shape `[n]`: kept errors as a share of all `n` (Traub et al. 2024).
    """

    coverage: FloatArray
    risk: FloatArray
    generalised_risk: FloatArray


def risk_coverage(score: FloatArray, right: BoolArray) -> RiskCoverage:
    """The risk-coverage curve of a score.

    Args:
        score: Shape `[n]`, the larger the surer.
        right: Shape `[n]`.
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
    """How right the model is at each level of confidence.

    Attributes:
        confidence: Shape `[b]`: mean confidence of each bin that is not empty.
        accuracy: Shape `[b]`: share right in it.
        count: Shape `[b]`: examples in it.
    """

    confidence: FloatArray
    accuracy: FloatArray
    count: FloatArray


def reliability(confidence: FloatArray, right: BoolArray, bins: int = 15) -> Reliability:
    """The reliability diagram over bins of equal width (DeGroot & Fienberg 1983).

    Args:
        confidence: Shape `[n]`, in [0, 1].
        right: Shape `[n]`.
        bins: How many.
    """
    which = np.clip((confidence * bins).astype(np.intp), 0, bins - 1)
    count = np.bincount(which, minlength=bins).astype(np.float64)
    filled = count > 0
    mean = np.bincount(which, weights=confidence, minlength=bins)[filled] / count[filled]
    share = np.bincount(which, weights=right.astype(np.float64), minlength=bins)[filled] / count[filled]
    return Reliability(mean, share, count[filled])
