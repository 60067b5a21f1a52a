"""Tests of Recorder and RecordingCallbackHandler on a real SQLite file and a real PostgreSQL server."""

# ruff: noqa: F811  (imported fixtures are also argument names)

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import pickle
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from langchain_core.language_models import FakeListChatModel
from langchain_core.prompts import ChatPromptTemplate
from sqlalchemy import text

from langchain_datashunt import ConfidenceRouterChain, HardPruning, NoPruning, ShuntRunnable, SoftPruning
from langchain_datashunt.call_log import CallLog, CallRecord, Recorder, RecordingCallbackHandler
from langchain_datashunt.call_log.spool import spool_of
from langchain_datashunt.exceptions import ConfigurationError, RecordRefusedError, StoreError
from tests.call_log.test_store import call, everything, url  # noqa: F401  # a fixture
from tests.support.faulty_server import FaultyServer
from tests.support.models import LABELS, CountingLarge, HttpError, WordModel


def test_recorder_unstorable_record_does_not_affect_others(tmp_path: Path, caplog: Any) -> None:
    with Recorder(tmp_path / "c.db", durability="record") as recorder:
        recorder.record([lambda: call(1, input="lone \ud800 surrogate"), lambda: call(2)])
        recorder.record([lambda: call(3, input_tokens=2**70), lambda: call(4)])
        assert recorder.flush(10)
        assert (recorder.counters.written, recorder.counters.failed) == (3, 1)
    assert "The database rejected the record" in caplog.text
    with CallLog(tmp_path / "c.db") as store:
        assert [one.input for one in everything(store)] == ["lone \ufffd surrogate", "question 2", "question 4"]


def test_recorder_rejected_record_does_not_suspend_database(url: str, tmp_path: Path, caplog: Any) -> None:
    """The other records of the group and of the spool are written. The rejected ones are logged and counted."""
    with CallLog(url) as store:
        store.append([call(0, id=(taken := str(uuid4())))])
    poison = call(50, id=taken)
    with CallLog(tmp_path / "spool.db") as spool:
        spool.append([*(call(i) for i in range(100, 120)), poison, *(call(i) for i in range(120, 140))])
    makers = [lambda i=i: call(i) for i in range(1, 40)]  # type: ignore[misc]
    with Recorder(url, spool=tmp_path / "spool.db", retry_seconds=0.1) as recorder:
        recorder.record([*makers, lambda: call(60, id=taken)])
        recorder.flush()
        deadline = time.monotonic() + 20
        while recorder.counters.drained < 40 and time.monotonic() < deadline:
            time.sleep(0.05)
        counters = recorder.counters
        assert (counters.written, counters.spooled, counters.drained, counters.failed) == (39, 0, 40, 2)
        recorder.record([lambda: call(200)])
        recorder.flush()
        assert recorder.counters.written == 40
    assert caplog.text.count(f"rejected the record {taken}") == 2
    with CallLog(url) as store, CallLog(tmp_path / "spool.db") as spool:
        assert (store.count(), spool.count()) == (81, 0)
        with pytest.raises(RecordRefusedError):
            store.append([call(61, id=taken)])


def test_recorder_record_rejected_by_spool_does_not_affect_others(tmp_path: Path) -> None:
    store = AwayStore(tmp_path / "c.db")
    store.away = True
    with Recorder(store, spool=tmp_path / "spool.db", retry_seconds=60) as recorder:
        recorder.record([lambda: call(1), lambda: call(2, input_tokens=2**70), lambda: call(3)])
        recorder.flush()
        assert (recorder.counters.spooled, recorder.counters.failed) == (2, 1)


@pytest.mark.parametrize("damage", ["a record", "its pages", "the file"])
def test_recorder_damaged_spool_does_not_affect_other_records(
    url: str, tmp_path: Path, caplog: Any, damage: str
) -> None:
    """Readable records are drained, unreadable ones stay in the spool, and new calls are written."""
    file = tmp_path / "spool.db"
    with CallLog(file) as spool:
        spool.append([call(i) for i in range(100, 110)])
        spool.append([call(i) for i in range(110, 140)])
        if damage == "a record":
            with spool.engine.begin() as connection:
                connection.execute(text("UPDATE calls SET probabilities = :c WHERE number <= 10"), {"c": b"pno"})
    whole = file.read_bytes()
    if damage == "the file":
        file.write_bytes(bytes(4096) + whole[4096:])
    elif damage == "its pages":
        file.write_bytes(whole[:8192] + b"x" * len(whole[8192:]))
    with Recorder(url, spool=file, retry_seconds=0.1) as recorder:
        for i in range(3):
            recorder.record([lambda i=i: call(i)])  # type: ignore[misc]
            recorder.flush()
            time.sleep(0.15)
        assert (recorder.counters.written, recorder.counters.spooled) == (3, 0)
        assert recorder.counters.drained == (30 if damage == "a record" else 0)
    assert ("cannot be read and were not moved" if damage == "a record" else "Failed to drain the spool") in caplog.text
    if damage == "a record":
        with CallLog(file) as spool:
            assert spool.count() == 10


