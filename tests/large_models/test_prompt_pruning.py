from __future__ import annotations

import pickle

import numpy as np
import pytest
from langchain_core.prompts import ChatPromptTemplate

from langchain_datashunt import ConformalPruning, HardPruning, NoPruning, SoftPruning, Threshold, TopHint
from langchain_datashunt.exceptions import ConfigurationError, PruningWarning
from langchain_datashunt.large_models import measure_proficiency
from langchain_datashunt.large_models.prompt_pruning import PRUNING_VARIABLES, Pruning
from langchain_datashunt.prediction import Candidates, PredictionBatch

LABELS = ("a", "b", "c", "d")
BATCH = PredictionBatch.from_arrays(LABELS, [[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]])


def test_soft_pruning_keeps_all_candidates_and_shows_likeliest_in_order() -> None:
    first, second = SoftPruning(top_k=2, decimals=1).prepare(BATCH)
    assert tuple(first["candidates"]) == LABELS
    assert list(first["candidate_probabilities"].items()) == [("a", 0.5), ("b", 0.3)]
    assert list(second["candidate_probabilities"]) == ["d", "c"]
    assert str(first["candidate_probabilities"]) == "- a with probability 0.5\n- b with probability 0.3"


def test_soft_pruning_proficient_labels_are_always_shown() -> None:
    first, second = SoftPruning(top_k=1, proficient=("d",)).prepare(BATCH)
    assert list(first["candidate_probabilities"]) == ["a", "d"]
    assert list(second["candidate_probabilities"]) == ["d"]
    assert len(SoftPruning(top_k=None).prepare(BATCH)[0]["candidate_probabilities"]) == 4


def test_soft_pruning_decimals_rounds_disclosed_probabilities() -> None:
    batch = PredictionBatch.from_arrays(("a", "b"), [[0.123456, 0.876544]])
    shown = SoftPruning(decimals=1).prepare(batch)[0]
    assert shown["candidate_probabilities"] == {"b": 0.9, "a": 0.1}
    assert shown["small_confidence"] == 0.9


def test_hard_pruning_removes_proficient_labels_and_shows_no_probability() -> None:
    prepared = HardPruning(proficient=("a", "c")).prepare(BATCH)[0]
    assert tuple(prepared["candidates"]) == ("b", "d")
    assert prepared["candidate_probabilities"] == {}


def test_hard_pruning_all_labels_proficient_keeps_all_and_warns() -> None:
    everything = HardPruning(proficient=LABELS)
    assert tuple(everything.prepare(BATCH)[0]["candidates"]) == LABELS
    with pytest.warns(PruningWarning, match="removes none"):
        everything.check(LABELS)


@pytest.mark.parametrize("strategy", [HardPruning(proficient=("z",)), SoftPruning(proficient=("z",))])
def test_check_unknown_proficient_label_raises(strategy: Pruning) -> None:
    with pytest.raises(ConfigurationError, match="do not exist: z"):
        strategy.check(LABELS)
    strategy.check(None)


def test_prepare_labels_unknown_to_small_model_stay_candidates() -> None:
    task = [*LABELS, "new"]
    assert "new" in HardPruning(proficient=("a",)).prepare(BATCH, task)[0]["candidates"]
    assert tuple(NoPruning().prepare(BATCH, task)[0]["candidates"]) == tuple(task)
    assert "new" not in SoftPruning().prepare(BATCH, task)[0]["candidate_probabilities"]


def test_top_hint_shows_label_and_confidence() -> None:
    prepared = TopHint().prepare(BATCH)[1]
    assert (prepared["small_label"], prepared["small_confidence"]) == ("d", 0.4)
    assert prepared["candidate_probabilities"] == {"d": 0.4}


def test_no_pruning_discloses_nothing() -> None:
    prepared = NoPruning().prepare(BATCH)
    assert prepared[0] == prepared[1]
    assert prepared[0]["small_label"] == "unknown"
    assert not prepared[0]["candidate_probabilities"]


@pytest.mark.parametrize("strategy", [SoftPruning(), HardPruning(proficient=("a",)), TopHint(), NoPruning()])
def test_prepare_every_strategy_fills_every_variable(strategy: Pruning) -> None:
    assert set(strategy.prepare(BATCH)[0]) == set(PRUNING_VARIABLES)
    assert set(strategy.without_prediction(LABELS)) == set(PRUNING_VARIABLES)
    assert strategy.variables <= set(PRUNING_VARIABLES)


def test_candidates_with_descriptions_format_as_lines() -> None:
    candidates = Candidates(["a", "b"], {"a": "the first"})
    assert str(candidates) == "- a: the first\n- b"
    template = ChatPromptTemplate.from_template("Choose:\n{candidates}\n{candidate_probabilities}")
    text = template.format(**SoftPruning(top_k=1).prepare(BATCH, descriptions={"b": "second"})[0])
    assert "- a\n- b: second\n- c\n- d\n- a with probability 0.5" in text
    again = pickle.loads(pickle.dumps(candidates))
    assert (str(again), again) == (str(candidates), candidates)


