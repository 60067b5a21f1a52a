"""A database that falls silent, a file that is removed, and a disk that is full must not hold or lose calls."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from langchain_datashunt.call_log import CallLog, Recorder, SharedThreshold
from langchain_datashunt.exceptions import ConfigurationError, StoreError
from tests.call_log.test_store import POSTGRES, call, everything, postgres_url
from tests.support.event_loop import longest_hold
from tests.support.silent_proxy import SilentProxy


@pytest.fixture
def silent_postgres() -> Any:
    """A proxy before PostgreSQL, and the URL of a fresh schema behind it."""
    direct = postgres_url()
    schema = direct.rpartition("%3D")[2]
    with SilentProxy(5432) as proxy:
        yield proxy, direct.replace(":5432/", f":{proxy.address}/"), direct
        proxy.silent = False
    engine = create_engine(POSTGRES)
    with engine.begin() as connection:
        connection.execute(text(f"DROP SCHEMA {schema} CASCADE"))
    engine.dispose()


def test_call_log_silent_database_fails_within_timeout(silent_postgres: Any) -> None:
    proxy, url, _ = silent_postgres
    log = CallLog(url, timeout_seconds=0.5)
    log.append([call(1)])
    proxy.silent = True
    for ask in (lambda: log.append([call(2)]), log.count, lambda: CallLog(url, timeout_seconds=1.0)):
        started = time.monotonic()
        with pytest.raises(StoreError):
            ask()
        assert time.monotonic() - started < 8.0
    proxy.silent = False
    log.append([call(3)])
    assert log.count() >= 2
    log.close()


@pytest.mark.parametrize("durability", ["group", "record"])
def test_recorder_silent_database_holds_no_caller_and_loses_nothing(
    silent_postgres: Any, tmp_path: Path, durability: Any
) -> None:
    proxy, url, direct = silent_postgres
    store = CallLog(url, timeout_seconds=1.0)
    recorder = Recorder(
        store, durability=durability, record_seconds=0.5, retry_seconds=0.5, spool=tmp_path / "spool.db"
    )  # fmt: skip
    recorder.record([lambda: call(0)])
    assert recorder.flush(10)
    proxy.silent = True
    waits: list[float] = []

    def answer(first: int) -> None:
        for i in range(first, first + 10):
            started = time.monotonic()
            recorder.record([lambda i=i: call(i)])  # type: ignore[misc]
            waits.append(time.monotonic() - started)

    threads = [threading.Thread(target=answer, args=(10 * n + 1,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(waits) == 40
    assert max(waits) < 3.0, "no caller waits much longer than `record_seconds`"
    proxy.silent = False
    for _ in range(200):
        with CallLog(direct) as log:
            if log.count() == 41:
                break
        time.sleep(0.1)
    recorder.close()
    with CallLog(direct) as log:
        assert len({record.input for record in everything(log)}) == log.count() == 41
    counters = recorder.counters
    assert counters.written + counters.spooled == 41
    assert counters.failed == 0


async def test_recorder_silent_database_does_not_hold_event_loop(silent_postgres: Any, tmp_path: Path) -> None:
    proxy, url, _ = silent_postgres
    recorder = Recorder(
        CallLog(url, timeout_seconds=1.0), durability="record", record_seconds=0.5, spool=tmp_path / "spool.db"
    )  # fmt: skip
    proxy.silent = True
    async with longest_hold() as hold:
        await asyncio.gather(*(recorder.arecord([lambda i=i: call(i)]) for i in range(20)))  # type: ignore[misc]
    assert hold.seconds < 0.25
    proxy.silent = False
    await asyncio.to_thread(recorder.close)


PROGRAM = """
import sys
from langchain_datashunt.call_log import CallLog, CallRecord, Recorder
recorder = Recorder(CallLog(sys.argv[1], timeout_seconds=1.0), spool=sys.argv[2], retry_seconds=0.5)
recorder.record([lambda: CallRecord(input="first", large_model="m")])
recorder.flush()
print("ready", flush=True)
sys.stdin.readline()
for i in range(50):
    recorder.record([lambda i=i: CallRecord(input=f"question {i}", large_model="m")])