def shunt(recorder: Recorder, **changes: Any) -> ShuntRunnable:
    return ShuntRunnable(**{"small": WordModel(), "large": CountingLarge(), "recorder": recorder, **changes})


@pytest.mark.parametrize("durability", ["group", "record"])
async def test_recorder_every_runnable_method_is_recorded(url: str, durability: Any) -> None:
    with Recorder(url, task="t", sample_small=1.0, durability=durability) as recorder:
        router = shunt(recorder)
        router.invoke("refund 1", {"configurable": {"shunt_subject": "jane"}})
        await router.ainvoke("refund 2")
        router.batch(["refund 3", "surely cancel 4"])
        await router.abatch(["refund 5", "surely cancel 6"])
        "".join(router.stream("refund 7"))
        "".join([chunk async for chunk in router.astream("refund 8")])
        list(router.batch_as_completed(["refund 9", "surely cancel 10"]))
        [pair async for pair in router.abatch_as_completed(["refund 11", "surely cancel 12"])]
        if durability == "group":
            assert recorder.flush()
        with CallLog(url) as store:
            records = everything(store)
            assert sorted(int(r.input.split()[-1]) for r in records) == list(range(1, 13))
            assert {r.route for r in records} == {"small", "large"}
            assert all(r.answer == f"L:{r.input}" for r in records if r.route == "large")
            assert all(r.answer is None and r.large_model == "" for r in records if r.route == "small")
            assert store.delete(subject="jane") == 1
        assert recorder.counters.written == 12
        assert recorder.counters.failed == recorder.counters.pending == 0


def test_recorder_deferred_call_records_all_fields(url: str) -> None:
    with (
        FaultyServer(lambda messages: "refund") as serving,
        Recorder(url, task="support") as recorder,
    ):
        chain = ConfidenceRouterChain.from_models(
            WordModel(), serving.chat_model(), recorder=recorder, answer_format="text", return_decision=True
        )
        result = chain.invoke("where is my refund")
        recorder.flush()
        with CallLog(url) as store:
            (record,) = everything(store)
            assert result.record_id is not None
            store.label(result.record_id, "refund")
    assert record.id == result.record_id
    assert (record.task, record.answer_label, record.answer, record.large_model) == (
        "support",
        "refund",
        "refund",
        "gpt-4",
    )
    assert record.labels == LABELS
    assert record.probabilities == pytest.approx(result.prediction.probabilities, abs=1e-3)
    assert (record.score, record.threshold) == (pytest.approx(result.decision.score), 0.9)
    assert record.policy.startswith("Threshold")
    assert record.cost_usd == pytest.approx(result.cost_usd)
    assert record.large_seconds > 0


def test_recorder_failed_and_unparsable_answers_are_recorded(tmp_path: Path) -> None:
    with Recorder(tmp_path / "c.db") as recorder:
        large = CountingLarge({"x": [HttpError(400)], "y": [HttpError(400)]})
        with pytest.raises(HttpError):
            shunt(recorder, large=large).invoke("x")
        assert shunt(recorder, large=large, on_large_error="small").invoke("y") == "cancel"
        model = FakeListChatModel(responses=["no label at all"])
        chain = ConfidenceRouterChain.from_models(WordModel(), model, recorder=recorder, max_reasks=0)
        assert chain.batch(["z"], return_exceptions=True)
        recorder.flush()
        with CallLog(tmp_path / "c.db") as store:
            found = {r.input: r for r in everything(store)}
    assert {name: (r.reason, r.route) for name, r in found.items()} == {
        "x": ("large_error", "large"), "y": ("large_error", "small"), "z": ("large_error", "large"),
    }  # fmt: skip
    assert (found["z"].answer, found["z"].answer_label) == ("no label at all", None)


