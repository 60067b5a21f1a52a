"""Guarantees of selected thresholds, and errors for objectives that the data cannot support."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from langchain_datashunt import AlwaysLarge, PerLabelThreshold, Threshold
from langchain_datashunt.calibration import (
    MatchLarge,
    MaxAccuracy,
    MaxCost,
    MaxDeferralRate,
    RiskControl,
    deferral_curve,
    fit_vector_scaling,
    select_threshold,
)
from langchain_datashunt.calibration.risk import (
    examples_needed,
    first_that_fails,
    grid_of,
    last_of_several_walks,
    risk_p_values,
)
from langchain_datashunt.calibration.smoothing import smoothed_right
from langchain_datashunt.evaluation import ConfidenceSequence, betting_p_value
from langchain_datashunt.exceptions import ConfigurationError, DataError
from langchain_datashunt.policies import Entropy
from langchain_datashunt.policies.fusion import AnswerFusion
from langchain_datashunt.prediction import PredictionBatch
from langchain_datashunt.small_models.scores import softmax

LABELS = ("a", "b", "c", "d")


def drawn(n: int, seed: int, sharp: float = 2.0, scale: float = 1.0) -> tuple[PredictionBatch, list[str]]:
    """Probabilities that are calibrated if `scale` is 1 and overconfident above, with true labels."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, sharp, (n, len(LABELS)))
    p = softmax(logits)
    truth = (p.cumsum(axis=1) < rng.random((n, 1))).sum(axis=1).clip(max=len(LABELS) - 1)
    return PredictionBatch.from_arrays(LABELS, softmax(logits * scale)), [LABELS[i] for i in truth]


