"""Simulations of the promotion gate: error rates and power."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import PrivateAttr

from langchain_datashunt.distillation import PromotionGate
from langchain_datashunt.exceptions import DataError
from langchain_datashunt.prediction import PredictionBatch
from langchain_datashunt.small_models import Scores, SmallModel


class Recorded(SmallModel):
    """Small model with a fixed answer for each of the texts "0", "1", and so on."""

    _answers: NDArray[np.intp] = PrivateAttr()

    def predict_scores(self, texts: Sequence[str]) -> Scores:
        return Scores(np.eye(len(self.labels))[self._answers[[int(text) for text in texts]]])


def recorded(labels: tuple[str, ...], truth: NDArray[np.intp], right: NDArray[np.bool_]) -> Recorded:
    model = Recorded(labels=labels)
    model._answers = np.where(right, truth, (truth + 1) % len(labels))
    return model


def share_promoted(gains: NDArray[np.float64], n: int, tries: int, churn: float = 0.06, seed: int = 0) -> float:
    """Return how often the gate passes a candidate whose accuracy differs by `gains[label]`.

    The old model's accuracy rises from 0.70 to 0.95 over the labels. A fraction `churn` of the answers changes between
    correct and wrong.
    """
    rng, k = np.random.default_rng(seed), len(gains)
    labels, accuracy, passed = tuple(f"l{i}" for i in range(k)), np.linspace(0.70, 0.95, k), 0
    texts = [str(i) for i in range(n)]
    for _ in range(tries):
        truth = rng.integers(k, size=n)
        p, gain = accuracy[truth], gains[truth]
        before = rng.random(n) < p
        lost, won = (churn / 2 - np.minimum(gain, 0)) / p, (churn / 2 + np.maximum(gain, 0)) / (1 - p)
        after = np.where(before, rng.random(n) >= lost, rng.random(n) < won)
        verdict = PromotionGate().test(
            recorded(labels, truth, before), recorded(labels, truth, after), texts, [labels[i] for i in truth]
        )
        passed += verdict.passed
    return passed / tries


@pytest.mark.parametrize("n", [100, 300, 1000, 3000])
@pytest.mark.parametrize("churn", [0.02, 0.06, 0.2])
@pytest.mark.parametrize("margin", [0.01, 0.03])
def test_lower_bound_loss_of_margin_passes_at_most_five_percent(n: int, churn: float, margin: float) -> None:
    rng, tries, gate = np.random.default_rng(n), 2000, PromotionGate(margin=margin)
    lost, won = max(margin, (churn + margin) / 2), max(0.0, (churn - margin) / 2)
    drawn = rng.random((tries, n))
    down, up = drawn < lost, (drawn >= lost) & (drawn < lost + won)
    passed = sum(gate.lower_bound(d, u) > -margin for d, u in zip(down, up, strict=True)) / tries
    noise = 3 * (0.05 * 0.95 / tries) ** 0.5
    # Counts are discrete, so the level is only approximate with few changed answers.
    assert passed <= (0.05 if n * (lost + won) >= 10 else 0.08) + noise


def test_lower_bound_solves_tango_equation() -> None:
    """Check (won - lost - n d)^2 = z^2 n (2 q + d (1 - d)), with q the restricted estimate of p(lost)."""
    won, lost = np.zeros(44, bool), np.zeros(44, bool)
    won[0] = True
    bound = PromotionGate(level=0.975).lower_bound(lost, won)
    n, d = 44, bound
    a, b, c = 2 * n, -1 + (2 * n - 1) * d, 0.0
    q = ((b * b - 4 * a * c) ** 0.5 - b) / (2 * a)
    assert (1 - n * d) ** 2 == pytest.approx(1.959964**2 * n * (2 * q + d * (1 - d)), rel=1e-3)
    assert -0.08 < bound < 0
    same = np.ones(1000, bool)
    assert PromotionGate().lower_bound(same, same) > -0.01, "1,000 unchanged answers must suffice"
    assert PromotionGate().lower_bound(same[:50], same[:50]) < -0.01, "50 unchanged answers must not suffice"


@pytest.mark.parametrize("k", [5, 50])
def test_gate_three_points_worse_is_rejected_two_points_better_passes(k: int) -> None:
    assert share_promoted(np.full(k, -0.03), 1000, 60) == 0.0
    assert share_promoted(np.full(k, -0.01), 1000, 60) <= 0.12
    assert share_promoted(np.full(k, 0.02), 3000, 40) >= 0.85


def test_gate_loss_on_proficient_labels_is_not_offset_by_gains() -> None:
    """Ten points are lost on labels with an accuracy above 0.9, and five are won on the others."""
    gains = np.where(np.linspace(0.70, 0.95, 10) > 0.9, -0.10, 0.05)
    assert share_promoted(gains, 3000, 40) <= 0.1


@pytest.mark.parametrize("order", ["in turn", "one after the other", "at random"])
def test_gate_proficient_labels_in_any_order_are_found(order: str) -> None:
    truth = np.arange(400) % 2
    if order != "in turn":
        truth = np.sort(truth) if order == "one after the other" else np.random.default_rng(0).permutation(truth)
    before = np.ones(400, dtype=np.bool_)
    after = ~((truth == 0) & (np.cumsum(truth == 0) <= 20))
    texts, labels = [str(i) for i in range(400)], ("a", "b")
    verdict = PromotionGate(margin=0.5).test(
        recorded(labels, truth, before), recorded(labels, truth, after), texts, [labels[i] for i in truth]
    )
    assert verdict.proficient_lower_bound == verdict.lower_bound
    assert not verdict.passed


def test_gate_unknown_labels_raise_data_error() -> None:
    truth = np.zeros(50, dtype=np.intp)
    model = recorded(("yes", "no"), truth, np.ones(50, dtype=np.bool_))
    with pytest.raises(DataError, match="such as 'yes', 'no', got 'Yes'"):
        PromotionGate().test(model, model, [str(i) for i in range(50)], ["Yes"] * 50)


def test_gate_generated_answers_raise_data_error() -> None:
    class Writes(Recorded):
        def predict_batch(self, inputs: Sequence[str], **given: Any) -> Any:
            batch = PredictionBatch.from_arrays(("answer", "other"), np.full((len(inputs), 2), 0.5))
            return replace(batch, answers=["something"] * len(inputs))

    model = Writes(labels=("answer", "other"))
    with pytest.raises(DataError, match="cannot score a model that generates its answers"):
        PromotionGate().test(model, model, ["1", "2"], ["answer", "other"])