def test_recorder_sample_small_records_share_of_local_answers(tmp_path: Path) -> None:
    with Recorder(tmp_path / "c.db", sample_small=0.25, seed=0) as recorder:
        shunt(recorder).batch([f"surely refund {i}" for i in range(400)])
        recorder.flush()
        counters = recorder.counters
        assert 70 <= counters.written <= 130
        assert counters.written + counters.sampled_out == 400
    for wrong in ({"sample_small": 2.0}, {"durability": "maybe"}):
        with pytest.raises(ConfigurationError):
            Recorder(tmp_path / "d.db", **wrong)  # type: ignore[arg-type]


def test_callback_handler_records_any_chain(url: str) -> None:
    with Recorder(url, task="collect") as recorder:
        handler = RecordingCallbackHandler(recorder, labels=LABELS)
        chain = ChatPromptTemplate.from_template("{q}") | FakeListChatModel(responses=["refund", "gibberish"])
        chain.invoke({"q": "money back"}, {"callbacks": [handler]})
        chain.invoke({"q": "who knows"}, {"callbacks": [handler]})
        parsing = RecordingCallbackHandler(recorder, labels=LABELS, parse=lambda text: "status")
        chain.invoke({"q": "where"}, {"callbacks": [parsing]})
        recorder.flush()
        with CallLog(url) as store:
            labels = {r.input: (r.answer_label, r.answer) for r in everything(store)}
    assert labels == {
        "money back": ("refund", "refund"), "who knows": (None, "gibberish"), "where": ("status", "refund"),
    }  # fmt: skip


@pytest.mark.parametrize("how", ["invoke", "ainvoke", "batch", "stream", "model"])
def test_callback_handler_subject_can_be_deleted(url: str, how: str) -> None:
    model = FakeListChatModel(responses=["refund"])
    chain = ChatPromptTemplate.from_template("{q}") | model
    with Recorder(url) as recorder:
        handler = RecordingCallbackHandler(recorder, labels=LABELS)
        jane: Any = {"callbacks": [handler], "configurable": {"shunt_subject": "jane"}}
        if how == "model":
            model.invoke("hers", {"callbacks": [handler], "metadata": {"shunt_subject": "jane"}})
        elif how == "ainvoke":
            asyncio.run(chain.ainvoke({"q": "hers"}, jane))
        elif how == "batch":
            chain.batch([{"q": "hers"}], {"callbacks": [handler], "metadata": {"shunt_subject": "jane"}})
        elif how == "stream":
            list(chain.stream({"q": "hers"}, jane))
        else:
            chain.invoke({"q": "hers"}, jane)
        chain.invoke({"q": "nobody's"}, {"callbacks": [handler]})
        recorder.flush()
        with CallLog(url) as store:
            assert store.delete(subject="jane") == 1
            assert [one.input for one in everything(store)] == ["nobody's"]


class AwayStore(CallLog):
    """Call log that can simulate an outage or a slow database."""

    away = False
    slow = 0.0

    def append(self, records: Any) -> None:
        time.sleep(self.slow)
        if self.away:
            raise StoreError("the database cannot be reached")
        super().append(records)


def test_recorder_database_outage_loses_no_record(tmp_path: Path) -> None:
    store = AwayStore(tmp_path / "c.db")
    with Recorder(store, spool=tmp_path / "spool.db", retry_seconds=0.1) as recorder:
        recorder.record([lambda: call(0)])
        recorder.flush()
        store.away = True
        for i in range(1, 50):
            recorder.record([lambda i=i: call(i)])  # type: ignore[misc]
        recorder.flush()
        assert store.count() == 1
        assert recorder.counters.spooled == 49
        store.away = False
        deadline = time.monotonic() + 20
        while recorder.counters.drained < 49 and time.monotonic() < deadline:  # `drained` is counted after the write
            time.sleep(0.05)
        assert store.count() == 50
        assert recorder.counters.drained == 49
        assert store.verify() == []


class NotingStore(CallLog):
    """Call log that notes the size of each append, and runs a callback before the first one."""

    def __init__(self, url: str | Path, at_first: Callable[[], None]) -> None:
        super().__init__(url)
        self.given: list[int] = []
        self.at_first = at_first

    def append(self, records: Any) -> None:
        if not self.given:
            self.at_first()
        self.given.append(len(records))
        super().append(records)