def answers(truth: list[str], accuracy: float, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [t if rng.random() < accuracy else LABELS[(LABELS.index(t) + 1) % 4] for t in truth]


# Risk control


def test_risk_p_values_and_walk_agree_with_mapie() -> None:
    from mapie.risk_control.fwer_control import control_fwer
    from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value

    for seed in range(20):
        batch, truth = drawn(400, seed)
        right = np.array([a == b for a, b in zip(batch.label_names(), truth, strict=True)])
        grid, alpha = grid_of((0.25, 1.0)), 0.15
        p, kept = risk_p_values(batch.confidence, right, grid, alpha)
        some = kept > 0
        wrong = np.array([(~right[batch.confidence >= limit]).sum() for limit in grid])
        risk = (wrong[some] - 1e-9) / kept[some]  # MAPIE rounds n * risk up, even from just above an integer
        theirs = compute_hoeffding_bentkus_p_value(risk, kept[some], alpha, binary=True).ravel()
        assert p[some] == pytest.approx(theirs, abs=1e-9)
        walk = first_that_fails(p, kept, 0.05, examples_needed(alpha, 0.95))
        assert walk is not None
        start, stop = walk
        valid = control_fwer(p[start:], 0.05, fwer_method="fixed_sequence")
        assert list(np.asarray(valid).ravel()) == list(range(stop - start))


@pytest.mark.parametrize(("n", "scale", "alpha"), [(300, 1.0, 0.1), (300, 3.0, 0.1), (1000, 1.0, 0.05)])
def test_risk_control_1000_tasks_violates_alpha_in_at_most_5_percent(n: int, scale: float, alpha: float) -> None:
    """The selective risk on 20,000 new inputs exceeds alpha in at most 5% of the tasks, up to chance."""
    tasks, broken, kept = 1000, 0, 0.0
    new, new_truth = drawn(20_000, 10_000, scale=scale)
    new_right = np.array([a == b for a, b in zip(new.label_names(), new_truth, strict=True)])
    order = np.argsort(-new.confidence)
    ranked, errors = new.confidence[order], np.cumsum(~new_right[order])
    aim = RiskControl(alpha=alpha)
    for seed in range(tasks):
        batch, truth = drawn(n, seed, scale=scale)
        choice = select_threshold(batch, truth, objective=aim)
        m = int(np.searchsorted(-ranked, -choice.threshold, side="right"))
        broken += bool(m and errors[m - 1] / m > alpha)
        kept += m / len(ranked)
    assert broken / tasks <= 0.05 + 3 * (0.05 * 0.95 / tasks) ** 0.5
    assert kept > 0, "the guarantee is trivial if every input is deferred"


def test_risk_control_without_large_answers_proves_bound() -> None:
    batch, truth = drawn(2000, 0)
    choice = select_threshold(batch, truth, objective=RiskControl(alpha=0.1))
    assert choice.proven
    assert isinstance(choice.policy, Threshold)
    assert 0 < choice.deferral_rate < 1
    assert choice.selective_risk <= 0.1
    assert "With 95% confidence, at most 10% of local answers are wrong" in choice.guarantee
    assert np.isnan(choice.accuracy)
    assert choice.to_dict()["accuracy"] is None
    low, _, high = choice.intervals["selective_risk"].low, None, choice.intervals["selective_risk"].high
    assert low <= choice.selective_risk <= high
    of_large = select_threshold(batch, truth, objective=RiskControl(alpha=0.1), labels_are="large")
    assert "bounds disagreement with it, not error" in of_large.guarantee
    by_entropy = select_threshold(batch, truth, objective=RiskControl(alpha=0.1), score=Entropy())
    assert by_entropy.proven


def test_risk_control_random_labels_defers_everything_with_reason() -> None:
    rng = np.random.default_rng(0)
    batch = PredictionBatch.from_arrays(LABELS, softmax(rng.normal(0, 2, (500, 4))))
    choice = select_threshold(batch, list(rng.choice(LABELS, 500)), objective=RiskControl(alpha=0.05))
    assert isinstance(choice.policy, AlwaysLarge)
    assert not choice.proven
    assert choice.deferral_rate == 1.0
    assert "everything is sent to the large model. Provide more examples" in choice.guarantee


def test_risk_control_per_label_proves_a_threshold_for_each_label() -> None:
    batch, truth = drawn(6000, 3, sharp=4.0)
    choice = select_threshold(batch, truth, objective=RiskControl(alpha=0.1, per_label=True))
    assert isinstance(choice.policy, PerLabelThreshold)
    assert set(choice.policy.thresholds) == set(LABELS)
    together = select_threshold(batch, truth, objective=RiskControl(alpha=0.1))
    assert choice.deferral_rate > together.deferral_rate, "the correction for four simultaneous guarantees defers more"
    few = select_threshold(*drawn(120, 3, sharp=4.0), objective=RiskControl(alpha=0.1, per_label=True))
    assert "labels have no guarantee" in few.guarantee or not few.proven


def test_match_large_with_confidence_is_proven_unless_large_is_perfect() -> None:
    batch, truth = drawn(4000, 5)
    large = answers(truth, 0.7, 6)
    sure = select_threshold(batch, truth, large=large, objective=MatchLarge(confidence=0.95))
    assert sure.proven
    assert sure.accuracy >= sure.large_accuracy
    loose = select_threshold(batch, truth, large=large, objective=MatchLarge(confidence=0.95, margin=0.05))
    assert loose.deferral_rate <= sure.deferral_rate
    perfect = select_threshold(batch, truth, large=truth, objective=MatchLarge(confidence=0.95))
    assert not perfect.proven
    assert perfect.deferral_rate == 1.0


def test_match_large_worse_small_model_is_rarely_proven() -> None:
    """If the small model is worse at every threshold, at most 10% of the tasks give the guarantee, up to chance."""
    made = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        batch, _ = drawn(600, seed)
        truth = [name if rng.random() < 0.78 else LABELS[0] for name in batch.label_names()]
        large = [t if rng.random() < 0.84 else "b" for t in truth]
        right = np.mean([a == b for a, b in zip(batch.label_names(), truth, strict=True)])
        assert right < 0.95
        choice = select_threshold(batch, truth, large=large, objective=MatchLarge(confidence=0.9, margin=0.0))
        made += choice.proven and choice.deferral_rate < 1.0 and right < 0.84
    assert made / 200 <= 0.1 + 3 * (0.09 / 200) ** 0.5


def test_last_of_several_walks_passing_run_reaches_its_end() -> None:
    p = np.full(100, 0.9)
    assert last_of_several_walks(p, 0.05) is None
    p[40:57] = 0.001
    assert last_of_several_walks(p, 0.05) == 56
    p[40] = 0.01
    assert last_of_several_walks(p, 0.05) == 56, "the walk that starts at 50 still passes"
    p[50] = 0.01
    assert last_of_several_walks(p, 0.05) is None


# Cost and deferral rate


def test_max_cost_known_costs_stays_within_bound() -> None:
    batch, truth = drawn(1000, 1)
    large = answers(truth, 0.95, 2)
    choice = select_threshold(batch, truth, large=large, large_cost=0.01, objective=MaxCost(usd_per_1000=3.0))
    assert choice.usd_per_1000 is not None and choice.usd_per_1000 <= 3.0 + 1e-9
    assert choice.deferral_rate == pytest.approx(0.3, abs=0.01)
    dear = select_threshold(batch, truth, large=large, large_cost=[0.01] * 1000, objective=MaxCost(usd_per_1000=100))
    assert dear.accuracy == select_threshold(batch, truth, large=large).accuracy
    with pytest.raises(DataError, match="for `large_cost`, got None"):
        select_threshold(batch, truth, large=large, objective=MaxCost(usd_per_1000=3.0))
    with pytest.raises(DataError, match="non-negative, finite costs"):
        select_threshold(batch, truth, large=large, large_cost=[0.1], objective=MaxCost(usd_per_1000=3.0))


def test_max_deferral_rate_without_large_answers_uses_the_rate() -> None:
    batch, truth = drawn(1000, 1)
    choice = select_threshold(batch, truth, objective=MaxDeferralRate(rate=0.25))
    assert 0.2 <= choice.deferral_rate <= 0.25


# Fusion


def test_select_threshold_with_fusion_uses_fused_accuracy() -> None:
    batch, truth = drawn(1500, 7)
    large = answers(truth, 0.8, 8)
    fusion = AnswerFusion.fit(LABELS, truth, large)
    plain = select_threshold(batch, truth, large=large)
    fused = select_threshold(batch, truth, large=large, fusion=fusion)
    assert fused.accuracy > plain.accuracy
    assert fused.large_accuracy == plain.large_accuracy, "the large model alone is not fused"


# Smoothing


def test_select_threshold_smoothing_beats_raw_best_point_on_new_data() -> None:
    """Over 200 small calibration sets, smoothed choices have a higher mean and a lower spread on new data."""
    new, new_truth = drawn(20_000, 999)
    small = np.array([a == b for a, b in zip(new.label_names(), new_truth, strict=True)])
    large = np.array([a == b for a, b in zip(answers(new_truth, 0.75, 1), new_truth, strict=True)])

    def value(threshold: float) -> float:
        return float(np.where(new.confidence >= threshold, small, large).mean())

    raw, smooth = [], []
    for seed in range(200):
        batch, truth = drawn(300, seed)
        said = answers(truth, 0.75, seed + 1)
        smooth.append(value(select_threshold(batch, truth, large=said).threshold))
        right = np.array([a == b for a, b in zip(batch.label_names(), truth, strict=True)])
        asked = np.array([a == b for a, b in zip(said, truth, strict=True)])
        curve = deferral_curve(batch.confidence, right, asked)
        raw.append(value(float(curve.thresholds[curve.accuracy.argmax()])))
    assert np.mean(smooth) > np.mean(raw)
    assert np.std(smooth) < np.std(raw)


def test_smoothed_right_constant_outcome_stays_near_constant() -> None:
    score = np.linspace(0.3, 0.999, 200)
    always = smoothed_right(score, (0.25, 1.0), np.ones(200, bool))
    never = smoothed_right(score, (0.25, 1.0), np.zeros(200, bool))
    assert always.min() > 0.9
    assert never.max() < 0.1


def test_match_large_fusion_worse_than_large_model_defers_everything() -> None:
    rng = np.random.default_rng(0)
    batch = PredictionBatch.from_arrays(LABELS, softmax(rng.normal(0, 6, (150, 4))))
    truth = [str(name) for name in rng.choice(LABELS, 150)]
    large = answers(truth, 0.97, 1)
    fusion = AnswerFusion.uniform(LABELS, 0.3)
    choice = select_threshold(batch, truth, large=large, fusion=fusion, objective=MatchLarge())
    assert not choice.proven
    assert "Calibrate without fusion" in choice.guarantee


# Invalid data and unsupported objectives


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": []}, "one of each for every example"),
        ({"labels": ["a"] * 50}, "got 'a' for all 50 examples"),
        ({"labels": ["a", "z"] * 25}, "outside the small model's label set: z.*unknown_labels='wrong'"),
        ({"large": ["a"] * 50}, "answers of the large model, got 'a' for all 50 examples.*right column"),
        ({"large": None}, "MaxAccuracy requires the large model's answers, but `large` is None"),
        ({"objective": RiskControl(alpha=0.01)}, "at least 299 calibration examples .*, got 50"),
    ],
)
def test_select_threshold_invalid_data_raises_with_remedy(change: dict[str, Any], words: str) -> None:
    batch, truth = drawn(50, 0)
    given: dict[str, Any] = {"labels": truth, "large": answers(truth, 0.8, 1), **change}
    with pytest.raises(DataError, match=f"(?s){words}"):
        select_threshold(batch, given.pop("labels"), **given)


