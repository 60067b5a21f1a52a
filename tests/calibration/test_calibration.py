from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_datashunt.calibration import (
    MatchLarge,
    MaxAccuracy,
    MaxDeferralRate,
    deferral_curve,
    fit_temperature,
    select_threshold,
)
from langchain_datashunt.evaluation import mean_interval
from langchain_datashunt.exceptions import ConfigurationError, DataError
from langchain_datashunt.policies import Margin
from langchain_datashunt.prediction import PredictionBatch
from langchain_datashunt.small_models.scores import softmax


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_fit_temperature_sampled_labels_recovers_true_temperature(temperature: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (20_000, 5))
    p = softmax(logits, temperature)
    truth = (p.cumsum(axis=1) < rng.random((len(p), 1))).sum(axis=1)
    assert fit_temperature(logits, truth) == pytest.approx(temperature, rel=0.05)


@given(st.integers(0, 1000))
def test_fit_temperature_random_data_minimises_loss(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, truth = rng.normal(0, 2, (60, 4)), rng.integers(0, 4, 60)

    def loss(t: float) -> float:
        return float(-np.log(softmax(logits, t)[np.arange(60), truth] + 1e-300).mean())

    found = fit_temperature(logits, truth)
    if found < 999:  # upper bound of the search
        assert loss(found) <= min(loss(found * 0.9), loss(found * 1.1)) + 1e-9


def test_fit_temperature_degenerate_data_is_bounded_or_raises() -> None:
    right = np.array([[5.0, 0.0], [0.0, 5.0]])
    assert fit_temperature(right, np.array([0, 1])) == 1.0
    assert fit_temperature(right, np.array([1, 0])) == pytest.approx(1000.0)
    with pytest.raises(DataError, match="got none"):
        fit_temperature(np.zeros((0, 2)), np.zeros(0, dtype=int))
    with pytest.raises(DataError, match="NaN"):
        fit_temperature(np.array([[np.nan, 1.0]]), np.array([0]))


curves = st.lists(st.tuples(st.sampled_from([0.2, 0.4, 0.5, 0.7, 0.9]), st.booleans(), st.booleans()), min_size=1)


@given(curves)
def test_deferral_curve_any_threshold_matches_threshold_rule(rows: list[tuple[float, bool, bool]]) -> None:
    score = np.array([row[0] for row in rows])
    small, large = (np.array([row[i] for row in rows]) for i in (1, 2))
    curve = deferral_curve(score, small, large)
    assert (np.diff(curve.deferral_rate) < 1e-12).all()
    assert (np.diff(curve.thresholds) < 0).all()
    assert (curve.deferral_rate[0], curve.deferral_rate[-1]) == (1.0, pytest.approx(0.0))
    for threshold, accuracy, share in zip(curve.thresholds, curve.accuracy, curve.deferral_rate, strict=True):
        keep = score >= threshold
        assert accuracy == pytest.approx(np.where(keep, small, large).mean())
        assert share == pytest.approx(1 - keep.mean())


def example() -> tuple[PredictionBatch, list[str], list[str]]:
    """Predictions that are right if confident and mostly wrong otherwise, and large answers with one error."""
    p = np.array([0.99, 0.95, 0.9, 0.7, 0.6, 0.55])
    batch = PredictionBatch.from_arrays(("a", "b"), np.stack([p, 1 - p], axis=1))
    return batch, ["a", "a", "a", "b", "a", "b"], ["a", "b", "a", "b", "a", "b"]


def test_select_threshold_default_objective_maximises_accuracy_with_least_deferral() -> None:
    batch, gold, large = example()
    choice = select_threshold(batch, gold, large=large)
    assert choice.policy.threshold == 0.9
    assert (choice.accuracy, choice.deferral_rate) == (1.0, 0.5)
    assert choice.small_accuracy == pytest.approx(4 / 6)
    assert choice.large_accuracy == pytest.approx(5 / 6)
    assert choice.fitted_on == 6
    assert "None" in choice.guarantee


def test_select_threshold_each_objective_meets_its_criterion() -> None:
    batch, gold, large = example()
    cheap = select_threshold(batch, gold, large=large, objective=MaxDeferralRate(rate=0.2))
    assert cheap.deferral_rate <= 0.2
    assert cheap.accuracy == pytest.approx(5 / 6)
    match = select_threshold(batch, gold, large=large, objective=MatchLarge())
    assert match.accuracy >= match.large_accuracy
    assert match.deferral_rate == pytest.approx(1 / 6)
    loose = select_threshold(batch, gold, large=large, objective=MatchLarge(margin=0.2))
    assert loose.deferral_rate == 0.0
    assert select_threshold(batch, gold, large=large, objective=MaxAccuracy(max_deferral_rate=0.0)).deferral_rate == 0.0
    margin = select_threshold(batch, gold, large=large, score=Margin())
    assert margin.policy.threshold == pytest.approx(0.8)
    with pytest.raises(ConfigurationError, match="rate"):
        MaxDeferralRate(rate=1.5)


def test_select_threshold_small_model_always_wrong_defers_all_without_warning() -> None:
    batch = PredictionBatch.from_arrays(("a", "b"), [[1.0, 0.0], [0.1, 0.9]])
    choice = select_threshold(batch, ["b", "a"], large=["b", "a"])
    assert choice.deferral_rate == 1.0
    assert not choice.policy.evaluate(batch).keep.any()


def test_select_threshold_missing_large_answer_counts_as_wrong() -> None:
    batch = PredictionBatch.from_arrays(("a", "b"), [[0.9, 0.1], [0.9, 0.1]])
    assert select_threshold(batch, ["a", "b"], large=[None, "b"]).large_accuracy == 0.5


def test_mean_interval_bootstrap_covers_truth_and_narrows_with_n() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        values = rng.random(200) < 0.8
        interval = mean_interval(values, seed=seed, resamples=500)
        assert interval.low <= interval.value <= interval.high
        hits += interval.low <= 0.8 <= interval.high
    assert hits >= 180
    wide, narrow = mean_interval(rng.random(50)), mean_interval(rng.random(5000))
    assert narrow.high - narrow.low < wide.high - wide.low
    assert mean_interval(np.ones(10)) == (1.0, 1.0, 1.0)
    with pytest.raises(DataError, match="got none"):
        mean_interval(np.array([]))
