"""The store and its writer, the same tests on a real SQLite file and a real PostgreSQL."""

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
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.language_models import FakeListChatModel
from langchain_core.prompts import ChatPromptTemplate
from sqlalchemy import create_engine, text

from langchain_datashunt import ConfidenceRouterChain, HardPruning, NoPruning, ShuntRunnable, SoftPruning
from langchain_datashunt.call_log import CallFilter, CallLog, CallRecord, Recorder, RecordingCallbackHandler
from langchain_datashunt.call_log.export import export
from langchain_datashunt.call_log.record import hash_input
from langchain_datashunt.call_log.rows import as_text
from langchain_datashunt.call_log.schema import FIRST, STEPS
from langchain_datashunt.call_log.spool import spool_of
from langchain_datashunt.exceptions import ConfigurationError, DataError, RecordRefusedError, StoreError
from langchain_datashunt.logprobs import label_distribution, stated_confidence
from tests.support.faulty_server import FaultyServer
from tests.support.models import LABELS, CountingLarge, HttpError, WordModel

POSTGRES = os.environ.get("DATASHUNT_TEST_POSTGRES", "postgresql+psycopg://127.0.0.1:5432/test")


def postgres_url() -> str:
    """A fresh schema of the test database; skips where there is no server."""
    engine = create_engine(POSTGRES)
    try:
        with engine.begin() as connection:
            schema = f"datashunt_{uuid4().hex[:12]}"
            connection.execute(text(f"CREATE SCHEMA {schema}"))
    except Exception as error:
        pytest.skip(f"no PostgreSQL at {POSTGRES} ({type(error).__name__}); set DATASHUNT_TEST_POSTGRES")
    finally:
        engine.dispose()
    return f"{POSTGRES}?options=-csearch_path%3D{schema}"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: Any, tmp_path: Path) -> Any:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'calls.db'}"
        return
    found = postgres_url()
    yield found
    schema = found.rpartition("%3D")[2]
    engine = create_engine(POSTGRES)
    with engine.begin() as connection:
        connection.execute(text(f"DROP SCHEMA {schema} CASCADE"))
    engine.dispose()


@pytest.fixture
def store(url: str) -> Any:
    with CallLog(url) as opened:
        yield opened


def call(i: int = 0, **changes: Any) -> CallRecord:
    defaults: dict[str, Any] = {
        "id": str(uuid4()), "input": f"question {i}", "labels": LABELS, "small_model": "words", "time": 1000.0 + i,
        "probabilities": (0.5, 0.25, 0.25), "score": 0.5, "threshold": 0.9, "policy": "Threshold(0.9)",
        "large_model": "gpt-4", "answer": "Refund.", "answer_label": "refund", "input_tokens": 100, "output_tokens": 2,
        "cost_usd": 0.01, "large_seconds": 0.5,
    }  # fmt: skip
    return CallRecord(**{**defaults, **changes})


def everything(store: CallLog, which: CallFilter = CallFilter()) -> list[CallRecord]:  # noqa: B008
    return sorted((r for batch in store.iterate(which, batch_size=3) for r in batch), key=lambda r: r.time)


def test_a_record_comes_back_as_it_went_in(store: CallLog) -> None:
    record = call(
        subject="jane", gold="status", gold_source="user", large_confidence=0.75, large_probabilities=(0.25, 0.5, 0.25),
        audit=True, reason="deferred", input="äöü 日本 \n \"quoted\"" * 20,
    )  # fmt: skip
    store.append([record])
    (back,) = everything(store)
    assert back.subject is not None
    assert "jane" not in back.subject
    assert back.model_copy(update={"subject": "jane"}) == record
    assert store.get(record.id) == back
    assert store.get(str(uuid4())) is None
    assert (back.small_label, back.confidence, back.agrees) == ("cancel", 0.5, False)


def test_a_written_answer_is_kept_beside_the_large_models(store: CallLog) -> None:
    written: dict[str, Any] = {"labels": ("answer", "other"), "probabilities": (0.25, 0.75)}
    same = call(1, small_answer="a cat", answer_label="a cat", answer="a cat.", **written)
    other = call(2, small_answer="ä dög" * 50, answer_label="answer", answer=None, **written)
    silent = call(3, small_answer="a fox", answer_label=None, large_model="", answer=None, **written)
    short = call(4, input="q", small_answer="", answer_label="x", answer=None, **written)
    store.append([same, other, silent, short])
    assert everything(store) == [same, other, silent, short]
    assert [one.agrees for one in everything(store)] == [True, False, None, False]
    assert everything(store, CallFilter(agrees=True)) == [same]
    assert everything(store, CallFilter(agrees=False)) == [other, short]
    assert same.confidence == 0.25
    assert everything(store, CallFilter(min_confidence=0.5)) == []
    assert not store.verify()