def test_select_threshold_nan_probabilities_raises_with_row() -> None:
    batch, truth = drawn(50, 0)
    p = batch.probabilities.copy()
    p[7] = np.nan
    batch = PredictionBatch(batch.labels, p)
    with pytest.raises(DataError, match="for `predictions`, got 1 invalid. Row 7"):
        select_threshold(batch, truth, large=answers(truth, 0.8, 1))


def test_select_threshold_unknown_labels_wrong_counts_them_as_wrong() -> None:
    batch, truth = drawn(200, 0)
    large = answers(truth, 0.9, 1)
    truth[3] = large[3] = "z"
    choice = select_threshold(batch, truth, large=large, unknown_labels="wrong")
    assert choice.fitted_on == 200
    assert select_threshold(batch, truth, large=large, unknown_labels="wrong", fusion=AnswerFusion.uniform(LABELS, 0.9))


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 5])
def test_risk_control_alpha_out_of_range_raises(alpha: float) -> None:
    with pytest.raises(ConfigurationError, match="alpha"):
        RiskControl(alpha=alpha)


# Scaling


def test_fit_vector_scaling_per_label_shift_beats_temperature() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (4000, 4))
    p = softmax(logits)
    truth = (p.cumsum(axis=1) < rng.random((4000, 1))).sum(axis=1).clip(max=3)
    shifted = logits * np.array([1.0, 2.0, 1.0, 0.5]) + np.array([0.0, 1.0, -1.0, 0.0])

    def loss(q: np.ndarray[Any, Any]) -> float:
        return float(-np.log(q[np.arange(4000), truth]).mean())

    from langchain_datashunt.calibration import fit_temperature

    scaled = fit_vector_scaling(shifted, truth, penalty=1e-4)(shifted)
    assert loss(scaled) < loss(softmax(shifted, fit_temperature(shifted, truth))) - 0.05
    assert loss(scaled) == pytest.approx(loss(p), abs=0.01)
    with pytest.raises(DataError, match="at least 40 examples .* got 39"):
        fit_vector_scaling(logits[:39], truth[:39])


