"""Metrics, intervals and evaluations against worked examples and definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from langchain_datashunt import Threshold
from langchain_datashunt.evaluation import (
    deferral_curve,
    evaluate,
    joint_intervals,
    mean_interval,
    reliability,
    resampled_interval,
    risk_coverage,
)
from langchain_datashunt.evaluation import metrics as m
from langchain_datashunt.exceptions import DataError
from langchain_datashunt.policies.fusion import AnswerFusion
from langchain_datashunt.prediction import PredictionBatch

SCORE = np.array([0.9, 0.8, 0.7, 0.6])
RIGHT = np.array([True, True, False, True])
LARGE = np.array([True, True, True, False])


def test_calibration_metrics_worked_example_match() -> None:
    # Two bins of ten are filled: one of two right at confidence 0.65, both right at confidence 0.95.
    confidence, right = np.array([0.65, 0.65, 0.95, 0.95]), np.array([True, False, True, True])
    assert m.expected_calibration_error(confidence, right, bins=10) == pytest.approx((0.15 + 0.05) / 2)
    assert m.expected_calibration_error(np.ones(3), np.ones(3, bool)) == 0.0
    p, truth = np.array([[0.8, 0.2], [0.4, 0.6]]), np.array([0, 0])
    assert m.brier_score(p, truth) == pytest.approx((0.2**2 * 2 + 0.6**2 * 2) / 2)
    assert m.negative_log_likelihood(p, truth) == pytest.approx(-(np.log(0.8) + np.log(0.4)) / 2)
    assert m.brier_score(p, np.array([-1, -1])) == pytest.approx(((0.68 + 1) + (0.52 + 1)) / 2), (
        "true labels outside the columns"
    )
    found = reliability(confidence, right, bins=10)
    assert found.count.tolist() == [2, 2]
    assert found.accuracy.tolist() == [0.5, 1.0]


def test_selective_metrics_worked_example_match() -> None:
    curve = risk_coverage(SCORE, RIGHT)
    assert curve.risk == pytest.approx([0, 0, 1 / 3, 1 / 4])
    assert m.aurc(SCORE, RIGHT) == pytest.approx((1 / 3 + 1 / 4) / 4)
    assert m.e_aurc(SCORE, RIGHT) == pytest.approx((1 / 3 + 1 / 4) / 4 - 1 / 16)
    assert m.augrc(SCORE, RIGHT) == pytest.approx((0 + 0 + 1 / 4 + 1 / 4) / 4)
    tied = risk_coverage(np.full(4, 0.5), RIGHT)
    assert tied.risk == pytest.approx([0.25] * 4), "equal scores count as in random order"


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=30))
@settings(max_examples=50)
def test_e_aurc_perfect_ranking_is_zero_and_never_negative(rows: list[tuple[float, bool]]) -> None:
    right = np.array([r for _, r in rows])
    assert m.e_aurc(right.astype(float), right) == pytest.approx(0.0)
    assert m.e_aurc(np.array([s for s, _ in rows]), right) >= -1e-9


def test_routing_metrics_worked_example_match() -> None:
    curve = deferral_curve(SCORE, RIGHT, LARGE)
    assert curve.deferral_rate.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert curve.accuracy.tolist() == [0.75, 0.75, 0.75, 0.5, 0.75]
    assert m.deferral_area(curve) == pytest.approx(0.25 * ((0.75 + 0.5) / 2 * 2 + 0.75 + 0.75))
    assert m.random_mix(0.6, 0.8, 0.25) == pytest.approx(0.65)
    assert m.performance_gap_recovered(0.7, 0.6, 0.8) == pytest.approx(0.5)
    assert m.cost_to_match(curve) == 0.0
    with pytest.raises(DataError, match="no gap"):
        m.apgr(curve)


def test_apgr_random_router_is_half_and_perfect_router_exceeds_one() -> None:
    rng = np.random.default_rng(0)
    small, large = rng.random(20_000) < 0.6, rng.random(20_000) < 0.8
    random = deferral_curve(rng.random(20_000), small, large)
    assert m.apgr(random) == pytest.approx(0.5, abs=0.03)
    assert m.call_performance_threshold(random, 0.5) == pytest.approx(0.5, abs=0.05)
    perfect = deferral_curve(small.astype(float) - large + rng.random(20_000) * 0.1, small, large)
    assert m.apgr(perfect) > 1.0
    assert m.call_performance_threshold(perfect, 0.5) < 0.2
    assert np.isnan(m.call_performance_threshold(random, 1.5))
    assert len(perfect.thinned(50).thresholds) == 50


def test_average_improvement_in_quality_is_mean_height_of_hull() -> None:
    # The hull has the points (0, .5), (1, .9), (2, 1) and the areas .7 and .95. The point (1, .6) lies below it.
    cost, quality = np.array([0.0, 1.0, 1.0, 2.0]), np.array([0.5, 0.6, 0.9, 1.0])
    assert m.average_improvement_in_quality(cost, quality) == pytest.approx((0.7 + 0.95) / 2)
    assert m.average_improvement_in_quality(np.array([0.0, 1.0, 2.0]), np.array([0.5, 0.4, 0.9])) == pytest.approx(0.7)
    with pytest.raises(DataError, match="cost the same"):
        m.average_improvement_in_quality(np.ones(2), np.ones(2))


def test_savings_usd_per_1000_subtracts_small_model_cost() -> None:
    asked = np.array([True, False, False, False])
    assert m.savings_usd_per_1000(np.full(4, 0.01), asked, 0.001) == pytest.approx(6.5)


# Intervals


def test_joint_intervals_one_mean_agrees_with_mean_interval() -> None:
    rng = np.random.default_rng(0)
    values = rng.random(800) < 0.3
    joint = joint_intervals({"x": values}, {"mean": lambda mean: mean["x"]})["mean"]
    plain = mean_interval(values.astype(float))
    assert joint.value == plain.value
    assert (joint.low, joint.high) == pytest.approx((plain.low, plain.high), abs=0.005)
    other = resampled_interval(lambda rows: float(values[rows].mean()), 800)
    assert (other.low, other.high) == pytest.approx((plain.low, plain.high), abs=0.01)
    with pytest.raises(DataError):
        joint_intervals({"x": np.array([])}, {})
    with pytest.raises(DataError):
        resampled_interval(lambda rows: 0.0, 0)


# Offline evaluation


def scored(n: int = 400, seed: int = 0) -> tuple[PredictionBatch, list[str], list[str | None]]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (n, 3))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    names = ("a", "b", "c")
    truth = [names[int(rng.choice(3, p=row))] for row in p]
    large = [t if rng.random() < 0.85 else None if rng.random() < 0.2 else str(rng.choice(names)) for t in truth]
    return PredictionBatch.from_arrays(names, p, logits=logits * 2), truth, large


def test_evaluate_threshold_policy_matches_rule_per_example() -> None:
    batch, truth, large = scored()
    fusion = AnswerFusion.fit(batch.labels, truth, large)
    found = evaluate(batch, truth, Threshold(0.7), large=large, fusion=fusion, large_cost=0.002, small_cost_usd=1e-5)
    keep = batch.confidence >= 0.7
    small = np.array([a == b for a, b in zip(batch.label_names(), truth, strict=True)])
    asked = np.array([a == b for a, b in zip(large, truth, strict=True)])
    told = found.to_dict()
    assert told["n"] == 400
    assert told["small_accuracy"] == pytest.approx(small.mean())
    assert told["large_accuracy"] == pytest.approx(asked.mean())
    assert told["shunt_accuracy"] == pytest.approx(np.where(keep, small, asked).mean())
    assert told["deferral_rate"] == pytest.approx(1 - keep.mean())
    assert told["selective_risk"] == pytest.approx((~small[keep]).mean())
    assert told["random_mix_accuracy"] == pytest.approx(
        m.random_mix(small.mean(), asked.mean(), float(1 - keep.mean()))
    )
    assert told["savings_usd_per_1000"] == pytest.approx(1000 * (0.002 * keep.mean() - 1e-5))
    assert told["ece_before"] != told["ece_after"]
    one_by_one = [
        t == (s if k else fusion.fuse(p, answer))
        for t, s, k, p, answer in zip(truth, batch.label_names(), keep, batch, large, strict=True)
    ]
    assert told["fused_accuracy"] == pytest.approx(np.mean(one_by_one))
    for name in ("small_accuracy", "shunt_accuracy", "aurc", "ece_before", "ece_after", "savings_usd_per_1000"):
        low, high = told[f"{name}_interval"]
        assert low < high
        assert low - 0.02 <= told[name] <= high + 0.02, "resampling biases a calibration error slightly upwards"
    assert sum(row.n for row in found.labels) == 400
    assert found.labels[0].small_accuracy <= found.labels[-1].small_accuracy
    assert all(not small[e.row] and keep[e.row] for e in found.kept_wrongly)
    assert all(small[e.row] and not keep[e.row] and not asked[e.row] for e in found.deferred_needlessly)


def test_evaluate_without_large_answers_gives_none_for_unknown_figures() -> None:
    batch, truth, _ = scored(60)
    told = evaluate(PredictionBatch(batch.labels, batch.probabilities), truth, Threshold(0.7)).to_dict()
    for name in ("large_accuracy", "fused_accuracy", "apgr", "savings_usd_per_1000", "ece_before"):
        assert told[name] is None
        assert told[f"{name}_interval"] is None
    assert told["small_accuracy"] is not None
    with pytest.raises(DataError, match="one of each for every example"):
        evaluate(batch, truth[:3], Threshold(0.7))
