from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_datashunt import AlwaysLarge, AlwaysSmall, PerLabelThreshold, Threshold
from langchain_datashunt.exceptions import ConfigurationError, ThresholdWarning
from langchain_datashunt.policies import Entropy, Margin, MaxProbability, Policy
from langchain_datashunt.policies.scores import ConfidenceScore
from langchain_datashunt.prediction import PredictionBatch

BATCH = PredictionBatch.from_arrays(
    ("a", "b", "c"), [[0.9, 0.05, 0.05], [0.5, 0.4, 0.1], [0.2, 0.2, 0.6], [1.0, 0.0, 0.0]]
)
distributions = st.lists(st.lists(st.floats(0.001, 1.0), min_size=4, max_size=4), min_size=1, max_size=15)


def normalised(values: list[list[float]]) -> PredictionBatch:
    p = np.array(values)
    return PredictionBatch.from_arrays(tuple("abcd"), p / p.sum(axis=1, keepdims=True))


SCORES: tuple[ConfidenceScore, ...] = (MaxProbability(), Margin(), Entropy())
"""All scores of distributions. Scores added here must satisfy the same properties."""


@pytest.mark.parametrize("score", SCORES, ids=lambda score: type(score).__name__)
@given(distributions)
def test_score_bounds_and_batch_of_one_hold(score: ConfidenceScore, values: list[list[float]]) -> None:
    batch = normalised(values)
    found, (low, high) = score(batch), score.bounds(4)
    assert found.shape == (len(batch),)
    assert (found >= low - 1e-9).all()
    assert (found <= high + 1e-9).all()
    assert [score(one.as_batch())[0] for one in batch] == pytest.approx(found.tolist())


@pytest.mark.parametrize("score", SCORES, ids=lambda score: type(score).__name__)
def test_score_certain_and_uniform_reach_bounds(score: ConfidenceScore) -> None:
    batch = PredictionBatch.from_arrays(tuple("abcd"), [[0.0, 1.0, 0.0, 0.0], [0.25] * 4])
    assert score(batch).tolist() == pytest.approx(list(reversed(score.bounds(4))))


def test_threshold_equal_score_answers_locally() -> None:
    assert Threshold(0.9).evaluate(BATCH).keep.tolist() == [True, False, False, True]
    assert Threshold(1.0).evaluate(BATCH).keep.tolist() == [False, False, False, True]


def test_threshold_above_one_defers_everything_and_warns() -> None:
    with pytest.warns(ThresholdWarning, match="never be reached"):
        policy = Threshold(1.01)
    assert not policy.evaluate(BATCH).keep.any()