# Betting


def test_betting_p_value_keeps_level_and_has_power() -> None:
    rng = np.random.default_rng(0)
    false = np.mean([betting_p_value((rng.random(300) < 0.3).astype(float), 0.3) <= 0.05 for _ in range(500)])
    found = np.mean([betting_p_value((rng.random(300) < 0.2).astype(float), 0.3) <= 0.05 for _ in range(500)])
    assert false <= 0.05 + 3 * (0.05 * 0.95 / 500) ** 0.5
    assert found >= 0.8
    assert betting_p_value(np.array([]), 0.5) == 1.0
    with pytest.raises(DataError, match="between 0 and 1"):
        betting_p_value(np.ones(3), 1.0)


@pytest.mark.parametrize("mean", [0.02, 0.3, 0.9])
def test_confidence_sequence_300_values_covers_mean_at_all_times(mean: float) -> None:
    rng, missed = np.random.default_rng(int(100 * mean)), 0
    for _ in range(100):
        sequence, out = ConfidenceSequence(0.95), False
        for value in (rng.random(300) < mean).astype(float).tolist():
            sequence.add(value)
            low, high = sequence.interval
            out |= not low <= mean <= high
        missed += out
    assert missed / 100 <= 0.05 + 3 * (0.05 * 0.95 / 100) ** 0.5
    assert high - low < 0.3
    assert sequence.n == 300
    assert 0 <= sequence.mean <= 1


