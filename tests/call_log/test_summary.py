"""Tests of call log summaries and of budgets for stored answers and disclosure, on real databases."""

from __future__ import annotations

import json
import pickle
from typing import Any
from uuid import uuid4

import pytest
from typer.testing import CliRunner

from langchain_datashunt import AlwaysLarge, ShuntRunnable
from langchain_datashunt.call_log import (
    CallFilter,
    CallLog,
    OutputBudget,
    Recorder,
    RedactionRules,
    SharedLedger,
    summarize,
)
from langchain_datashunt.cli.app import app
from langchain_datashunt.exceptions import ConfigurationError, StoreError
from langchain_datashunt.privacy import DisclosureBudget, LocalLedger, PrivacyGuard
from tests.call_log.test_store import call, url  # noqa: F401  # a fixture
from tests.support.models import WordModel

DAY = 86_400.0
MAIL = "jane@example.com"


@pytest.fixture
def store(url: str) -> Any:  # noqa: F811
    with CallLog(url) as opened:
        yield opened


def filled(store: CallLog) -> None:
    monday = 4 * DAY  # the first Monday of 1970
    asked = [
        call(i, time=monday + 1.7 + i * DAY / 2, answer_label=label, gold=gold)
        for i, (label, gold) in enumerate([("refund", "refund"), ("cancel", "status"), ("cancel", None)])
    ]
    kept: dict[str, Any] = {
        "route": "small",
        "reason": "confident",
        "large_model": "",
        "answer_label": None,
        "cost_usd": None,
        "weight": 2.0,
    }
    store.append([*asked, call(7, time=monday + 2, gold="cancel", **kept), call(8, time=monday + 9 * DAY, **kept)])
    store.append([asked[2].model_copy(update={"id": str(uuid4())})])


def test_summarize_by_period_returns_cost_and_quality(store: CallLog) -> None:
    filled(store)
    first, second, last = summarize(store)
    assert [row.start / DAY for row in (first, second, last)] == [4, 5, 13]
    assert (first.calls, first.deferral_rate) == (4.0, 0.5)
    assert first.cost_usd == pytest.approx(0.02)
    assert first.usd_per_1000 == pytest.approx(5.0)
    assert first.all_large_usd_per_1000 == pytest.approx(10.0)
    assert (first.agreement, first.labelled) == (0.5, 3)
    assert first.accuracy == pytest.approx(2 / 3), "the large model is right on refund, the small one on cancel"
    assert (first.small_accuracy, first.large_accuracy) == (pytest.approx(1 / 3), 0.5)
    assert (second.calls, second.deferral_rate, second.labelled) == (2.0, 1.0, 0), "repeats are counted"
    assert (last.deferral_rate, last.usd_per_1000, last.all_large_usd_per_1000) == (0.0, 0.0, None)
    weeks = summarize(store, by="week")
    assert [(row.start / DAY, row.calls) for row in weeks] == [(4, 6.0), (11, 2.0)]
    (everything,) = summarize(store, by="all")
    assert (everything.calls, everything.start) == (8.0, 4 * DAY + 1.7)
    assert summarize(store, which=CallFilter(until=4 * DAY)) == []


def test_summarize_scales_up_only_sampled_calls(store: CallLog) -> None:
    """Audits, inputs that must stay local, and failed large calls are always recorded."""
    nothing: dict[str, Any] = {"answer_label": None, "answer": None, "cost_usd": None, "large_model": "", "time": 10.0}
    kept: dict[str, Any] = {**nothing, "route": "small", "reason": "confident"}
    store.append(
        [
            *(call(i, **kept, weight=10.0) for i in range(10)),
            *(call(100 + i, **{**kept, "large_model": "gpt-4", "cost_usd": 0.5, "audit": True}) for i in range(4)),
            *(call(200 + i, time=10.0) for i in range(6)),
            *(call(300 + i, **{**nothing, "route": "small", "reason": "local_only"}) for i in range(3)),
            *(call(400 + i, **{**nothing, "route": "small", "reason": "large_error"}) for i in range(1)),
        ]
    )
    (row,) = summarize(store)
    assert row.calls == 10 / 0.1 + 6 + 3 + 1
    assert row.deferral_rate == pytest.approx(7 / 110)
    assert row.cost_usd == pytest.approx(4 * 0.5 + 6 * 0.01)
    assert row.all_large_usd_per_1000 == pytest.approx(1000 * 0.06 / 7)