def test_what_is_not_known_stays_unknown(store: CallLog) -> None:
    bare = CallRecord(input="x", route="small", reason="confident")
    store.append([bare])
    (back,) = everything(store)
    assert back.model_dump() == bare.model_dump()
    assert (back.agrees, back.small_label, back.confidence) == (None, None, None)


def test_a_label_outside_the_label_set_is_kept_and_counted(store: CallLog) -> None:
    store.append([call(answer_label="brand new")])
    assert everything(store)[0].answer_label == "brand new"
    assert store.stats()["outside_label_set"] == 1


def test_append_repeated_input_is_a_row_of_its_own(store: CallLog) -> None:
    first, second = call(7, time=1), call(7, time=2, answer_label="cancel")
    store.append([first, second, call(7, time=3, input="  QUESTION 7 "), call(7, time=4, task="other")])
    assert [one.time for one in everything(store)] == [1, 2, 3, 4]
    assert (store.count(), store.count(distinct=True)) == (4, 2)
    store.label(first.id, "status", source="review")
    assert [(one.gold, one.gold_source) for one in everything(store)][:2] == [("status", "review"), (None, None)]
    with pytest.raises(StoreError, match="No call with the id"):
        store.label(str(uuid4()), "cancel")


def test_append_same_id_again_is_stored_once(store: CallLog) -> None:
    """Two processes that drain one spool, or one that died meanwhile, deliver a record twice."""
    first, second = call(1, time=1), call(1, time=2)
    store.append([first, call(2), first])
    store.append([first])
    store.append([second, first])
    assert sorted(one.id for one in everything(store)) == sorted([first.id, second.id, everything(store)[-1].id])
    assert store.count() == 3
    assert store.verify() == []


@pytest.mark.parametrize("query", [
    "SELECT task, avg(cost_usd) FROM calls GROUP BY 1",
    "SELECT route, reason, count(*) FROM calls GROUP BY 1, 2 ORDER BY 3 DESC",
    "SELECT large_model, sum(cost_usd), avg(large_seconds) FROM calls WHERE route = 'large' GROUP BY 1",
    "SELECT input, small_label, answer_label, confidence FROM calls WHERE agrees = false ORDER BY confidence DESC",
    "SELECT input, gold FROM calls WHERE gold IS NOT NULL AND gold <> small_label",
])  # fmt: skip
def test_calls_table_answers_plain_sql(store: CallLog, query: str) -> None:
    store.append([call(1), call(2, task="other", answer_label="cancel", gold="status"), call(3)])
    with store.reading() as connection:
        rows = connection.execute(text(query)).all()
    assert rows
    if "avg(cost_usd)" in query:
        assert sorted(rows) == [("default", pytest.approx(0.01)), ("other", pytest.approx(0.01))]


def test_two_that_drain_one_spool_move_each_record_once(url: str, tmp_path: Path) -> None:
    spool = tmp_path / "spool.db"
    with CallLog(spool) as own:
        own.append([call(i) for i in range(3_000)])
    failed: list[Exception] = []

    def drain() -> None:
        try:
            with CallLog(spool) as mine, CallLog(url) as there:
                mine.move_to(there, batch_size=100)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=drain) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    with CallLog(url) as there, CallLog(spool) as own:
        assert own.count() == 0
        assert there.count() == 3_000


def test_filters_mean_what_they_say(store: CallLog) -> None:
    store.append(
        [
            call(
                0,
                route="small",
                reason="confident",
                probabilities=(0.98, 0.01, 0.01),
                large_model="",
                answer_label=None,
            ),
            call(1, answer_label="cancel"),
            call(2, answer_label="refund", gold="refund"),
            call(3, task="other"),
        ]
    )
    wanted = {
        CallFilter(route="small"): [0],
        CallFilter(asked=True): [1, 2, 3],
        CallFilter(asked=False): [0],
        CallFilter(agrees=True): [1],
        CallFilter(agrees=False): [2, 3],
        CallFilter(labelled=True): [2],
        CallFilter(labelled=False): [0, 1, 3],
        CallFilter(task="other"): [3],
        CallFilter(since=1001.0, until=1003.0): [1, 2],
        CallFilter(min_confidence=0.9): [0],
        CallFilter(max_confidence=0.9, task="default"): [1, 2],
    }
    for which, expected in wanted.items():
        assert [int(r.input.split()[1]) for r in everything(store, which)] == expected, which
        assert store.count(which) == len(expected)