def test_recorder_new_records_take_precedence_over_draining(tmp_path: Path) -> None:
    with CallLog(tmp_path / "spool.db") as spool:
        for start in range(0, 6_000, 3_000):
            spool.append([call(i) for i in range(start, start + 3_000)])
    ready = threading.Event()

    def one_more() -> None:
        ready.wait()
        recorder.record([lambda: call(10_000)])

    store = NotingStore(tmp_path / "c.db", one_more)
    with Recorder(store, spool=tmp_path / "spool.db", retry_seconds=0.05) as recorder:
        ready.set()
        deadline = time.monotonic() + 20
        while recorder.counters.drained < 6_000 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert recorder.counters.drained == 6_000
        assert recorder.counters.written == 1
    assert store.given == [2048, 1, 2048, 6_000 - 2 * 2048]


def test_spool_of_each_database_is_separate_and_private(tmp_path: Path, monkeypatch: Any) -> None:
    """Records of one database never reach another, and other users cannot place a file in the spool folder."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    one, two = "postgresql+psycopg://joe:secret@host/one", "postgresql+psycopg://joe@host/two"
    assert spool_of(one) == spool_of(one.replace("secret", "changed")) != spool_of(two)
    assert spool_of(one).parent == tmp_path / "state" / "langchain-datashunt"
    assert spool_of(tmp_path / "c.db") == tmp_path / "c.db.spool"
    assert spool_of("sqlite:///calls.db") == Path("calls.db.spool")
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    folder = spool_of(one).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    with pytest.raises(ConfigurationError, match="is not private to this user"):
        spool_of(one)


def test_spool_of_in_memory_log_is_not_in_working_folder(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for memory in ("sqlite://", "sqlite:///:memory:", ":memory:"):
        assert spool_of(memory).parent == tmp_path / "langchain-datashunt"


def test_recorder_spool_of_earlier_process_is_drained(tmp_path: Path) -> None:
    with CallLog(tmp_path / "c.db.spool") as spool:
        spool.append([call(1), call(2, subject="jane")])
    with Recorder(tmp_path / "c.db", retry_seconds=0.05) as recorder:
        deadline = time.monotonic() + 20
        while recorder.counters.drained < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        with CallLog(tmp_path / "c.db") as store:
            assert store.count() == 2
            assert store.delete(subject="jane") == 1


def test_recorder_full_queue_waits_then_spools(tmp_path: Path) -> None:
    store = AwayStore(tmp_path / "c.db")
    store.slow = 0.3
    recorder = Recorder(store, queue_size=2, group_size=1, max_wait_ms=20, spool=tmp_path / "s.db", retry_seconds=0.2)
    slowest = 0.0
    for i in range(12):
        started = time.perf_counter()
        recorder.record([lambda i=i: call(i)])  # type: ignore[misc]
        slowest = max(slowest, time.perf_counter() - started)
    assert slowest < 0.29, "a caller waits 20 ms and writes to the spool instead of waiting for the slow database"
    assert recorder.counters.spooled > 0
    store.slow = 0.0
    deadline = time.monotonic() + 20
    while store.count() < 12 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert store.count() == 12
    recorder.close()
    recorder.close()
    recorder.record([lambda: call(99)])
    with CallLog(tmp_path / "s.db") as spool:
        assert spool.count() == 1, "records after close() go to the spool"


def test_recorder_queued_records_are_written_in_one_commit(tmp_path: Path) -> None:
    """9,000 calls that arrive while the writer is busy share one commit, which is cheaper than several."""
    written: list[int] = []
    began, go_on = threading.Event(), threading.Event()

    class Watched(CallLog):
        def append(self, records: Any) -> None:
            written.append(len(records))
            began.set()
            assert go_on.wait(60)
            super().append(records)

    with Recorder(Watched(tmp_path / "c.db")) as recorder:
        recorder.record([lambda: call(0)])
        assert began.wait(60)
        for i in range(1, 9001):
            recorder.record([lambda i=i: call(i)])  # type: ignore[misc]
        go_on.set()
        recorder.flush()
        assert written == [1, 9000]
        assert recorder.counters.written == 9001
    with CallLog(tmp_path / "c.db") as store:
        assert store.count() == 9001
        assert [record.input for group in store.iterate() for record in group] == [call(i).input for i in range(9001)]


def test_recorder_lost_record_is_counted_and_call_succeeds(tmp_path: Path, caplog: Any) -> None:
    store = AwayStore(tmp_path / "c.db")
    store.away = True
    (tmp_path / "spool").mkdir()
    with Recorder(store, spool=tmp_path / "spool", retry_seconds=0.1) as recorder:
        assert shunt(recorder).invoke("refund") == "L:refund"
        recorder.record([lambda: 1 / 0])  # type: ignore[list-item,return-value]
        recorder.flush()
        assert recorder.counters.failed == 2
    assert "log and spool failed" in caplog.text
    assert "Failed to create the record" in caplog.text


async def test_recorder_full_queue_does_not_block_event_loop(tmp_path: Path) -> None:
    store = AwayStore(tmp_path / "c.db")
    store.slow = 0.2
    with Recorder(store, queue_size=1, group_size=1, max_wait_ms=100, spool=tmp_path / "s.db") as recorder:
        router, ticks = shunt(recorder), 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.005)
                ticks += 1

        ticking = asyncio.create_task(tick())
        started = time.perf_counter()
        await asyncio.gather(*(router.ainvoke(f"refund {i}") for i in range(6)))
        expected = (time.perf_counter() - started) / 0.02
        ticking.cancel()
        assert ticks >= expected
        store.slow = 0.0


PROGRAM = """
import sys, time
from langchain_datashunt.call_log import Recorder, CallRecord
recorder = Recorder(sys.argv[1], durability=sys.argv[2])
print("ready", flush=True)
for i in range(int(sys.argv[3])):
    recorder.record([lambda i=i: CallRecord(input=f"question {i}", large_model="m")])
    if sys.argv[2] == "record":
        print(i, flush=True)
