"""Metrics of calibration, of selective answering and of routing: each with its definition and source.

Arrays are per example, shape `[n]`, unless said otherwise; accuracies and shares are in [0, 1].
"""

from __future__ import annotations

import numpy as np

from langchain_datashunt.evaluation.curves import DeferralCurve, reliability, risk_coverage
from langchain_datashunt.exceptions import DataError
from langchain_datashunt.prediction import BoolArray, FloatArray, IntArray

# Calibration


def expected_calibration_error(confidence: FloatArray, right: BoolArray, bins: int = 15) -> float:
    """ECE: mean gap of confidence and accuracy over bins of equal width, weighted by size (Guo et al. 2017)."""
    found = reliability(confidence, right, bins)
    return float((found.count * np.abs(found.confidence - found.accuracy)).sum() / found.count.sum())


def brier_score(probabilities: FloatArray, truth: IntArray) -> float:
    """Mean squared distance of the distribution `[n, k]` from the truth, summed over labels, in [0, 2] (Brier 1950).

    A true label that is not among the columns (index -1) has distance |p|^2 + 1.
    """
    known = truth >= 0
    own = probabilities[np.arange(len(truth)), np.where(known, truth, 0)] * known
    squares = np.einsum("nk,nk->n", probabilities, probabilities)
    return float((squares - 2.0 * own + 1.0).mean())


def negative_log_likelihood(probabilities: FloatArray, truth: IntArray, floor: float = 1e-12) -> float:
    """NLL: mean -log p(truth) in nats; probabilities `[n, k]`, no smaller than `floor` (also for an unknown truth)."""
    own = np.where(truth >= 0, probabilities[np.arange(len(truth)), np.maximum(truth, 0)], 0.0)
    return float(-np.log(np.maximum(own, floor)).mean())


# Selective answering


def aurc(score: FloatArray, right: BoolArray) -> float:
    """Area under the risk-coverage curve: mean error among the kept over all coverages (Geifman & El-Yaniv 2017)."""
    return float(risk_coverage(score, right).risk.mean())


def e_aurc(score: FloatArray, right: BoolArray) -> float:
    """AURC less that of a perfect order of the same answers (Geifman, Uziel & El-Yaniv 2019)."""
    return aurc(score, right) - aurc(right.astype(np.float64), right)


def augrc(score: FloatArray, right: BoolArray) -> float:
    """Area under the generalised risk-coverage curve: mean share of kept errors among all (Traub et al. 2024)."""
    return float(risk_coverage(score, right).generalised_risk.mean())


# Routing between a small and a large model


def random_mix(small_accuracy: float, large_accuracy: float, share: float) -> float:
    """Expected accuracy where a random `share` is asked: the control that every router must beat."""
    return (1.0 - share) * small_accuracy + share * large_accuracy


def deferral_area(curve: DeferralCurve) -> float:
    """Mean accuracy over all shares asked: the area under the deferral curve (trapezoids)."""
    return _area(curve.accuracy[::-1], curve.deferral_rate[::-1])


def performance_gap_recovered(accuracy: float, small_accuracy: float, large_accuracy: float) -> float:
    """PGR: the part of the way from the small model's accuracy to the large one's (Ong et al. 2024, RouteLLM).

    Raises:
        DataError: Both are equally accurate, so there is no gap to recover.
    """
    if large_accuracy == small_accuracy:
        raise DataError(
            "The small and the large model are equally accurate; there is no gap to recover. "
            "Compare accuracies instead."
        )
    return (accuracy - small_accuracy) / (large_accuracy - small_accuracy)


def apgr(curve: DeferralCurve) -> float:
    """APGR: mean PGR over all shares asked, the area under PGR against the share (Ong et al. 2024).

    0.5 is a random router. The curve's ends are the two models alone.
    """
    return performance_gap_recovered(deferral_area(curve), float(curve.accuracy[-1]), float(curve.accuracy[0]))


def call_performance_threshold(curve: DeferralCurve, recovered: float) -> float:
    """CPT(x): the smallest share asked that recovers a part x of the gap (Ong et al. 2024); NaN where none does.

    Read off the line between neighbouring points.
    """
    small, large = float(curve.accuracy[-1]), float(curve.accuracy[0])
    gap = np.array([performance_gap_recovered(a, small, large) for a in curve.accuracy[::-1].tolist()])
    share = curve.deferral_rate[::-1]
    reached = np.flatnonzero(gap >= recovered - 1e-12)
    if not reached.size:
        return float("nan")
    first = int(reached[0])
    if first == 0 or gap[first] == gap[first - 1]:
        return float(share[first])
    part = (recovered - gap[first - 1]) / (gap[first] - gap[first - 1])
    return float(share[first - 1] + min(1.0, max(0.0, part)) * (share[first] - share[first - 1]))


def cost_to_match(curve: DeferralCurve, margin: float = 0.0) -> float:
    """The smallest cost (share asked, where costs are not known) that is as accurate as the large model."""
    measure = curve.deferral_rate if curve.cost is None else curve.cost
    return float(measure[curve.accuracy >= curve.accuracy[0] - margin - 1e-12].min())


def average_improvement_in_quality(cost: FloatArray, quality: FloatArray) -> float:
    """AIQ: mean height of the non-decreasing convex hull of (cost, quality) points (Hu et al. 2024, RouterBench).

    Args:
        cost: Shape `[m]`, two distinct values at least.
        quality: Shape `[m]`.

    Raises:
        DataError: All points cost the same.
    """
    order = np.lexsort((-quality, cost))
    points = list(zip(cost[order].tolist(), np.maximum.accumulate(quality[order]).tolist(), strict=True))
    if points[0][0] == points[-1][0]:
        raise DataError("All points cost the same; AIQ needs a range of costs. Give points of other thresholds too.")
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) <= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        if not hull or x > hull[-1][0]:
            hull.append((x, y))
    xs, ys = np.array([p[0] for p in hull]), np.array([p[1] for p in hull])
    return _area(ys, xs) / float(xs[-1] - xs[0])


def savings_usd_per_1000(large_cost: FloatArray, asked: BoolArray, small_cost_usd: float = 0.0) -> float:
    """What is saved against asking always, in USD for 1,000 inputs, net of the small model's own cost.

    Args:
        large_cost: USD of asking each input.
        asked: Which inputs are asked.
        small_cost_usd: What one input costs on the small model (machine and power).
    """
    return float(1000.0 * (np.where(asked, 0.0, large_cost).mean() - small_cost_usd))


def _area(y: FloatArray, x: FloatArray) -> float:
    """Under a line through points, by trapezoids; numpy's own has another name before version 2."""
    return float(((y[1:] + y[:-1]) / 2.0 * np.diff(x)).sum())