def test_stats_are_sums_over_all(store: CallLog) -> None:
    assert store.stats()["calls"] == 0
    store.append([call(i, answer_label="cancel" if i % 2 else "refund") for i in range(10)])
    stats = store.stats()
    assert (stats["calls"], stats["route_large"]) == (10, 10)
    assert (stats["compared"], stats["agreeing"]) == (10, 5)
    assert stats["cost_usd"] == pytest.approx(0.1)
    assert (stats["oldest"], stats["newest"]) == (1000.0, 1009.0)


def test_a_person_can_be_forgotten(store: CallLog) -> None:
    store.append([call(1, subject="jane"), call(2, subject="joe"), call(3)])
    store.append([call(1, subject="jane")])
    assert store.delete(subject="jane") == 2
    assert store.delete(input_hash=hash_input("question 3").hex()) == 1
    assert [r.input for r in everything(store)] == ["question 2"]
    with pytest.raises(StoreError, match="Pass input_hash or subject"):
        store.delete()


def test_delete_leaves_nothing_in_the_files(tmp_path: Path) -> None:
    with CallLog(tmp_path / "calls.db") as store:
        store.append([call(1, input="unique-word", answer="unique-answer", subject="jane"), call(2)])
        assert b"unique-word" in b"".join(file.read_bytes() for file in tmp_path.iterdir())
        assert store.delete(input_hash=hash_input("unique-word").hex()) == 1
        left = b"".join(file.read_bytes() for file in tmp_path.iterdir())
        assert b"unique-word" not in left
        assert b"unique-answer" not in left
        store.append([call(3, labels=("a-label-of-jane", "other"), probabilities=(0.5, 0.5), subject="jane")])
        assert store.delete(subject="jane") == 1
        assert b"a-label-of-jane" not in b"".join(file.read_bytes() for file in tmp_path.iterdir())
        assert [one.input for one in everything(store)] == ["question 2"]
        assert store.verify() == []


