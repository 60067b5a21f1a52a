"""Budgets under drift, monitors, background audits and shadow mode."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableLambda

from langchain_datashunt import (
    AlwaysSmall,
    CostBudget,
    DeferralBudget,
    Prediction,
    ShuntRunnable,
    SoftPruning,
    Threshold,
)
from langchain_datashunt.call_log import CallFilter, CallLog, CallRecord, Recorder, SharedThreshold
from langchain_datashunt.evaluation.monitor import Alarm, Monitor
from langchain_datashunt.exceptions import ConfigurationError, StoreError
from langchain_datashunt.policies.budgets import LocalControl
from langchain_datashunt.prediction import PredictionBatch
from langchain_datashunt.privacy import DisclosureBudget, PrivacyGuard
from tests.support.models import WordModel

NAMES = ("a", "b")


def traffic(n: int, seed: int, easy: float) -> PredictionBatch:
    """Return `n` predictions with confidences in [0.5, 1], higher for larger `easy`."""
    rng = np.random.default_rng(seed)
    p = 0.5 + 0.5 * rng.beta(easy, 1.0, n)
    return PredictionBatch.from_arrays(NAMES, np.column_stack([p, 1 - p]))


def decided(policy: Any, batch: PredictionBatch) -> Any:
    """Return which predictions are answered locally, and report the result to the policy, like a shunt."""
    verdict = policy.evaluate(batch)
    policy.observe(int((~verdict.keep).sum()), len(batch))
    return verdict.keep


# Budgets


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.9, 1.0])
def test_deferral_budget_holds_rate_under_drift(share: float) -> None:
    policy = DeferralBudget(rate=share)
    asked = [~decided(policy, traffic(50, day, easy)) for day, easy in enumerate(np.linspace(0.3, 8.0, 120))]
    assert np.concatenate(asked).mean() == pytest.approx(share, abs=0.02)
    assert np.concatenate(asked[-20:]).mean() == pytest.approx(share, abs=0.06)


def test_deferral_budget_holds_rate_for_single_calls_after_jumps() -> None:
    policy = DeferralBudget(rate=0.2, gain=0.05)
    asked = []
    for day, easy in enumerate((6.0, 0.2, 6.0)):
        for prediction in traffic(800, day, easy):
            asked.append(not policy.evaluate(prediction.as_batch()).keep[0])
            policy.observe(asked[-1], 1)
    assert np.mean(asked) == pytest.approx(0.2, abs=0.03)


def test_deferral_budget_call_threshold_overrides_own() -> None:
    policy, batch = DeferralBudget(rate=0.5), traffic(64, 0, 1.0)
    verdict = policy.evaluate(batch, np.where(np.arange(64) < 2, 0.0, np.nan))
    assert verdict.keep[:2].all()
    assert (verdict.threshold[:2] == 0.0).all()


def test_cost_budget_holds_rate_and_limits_burst_after_pause() -> None:
    now = [0.0]
    policy = CostBudget(usd_per_hour=3.6, usd_per_call=0.01, clock=lambda: now[0])  # one call per ten seconds
    asked = 0
    for i in range(2000):
        now[0] += 1.0
        asked += int((~decided(policy, traffic(1, i, 0.5 if i < 1000 else 3.0))).sum())
    assert asked == pytest.approx(200, rel=0.15)
    now[0] += 1e6
    burst = sum(int((~decided(policy, traffic(1, i, 0.5))).sum()) for i in range(300))
    assert burst < 120, "a long pause must not allow a flood of calls"


def test_deferral_budget_shared_by_threads_holds_rate() -> None:
    policy, asked = DeferralBudget(rate=0.25), []

    def work(seed: int) -> None:
        for i in range(60):
            asked.append((~decided(policy, traffic(20, 100 * seed + i, 1.0))).mean())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.mean(asked) == pytest.approx(0.25, abs=0.03)


def test_shared_threshold_is_shared_through_store_without_lost_updates(tmp_path: Path) -> None:
    url = tmp_path / "calls.db"
    one, two = (DeferralBudget(rate=0.3, control=SharedThreshold(url, "support")) for _ in range(2))
    for i in range(150):
        for policy in (one, two):
            decided(policy, traffic(10, i, 1.0))
    assert one.current == two.current != 0.9
    copied = pickle.loads(pickle.dumps(SharedThreshold(url, "support", retry_seconds=0.5)))
    assert copied.get(0.9) == one.current
    assert copied.retry_seconds == 0.5
    assert SharedThreshold(url, "other").get(0.4) == 0.4
    before = one.current
    threads = [
        threading.Thread(target=lambda: [SharedThreshold(url, "support").add(0.9, 0.001) for _ in range(20)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert one.current == pytest.approx(before + 0.08), "no update may be lost"


class CutStore(CallLog):
    """Call log whose database can be made unavailable."""

    away = False
    asked = 0

    @contextmanager
    def connection(self) -> Any:
        self.ask()
        with super().connection() as connection:
            yield connection

    @contextmanager
    def reading(self) -> Any:
        self.ask()
        with super().reading() as connection:
            yield connection

    def ask(self) -> None:
        self.asked += 1
        if self.away:
            raise StoreError("the database is away")


def test_shared_threshold_works_locally_while_database_is_down(tmp_path: Path, caplog: Any) -> None:
    store, other = CutStore(tmp_path / "c.db"), SharedThreshold(tmp_path / "c.db", "support")
    control = SharedThreshold(store, "support", retry_seconds=0.2)
    control.add(0.5, 0.1)
    store.away, store.asked = True, 0
    policy = DeferralBudget(rate=0.3, start=0.5, control=control)
    shunt = ShuntRunnable(small=WordModel(), large=lambda asked: "large", policy=policy)
    assert len(shunt.batch(["x"] * 5)) == 5
    moved = control.get(0.5) - 0.6
    assert moved != 0
    assert store.asked == 1, "an unavailable database must not be queried by every call"
    assert "until the database can be reached again" in caplog.text
    other.add(0.5, 0.05)
    store.away = False
    time.sleep(0.3)
    assert control.get(0.5) == pytest.approx(0.65 + moved)
    assert other.get(0.5) == pytest.approx(0.65 + moved)


def test_call_log_open_read_does_not_block_write(tmp_path: Path) -> None:
    with CallLog(tmp_path / "c.db") as reader, CallLog(tmp_path / "c.db") as writer:
        with reader.reading() as connection:
            connection.exec_driver_sql("SELECT count(*) FROM calls").scalar()
            started = time.monotonic()
            writer.append([CallRecord(input="x", large_model="m")])
            assert time.monotonic() - started < 10
        assert reader.count() == 1


def test_deferral_budget_evaluate_alone_keeps_threshold() -> None:
    policy = DeferralBudget(rate=0.1)
    policy.evaluate(traffic(500, 0, 0.5))
    assert policy.current == 0.9


@pytest.mark.parametrize("student", [False, True])
def test_shunt_deferral_budget_holds_rate_with_and_without_student(student: bool) -> None:
    def guess(text: str) -> Prediction:
        p = 0.5 + 0.5 * np.random.default_rng(int(text)).beta(2.0, 1.0)
        return Prediction.from_probabilities({"a": p, "b": 1 - p})

    policy = DeferralBudget(rate=0.2)
    shunt = ShuntRunnable(
        small=guess, student=guess if student else None, large=lambda _: "b", pruning=None, policy=policy,
        return_decision=True,
    )  # fmt: skip
    routes = [result.route for i in range(0, 1500, 30) for result in shunt.batch([str(j) for j in range(i, i + 30)])]
    routes += [shunt.invoke(str(i)).route for i in range(200)]
    assert np.mean([route == "large" for route in routes]) == pytest.approx(0.2, abs=0.04)


def test_budget_copy_and_pickle_keep_threshold() -> None:
    for policy in (DeferralBudget(rate=0.2), CostBudget(usd_per_hour=1.0, usd_per_call=0.01)):
        decided(policy, traffic(300, 0, 1.0))
        for again in (pickle.loads(pickle.dumps(policy)), copy.deepcopy(policy)):
            assert again.current == policy.current
            decided(again, traffic(300, 1, 0.2))
    shunt = ShuntRunnable(small=WordModel(), large=lambda _: "x", pruning=None, policy=DeferralBudget(rate=0.2))
    assert copy.deepcopy(shunt).policy == shunt.policy


def test_bundle_save_with_budget_policy_raises(tmp_path: Path) -> None:
    from langchain_datashunt.small_models import TextCNN, TrainingSettings

    small = TextCNN.train(["a b", "c d"] * 4, ["x", "y"] * 4, settings=TrainingSettings(epochs=1, progress=False))
    small.policy = DeferralBudget(rate=0.2)
    with pytest.raises(ConfigurationError, match="Unknown class 'DeferralBudget'"):
        small.save(tmp_path / "bundle")


def test_audit_reads_answer_of_nested_shunt() -> None:
    monitor = Monitor()
    inner = ShuntRunnable(small=WordModel(), large=lambda _: "refund", pruning=None, policy=AlwaysSmall())
    shunt = ShuntRunnable(
        small=WordModel(), large=inner, pruning=None, policy=AlwaysSmall(), audit_rate=1.0, monitor=monitor,
        return_decision=True,
    )  # fmt: skip
    shunt.batch(["surely cancel it"] * 5)
    assert shunt.auditor is not None and shunt.auditor.flush()
    assert monitor.report()["disagreement"]["mean"] == 0.0


def test_audit_prompt_lists_labels_and_errors_do_not_fail_call() -> None:
    def known(text: Any) -> Prediction:
        return Prediction.from_probabilities({"refund": 0.9, "status": 0.1})

    large = Asked()
    shunt = ShuntRunnable(small=known, large=large, policy=AlwaysSmall(), audit_rate=1.0)
    assert shunt.invoke("hello") == "refund"
    assert shunt.invoke([AIMessage("no human said this")]) == "refund"
    assert shunt.auditor is not None and shunt.auditor.flush()
    assert [tuple(value["candidates"]) for value in large.seen] == [("refund", "status")]
    assert shunt.auditor.counters.failed == 1


def test_local_control_starts_at_first_given_value() -> None:
    control = LocalControl()
    assert control.get(0.7) == 0.7
    assert control.add(0.7, 0.1) == pytest.approx(0.8)
    assert control.get(0.1) == pytest.approx(0.8)


# Monitor


def test_monitor_error_above_bound_raises_one_alarm() -> None:
    alarms: list[Alarm] = []
    monitor, rng = Monitor(max_error=0.05, on_alarm=alarms.append), np.random.default_rng(0)
    for wrong in rng.random(600) < 0.25:
        monitor.audited("a", "b" if wrong else "a")
    assert [alarm.kind for alarm in alarms] == ["error"]
    assert "at most 5% is acceptable" in alarms[0].message
    assert monitor.alarmed
    low, high = monitor.disagreement.interval
    assert low <= 0.25 <= high
    assert monitor.report()["disagreement"]["n"] == 600
    monitor.reset()
    assert not monitor.alarmed
    assert monitor.report()["disagreement"]["mean"] is None


def test_monitor_false_alarm_rate_matches_level() -> None:
    rng, alarmed = np.random.default_rng(1), 0
    for _ in range(100):
        monitor = Monitor(max_error=0.1, level=0.9)
        for wrong in (rng.random(200) < 0.1).tolist():
            monitor.labelled("a", "b" if wrong else "a")
        alarmed += monitor.alarmed
    assert alarmed <= 10 + 9, "at most 1 in 10, plus three standard errors"


def test_monitor_detects_drift_once_and_ignores_stable_traffic() -> None:
    rng = np.random.default_rng(0)
    steady = Monitor(reference=rng.beta(5, 1, 2000), window=200)
    steady.saw(rng.beta(5, 1, 20_000))
    assert not steady.alarmed
    drifting = Monitor(window=200)
    drifting.saw(rng.beta(5, 1, 400))
    assert not drifting.alarmed
    drifting.saw(rng.beta(2, 1, 200))
    assert [alarm.kind for alarm in drifting.alarms] == ["drift"]
    drifting.saw(rng.beta(2, 1, 200))
    assert len(drifting.alarms) == 1


def test_monitor_failing_callback_is_logged_and_pickle_keeps_report(caplog: pytest.LogCaptureFixture) -> None:
    def fails(alarm: Alarm) -> None:
        raise RuntimeError("pager is off")

    monitor = Monitor(max_error=0.01, on_alarm=fails)
    for _ in range(100):
        monitor.audited("a", "b")
    assert monitor.alarmed
    assert "`on_alarm` callback failed" in caplog.text
    monitor.on_alarm = None
    assert pickle.loads(pickle.dumps(monitor)).report() == monitor.report()


@pytest.mark.parametrize("settings", [{"max_error": 0.0}, {"max_error": 2.0}, {"window": 5}])
def test_monitor_invalid_settings_raise(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        Monitor(**settings)


# Audits


class Asked:
    """Large model that answers "refund" and records its inputs."""

    def __init__(self, error: Exception | None = None, seconds: float = 0.0) -> None:
        self.seen: list[Any] = []
        self.error, self.seconds = error, seconds

    def __call__(self, value: Any) -> str:
        self.seen.append(value)
        time.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        return "refund"


def audited(large: Any, **settings: Any) -> ShuntRunnable:
    given = {"policy": AlwaysSmall(), "audit_rate": 1.0, "pruning": SoftPruning(), **settings}
    return ShuntRunnable(small=WordModel(), large=large, **given)


def test_audit_runs_in_background_and_is_logged(tmp_path: Path) -> None:
    large, monitor = Asked(seconds=0.2), Monitor()
    with Recorder(tmp_path / "calls.db", sample_small=1.0) as recorder:
        shunt = audited(large, monitor=monitor, recorder=recorder)
        started = time.perf_counter()
        assert shunt.batch(["surely cancel it", "surely refund it"]) == ["cancel", "refund"]
        assert shunt.invoke("surely refund me") == "refund"
        assert time.perf_counter() - started < 0.2, "the caller must not wait for audits"
        assert shunt.auditor is not None and shunt.auditor.flush()
    assert len(large.seen) == 3
    assert all(not value["candidate_probabilities"] for value in large.seen), (
        "audit prompts must not carry probabilities"
    )
    assert monitor.report()["disagreement"]["n"] == 3
    assert monitor.disagreement.mean == pytest.approx(1 / 3)
    with CallLog(tmp_path / "calls.db") as store:
        calls = [call for batch in store.iterate(CallFilter(route="small")) for call in batch]
    assert sorted(call.audit for call in calls) == [False] * 3 + [True] * 3
    assert all(call.answer_label == "refund" for call in calls if call.audit)


async def test_audit_does_not_block_event_loop() -> None:
    large = Asked(seconds=0.2)
    shunt = audited(large)
    started = time.perf_counter()
    assert await shunt.ainvoke("surely cancel it") == "cancel"
    assert time.perf_counter() - started < 0.15
    assert shunt.auditor is not None and shunt.auditor.flush()
    assert len(large.seen) == 1


def test_audit_samples_at_rate_and_failures_do_not_fail_calls(caplog: pytest.LogCaptureFixture) -> None:
    large = Asked(ValueError("down"))
    shunt = audited(large, audit_rate=0.2, monitor=(monitor := Monitor()))
    assert shunt.batch(["surely cancel it"] * 500) == ["cancel"] * 500
    assert shunt.auditor is not None and shunt.auditor.flush()
    counters = shunt.auditor.counters
    assert 60 <= counters.failed + counters.left_out <= 140
    assert "Audit failed: down" in caplog.text
    assert monitor.report()["disagreement"]["n"] == 0
    assert ShuntRunnable(small=WordModel(), large=large, pruning=None).auditor is None


def test_fail_safe_alarm_defers_every_input_until_reset() -> None:
    monitor = Monitor(max_error=0.05)
    shunt = audited(Asked(), monitor=monitor, fail_safe="large", audit_rate=0.0, return_decision=True)
    assert shunt.invoke("surely cancel it").route == "small"
    for _ in range(200):
        monitor.audited("a", "b")
    assert monitor.alarmed
    assert shunt.invoke("surely cancel it").route == "large"
    assert {result.route for result in shunt.batch(["surely cancel it"] * 3)} == {"large"}
    monitor.reset()
    assert shunt.invoke("surely cancel it").route == "small"
    with pytest.raises(ConfigurationError, match="requires a monitor"):
        audited(Asked(), fail_safe="large")


# Shadow mode


def test_shadow_mode_defers_all_and_logs_would_be_decisions(tmp_path: Path) -> None:
    large = Asked()
    with Recorder(tmp_path / "calls.db") as recorder:
        shunt = ShuntRunnable(
            small=WordModel(), large=large, policy=Threshold(0.8), shadow=True, return_decision=True, recorder=recorder
        )
        results = shunt.batch(["surely cancel it", "surely refund it", "status perhaps"])
    assert [result.output for result in results] == ["refund"] * 3
    assert len(large.seen) == 3
    would_keep = [result.decision.score >= result.decision.threshold for result in results]
    assert would_keep == [True, True, False]
    assert results[0].decision.policy.startswith("shadow of Threshold")
    with CallLog(tmp_path / "calls.db") as store:
        stats = store.stats()
    assert stats["would_be_kept"] == 2
    assert stats["would_be_kept_agreeing"] == 1
    assert stats["would_be_saved_usd"] == 0.0


@pytest.mark.parametrize("student", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_shadow_mode_budget_converges_to_same_threshold(student: bool, alone: bool) -> None:
    """Each input counts once, even if a more confident student is called for all of them."""

    def guess(text: str, more: float = 0.0) -> Prediction:
        p = min(0.999, 0.5 + 0.4 * np.random.default_rng(int(text)).beta(2.0, 1.0) + more)
        return Prediction.from_probabilities({"a": p, "b": 1 - p})

    final = []
    for shadow in (False, True):
        policy = DeferralBudget(rate=0.2)
        shunt = ShuntRunnable(
            small=guess, student=(lambda text: guess(text, 0.1)) if student else None, large=lambda _: "b",
            pruning=None, policy=policy, shadow=shadow, return_decision=True,
        )  # fmt: skip
        if alone:
            results = [shunt.invoke(str(i)) for i in range(700)]
        else:
            results = [r for i in range(0, 2000, 20) for r in shunt.batch([str(j) for j in range(i, i + 20)])]
        sure = [result.decision.score >= result.decision.threshold for result in results[-400:]]
        assert np.mean(sure) == pytest.approx(0.8, abs=0.06)
        final.append(policy.current)
    assert final[0] == pytest.approx(final[1], abs=0.02)


def test_deferral_budget_recovers_after_forced_deferrals() -> None:
    """Deferrals are forced if the small model is down, or if an alarm defers every input."""
    policy = DeferralBudget(rate=0.2)
    for day in range(40):
        decided(policy, traffic(32, day, 1.0))
    for _ in range(2000):
        policy.observe(1, 1)
    asked = [~decided(policy, traffic(1, 100 + i, 1.0)) for i in range(2000)]
    assert np.concatenate(asked).mean() == pytest.approx(0.2, abs=0.05)


def test_cost_budget_holds_rate_for_large_batches() -> None:
    now = [0.0]
    policy = CostBudget(usd_per_hour=1.0, usd_per_call=0.01, clock=lambda: now[0])
    asked = 0
    for minute in range(12 * 60):
        now[0] = 60.0 * minute
        asked += int((~decided(policy, traffic(2000, minute % 50, 1.0))).sum())
    assert 0.01 * asked < 1.3 * 12, "large batches must not multiply the cost"


def test_monitor_empty_or_nan_reference_raises() -> None:
    for reference in ([], [0.5, float("nan")]):
        with pytest.raises(ConfigurationError, match="for `reference`"):
            Monitor(reference=reference)


def test_audit_counts_towards_disclosure_budget_of_call_subject() -> None:
    large, guard = Asked(), PrivacyGuard(budget=DisclosureBudget(subject_calls=1), on_local="raise")
    shunt = audited(RunnableLambda(large), guard=guard)
    for i in range(4):
        shunt.invoke(f"surely refund {i}", {"configurable": {"shunt_subject": "jane"}})
    shunt.invoke("surely refund joe", {"configurable": {"shunt_subject": "joe"}})
    assert shunt.auditor is not None and shunt.auditor.flush()
    assert len(large.seen) == 2, "each subject may have only one call"
    assert shunt.auditor.counters.failed == 3
