"""Tests of CallLog on a real SQLite file and a real PostgreSQL server."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine, text

from langchain_datashunt.call_log import CallFilter, CallLog, CallRecord, Recorder
from langchain_datashunt.call_log.record import hash_input
from langchain_datashunt.call_log.rows import as_text
from langchain_datashunt.call_log.schema import FIRST, STEPS
from langchain_datashunt.exceptions import ConfigurationError, DataError, RecordRefusedError, StoreError
from langchain_datashunt.logprobs import label_distribution, stated_confidence
from tests.support.models import LABELS

POSTGRES = os.environ.get("DATASHUNT_TEST_POSTGRES", "postgresql+psycopg://127.0.0.1:5432/test")


def postgres_url() -> str:
    """Create a schema in the test database and return its URL. Skip the test if there is no server."""
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


def test_append_full_record_round_trips(store: CallLog) -> None:
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


def test_append_generated_answers_round_trip_and_filter_by_agreement(store: CallLog) -> None:
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


def test_append_minimal_record_keeps_missing_fields_none(store: CallLog) -> None:
    bare = CallRecord(input="x", route="small", reason="confident")
    store.append([bare])
    (back,) = everything(store)
    assert back.model_dump() == bare.model_dump()
    assert (back.agrees, back.small_label, back.confidence) == (None, None, None)


def test_append_label_outside_label_set_is_stored_and_counted(store: CallLog) -> None:
    store.append([call(answer_label="brand new")])
    assert everything(store)[0].answer_label == "brand new"
    assert store.stats()["outside_label_set"] == 1


def test_append_repeated_input_is_stored_as_separate_row(store: CallLog) -> None:
    first, second = call(7, time=1), call(7, time=2, answer_label="cancel")
    store.append([first, second, call(7, time=3, input="  QUESTION 7 "), call(7, time=4, task="other")])
    assert [one.time for one in everything(store)] == [1, 2, 3, 4]
    assert (store.count(), store.count(distinct=True)) == (4, 3), "a small model may tell the spellings apart"
    store.label(first.id, "status", source="review")
    assert [(one.gold, one.gold_source) for one in everything(store)][:2] == [("status", "review"), (None, None)]
    with pytest.raises(StoreError, match="No call with the id"):
        store.label(str(uuid4()), "cancel")


def test_append_same_id_again_is_stored_once(store: CallLog) -> None:
    """A record is delivered twice if two processes drain the same spool, or if one of them dies while draining."""
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
def test_calls_table_plain_sql_returns_readable_rows(store: CallLog, query: str) -> None:
    store.append([call(1), call(2, task="other", answer_label="cancel", gold="status"), call(3)])
    with store.reading() as connection:
        rows = connection.execute(text(query)).all()
    assert rows
    if "avg(cost_usd)" in query:
        assert sorted(rows) == [("default", pytest.approx(0.01)), ("other", pytest.approx(0.01))]


def test_move_to_concurrent_drains_move_each_record_once(url: str, tmp_path: Path) -> None:
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


def test_filter_each_attribute_selects_matching_records(store: CallLog) -> None:
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


def test_stats_of_several_calls_are_totals(store: CallLog) -> None:
    assert store.stats()["calls"] == 0
    store.append([call(i, answer_label="cancel" if i % 2 else "refund") for i in range(10)])
    stats = store.stats()
    assert (stats["calls"], stats["route_large"]) == (10, 10)
    assert (stats["compared"], stats["agreeing"]) == (10, 5)
    assert stats["cost_usd"] == pytest.approx(0.1)
    assert (stats["oldest"], stats["newest"]) == (1000.0, 1009.0)


def test_delete_by_subject_or_input_hash_removes_their_calls(store: CallLog) -> None:
    store.append([call(1, subject="jane"), call(2, subject="joe"), call(3)])
    store.append([call(1, subject="jane")])
    assert store.delete(subject="jane") == 2
    assert store.delete(input_hash=hash_input("question 3").hex()) == 1
    assert [r.input for r in everything(store)] == ["question 2"]
    with pytest.raises(StoreError, match="Pass input_hash or subject"):
        store.delete()


def test_delete_sqlite_erases_content_from_files(tmp_path: Path) -> None:
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


def test_delete_concurrent_subjects_removes_each(store: CallLog, url: str) -> None:
    """Concurrent connections delete the records of different subjects."""
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


def test_delete_during_writes_leaves_no_partial_records(store: CallLog, url: str) -> None:
    """Threads repeatedly write the rows of a subject while others delete them."""
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


def test_append_after_failed_transaction_uses_correct_label_sets(store: CallLog) -> None:
    """The failed transaction stored no label set, so the row id that it used may go to another one."""
    with pytest.raises(Exception, match="(?i)overflow|too large|out of range"):
        store.append([call(1, task="first", input_tokens=2**70)])
    store.append([call(2, task="second", labels=("a", "b", "c"), answer_label="a")])
    store.append([call(3, task="first")])
    assert {(record.task, record.labels) for record in everything(store)} == {
        ("second", ("a", "b", "c")),
        ("first", LABELS),
    }


def test_append_same_id_with_other_input_is_rejected(store: CallLog) -> None:
    """The stored record is not replaced, and no other record of the transaction is stored."""
    first = call(1)
    store.append([first])
    for group in ([call(2), call(3, id=first.id)], [call(1), call(4), call(5, id=(twice := call(6)).id), twice]):
        with pytest.raises(RecordRefusedError, match="for another input"):
            store.append(group)
        assert [(one.id, one.input) for one in everything(store)] == [(first.id, first.input)]
    assert store.verify() == []


def test_append_large_mixed_group_round_trips(store: CallLog) -> None:
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


def test_prune_by_age_or_number_deletes_oldest_calls(store: CallLog) -> None:
    store.append([call(i, time=time.time() - (9 - i) * 100) for i in range(10)])
    assert store.prune(max_age_seconds=550) == 4
    assert store.prune(max_records=3) == 3
    assert [r.input for r in everything(store)] == ["question 7", "question 8", "question 9"]
    assert store.prune(max_records=3) == store.prune() == 0


def test_verify_damaged_rows_are_reported(store: CallLog, url: str) -> None:
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


def test_call_log_newer_schema_version_raises(store: CallLog, url: str) -> None:
    with CallLog(url):
        pass
    with store.engine.begin() as connection:
        connection.execute(text("INSERT INTO datashunt_schema (version) VALUES (99)"))
    with pytest.raises(StoreError, match=f"schema version 99, .* only versions up to {FIRST + len(STEPS) - 1}"):
        CallLog(url)


@pytest.mark.parametrize("url", ["nosuch://user:secret@host/x", "mysql+nosuchdriver://user:secret@host/x"])
def test_call_log_unsupported_database_raises_configuration_error(url: str, tmp_path: Path) -> None:
    for make in (CallLog, lambda url: Recorder(url, spool=tmp_path / "spool.db")):
        with pytest.raises(ConfigurationError, match=r"user:\*\*\*@host/x cannot be used") as raised:
            make(url)
        assert "secret" not in str(raised.value)


def test_call_log_schema_before_first_release_raises(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "old.db") as plain:
        plain.execute("CREATE TABLE datashunt_schema (version INTEGER PRIMARY KEY)")
        plain.execute("INSERT INTO datashunt_schema VALUES (4)")
    with pytest.raises(StoreError, match=r"version 4, from before the first release.*Export it"):
        CallLog(tmp_path / "old.db")


def _append_many(url: str, start: int) -> None:
    with CallLog(url) as mine:
        for i in range(start, start + 40, 4):
            mine.append([call(j) for j in range(i, i + 4)])


def test_append_from_several_processes_stores_all(store: CallLog, url: str) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_append_many, args=(url, start)) for start in (0, 20, 100)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert (store.count(), store.count(distinct=True)) == (120, 100)
    assert store.verify() == []


def test_call_log_unusable_database_raises_store_error_without_password(tmp_path: Path) -> None:
    (tmp_path / "no.db").write_text("this is no database, it is a plain text file of some length")
    with pytest.raises(StoreError, match="cannot be used"):
        CallLog(tmp_path / "no.db")
    with pytest.raises(StoreError) as caught:
        CallLog("postgresql+psycopg://user:secret@127.0.0.1:9/none")
    assert "secret" not in str(caught.value)


def test_call_log_read_of_dropped_table_raises_store_error(store: CallLog) -> None:
    store.append([call(1)])
    with store.engine.begin() as connection:
        connection.execute(text("DROP TABLE calls"))
    for read in (store.count, store.stats, store.verify, lambda: everything(store), lambda: store.get(str(uuid4()))):
        with pytest.raises(StoreError, match="cannot be used"):
            read()


def test_call_log_sqlite_file_has_mode_0600(tmp_path: Path) -> None:
    with CallLog(tmp_path / "calls.db") as store:
        store.append([call()])
    assert stat.S_IMODE((tmp_path / "calls.db").stat().st_mode) == 0o600


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=80), st.none() | st.text(max_size=80), st.lists(st.floats(0.01, 1), min_size=3, max_size=3))
def test_append_any_text_and_distribution_round_trips(
    tmp_path_factory: Any, value: str, raw: str | None, p: list[float]
) -> None:
    total = sum(p)
    record = call(input=value, answer=raw, probabilities=tuple(x / total for x in p))
    with CallLog(tmp_path_factory.mktemp("s") / "c.db") as store:
        store.append([record])
        (back,) = everything(store)
    assert (back.input, back.answer) == (as_text(value), raw and as_text(raw))
    assert back.probabilities == pytest.approx(record.probabilities, abs=1e-3)
    assert sum(back.probabilities or ()) == pytest.approx(1.0)


def test_record_wrong_number_of_probabilities_raises() -> None:
    with pytest.raises(DataError, match="`probabilities` for each of the 3 labels, got 2"):
        call(probabilities=(0.5, 0.5))


def test_label_distribution_from_logprobs_sums_to_one() -> None:
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


def test_append_in_atexit_handler_stores_all_records(tmp_path: Path) -> None:
    """The interpreter starts no threads at exit, so `append` must not need one."""
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


def test_stats_repeated_input_counts_each_call(store: CallLog) -> None:
    for i in range(10):
        store.append([call(1, time=1000.0 + i)])
    store.append([call(2, route="small", reason="confident", large_model="", answer_label=None, cost_usd=None)])
    stats = store.stats()
    assert (stats["calls"], stats["route_large"], stats["route_small"]) == (11, 10, 1)
    assert stats["cost_usd"] == pytest.approx(0.1)
    assert stats["input_tokens"] == 1100
    assert isinstance(stats["route_large"], int)