def test_people_can_be_forgotten_at_once(store: CallLog, url: str) -> None:
    """Each deletion rewrites the group that all of them stand in."""
    store.append([call(i, subject=f"person {i}") for i in range(40)])

    def forget(who: int) -> None:
        with CallLog(url) as mine:
            assert mine.delete(subject=f"person {who}") == 1

    threads = [threading.Thread(target=forget, args=(who,)) for who in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [record.input for record in everything(store)] == [f"question {i}" for i in range(8, 40)]


def test_what_is_written_while_something_is_deleted_is_whole_or_gone(store: CallLog, url: str) -> None:
    """Writers move a person's rows to new groups while the person is forgotten, again and again."""
    stop = threading.Event()

    def write() -> None:
        with CallLog(url) as mine:
            while not stop.is_set():
                mine.append([call(i, subject="jane") for i in range(5)] + [call(100, subject="joe")])

    def forget() -> None:
        with CallLog(url) as mine:
            while not stop.is_set():
                mine.delete(subject="jane")

    threads = [threading.Thread(target=work) for work in (write, write, forget, forget)]
    for thread in threads:
        thread.start()
    time.sleep(1.5)
    stop.set()
    for thread in threads:
        thread.join()
    store.delete(subject="jane")
    assert {record.input for record in everything(store)} == {"question 100"}
    assert store.verify() == []


def test_a_group_that_failed_leaves_no_trace_in_the_next(store: CallLog) -> None:
    """Its context was never stored, so that its number may become another's."""
    with pytest.raises(Exception, match="(?i)overflow|too large|out of range"):
        store.append([call(1, task="first", input_tokens=2**70)])
    store.append([call(2, task="second", labels=("a", "b", "c"), answer_label="a")])
    store.append([call(3, task="first")])
    assert {(record.task, record.labels) for record in everything(store)} == {
        ("second", ("a", "b", "c")),
        ("first", LABELS),
    }


def test_two_inputs_cannot_have_one_id(store: CallLog) -> None:
    """Neither takes the other's place unsaid, nor is anything of their group stored."""
    first = call(1)
    store.append([first])
    for group in ([call(2), call(3, id=first.id)], [call(1), call(4), call(5, id=(twice := call(6)).id), twice]):
        with pytest.raises(RecordRefusedError, match="for another input"):
            store.append(group)
        assert [(one.id, one.input) for one in everything(store)] == [(first.id, first.input)]
    assert store.verify() == []


def test_a_large_group_of_all_kinds_comes_back_as_it_went_in(store: CallLog) -> None:
    def kind(i: int, again: int = 0) -> CallRecord:
        k = 2 + i % 5
        some: dict[str, Any] = [
            {"probabilities": None, "score": None},
            {"gold": f"label {i}", "gold_source": "user"},
            {"subject": "sha256:" + f"{i:032x}"},
            {"answer_label": "a label of its own", "cost_usd": None},
            {"labels": ("answer", "other"), "probabilities": (0.75, 0.25), "small_answer": "so", "answer_label": "so"},
            {"id": f"no UUID {i} {again}"},
            {"route": "small", "reason": "confident", "large_model": "", "answer": None, "answer_label": None},
        ][i % 7]
        p = {
            "labels": tuple(f"l{j}" for j in range(k)),
            "probabilities": (0.5, 0.5, *[0.0] * (k - 2)),
            "answer_label": "l1",
        }
        return call(i + 1_000 * again, **{**p, "input": f"question {i}", "time": 1000.0 + i + again / 10, **some})

    first = [kind(i) for i in range(1_300)]
    store.append(first)
    written = {r.input: r for r in everything(store)}
    assert len(written) == store.count() == 1_300
    for record in first:
        back = written[record.input]
        assert back == record
        assert store.get(record.id) == back
    store.append([kind(i, again=1) for i in range(600, 1_900)])
    assert (store.count(), store.count(distinct=True)) == (2_600, 1_900)
    assert store.verify() == []


def test_a_record_that_no_database_takes_harms_no_other(tmp_path: Path, caplog: Any) -> None:
    with Recorder(tmp_path / "c.db", durability="record") as recorder:
        recorder.record([lambda: call(1, input="lone \ud800 surrogate"), lambda: call(2)])
        recorder.record([lambda: call(3, input_tokens=2**70), lambda: call(4)])
        assert recorder.flush(10)
        assert (recorder.counters.written, recorder.counters.failed) == (3, 1)
    assert "cannot be written" in caplog.text
    with CallLog(tmp_path / "c.db") as store:
        assert [one.input for one in everything(store)] == ["lone \ufffd surrogate", "question 2", "question 4"]


def test_a_record_that_the_database_refuses_does_not_make_it_away(url: str, tmp_path: Path, caplog: Any) -> None:
    """Neither in a group nor in the spool: the others are written, and it is named and counted."""
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
    assert caplog.text.count(f"The record {taken} cannot be written") == 2
    with CallLog(url) as store, CallLog(tmp_path / "spool.db") as spool:
        assert (store.count(), spool.count()) == (81, 0)
        with pytest.raises(RecordRefusedError):
            store.append([call(61, id=taken)])


def test_a_record_that_no_spool_takes_harms_no_other(tmp_path: Path) -> None:
    store = AwayStore(tmp_path / "c.db")
    store.away = True
    with Recorder(store, spool=tmp_path / "spool.db", retry_seconds=60) as recorder:
        recorder.record([lambda: call(1), lambda: call(2, input_tokens=2**70), lambda: call(3)])
        recorder.flush()
        assert (recorder.counters.spooled, recorder.counters.failed) == (2, 1)


@pytest.mark.parametrize("damage", ["a record", "its pages", "the file"])
def test_a_damaged_spool_harms_no_other_record(url: str, tmp_path: Path, caplog: Any, damage: str) -> None:
    """What can be read of it is drained, what cannot stays where it is, and new calls are written as ever."""
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
    assert ("cannot be read and stay there" if damage == "a record" else "cannot be drained now") in caplog.text
    if damage == "a record":
        with CallLog(file) as spool:
            assert spool.count() == 10


def test_retention_is_by_age_and_by_number(store: CallLog) -> None:
    store.append([call(i, time=time.time() - (9 - i) * 100) for i in range(10)])
    assert store.prune(max_age_seconds=550) == 4
    assert store.prune(max_records=3) == 3
    assert [r.input for r in everything(store)] == ["question 7", "question 8", "question 9"]
    assert store.prune(max_records=3) == store.prune() == 0


def test_verify_finds_what_was_damaged(store: CallLog, url: str) -> None:
    for i in range(5):
        store.append([call(i)])
    assert store.verify() == []
    with store.engine.begin() as connection:
        connection.execute(text("UPDATE calls SET probabilities = :c WHERE number = 1"), {"c": b"pnonsense"})
        connection.execute(text("UPDATE calls SET input = 'another' WHERE number = 2"))
    problems = store.verify()
    assert len(problems) == 2
    assert any("cannot be read" in p for p in problems)
    assert any("does not match its hash" in p for p in problems)
    with store.engine.begin() as connection:
        connection.execute(text("DELETE FROM label_sets"))
    assert len(store.verify()) == 5


def test_what_is_exported_is_what_is_stored(store: CallLog, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from pyarrow import parquet

    lone = call(3, input="half a \ud800 pair")
    odd = 'a line\nof "text"\u2028 über 😀 \x00'
    store.append(
        [
            call(1, input=odd, answer=odd, gold=None, cost_usd=1e-7, time=1.7e9, subject="alice"),
            call(2, probabilities=None, score=None, answer_label="a label of its own", audit=True),
            lone,
        ]
    )
    stored = [record for batch in store.iterate() for record in batch]
    export(store, tmp_path / "calls.jsonl")
    export(store, tmp_path / "calls.parquet")
    lines = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_bytes().split(b"\n")[:-1]]
    rows = parquet.read_table(tmp_path / "calls.parquet").to_pylist()
    for record, line, row in zip(stored, lines, rows, strict=True):
        computed = {"input_hash": record.input_hash, "confidence": record.confidence, "small_label": record.small_label}
        assert line == {**record.model_dump(mode="json", exclude={"subject"}), **computed}
        assert {name: row[name] for name in line} == {
            **line,
            "probabilities": line["probabilities"] and pytest.approx(line["probabilities"]),
        }


def test_a_database_of_newer_code_is_refused(store: CallLog, url: str) -> None:
    with CallLog(url):
        pass
    with store.engine.begin() as connection:
        connection.execute(text("INSERT INTO datashunt_schema (version) VALUES (99)"))
    with pytest.raises(StoreError, match=f"schema version 99; this code knows versions up to {FIRST + len(STEPS) - 1}"):
        CallLog(url)


@pytest.mark.parametrize("url", ["nosuch://user:secret@host/x", "mysql+nosuchdriver://user:secret@host/x"])
def test_a_database_that_is_not_known_is_a_wrong_setting_and_not_one_that_is_away(url: str, tmp_path: Path) -> None:
    for make in (CallLog, lambda url: Recorder(url, spool=tmp_path / "spool.db")):
        with pytest.raises(ConfigurationError, match=r"user:\*\*\*@host/x cannot be used") as raised:
            make(url)
        assert "secret" not in str(raised.value)


def test_a_database_from_before_the_first_release_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "old.db") as plain:
        plain.execute("CREATE TABLE datashunt_schema (version INTEGER PRIMARY KEY)")
        plain.execute("INSERT INTO datashunt_schema VALUES (4)")
    with pytest.raises(StoreError, match=r"version 4, from before the first release.*Export it"):
        CallLog(tmp_path / "old.db")