def test_confidence_sequence_value_out_of_range_raises() -> None:
    with pytest.raises(DataError, match="for `value`, got 2.0"):
        ConfidenceSequence().add(2.0)
    with pytest.raises(DataError, match="for `level`, got 1.0"):
        ConfidenceSequence(1.0)
    assert np.isnan(ConfidenceSequence().mean)


def test_objective_equal_settings_compare_equal() -> None:
    assert MaxAccuracy() == MaxAccuracy()
    assert RiskControl(alpha=0.1) != RiskControl(alpha=0.2)


def test_select_threshold_generated_answers_can_fall_below_one_half() -> None:
    """The confidence of generated text spans 0 to 1, although two labels represent it."""
    rng = np.random.default_rng(0)
    sure = rng.random(2000)
    right = rng.random(2000) < np.where(sure < 0.25, 0.1, 0.98)
    batch = PredictionBatch.from_arrays(("answer", "other"), np.column_stack([sure, 1 - sure]))
    batch = replace(batch, answers=[f"text {i}" for i in range(2000)])
    labels = ["answer" if one else "other" for one in right]
    choice = select_threshold(batch, labels, objective=RiskControl(alpha=0.1))
    assert 0.1 < choice.threshold < 0.5
    assert choice.selective_risk < 0.1


def test_select_threshold_label_only_large_model_has_counts_as_right_for_it() -> None:
    batch, truth = drawn(1000, 0)
    unknown = [i % 5 == 0 for i in range(1000)]
    labels = ["new" if new else label for new, label in zip(unknown, truth, strict=True)]
    choice = select_threshold(batch, labels, large=labels[:-1] + ["a"], objective=MatchLarge(), unknown_labels="wrong")
    assert choice.large_accuracy >= 0.999
    with pytest.raises(DataError, match="strings for `labels`, got None"):
        select_threshold(batch, [None, *labels[1:]], objective=MaxDeferralRate(rate=0.5))  # type: ignore[list-item]
    with pytest.raises(DataError, match="non-negative, finite costs"):
        select_threshold(batch, truth, large=truth[:-1] + ["a"], large_cost=["x"] * 1000, objective=MatchLarge())  # type: ignore[arg-type]


def test_smoothed_right_overconfident_scores_are_separated() -> None:
    """Scores that are all close to 1, as of a very overconfident network, differ in their estimates."""
    rng = np.random.default_rng(0)
    logit = rng.uniform(5.0, 20.0, 4000)
    right = rng.random(4000) < 1.0 / (1.0 + np.exp(-(logit - 12.0)))
    curve = smoothed_right(1.0 / (1.0 + np.exp(-logit)), (0.0, 1.0), right)
    assert curve[logit < 8].mean() < 0.2
    assert curve[logit > 16].mean() > 0.8