print("done", flush=True)
for _ in range(600 if sys.argv[4] == "wait" else 0):
    time.sleep(0.1)  # a signal just before one long sleep would be handled only after it
"""


def run_program(*words: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, words)], stdout=subprocess.PIPE, text=True, bufsize=1
    )


@pytest.mark.parametrize("end", ["exit", "SIGTERM"])
def test_recorder_pending_records_are_written_at_exit_and_on_sigterm(tmp_path: Path, end: str) -> None:
    program = run_program(tmp_path / "c.db", "group", 3000, "wait" if end == "SIGTERM" else "go")
    assert program.stdout is not None
    for line in program.stdout:
        if line.strip() == "done":
            break
    if end == "SIGTERM":
        program.send_signal(signal.SIGTERM)
    assert program.wait(30) == (-signal.SIGTERM if end == "SIGTERM" else 0)
    with CallLog(tmp_path / "c.db") as store:
        assert store.count() == 3000


def test_recorder_created_in_thread_first_is_written_on_sigterm(tmp_path: Path) -> None:
    other = (
        "import threading\n"
        "from langchain_datashunt.call_log import Recorder\n"
        "opened = []\n"
        f"thread = threading.Thread(target=lambda: opened.append(Recorder({str(tmp_path / 'other.db')!r})))\n"
        "thread.start()\n"
        "thread.join()\n"
    )
    words = [str(tmp_path / "c.db"), "group", "3000", "wait"]
    program = subprocess.Popen([sys.executable, "-c", other + PROGRAM, *words], stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None
    for line in program.stdout:
        if line.strip() == "done":
            break
    program.send_signal(signal.SIGTERM)
    assert program.wait(30) == -signal.SIGTERM
    with CallLog(tmp_path / "c.db") as store:
        assert store.count() == 3000


def test_recorder_closed_during_records_loses_none(tmp_path: Path) -> None:
    for turn in range(10):
        recorder = Recorder(tmp_path / f"{turn}.db", durability="record", spool=tmp_path / f"{turn}.spool")

        def record_many(recorder: Recorder = recorder) -> None:
            for i in range(40):
                recorder.record([lambda i=i: call(i, id=str(uuid4()))])  # type: ignore[misc]

        threads = [threading.Thread(target=record_many, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.02)
        recorder.close()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive(), "a record queued behind the end of the writer waits forever"
        counters = recorder.counters
        assert counters.written + counters.spooled == 160
        assert counters.failed == counters.pending == 0


def test_recorder_sigkill_with_record_durability_keeps_returned_calls(tmp_path: Path) -> None:
    program = run_program(tmp_path / "c.db", "record", 100_000, "wait")
    assert program.stdout is not None
    returned = -1
    for line in program.stdout:
        if line.strip().isdigit():
            returned = int(line)
        if returned >= 150:
            program.kill()
            break
    returned = max([returned, *(int(line) for line in program.stdout if line.strip().isdigit())])
    program.wait()
    with CallLog(tmp_path / "c.db") as store:
        stored = {int(r.input.split()[1]) for r in everything(store)}
        assert set(range(returned + 1)) <= stored
        assert store.verify() == []


def test_recorder_forked_or_pickled_starts_own_writer(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "c.db")
    recorder.record([lambda: call(1)])
    recorder.flush()
    child = os.fork()
    if child == 0:
        recorder.record([lambda: call(2)])
        os._exit(0 if recorder.flush(20) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with CallLog(tmp_path / "c.db") as store:
        assert store.count() == 2

    again = pickle.loads(pickle.dumps(recorder))
    again.record([lambda: call(3)])
    again.close()
    recorder.close()
    with sqlite3.connect(tmp_path / "c.db") as plain:
        assert plain.execute("SELECT count(*) FROM calls").fetchone() == (3,)
    assert "c.db" in repr(recorder)


def test_recorder_forked_processes_use_separate_connections(url: str, tmp_path: Path) -> None:
    """A server may create its recorder before it forks its workers."""
    with Recorder(url, spool=tmp_path / "spool.db") as recorder:
        recorder.record([lambda: call(-1)])
        recorder.flush()
        children = []
        for child in range(4):
            if (pid := os.fork()) == 0:
                for i in range(100):
                    recorder.record([lambda i=i, c=child: call(1_000 * c + i)])  # type: ignore[misc]
                    recorder.flush()
                os._exit(0 if recorder.flush(20) and not recorder.counters.spooled else 1)
            children.append(pid)
        for i in range(100):
            recorder.record([lambda i=i: call(10_000 + i)])  # type: ignore[misc]
            recorder.flush()
        assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 4
        assert recorder.counters.spooled == 0
    with CallLog(url) as store:
        assert store.count() == 501
        assert store.verify() == []


def _record_and_end(recorder: Recorder, start: int) -> None:
    for i in range(start, start + 50):
        recorder.record([lambda i=i: call(i)])  # type: ignore[misc]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_recorder_pending_records_of_ending_worker_are_written(tmp_path: Path, method: str) -> None:
    recorder = Recorder(tmp_path / "c.db")
    context = multiprocessing.get_context(method)
    workers = [context.Process(target=_record_and_end, args=(recorder, 100 * n)) for n in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    recorder.close()
    with CallLog(tmp_path / "c.db") as store:
        assert store.count() == 100


def test_recorder_shared_by_threads_writes_all_records(tmp_path: Path) -> None:
    with Recorder(tmp_path / "c.db", durability="record") as recorder:
        router = shunt(recorder)
        threads = [
            threading.Thread(target=lambda t=t: [router.invoke(f"refund {t} {i}") for i in range(10)])  # type: ignore[misc]
            for t in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with CallLog(tmp_path / "c.db") as store:
            assert store.count() == 80


def test_recorder_pending_counts_records_until_written(tmp_path: Path) -> None:
    going, begun = threading.Event(), threading.Event()

    def slow() -> CallRecord:
        begun.set()
        assert going.wait(20)
        return call(0)

    with Recorder(tmp_path / "calls.db") as recorder:
        recorder.record([slow])
        assert begun.wait(20)
        recorder.record([lambda i=i: call(i) for i in range(1, 101)])  # type: ignore[misc]
        assert recorder.counters.pending == 101, "one record is being written, and 100 are queued as one group"
        going.set()
        assert recorder.flush()
        assert (recorder.counters.pending, recorder.counters.written) == (0, 101)


@pytest.mark.parametrize(
    ("pruning", "expected"),
    [
        (NoPruning(), {"pruning": "NoPruning", "probabilities": False}),
        (SoftPruning(), {"pruning": "SoftPruning", "probabilities": True}),
        (HardPruning(proficient=("refund",)), {"pruning": "HardPruning", "candidates": ["cancel", "status"]}),
    ],
    ids=lambda one: type(one).__name__,
)
def test_recorder_deferred_call_records_prompt_disclosure(
    tmp_path: Path, pruning: Any, expected: dict[str, Any]
) -> None:
    with Recorder(tmp_path / "calls.db", sample_small=1.0) as recorder:
        chain = ShuntRunnable(small=WordModel(), large=lambda asked: "refund", pruning=pruning, recorder=recorder)
        chain.invoke("surely cancel")
        chain.invoke("what now")
    with CallLog(tmp_path / "calls.db") as store:
        local, deferred = everything(store)
    assert local.disclosed is None
    assert expected.items() <= json.loads(deferred.disclosed or "").items()