def _append_many(url: str, start: int) -> None:
    with CallLog(url) as mine:
        for i in range(start, start + 40, 4):
            mine.append([call(j) for j in range(i, i + 4)])


def test_many_processes_write_at_once(store: CallLog, url: str) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_append_many, args=(url, start)) for start in (0, 20, 100)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert (store.count(), store.count(distinct=True)) == (120, 100)
    assert store.verify() == []


def test_a_store_that_cannot_be_opened_is_explained(tmp_path: Path) -> None:
    (tmp_path / "no.db").write_text("this is no database, it is a plain text file of some length")
    with pytest.raises(StoreError, match="cannot be used"):
        CallLog(tmp_path / "no.db")
    with pytest.raises(StoreError) as caught:
        CallLog("postgresql+psycopg://user:secret@127.0.0.1:9/none")
    assert "secret" not in str(caught.value)


def test_a_database_that_breaks_while_it_is_read_is_explained(store: CallLog) -> None:
    store.append([call(1)])
    with store.engine.begin() as connection:
        connection.execute(text("DROP TABLE calls"))
    for read in (store.count, store.stats, store.verify, lambda: everything(store), lambda: store.get(str(uuid4()))):
        with pytest.raises(StoreError, match="cannot be used"):
            read()


def test_the_file_belongs_to_its_owner_alone(tmp_path: Path) -> None:
    with CallLog(tmp_path / "calls.db") as store:
        store.append([call()])
    assert stat.S_IMODE((tmp_path / "calls.db").stat().st_mode) == 0o600


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=80), st.none() | st.text(max_size=80), st.lists(st.floats(0.01, 1), min_size=3, max_size=3))
def test_any_text_and_distribution_survive(tmp_path_factory: Any, value: str, raw: str | None, p: list[float]) -> None:
    total = sum(p)
    record = call(input=value, answer=raw, probabilities=tuple(x / total for x in p))
    with CallLog(tmp_path_factory.mktemp("s") / "c.db") as store:
        store.append([record])
        (back,) = everything(store)
    assert (back.input, back.answer) == (as_text(value), raw and as_text(raw))
    assert back.probabilities == pytest.approx(record.probabilities, abs=1e-3)
    assert sum(back.probabilities or ()) == pytest.approx(1.0)


