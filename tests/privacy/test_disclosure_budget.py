"""Limits on disclosed data per request, per subject and in total, in one process and across processes."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from langchain_datashunt import AlwaysLarge, ShuntRunnable
from langchain_datashunt.call_log import CallLog, SharedLedger
from langchain_datashunt.call_log.schema import controls
from langchain_datashunt.exceptions import ConfigurationError, LocalOnlyError, StoreError
from langchain_datashunt.privacy import Disclosure, DisclosureBudget, LocalLedger, Placeholders, PrivacyGuard
from tests.call_log.test_store import url  # noqa: F401  # a fixture
from tests.support.models import WordModel

MAIL = "jane@example.com"


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def shunt(budget: DisclosureBudget, asked: list[Any], **guard: Any) -> ShuntRunnable:
    def large(mapping: Any) -> str:
        asked.append(mapping["input"])
        return "large"

    return ShuntRunnable(
        small=WordModel(), large=large, policy=AlwaysLarge(), pruning=None, return_decision=True,
        guard=PrivacyGuard(budget=budget, **guard),
    )  # fmt: skip


def about(subject: str) -> Any:
    return {"configurable": {"shunt_subject": subject}}


@pytest.fixture(params=["here", "shared"])
def ledger(request: pytest.FixtureRequest, url: str) -> Any:  # noqa: F811
    if request.param == "here":
        return LocalLedger()
    return SharedLedger(CallLog(url))


def test_disclosure_budget_input_above_limit_stays_local(ledger: Any) -> None:
    clock, asked = Clock(), []  # type: ignore[var-annotated]
    budget = DisclosureBudget(request_characters=40, subject_calls=2, calls=4, ledger=ledger, clock=clock)
    chain = shunt(budget, asked)
    routes = [
        chain.invoke({"input": "refund " + "x" * 60}).reason,  # too long, so it is not counted
        *(chain.invoke({"input": f"refund {i}"}, about("jane")).reason for i in range(3)),
        chain.invoke({"input": "refund 3"}, about("joe")).reason,
        chain.invoke({"input": "refund 4"}).reason,
        chain.invoke({"input": "refund 5"}, about("joe")).reason,
    ]
    sent, stays = "deferred", "local_only"
    assert routes == [stays, sent, sent, stays, sent, sent, stays]
    assert asked == ["refund 0", "refund 1", "refund 3", "refund 4"]
    last = chain.invoke({"input": "refund 6"})
    assert (last.output, last.reason) == ("refund", stays)
    assert "'calls' of the budget 'default'" in str(last.decision.error)
    clock.now += 86_400.0
    assert chain.invoke({"input": "refund 7"}, about("jane")).reason == sent, "a new period"


def test_disclosure_budget_counts_unreplaced_entities(ledger: Any) -> None:
    asked: list[Any] = []
    budget = DisclosureBudget(request_entities=1, subject_entities=2, ledger=ledger)
    chain = shunt(budget, asked, redact={"IP"})
    two = chain.invoke({"input": f"status {MAIL} joe@example.com"}, about("jane"))
    assert (two.reason, two.output) == ("local_only", "status")
    for i in range(3):
        found = chain.invoke({"input": f"status {i} {MAIL} from 192.168.0.1"}, about("jane"))
        assert found.reason == ("deferred" if i < 2 else "local_only")
    assert asked == [f"status {i} {MAIL} from <IP_1>" for i in range(2)]


def test_ledger_trail_has_counts_and_hashes_but_no_text(ledger: Any) -> None:
    asked: list[Any] = []
    chain = shunt(DisclosureBudget(calls=1, ledger=ledger), asked)
    for text in (f"refund {MAIL}", f"refund {MAIL}"):
        chain.invoke({"input": text}, about("jane"))
    trail: list[Disclosure] = list(ledger.trail if isinstance(ledger, LocalLedger) else ledger.trail())
    assert [line.refused for line in trail] == ["", "calls"]
    assert trail[0].digest == trail[1].digest
    assert trail[0].characters == len("refund <EMAIL_1>") + len("input")
    assert dict(trail[0].replaced) == {"EMAIL": 1}
    assert trail[0].subject is not None
    assert "jane" not in repr(trail)
    if isinstance(ledger, SharedLedger):
        assert ledger.summary() == {"sent": 1, "refused": 1, "characters": trail[0].characters}
        assert ledger.prune(trail[1].time + 1e9) == 2
        with ledger.store.connection() as connection:
            assert connection.execute(controls.select()).all() == []
        assert list(ledger.trail()) == []


def test_shared_ledger_prune_keeps_amounts_of_running_periods(url: str) -> None:  # noqa: F811
    """Prune budgets with periods of a day and a week, and one that is not in the mapping."""
    clock, day = Clock(), 86_400.0
    seconds = {"daily": day, "weekly": 7 * day, "other": day}
    with CallLog(url) as store:
        ledger = SharedLedger(store)
        budgets = [
            DisclosureBudget(calls=1, name=name, period_seconds=length, ledger=ledger, clock=clock)
            for name, length in seconds.items()
        ]
        for budget in budgets:
            shunt(budget, []).invoke({"input": "refund"}, about("jane"))
        clock.now = 2.0 * day + (clock.now // day) * day  # two days later, in the same week
        assert ledger.prune(clock.now, period_seconds={"daily": day, "weekly": 7 * day}) == 3
        with store.connection() as connection:
            left = {row.name.split(":")[1] for row in connection.execute(controls.select())}
        assert left == {"weekly", "other"}
        ledger.prune(clock.now)
        with store.connection() as connection:
            left = {row.name.split(":")[1] for row in connection.execute(controls.select())}
        assert left == set(), "one period length for all budgets"


def test_disclosure_budget_many_threads_stay_within_limit(ledger: Any) -> None:
    asked: list[Any] = []
    chains = [shunt(DisclosureBudget(calls=25, ledger=ledger), asked) for _ in range(4)]
    if isinstance(ledger, SharedLedger):  # separate connections, as in other processes
        others = [SharedLedger(CallLog(ledger.store.url.render_as_string(hide_password=False))) for _ in range(4)]
        chains = [shunt(DisclosureBudget(calls=25, ledger=other), asked) for other in others]

    def work(chain: ShuntRunnable) -> None:
        for i in range(15):
            chain.invoke({"input": f"refund {i}"})

    threads = [threading.Thread(target=work, args=(chain,)) for chain in chains]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == 25


def test_disclosure_budget_counts_batches_and_streams(ledger: Any) -> None:
    asked: list[Any] = []
    chain = shunt(DisclosureBudget(calls=3, ledger=ledger), asked)
    found = chain.batch([{"input": f"refund {i}"} for i in range(5)])
    assert sorted(one.reason for one in found) == ["deferred"] * 3 + ["local_only"] * 2
    assert list(chain.stream({"input": "refund"}))[-1].reason == "local_only"
    assert len(asked) == 3


def test_disclosure_budget_unavailable_ledger_keeps_input_local() -> None:
    class Away(LocalLedger):
        def spend(self, amounts: Any) -> Any:
            raise StoreError("the database is unavailable")

    class Full(LocalLedger):
        def note(self, entry: Any) -> None:
            raise OSError("no space")

    for ledger, words in ((Away(), "cannot be counted"), (Full(), "cannot be logged")):
        asked: list[Any] = []
        found = shunt(DisclosureBudget(calls=5, ledger=ledger), asked).invoke({"input": "refund"})
        assert (found.reason, asked) == ("local_only", [])
        assert words in str(found.decision.error)


def test_disclosure_budget_invalid_settings_raise() -> None:
    with pytest.raises(ConfigurationError, match="at least one limit"):
        DisclosureBudget()
    with pytest.raises(ConfigurationError, match="Expected a `ledger`"):
        DisclosureBudget(calls=1, ledger=3)
    with pytest.raises(ConfigurationError, match="name"):
        DisclosureBudget(calls=1, name="a:b")
    with pytest.raises(LocalOnlyError, match="'request_characters'"):
        PrivacyGuard(budget=DisclosureBudget(request_characters=3)).outbound("hello")
    PrivacyGuard(budget=DisclosureBudget(request_characters=5)).outbound("hello")


def test_local_ledger_cleanup_keeps_budgets_with_longer_periods() -> None:
    now, ledger = [0.0], LocalLedger()
    ledger._room = 500
    day = DisclosureBudget(name="day", calls=3, ledger=ledger, clock=lambda: now[0])
    minute = DisclosureBudget(name="minute", subject_calls=5, period_seconds=60.0, ledger=ledger, clock=lambda: now[0])
    left = Placeholders(())
    left.redact("text")
    for _ in range(3):
        day.spend(left, None)
    for i in range(1000):
        now[0] = float(i)
        minute.spend(left, f"person {i}")
    with pytest.raises(LocalOnlyError, match="'calls' of the budget 'day'"):
        day.spend(left, None)
    assert len(ledger._spent) < 1000