def test_candidates_braces_in_label_are_not_a_template() -> None:
    template = ChatPromptTemplate.from_template("{candidates}")
    assert "{input}" in template.format(candidates=Candidates(["{input}"]))


def test_measure_proficiency_counts_correct_local_answers() -> None:
    batch = PredictionBatch.from_arrays(("a", "b"), [[0.95, 0.05]] * 9 + [[0.6, 0.4]] + [[0.1, 0.9]] * 5 + [[0.9, 0.1]])
    gold = ["a"] * 10 + ["b"] * 6
    assert measure_proficiency(batch, gold, Threshold(0.9)) == ("a",)
    assert measure_proficiency(batch, gold, Threshold(0.9), minimum=0.8) == ("a", "b")
    assert measure_proficiency(batch, gold, Threshold(0.9), min_examples=11) == ()
    assert HardPruning.fit(batch, gold, Threshold(0.9)).proficient == ("a",)


def test_measure_proficiency_and_fit_mismatched_labels_raise() -> None:
    with pytest.raises(ConfigurationError, match="2 predictions and 1 true labels"):
        measure_proficiency(BATCH, ["a"], Threshold(0.9))
    with pytest.raises(ConfigurationError, match="lacks: z"):
        ConformalPruning().fit(BATCH, ["a", "z"])


def test_conformal_pruning_unfitted_raises() -> None:
    with pytest.raises(ConfigurationError, match="not been fitted"):
        ConformalPruning(alpha=0.1).check(LABELS)
    with pytest.raises(ConfigurationError, match="not been fitted"):
        ConformalPruning(alpha=0.1).prepare(BATCH)


def test_conformal_pruning_fit_returns_split_conformal_quantile() -> None:
    p_true = np.linspace(0.05, 0.95, 19)
    batch = PredictionBatch.from_arrays(("a", "b"), np.stack([p_true, 1 - p_true], axis=1))
    fitted = ConformalPruning(alpha=0.05).fit(batch, ["a"] * 19)
    assert fitted.quantile == pytest.approx(0.95)  # rank ceil(20 * 0.95) = 19, the largest of 1 - p
    assert ConformalPruning(alpha=0.5).fit(batch, ["a"] * 19).quantile == pytest.approx(0.5)
    assert fitted.n_calibration == 19


def test_conformal_pruning_too_few_examples_keeps_all_and_warns() -> None:
    batch = PredictionBatch.from_arrays(("a", "b"), [[0.9, 0.1]] * 18)
    with pytest.warns(PruningWarning, match=r"18 deferred .* too few for alpha=0.05 \(19 are needed\)"):
        fitted = ConformalPruning(alpha=0.05).fit(batch, ["a"] * 18)
    assert tuple(fitted.prepare(BATCH)[0]["candidates"]) == LABELS


def test_conformal_pruning_fit_with_policy_uses_deferred_examples_only() -> None:
    batch = PredictionBatch.from_arrays(("a", "b"), [[0.99, 0.01]] * 50 + [[0.6, 0.4]] * 30)
    fitted = ConformalPruning(alpha=0.1).fit(batch, ["a"] * 80, Threshold(0.9))
    assert fitted.n_calibration == 30
    assert fitted.quantile == pytest.approx(0.4)


def test_conformal_pruning_empty_set_keeps_all_candidates() -> None:
    strategy = ConformalPruning(alpha=0.1, quantile=0.3)
    assert tuple(strategy.prepare(BATCH)[1]["candidates"]) == LABELS


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3])
def test_conformal_pruning_true_label_coverage_meets_guarantee(alpha: float) -> None:
    labels, coverage = tuple("abcdefgh"), []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        p = rng.dirichlet(np.full(8, 0.4), size=3000)
        truth = (p.cumsum(axis=1) < rng.random((3000, 1))).sum(axis=1)
        names = [labels[i] for i in truth]
        calibration, test = PredictionBatch.from_arrays(labels, p[:1000]), PredictionBatch.from_arrays(labels, p[1000:])
        fitted = ConformalPruning(alpha=alpha).fit(calibration, names[:1000])
        coverage.append(fitted.candidates(test)[np.arange(2000), truth[1000:]].mean())
    one_run = np.sqrt(alpha * (1 - alpha) * (1 / 1000 + 1 / 2000))
    assert np.mean(coverage) >= 1 - alpha - 4 * one_run / np.sqrt(20)
    assert np.mean(coverage) <= 1 - alpha + 0.02, "the sets are larger than they need to be"