def test_records_check_their_distributions() -> None:
    with pytest.raises(DataError, match="2 probabilities for 3 labels"):
        call(probabilities=(0.5, 0.5))


def test_log_probabilities_become_a_distribution() -> None:
    import math

    def token(word: str, p: float, **others: float) -> dict[str, Any]:
        top = [{"token": w, "logprob": math.log(q)} for w, q in {word: p, **others}.items()]
        return {"token": word, "logprob": math.log(p), "top_logprobs": top}

    tokens = [token("ref", 0.8, can=0.1, stat=0.05, zzz=0.01), token("und", 0.99)]
    found = label_distribution(tokens, LABELS, "refund")
    assert found is not None
    p, confidence = found
    assert confidence == pytest.approx(0.792)
    assert p.sum() == pytest.approx(1.0)
    assert p[LABELS.index("refund")] == pytest.approx(0.792, abs=1e-6)
    assert p[LABELS.index("cancel")] > p[LABELS.index("status")] > 0
    assert label_distribution([], LABELS, "refund") is None
    assert label_distribution(tokens, LABELS, "strange") is None
    assert stated_confidence('{"label": "x", "confidence": 0.7}') == 0.7
    assert [stated_confidence(t) for t in (None, "x", "[]", '{"confidence": 2}', '{"confidence": true}')] == [None] * 5


# The writer


def shunt(recorder: Recorder, **changes: Any) -> ShuntRunnable:
    return ShuntRunnable(**{"small": WordModel(), "large": CountingLarge(), "recorder": recorder, **changes})


@pytest.mark.parametrize("durability", ["group", "record"])
async def test_every_way_of_calling_is_recorded(url: str, durability: Any) -> None:
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


def test_a_record_tells_the_whole_call(url: str) -> None:
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


def test_failures_and_unparsable_answers_are_recorded_too(tmp_path: Path) -> None:
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


def test_small_answers_are_sampled(tmp_path: Path) -> None:
    with Recorder(tmp_path / "c.db", sample_small=0.25, seed=0) as recorder:
        shunt(recorder).batch([f"surely refund {i}" for i in range(400)])
        recorder.flush()
        counters = recorder.counters
        assert 70 <= counters.written <= 130
        assert counters.written + counters.sampled_out == 400
    for wrong in ({"sample_small": 2.0}, {"durability": "maybe"}):
        with pytest.raises(ConfigurationError):
            Recorder(tmp_path / "d.db", **wrong)  # type: ignore[arg-type]


def test_any_chain_can_be_recorded_by_a_handler(url: str) -> None:
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
def test_a_person_can_be_forgotten_whose_calls_a_handler_recorded(url: str, how: str) -> None:
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
    """A store whose database can be taken away."""

    away = False
    slow = 0.0

    def append(self, records: Any) -> None:
        time.sleep(self.slow)
        if self.away:
            raise StoreError("the database is away")
        super().append(records)


def test_with_the_database_away_nothing_is_lost(tmp_path: Path) -> None:
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
        while recorder.counters.drained < 49 and time.monotonic() < deadline:  # counted after it is written
            time.sleep(0.05)
        assert store.count() == 50
        assert recorder.counters.drained == 49
        assert store.verify() == []


class NotingStore(CallLog):
    """A store that notes how many records it is given, and calls back at the first of them."""

    def __init__(self, url: str | Path, at_first: Callable[[], None]) -> None:
        super().__init__(url)
        self.given: list[int] = []
        self.at_first = at_first

    def append(self, records: Any) -> None:
        if not self.given:
            self.at_first()
        self.given.append(len(records))
        super().append(records)


def test_what_is_called_while_a_spool_is_drained_does_not_wait_for_all_of_it(tmp_path: Path) -> None:
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


