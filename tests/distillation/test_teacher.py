"""Teacher check in simulations, in the gate and in continual distillation."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import PrivateAttr

from langchain_datashunt.call_log import CallLog, CallRecord
from langchain_datashunt.distillation import (
    ContinualDistiller,
    DistillationSettings,
    ModelRegistry,
    PromotionGate,
    TeacherCheck,
)
from langchain_datashunt.exceptions import DataError
from langchain_datashunt.small_models import EmbeddingClassifier, Scores, SmallModel, TrainingSettings

K = 20
LABELS = tuple(f"l{i}" for i in range(K))
THRESHOLD = 0.7


class Table(SmallModel):
    """Small model with a fixed distribution for each of the texts "0", "1", and so on."""

    _p: NDArray[np.float64] = PrivateAttr()

    def predict_scores(self, texts: Sequence[str]) -> Scores:
        return Scores(np.log(self._p[[int(text) for text in texts]]))


class World:
    """Simulated inputs with true labels drawn from the small model's distribution, and a large model's answers."""

    def __init__(self, n: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        sharp = self.rng.choice([0.5, 1.0, 2.0], size=(n, 1))
        p = self.rng.dirichlet(np.full(K, 0.12), n) ** sharp + 1e-4
        self.p = p / p.sum(axis=1, keepdims=True)
        self.small = Table(labels=LABELS)
        self.small._p = self.p
        self.truth = self.drawn()
        self.large = np.where(self.rng.random(n) < 0.8, self.truth, self.drawn())

    def drawn(self) -> NDArray[np.intp]:
        return (self.p.cumsum(axis=1) > self.rng.random((len(self.p), 1))).argmax(axis=1)

    def calls(self, rows: range, flipped: float = 0.0) -> list[CallRecord]:
        """Return the records of a shunt, with a fraction `flipped` of the large answers replaced at random."""
        found = []
        for i in rows:
            answer = self.rng.integers(K) if self.rng.random() < flipped else self.large[i]
            if self.p[i].max() < THRESHOLD:
                p = tuple(self.p[i].tolist())
                found.append(call(input=str(i), probabilities=p, answer_label=LABELS[answer]))
        return found

    def held_out(self, rows: range) -> tuple[list[str], list[str | None]]:
        return [str(i) for i in rows], [LABELS[self.large[i]] for i in rows]


def call(**fields: Any) -> CallRecord:
    return CallRecord(**{"labels": LABELS, "large_model": "m", "threshold": THRESHOLD, "answer": "x"} | fields)


def share_refused(flipped: float, tries: int, check: TeacherCheck, n: int = 1000) -> float:
    refused = 0
    for seed in range(tries):
        world = World(2 * n, seed)
        verdict = check.test(world.small, world.calls(range(n), flipped), *world.held_out(range(n, 2 * n)))
        assert min(verdict.taught, verdict.held_out) >= 100
        refused += not verdict.passed
    return refused / tries


def test_teacher_check_unchanged_answers_fail_at_most_at_level() -> None:
    tries = 200
    assert share_refused(0.0, tries, TeacherCheck(margin=0.0)) <= 0.05 + 3 * (0.05 * 0.95 / tries) ** 0.5
    assert share_refused(0.0, tries, TeacherCheck()) <= 0.02


@pytest.mark.parametrize(("flipped", "noticed"), [(0.1, 0.7), (0.5, 1.0)])
def test_teacher_check_replaced_answers_fail(flipped: float, noticed: float) -> None:
    assert share_refused(flipped, 40, TeacherCheck()) >= noticed


def test_teacher_check_harder_log_passes() -> None:
    """Inputs are compared at equal confidence, so a harder log alone must not fail the check."""
    world = World(3000, 0)
    hard = [one for one in world.calls(range(1500)) if (one.confidence or 0.0) < 0.4]
    verdict = TeacherCheck().test(world.small, hard, *world.held_out(range(1500, 3000)))
    assert verdict.passed, verdict
    assert verdict.taught == len(hard) > 100
    sure = [one for one in world.calls(range(1500)) if (one.confidence or 0.0) >= 0.4]
    assert TeacherCheck().test(world.small, sure, *world.held_out(range(1500, 3000))).passed


def test_teacher_check_one_stratum_matches_plain_difference() -> None:
    """With one stratum the estimate is the difference of two rates, with about the usual variance."""
    world = World(4000, 1)
    check = TeacherCheck(strata=1)
    calls = world.calls(range(2000), flipped=0.2)
    texts, answers = world.held_out(range(2000, 4000))
    verdict = check.test(world.small, calls, texts, answers)
    limit = max(one.confidence or 0.0 for one in calls)
    held = [i for i in range(2000, 4000) if world.p[i].max() <= limit]
    expected = np.mean([world.p[i, world.large[i]] < 1 / K for i in held])
    surprising = np.mean([one.probabilities[LABELS.index(str(one.answer_label))] < 1 / K for one in calls])  # type: ignore[index]
    assert (verdict.taught, verdict.held_out) == (len(calls), len(held))
    assert verdict.surprising == pytest.approx(surprising)
    assert verdict.expected == pytest.approx(expected)
    deviation = (surprising * (1 - surprising) / len(calls) + expected * (1 - expected) / len(held)) ** 0.5
    assert verdict.lower_bound == pytest.approx(surprising - expected - 1.645 * deviation, abs=2e-3)


def test_teacher_check_unrelated_calls_are_ignored() -> None:
    world = World(600, 2)
    calls, held = world.calls(range(300)), world.held_out(range(300, 600))
    odd = [
        call(input="a", probabilities=calls[0].probabilities, answer_label=LABELS[0], audit=True),
        call(input="b", probabilities=calls[0].probabilities, answer_label="new"),
        call(input="c", probabilities=calls[0].probabilities, answer_label=None),
        call(input="d", answer_label=LABELS[0]),
        call(input="e", probabilities=calls[0].probabilities, answer_label=LABELS[0], reason="small_error"),
        call(input="f", labels=("answer", "other"), probabilities=(0.6, 0.4), small_answer="x", answer_label="x"),
    ]
    plain = TeacherCheck().test(world.small, calls, *held)
    assert TeacherCheck().test(world.small, [*odd, *calls], *held) == plain
    assert TeacherCheck().test(world.small, calls, [*held[0], "1", "2"], [*held[1], None, "new"]) == plain


def test_teacher_check_too_few_answers_passes_without_comparison() -> None:
    world = World(400, 3)
    calls, (texts, answers) = world.calls(range(200)), world.held_out(range(200, 400))
    for verdict in (
        TeacherCheck().test(world.small, calls[:49], texts, answers),
        TeacherCheck().test(world.small, calls, texts[:20], answers[:20]),
        TeacherCheck().test(world.small, calls, texts, [None] * len(texts)),
        TeacherCheck().test(world.small, [], texts, answers),
    ):
        assert verdict.passed
        assert "and at least 50 of each are needed" in verdict.reason
        assert math.isnan(verdict.lower_bound)
    with pytest.raises(DataError, match="Expected one answer of the large model for each held-out text"):
        TeacherCheck().test(world.small, calls, texts, answers[:5])


def test_teacher_check_no_common_stratum_passes_without_comparison() -> None:
    """Logged inputs have a confidence of 0.2 or 0.9, and held-out ones of 0.4, so no stratum has both."""
    world = World(200, 5)
    for i in range(200):
        top = (0.2 if i < 50 else 0.9) if i < 100 else 0.4
        world.p[i] = (1.0 - top) / (K - 1)
        world.p[i, 0] = top
    calls = [call(input=str(i), probabilities=tuple(world.p[i].tolist()), answer_label=LABELS[0]) for i in range(100)]
    verdict = TeacherCheck().test(world.small, calls, *world.held_out(range(100, 200)))
    assert verdict.passed
    assert "too few answers to compare" in verdict.reason


def test_continual_holdout_large_of_wrong_length_raises_data_error(tmp_path: Path) -> None:
    for holdout in (None, (["a", "b"], ["x", "y"])):
        with pytest.raises(DataError, match="Expected one answer in `holdout_large` for each text of `holdout`"):
            ContinualDistiller(tmp_path / "models", tmp_path / "c.db", holdout=holdout, holdout_large=["x"])


def test_gate_failed_teacher_check_rejects_with_reason() -> None:
    world = World(2000, 4)
    texts, labels = [str(i) for i in range(2000)], [LABELS[i] for i in world.truth]
    held = world.held_out(range(1000, 2000))
    good = TeacherCheck().test(world.small, world.calls(range(1000)), *held)
    bad = TeacherCheck().test(world.small, world.calls(range(1000), flipped=0.3), *held)
    gate = PromotionGate()
    assert gate.test(world.small, world.small, texts, labels, teacher=good).passed
    verdict = gate.test(world.small, world.small, texts, labels, teacher=bad)
    assert not verdict.passed
    assert "answers surprise the small model" in verdict.reason
    assert "the large model, its prompt or the log has changed" in verdict.reason
    assert verdict.teacher == bad


@pytest.fixture(scope="module")
def shop(shop_messages: Any) -> tuple[EmbeddingClassifier, list[str], list[str]]:
    """S1 trained on few examples, and texts and labels that it was not trained on."""
    texts, labels = shop_messages
    order = np.random.default_rng(0).permutation(len(texts)).tolist()
    few, rest = order[:24], order[24:]
    quiet = TrainingSettings(progress=False)
    s1 = EmbeddingClassifier.train([texts[i] for i in few], [labels[i] for i in few], settings=quiet)
    return s1, [texts[i] for i in rest], [labels[i] for i in rest]


@pytest.mark.parametrize("flipped", [False, True])
def test_continual_round_applies_teacher_check(shop: Any, tmp_path: Path, flipped: bool) -> None:
    s1, texts, labels = shop
    registry, url, half = ModelRegistry(tmp_path / "models"), str(tmp_path / "c.db"), len(texts) // 2
    registry.promote(registry.add(s1))
    assert registry.in_service_since() == 0.0, "calls of the first version may be older than the registry"
    wrong = dict(zip(sorted(set(labels)), sorted(set(labels))[1:] + sorted(set(labels))[:1], strict=True))
    with CallLog(url) as store:
        store.append(
            [
                CallRecord(
                    input=text, labels=s1.labels, probabilities=tuple(p.probabilities.tolist()), threshold=1.1,
                    large_model="m", answer_label=wrong[label] if flipped else label,
                )
                for text, label, p in zip(texts[:half], labels[:half], s1.predict_batch(texts[:half]), strict=True)
            ]
        )  # fmt: skip
    generous = PromotionGate(margin=0.9, proficient_margin=0.9, label_margin=1.0)
    continual = ContinualDistiller(
        registry, url, every=1, gate=generous, holdout=(texts[half:], labels[half:]), holdout_large=labels[half:],
        teacher_check=TeacherCheck(min_examples=20),
        settings=DistillationSettings(training=TrainingSettings(progress=False)),
    )  # fmt: skip
    found = continual.step()
    assert found is not None
    version, verdict = found
    assert verdict.teacher is not None
    assert verdict.teacher.taught == half
    assert verdict.passed is not flipped
    told = registry.version(version)
    assert told.status == ("rejected" if flipped else "promoted")
    assert ("surprise" in told.reason) is flipped
    assert told.metrics["teacher"]["passed"] is not flipped
    if not flipped:
        assert registry.in_service_since() == told.created
        again = continual.step()
        assert again is not None
        assert again[1].teacher is not None
        assert again[1].teacher.taught == 0, "answers that trained the version must not be used to check it"
        kept = json.loads((registry.folder / "versions" / "0003.json").read_text())["metrics"]["teacher"]
        assert kept["lower_bound"] is None