def test_threshold_always_reached_warns() -> None:
    with pytest.warns(ThresholdWarning, match="always reached"):
        Threshold(0.0)
    with pytest.warns(ThresholdWarning, match="over 3 labels"):
        Threshold(0.3).check(("a", "b", "c"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Threshold(0.34).check(("a", "b", "c"))


def test_per_label_threshold_uses_predicted_label() -> None:
    policy = PerLabelThreshold({"a": 0.95, "c": 0.5}, default=0.99)
    verdict = policy.evaluate(BATCH)
    assert verdict.keep.tolist() == [False, False, True, True]
    assert verdict.threshold.tolist() == [0.95, 0.95, 0.5, 0.95]


def test_per_label_threshold_unknown_label_raises() -> None:
    with pytest.raises(ConfigurationError, match="does not have: z"):
        PerLabelThreshold({"z": 0.9}, default=0.9).check(("a", "b"))
    PerLabelThreshold({"z": 0.9}, default=0.9).check(None)


@pytest.mark.parametrize("make", [lambda: Threshold(float("nan")), lambda: PerLabelThreshold({}, float("nan"))])
def test_policy_nan_threshold_raises(make: object) -> None:
    with pytest.raises(ConfigurationError, match="NaN"):
        make()  # type: ignore[operator]


def test_per_label_threshold_nan_for_one_label_raises() -> None:
    with pytest.raises(ConfigurationError, match="NaN"):
        PerLabelThreshold({"a": float("nan")}, default=0.5)


def test_threshold_invalid_setting_is_named_in_error() -> None:
    with pytest.raises(ConfigurationError, match="Invalid settings of Threshold: threshold"):
        Threshold("high")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="treshold"):
        Threshold(0.9, treshold=0.8)


def test_threshold_per_call_value_replaces_own_unless_nan() -> None:
    verdict = Threshold(0.99).evaluate(BATCH, np.array([0.8, np.nan, 0.6, 1.5]))
    assert verdict.keep.tolist() == [True, False, True, False]
    assert verdict.threshold.tolist() == [0.8, 0.99, 0.6, 1.5]


def test_constant_policies_keep_all_or_none() -> None:
    assert AlwaysSmall().evaluate(BATCH).keep.all()
    assert not AlwaysLarge().evaluate(BATCH).keep.any()
    assert np.isnan(AlwaysLarge().evaluate(BATCH).threshold).all()
    AlwaysSmall().check(("a",))


@given(distributions, st.floats(0.3, 0.9), st.floats(0.05, 0.9))
def test_policy_and_keeps_intersection_or_keeps_union(values: list[list[float]], high: float, margin: float) -> None:
    batch = normalised(values)
    a, b = Threshold(high), Threshold(margin, score=Margin())
    keep_a, keep_b = a.evaluate(batch).keep, b.evaluate(batch).keep
    assert np.array_equal((a & b).evaluate(batch).keep, keep_a & keep_b)
    assert np.array_equal((a | b).evaluate(batch).keep, keep_a | keep_b)


def test_combined_policy_reports_score_and_threshold_of_deciding_part() -> None:
    both = Threshold(0.8) & Threshold(0.99, score=Margin())
    verdict = both.evaluate(BATCH)
    assert verdict.threshold.tolist() == [0.99, 0.8, 0.8, 0.8]
    assert verdict.score[0] == pytest.approx(0.85)
    either = Threshold(0.95) | Threshold(0.05, score=Margin())
    assert either.evaluate(BATCH).threshold.tolist() == [0.05, 0.05, 0.05, 0.95]
    assert len((both & Threshold(0.5)).policies) == 3  # type: ignore[attr-defined]
    both.check(("a", "b", "c"))
    either.check(("a", "b", "c"))


@given(distributions, st.sampled_from([MaxProbability(), Margin(), Entropy()]))
def test_score_random_distributions_stay_within_bounds(values: list[list[float]], score: ConfidenceScore) -> None:
    batch = normalised(values)
    low, high = score.bounds(4)
    found = score(batch)
    assert found.shape == (len(batch),)
    assert (found >= low - 1e-12).all()
    assert (found <= high + 1e-12).all()


@given(distributions, st.sampled_from([MaxProbability(), Margin(), Entropy()]), st.floats(0.26, 0.99))
def test_evaluate_batch_of_one_equals_batch(values: list[list[float]], score: ConfidenceScore, limit: float) -> None:
    batch = normalised(values)
    for policy in (Threshold(limit, score=score), PerLabelThreshold({"a": limit}, 0.5, score=score)):
        verdict = policy.evaluate(batch)
        for i, prediction in enumerate(batch):
            alone = policy.evaluate(prediction.as_batch())
            assert (alone.keep[0], alone.threshold[0]) == (verdict.keep[i], verdict.threshold[i])
            assert alone.score[0] == pytest.approx(verdict.score[i])
            assert policy.evaluate(prediction.as_batch(), np.array([-1.0])).keep[0]


@given(distributions, st.floats(0.26, 0.9), st.floats(0.0, 0.1))
def test_threshold_higher_value_never_keeps_more(values: list[list[float]], low: float, more: float) -> None:
    batch = normalised(values)
    assert (Threshold(low + more).evaluate(batch).keep <= Threshold(low).evaluate(batch).keep).all()


def test_score_certain_is_one_uniform_is_zero() -> None:
    batch = PredictionBatch.from_arrays(("a", "b"), [[1.0, 0.0], [0.5, 0.5]])
    assert Entropy()(batch).tolist() == [1.0, 0.0]
    assert Margin()(batch).tolist() == [1.0, 0.0]
    single = PredictionBatch.from_arrays(("a",), [[1.0]])
    assert Entropy()(single).tolist() == Margin()(single).tolist() == [1.0]


def test_policy_is_immutable_and_compares_by_value() -> None:
    assert Threshold(0.9) == Threshold(0.9)
    assert "0.9" in str(Threshold(0.9))
    with pytest.raises(Exception, match="frozen"):
        Threshold(0.9).threshold = 0.5
    assert isinstance(Threshold(0.9), Policy)