def test_each_database_has_a_spool_of_its_own(tmp_path: Path, monkeypatch: Any) -> None:
    """What one was to get reaches no other; nobody else can put a file there."""
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
    with pytest.raises(ConfigurationError, match="can be used by others"):
        spool_of(one)


def test_what_an_earlier_process_spooled_is_drained(tmp_path: Path) -> None:
    with CallLog(tmp_path / "c.db.spool") as spool:
        spool.append([call(1), call(2, subject="jane")])
    with Recorder(tmp_path / "c.db", retry_seconds=0.05) as recorder:
        deadline = time.monotonic() + 20
        while recorder.counters.drained < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        with CallLog(tmp_path / "c.db") as store:
            assert store.count() == 2
            assert store.delete(subject="jane") == 1


def test_a_full_queue_makes_callers_wait_a_little_then_spool(tmp_path: Path) -> None:
    store = AwayStore(tmp_path / "c.db")
    store.slow = 0.3
    recorder = Recorder(store, queue_size=2, group_size=1, max_wait_ms=20, spool=tmp_path / "s.db", retry_seconds=0.2)
    slowest = 0.0
    for i in range(12):
        started = time.perf_counter()
        recorder.record([lambda i=i: call(i)])  # type: ignore[misc]
        slowest = max(slowest, time.perf_counter() - started)
    assert slowest < 0.29, "a caller waits its 20 ms and writes to the spool, not for the slow database"
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
        assert spool.count() == 1, "what comes after closing is spooled"


def test_what_waits_is_written_in_one_group(tmp_path: Path) -> None:
    """Nine thousand calls that came while the writer was busy: one commit, as large groups are the cheaper ones."""
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


def test_what_cannot_be_written_anywhere_is_counted_and_the_call_goes_on(tmp_path: Path, caplog: Any) -> None:
    store = AwayStore(tmp_path / "c.db")
    store.away = True
    (tmp_path / "spool").mkdir()
    with Recorder(store, spool=tmp_path / "spool", retry_seconds=0.1) as recorder:
        assert shunt(recorder).invoke("refund") == "L:refund"
        recorder.record([lambda: 1 / 0])  # type: ignore[list-item,return-value]
        recorder.flush()
        assert recorder.counters.failed == 2
    assert "could not be written anywhere" in caplog.text
    assert "could not be made" in caplog.text


async def test_async_callers_are_not_held_up_by_a_full_queue(tmp_path: Path) -> None:
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
    time.sleep(0.1)  # Python would see a signal that comes just before a long sleep only after it