"""


def test_recorder_exit_with_silent_database_spools_the_rest(silent_postgres: Any, tmp_path: Path) -> None:
    proxy, url, direct = silent_postgres
    spool = tmp_path / "spool.db"
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, url, str(spool)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert program.stdout is not None
    assert program.stdout.readline().strip() == "ready"
    proxy.silent = True
    started = time.monotonic()
    program.communicate("go\n", timeout=60)
    assert program.returncode == 0
    assert time.monotonic() - started < 45
    with CallLog(spool) as kept, CallLog(direct) as log:
        assert {r.input for r in (*everything(kept), *everything(log))} == {
            "first",
            *(f"question {i}" for i in range(50)),
        }


def test_shared_threshold_silent_database_continues_locally(silent_postgres: Any, caplog: Any) -> None:
    proxy, url, _ = silent_postgres
    threshold = SharedThreshold(CallLog(url, timeout_seconds=0.5), "support", retry_seconds=30.0)
    assert threshold.add(0.9, 0.01) == pytest.approx(0.91)
    proxy.silent = True
    started = time.monotonic()
    assert threshold.add(0.9, 0.01) == pytest.approx(0.92)
    assert time.monotonic() - started < 5.0
    started = time.monotonic()
    assert threshold.get(0.9) == pytest.approx(0.92)
    assert time.monotonic() - started < 0.1, "the database is tried again only after `retry_seconds`"


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_call_log_removed_or_replaced_file_is_opened_again(tmp_path: Path, how: str, caplog: Any) -> None:
    file = tmp_path / "calls.db"
    log, recorder = CallLog(file), Recorder(file)
    recorder.record([lambda: call(1)])
    assert recorder.flush(10)
    for path in tmp_path.glob("calls.db*"):
        path.unlink()
    if how == "replaced":
        with CallLog(tmp_path / "other.db") as other:
            other.append([call(5)])
        os.replace(tmp_path / "other.db", file)
    with caplog.at_level(logging.WARNING):
        recorder.record([lambda: call(2)])
        assert recorder.flush(10)
        log.append([call(3)])
    recorder.close()
    assert "was removed or replaced" in caplog.text
    with CallLog(file) as found:
        assert {r.input for r in everything(found)} >= {"question 2", "question 3"}
    assert log.count() == (3 if how == "replaced" else 2)


def test_call_log_unopenable_path_raises_own_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for wrong in (tmp_path / "file" / "calls.db", tmp_path):
        with pytest.raises(StoreError, match="cannot be opened"):
            CallLog(wrong)
    with pytest.raises(ConfigurationError, match="timeout_seconds"):
        CallLog(tmp_path / "c.db", timeout_seconds=0)


def test_call_log_stopped_lock_holder_fails_within_timeout(tmp_path: Path) -> None:
    holder, log = CallLog(tmp_path / "c.db"), CallLog(tmp_path / "c.db", timeout_seconds=0.3)
    with holder.connection():
        started = time.monotonic()
        with pytest.raises(StoreError):
            log.append([call(1)])
        assert time.monotonic() - started < 3.0
        recorder = Recorder(log, durability="record", record_seconds=0.2, spool=tmp_path / "spool.db")
        started = time.monotonic()
        recorder.record([lambda: call(2)])
        assert time.monotonic() - started < 2.0
    recorder.close()
    assert recorder.counters.spooled == 1


def test_recorder_idle_or_unclosed_keeps_no_thread(tmp_path: Path) -> None:
    def writers() -> int:
        return sum(thread.name == "datashunt-recorder" for thread in threading.enumerate())

    before = writers()
    for i in range(20):
        recorder = Recorder(tmp_path / f"{i}.db", retry_seconds=0.1)
        recorder.record([lambda i=i: call(i)])  # type: ignore[misc]
        assert recorder.flush(10)
        del recorder
    for _ in range(100):
        gc.collect()
        if writers() <= before:
            break
        time.sleep(0.05)
    assert writers() <= before
    again = Recorder(tmp_path / "0.db", retry_seconds=0.1)
    for i in range(3):  # the thread starts again after each pause
        again.record([lambda i=i: call(100 + i)])  # type: ignore[misc]
        assert again.flush(10)
        time.sleep(0.25)
    again.close()
    assert again.counters.written == 3


def test_call_log_in_memory_is_supported() -> None:
    for memory in ("sqlite://", "sqlite:///:memory:"):
        with CallLog(memory) as log:
            log.append([call(1)])
            assert log.count() == 1