def test_recorder_sampling_rate_is_stored_with_records(tmp_path: Any) -> None:
    with CallLog(tmp_path / "c.db") as opened:
        with Recorder(opened, sample_small=0.25, seed=1) as recorder:
            shunt = ShuntRunnable(small=WordModel(), large=lambda asked: "refund", recorder=recorder, deduplicate=False)
            shunt.batch(["surely refund"] * 400 + ["refund"] * 20)
        (row,) = summarize(opened, by="all")
        assert row.calls == pytest.approx(420, abs=60)
        assert row.calls == 4 * (opened.count() - 20) + 20


def test_summarize_includes_audit_trail_of_guard(store: CallLog) -> None:
    ledger = SharedLedger(store)
    guard = PrivacyGuard(budget=DisclosureBudget(calls=2, ledger=ledger), redact=frozenset({"EMAIL"}))
    with Recorder(store, sample_small=1.0) as recorder:
        shunt = ShuntRunnable(
            small=WordModel(), large=lambda asked: "refund", policy=AlwaysLarge(), pruning=None, guard=guard,
            recorder=recorder,
        )  # fmt: skip
        for i in range(4):
            shunt.invoke({"input": f"refund {i} {MAIL} from 192.168.0.{i}"})
    (row,) = summarize(store)
    assert (row.calls, row.sent, row.refused) == (4.0, 2, 2)
    assert (row.replaced, row.plain) == ({"EMAIL": 2}, {"IP": 2})
    assert row.characters > 2 * len("refund 0 <EMAIL_1> from 192.168.0.0")
    assert row.deferral_rate == 0.5


def test_log_summary_command_prints_table_or_json(store: CallLog, url: str) -> None:  # noqa: F811
    filled(store)
    runner = CliRunner()
    shown = runner.invoke(app, ["log", "summary", "--store", url, "--by", "week"])
    assert shown.exit_code == 0
    assert "1970-01-05" in shown.stdout
    assert "66.7% of 3" in shown.stdout
    found = runner.invoke(app, ["log", "summary", "--store", url, "--json", "--since", "1970-01-06"])
    assert [row["calls"] for row in json.loads(found.stdout)] == [2.0, 2.0]
    wrong = runner.invoke(app, ["log", "summary", "--store", url, "--by", "hour"])
    assert wrong.exit_code == 2
    assert "got 'hour'" in wrong.stderr


@pytest.fixture(params=["here", "shared"])
def ledger(request: pytest.FixtureRequest, url: str) -> Any:  # noqa: F811
    return LocalLedger() if request.param == "here" else SharedLedger(CallLog(url))


def test_output_budget_limits_stored_answers(store: CallLog, ledger: Any) -> None:
    keep = RedactionRules(outputs=OutputBudget(outputs=3, subject_outputs=2, ledger=ledger, name="stored"))
    with Recorder(store, sample_small=1.0, keep=keep) as recorder:
        shunt = ShuntRunnable(
            small=WordModel(), large=lambda asked: "refund", policy=AlwaysLarge(), pruning=None, recorder=recorder
        )
        for i, who in enumerate(["jane", "jane", "jane", "joe", "joe"]):
            shunt.invoke({"input": f"refund {i}"}, {"configurable": {"shunt_subject": who}})
    records = sorted((one for part in store.iterate() for one in part), key=lambda one: one.input)
    assert [one.answer for one in records] == ["refund", "refund", None, "refund", None]
    assert [one.route for one in records] == ["large"] * 5, "the calls themselves are still recorded"
    assert [one.answer_label for one in records if one.answer is None] == [None, None]