"""


def run_program(*words: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, words)], stdout=subprocess.PIPE, text=True, bufsize=1
    )


@pytest.mark.parametrize("end", ["exit", "SIGTERM"])
def test_pending_records_are_written_at_exit_and_on_sigterm(tmp_path: Path, end: str) -> None:
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


def test_many_records_are_stored_by_what_runs_at_exit(tmp_path: Path) -> None:
    """The interpreter starts no thread then that could compress them."""
    code = """if True:
        import atexit, sys
        from langchain_datashunt.call_log import CallLog, CallRecord
        store = CallLog(sys.argv[1])
        records = [CallRecord(input=f"question {i}", labels=("a", "b"), answer="a" * 50) for i in range(9000)]
        atexit.register(store.append, records)
    """
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "c.db")], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    with CallLog(tmp_path / "c.db") as store:
        assert [len(batch) for batch in store.iterate(batch_size=8000)] == [8000, 1000]
        assert store.verify() == []


def test_after_sigkill_every_call_that_returned_has_its_record(tmp_path: Path) -> None:
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


def test_a_child_process_gets_a_writer_of_its_own(tmp_path: Path) -> None:
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


def test_forked_processes_do_not_share_a_connection(url: str, tmp_path: Path) -> None:
    """As those of a server that makes its recorder before it forks."""
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
def test_what_a_worker_process_has_pending_is_written_when_it_ends(tmp_path: Path, method: str) -> None:
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


def test_threads_share_a_recorder(tmp_path: Path) -> None:
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


def test_an_export_that_fails_leaves_the_one_before_it(store: CallLog, tmp_path: Path) -> None:
    store.append([call(i) for i in range(3)])
    for name in ("calls.jsonl", "calls.parquet"):
        export(store, tmp_path / name)
    before = {file.name: file.read_bytes() for file in tmp_path.glob("calls.*") if file.suffix != ".db"}
    with store.engine.begin() as connection:
        connection.execute(text("UPDATE calls SET probabilities = :nothing"), {"nothing": b"zzz"})
    for name in ("calls.jsonl", "calls.parquet"):
        with pytest.raises(StoreError):
            export(store, tmp_path / name)
        assert (tmp_path / name).read_bytes() == before[name]
    assert not list(tmp_path.glob(".calls*"))
    with pytest.raises(ConfigurationError, match="is a folder"):
        export(store, tmp_path, kind="jsonl")


def test_chats_for_fine_tuning_are_only_what_can_be_learnt(store: CallLog, tmp_path: Path) -> None:
    written = call(2, labels=("answer", "other"), probabilities=(0.4, 0.6), answer_label="It is on its way.")
    store.append([call(1), written, call(3, input="hashed:sha256:" + "0" * 64)])
    assert export(store, tmp_path / "chats.jsonl", kind="openai") == 2
    told = [json.loads(line)["messages"] for line in (tmp_path / "chats.jsonl").open()]
    assert [one[0]["content"][:20] for one in told] == ["Sort the message int", "Answer the message."]
    assert told[1][2]["content"] == "It is on its way."


def test_totals_count_repeats(store: CallLog) -> None:
    for i in range(10):
        store.append([call(1, time=1000.0 + i)])
    store.append([call(2, route="small", reason="confident", large_model="", answer_label=None, cost_usd=None)])
    stats = store.stats()
    assert (stats["calls"], stats["route_large"], stats["route_small"]) == (11, 10, 1)
    assert stats["cost_usd"] == pytest.approx(0.1)
    assert stats["input_tokens"] == 1100
    assert isinstance(stats["route_large"], int)


def test_pending_counts_records_until_they_are_written(tmp_path: Path) -> None:
    going, begun = threading.Event(), threading.Event()

    def slow() -> CallRecord:
        begun.set()
        assert going.wait(20)
        return call(0)

    with Recorder(tmp_path / "calls.db") as recorder:
        recorder.record([slow])
        assert begun.wait(20)
        recorder.record([lambda i=i: call(i) for i in range(1, 101)])  # type: ignore[misc]
        assert recorder.counters.pending == 101, "one is being written, and a hundred wait in one group"
        going.set()
        assert recorder.flush()
        assert (recorder.counters.pending, recorder.counters.written) == (0, 101)


def test_a_dataset_of_nothing_is_one_and_takes_no_other_folders_place(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    with CallLog(tmp_path / "calls.db") as store:
        store.append([call(i) for i in range(3)])
        nothing = CallFilter(until=1.0)
        for which, n in ((nothing, 0), (CallFilter(), 3), (nothing, 0)):
            assert export(store, tmp_path / "ds", kind="datasets", which=which) == n
            assert datasets.load_from_disk(str(tmp_path / "ds")).num_rows == n
        assert "input_hash" in datasets.load_from_disk(str(tmp_path / "ds")).column_names
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("x")
        with pytest.raises(ConfigurationError, match="is no dataset"):
            export(store, tmp_path / "mine", kind="datasets")
        chats = tmp_path / "chats.jsonl"
        export(store, chats, kind="openai", instruction='Say {"label": "x"}, one of {labels}.')
        system = json.loads(chats.read_text().splitlines()[0])["messages"][0]["content"]
        assert system == 'Say {"label": "x"}, one of ' + ", ".join(LABELS) + "."
        with pytest.raises(StoreError, match="'xyz' is not an input hash"):
            store.delete(input_hash="xyz")


@pytest.mark.parametrize(
    ("pruning", "expected"),
    [
        (NoPruning(), {"pruning": "NoPruning", "probabilities": False}),
        (SoftPruning(), {"pruning": "SoftPruning", "probabilities": True}),
        (HardPruning(proficient=("refund",)), {"pruning": "HardPruning", "candidates": ["cancel", "status"]}),
    ],
    ids=lambda one: type(one).__name__,
)
def test_record_says_what_the_prompt_disclosed(tmp_path: Path, pruning: Any, expected: dict[str, Any]) -> None:
    with Recorder(tmp_path / "calls.db", sample_small=1.0) as recorder:
        chain = ShuntRunnable(small=WordModel(), large=lambda asked: "refund", pruning=pruning, recorder=recorder)
        chain.invoke("surely cancel")
        chain.invoke("what now")
    with CallLog(tmp_path / "calls.db") as store:
        local, deferred = everything(store)
    assert local.disclosed is None
    assert expected.items() <= json.loads(deferred.disclosed or "").items()
