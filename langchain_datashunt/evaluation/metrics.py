"""Metrics for calibration, selective prediction and routing, with their definitions and sources.

Arrays are per example with shape `[n]` unless noted. Accuracies and shares are in [0, 1].
"""

from __future__ import annotations

import numpy as np

from langchain_datashunt.evaluation.curves import DeferralCurve, reliability, risk_coverage
from langchain_datashunt.exceptions import DataError
from langchain_datashunt.prediction import BoolArray, FloatArray, IntArray

# Calibration


def expected_calibration_error(confidence: FloatArray, right: BoolArray, bins: int = 15) -> float:
    """Return the expected calibration error (ECE), the mean gap between confidence and accuracy (Guo et al. 2017).

    The mean is taken over bins of equal width, weighted by the number of examples in each.
    """
    found = reliability(confidence, right, bins)
    return float((found.count * np.abs(found.confidence - found.accuracy)).sum() / found.count.sum())


def brier_score(probabilities: FloatArray, truth: IntArray) -> float:
    """Return the Brier score, the mean squared distance of probabilities from the truth (Brier 1950).

    The distance is summed over the labels and lies in [0, 2]. If the true label has no column (index -1), the distance
    is |p|^2 + 1.

    Args:
        probabilities: Probabilities of the labels, shape `[n, k]`.
        truth: Indices of the true labels, -1 if outside the columns.
    """
    known = truth >= 0
    own = probabilities[np.arange(len(truth)), np.where(known, truth, 0)] * known
    squares = np.einsum("nk,nk->n", probabilities, probabilities)
    return float((squares - 2.0 * own + 1.0).mean())


def negative_log_likelihood(probabilities: FloatArray, truth: IntArray, floor: float = 1e-12) -> float:
    """Return the mean negative log-likelihood (NLL), -log p(truth) in nats.

    Args:
        probabilities: Probabilities of the labels, shape `[n, k]`.
        truth: Indices of the true labels, -1 if outside the columns.
        floor: Lower bound of p(truth), which also stands in for labels outside the columns.
    """
    own = np.where(truth >= 0, probabilities[np.arange(len(truth)), np.maximum(truth, 0)], 0.0)
    return float(-np.log(np.maximum(own, floor)).mean())


# Selective prediction


def aurc(score: FloatArray, right: BoolArray) -> float:
    """Return the area under the risk-coverage curve (AURC), the mean selective risk (Geifman & El-Yaniv 2017)."""
    return float(risk_coverage(score, right).risk.mean())


def e_aurc(score: FloatArray, right: BoolArray) -> float:
    """Return the AURC in excess of a perfect ranking of the same answers (Geifman, Uziel & El-Yaniv 2019)."""
    return aurc(score, right) - aurc(right.astype(np.float64), right)


def augrc(score: FloatArray, right: BoolArray) -> float:
    """Return the area under the generalised risk-coverage curve (AUGRC; Traub et al. 2024).

    This is the share of wrong local answers among all examples, averaged over all coverages.
    """
    return float(risk_coverage(score, right).generalised_risk.mean())


# Routing between a small and a large model


def random_mix(small_accuracy: float, large_accuracy: float, share: float) -> float:
    """Return the expected accuracy if a random `share` of the inputs is deferred.

    Every router must beat this baseline.
    """
    return (1.0 - share) * small_accuracy + share * large_accuracy


def deferral_area(curve: DeferralCurve) -> float:
    """Return the area under the deferral curve, the mean accuracy over all deferral rates (trapezoidal rule)."""
    return _area(curve.accuracy[::-1], curve.deferral_rate[::-1])


def performance_gap_recovered(accuracy: float, small_accuracy: float, large_accuracy: float) -> float:
    """Return the performance gap recovered (PGR; Ong et al. 2024, RouteLLM) by a router.

    A PGR of 0 is the accuracy of the small model, and 1 that of the large model.

    Raises:
        DataError: Both models are equally accurate.
    """
    if large_accuracy == small_accuracy:
        raise DataError(
            "Expected models of different accuracy, got equally accurate ones with no gap to recover. "
            "Compare their accuracies instead."
        )
    return (accuracy - small_accuracy) / (large_accuracy - small_accuracy)


def apgr(curve: DeferralCurve) -> float:
    """Return the average PGR (APGR) over all deferral rates (Ong et al. 2024).

    A random router has an APGR of 0.5. The ends of the curve are taken as the two models alone.

    Raises:
        DataError: Both models are equally accurate.
    """
    return performance_gap_recovered(deferral_area(curve), float(curve.accuracy[-1]), float(curve.accuracy[0]))


def call_performance_threshold(curve: DeferralCurve, recovered: float) -> float:
    """Return the call-performance threshold (CPT), the lowest deferral rate that reaches a PGR (Ong et al. 2024).

    Values between the points of the curve are interpolated linearly.

    Args:
        curve: Deferral curve.
        recovered: PGR to reach, for example 0.5 for CPT(50%).

    Returns:
        Deferral rate, or NaN if no point of the curve reaches the PGR.

    Raises:
        DataError: Both models are equally accurate.
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
    """Return the lowest cost at which the shunt is as accurate as the large model, up to `margin`.

    The cost is the mean per input in USD, or the deferral rate if costs are unknown.
    """
    measure = curve.deferral_rate if curve.cost is None else curve.cost
    return float(measure[curve.accuracy >= curve.accuracy[0] - margin - 1e-12].min())


def average_improvement_in_quality(cost: FloatArray, quality: FloatArray) -> float:
    """Return the average improvement in quality (AIQ; Hu et al. 2024, RouterBench).

    This is the mean height of the non-decreasing convex hull of (cost, quality) points.

    Args:
        cost: Costs, shape `[m]`, with at least two distinct values.
        quality: Qualities, shape `[m]`.

    Raises:
        DataError: All points cost the same.
    """
    order = np.lexsort((-quality, cost))
    points = list(zip(cost[order].tolist(), np.maximum.accumulate(quality[order]).tolist(), strict=True))
    if points[0][0] == points[-1][0]:
        raise DataError("Expected different values for `cost`, but all points cost the same. Add other thresholds.")
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
    """Return the savings against always deferring, in USD per 1,000 inputs, net of the small model's cost.

    Args:
        large_cost: LLM cost of each input in USD.
        asked: Whether each input is deferred.
        small_cost_usd: Cost of one input on the small model in USD (hardware and power).
    """
    return float(1000.0 * (np.where(asked, 0.0, large_cost).mean() - small_cost_usd))


def _area(y: FloatArray, x: FloatArray) -> float:
    """Return the area under a piecewise linear curve (trapezoidal rule)."""
    # numpy's function is `trapz` before version 2 and `trapezoid` from then on.
    return float(((y[1:] + y[:-1]) / 2.0 * np.diff(x)).sum())