def test_output_budget_failing_ledger_stores_no_answer(store: CallLog, caplog: Any) -> None:
    class Away(LocalLedger):
        def spend(self, amounts: Any) -> Any:
            raise StoreError("the database cannot be reached")

    kept = RedactionRules(outputs=OutputBudget(outputs=5, ledger=Away()))(call(1))
    assert (kept.answer, kept.answer_label) == (None, None)
    assert "output budget cannot be updated" in caplog.text
    with pytest.raises(ConfigurationError, match="at least one limit"):
        OutputBudget()


def test_local_ledger_full_drops_only_other_periods(monkeypatch: Any) -> None:
    ledger = LocalLedger()
    ledger._room = 10
    now = 0.0
    budget = DisclosureBudget(subject_calls=1, ledger=ledger, clock=lambda: now)
    for who in range(30):
        assert budget.above({"calls": 1}, bytes([who])) == ""
    assert budget.above({"calls": 1}, bytes([0])) == "subject_calls", "amounts of the current period are kept"
    now, ledger._room = 86_400.0, 10
    assert budget.above({"calls": 1}, bytes([0])) == ""
    assert len(ledger._spent) == 1


def test_budgets_and_redaction_rules_can_be_pickled(tmp_path: Any) -> None:
    keep = RedactionRules(outputs=OutputBudget(outputs=3))
    assert pickle.loads(pickle.dumps(keep)).outputs.outputs == 3
    assert pickle.loads(pickle.dumps(DisclosureBudget(calls=1))).calls == 1
    with Recorder(tmp_path / "calls.db", keep=keep) as recorder:
        pickle.loads(pickle.dumps(recorder)).close()


def test_disclosure_budget_usd_limits_are_enforced() -> None:
    ledger, asked = LocalLedger(), []  # type: ignore[var-annotated]
    budget = DisclosureBudget(usd=0.05, subject_usd=0.02, usd_per_call=0.01, ledger=ledger)
    shunt = ShuntRunnable(
        small=WordModel(), large=lambda mapping: asked.append(mapping["input"]) or "refund", policy=AlwaysLarge(),
        pruning=None, return_decision=True, guard=PrivacyGuard(budget=budget),
    )  # fmt: skip
    whose = ["jane", "jane", "jane", "joe", "joe", "ann", "bob"]
    reasons = [
        shunt.invoke({"input": f"refund {i}"}, {"configurable": {"shunt_subject": who}}).reason
        for i, who in enumerate(whose)
    ]
    sent, stays = "deferred", "local_only"
    assert reasons == [sent, sent, stays, sent, sent, sent, stays]
    by_length = PrivacyGuard(budget=DisclosureBudget(usd=0.01, usd_per_1000_characters=0.1, ledger=LocalLedger()))
    by_length.outbound("x" * 90)
    with pytest.raises(Exception, match="limit 'usd'"):
        by_length.outbound("x" * 20)
    by_length.outbound("x" * 9)
    exact = PrivacyGuard(budget=DisclosureBudget(usd=0.3, usd_per_call=0.1, ledger=LocalLedger()))
    for _ in range(3):
        exact.outbound("three times a tenth is three tenths")
    with pytest.raises(Exception, match="limit 'usd'"):
        exact.outbound("x")
    with pytest.raises(ConfigurationError, match="requires a cost estimate"):
        DisclosureBudget(usd=1.0)


def test_summarize_failed_call_is_not_labelled(store: CallLog) -> None:
    lost: dict[str, Any] = {
        "route": "large",
        "reason": "large_error",
        "answer_label": None,
        "large_model": "",
        "time": 10.0,
    }
    store.append([call(i, gold="refund", **lost) for i in range(3)])
    (row,) = summarize(store, by="all")
    assert (row.labelled, row.accuracy) == (0, None)
