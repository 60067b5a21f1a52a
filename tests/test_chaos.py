"""Fault injection in the large model's API, the disk, the database, the small model, the clock and the process.

docs/security.md documents the expected outcomes.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.runnables import RunnableLambda
from openai import RateLimitError

from langchain_datashunt import Retry, ShuntRunnable
from langchain_datashunt.call_log import CallLog, Recorder
from langchain_datashunt.exceptions import CircuitOpenError, LargeTimeoutError
from langchain_datashunt.large_models import CircuitBreaker
from langchain_datashunt.small_models import TextCNN, TrainingSettings
from langchain_datashunt.small_models.scores import Scores
from tests.routing.test_openai_http import answer, faults, router
from tests.support.faulty_server import FaultyServer
from tests.support.models import LABELS, CountingLarge, WordModel

QUICK = Retry(attempts=4, initial_wait=0.01, max_wait=0.2, jitter=0.05)


# Large model API


async def test_retry_burst_of_429_answers_all_callers() -> None:
    """60 concurrent callers, whose first 90 requests are refused."""
    with FaultyServer(answer, lambda number, body: "429" if number <= 90 else None) as serving:
        chain = router(serving, retry=QUICK.model_copy(update={"attempts": 12}), max_concurrency=20)
        found = await asyncio.gather(*(chain.ainvoke(f"please {LABELS[i % 3]}") for i in range(60)))
        assert found == [LABELS[i % 3] for i in range(60)]
        assert serving.faults == ["429"] * 90


async def test_circuit_breaker_persistent_429_stops_requests() -> None:
    with FaultyServer(answer, lambda number, body: "429") as serving:
        breaker = CircuitBreaker(failures=5, reset_seconds=60.0)
        chain = router(serving, breaker=breaker, max_concurrency=4)
        found = await asyncio.gather(*(chain.ainvoke("my refund") for _ in range(50)), return_exceptions=True)
        assert {type(error) for error in found} <= {CircuitOpenError, RateLimitError}
        assert len(serving.faults) <= 5 + 4, "only requests in flight when the breaker opened"
        small = router(serving, breaker=breaker, on_large_error="small", return_decision=True)
        kept = await small.ainvoke("my refund")
        assert (kept.output, kept.reason) == ("refund", "large_error")


@pytest.mark.parametrize("way", ["invoke", "ainvoke", "batch", "abatch", "astream"])
async def test_retry_slow_drip_response_times_out_and_retries(way: str) -> None:
    """A slow drip of bytes never triggers the client's read timeout, but `attempt_seconds` limits the whole attempt."""
    with FaultyServer(answer, faults("slow-loris"), hang=2.0) as serving:
        chain = router(serving, retry=QUICK.model_copy(update={"attempt_seconds": 0.4}), timeout=1.0)
        started = time.perf_counter()
        text = "my refund"
        if way == "invoke":
            found = chain.invoke(text)
        elif way == "ainvoke":
            found = await chain.ainvoke(text)
        elif way == "astream":
            found = "".join([chunk async for chunk in chain.astream(text)])
        else:
            found = (chain.batch([text]) if way == "batch" else await chain.abatch([text]))[0]
        assert found == "refund"
        assert 0.4 <= time.perf_counter() - started < 1.9, "the second attempt answered"
    with FaultyServer(answer, lambda number, body: "slow-loris", hang=1.0) as serving:
        once = router(serving, retry=Retry(attempts=1, attempt_seconds=0.2), timeout=5.0)
        with pytest.raises(LargeTimeoutError, match="within 0.2 s"):
            await once.ainvoke(text)
        with pytest.raises(LargeTimeoutError, match="within 0.2 s"):
            once.invoke(text)


@pytest.mark.parametrize("fault", ["cut", "cut-at-once"])
async def test_astream_interrupted_stream_yields_only_the_answer(fault: str) -> None:
    """Labels are streamed as a whole, so an interrupted stream can be retried without repeating output.

    Streams of free text raise instead, see test_openai_http.py.
    """
    with FaultyServer(answer, faults(fault)) as serving:
        assert [chunk async for chunk in router(serving).astream("my refund")] == ["refund"]
        assert serving.faults == [fault]


@pytest.mark.parametrize("fault", ["page", "error-body"])
@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
async def test_large_model_invalid_200_response_is_an_error(fault: str, way: str) -> None:
    with FaultyServer(answer, lambda number, body: fault) as serving:
        strict, lenient = router(serving), router(serving, on_large_error="small", return_decision=True)
        with pytest.raises(Exception, match="quota exceeded" if fault == "error-body" else ".") as caught:
            strict.invoke("my refund") if way == "invoke" else await strict.ainvoke("my refund")
        assert not isinstance(caught.value, AssertionError)
        kept = lenient.invoke("my refund") if way == "invoke" else await lenient.ainvoke("my refund")
        assert (kept.output, kept.reason) == ("refund", "large_error")


# Disk and database

FULL_DISK = """
import resource, sys
from langchain_datashunt.call_log import Recorder, CallRecord
recorder = Recorder(sys.argv[1])
recorder.record([lambda: CallRecord(input="before", large_model="m")])
assert recorder.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # no file may grow beyond this limit, as on a full disk
for i in range(4000):
    recorder.record([lambda i=i: CallRecord(input=f"question {i} " + str(hash(str(i))) * 40, large_model="m")])
    if i % 500 == 0:
        recorder.flush()
recorder.flush()
c = recorder.counters
print(c.written, c.spooled, c.failed)
"""


def test_recorder_full_disk_fails_no_call_and_counts_lost_records(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "calls.db")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    written, spooled, failed = map(int, done.stdout.split())
    assert written + spooled + failed == 4001
    assert failed > 0
    assert "log and spool failed" in done.stderr
    with CallLog(tmp_path / "calls.db") as store:
        assert store.verify() == []
        assert store.count() >= written, "all records counted as written are stored"


def test_recorder_locked_database_does_not_block_callers(tmp_path: Path) -> None:
    with Recorder(tmp_path / "calls.db") as recorder:
        recorder.flush()
        other = sqlite3.connect(tmp_path / "calls.db", isolation_level=None, check_same_thread=False)
        other.execute("BEGIN EXCLUSIVE")
        threading.Timer(1.0, lambda: other.execute("COMMIT")).start()
        shunt = ShuntRunnable(small=WordModel(), large=CountingLarge(), recorder=recorder)
        started = time.perf_counter()
        assert [shunt.invoke(f"refund {i}") for i in range(50)] == [f"L:refund {i}" for i in range(50)]
        assert time.perf_counter() - started < 0.9, "no caller waited for the lock"
        assert recorder.flush()
        assert (recorder.counters.written, recorder.counters.failed) == (50, 0)
        other.close()


def test_recorder_dropped_table_spools_records(tmp_path: Path) -> None:
    """Another process drops the table while the recorder runs."""
    folder = tmp_path / "data"
    folder.mkdir()
    with Recorder(folder / "calls.db", spool=tmp_path / "spool.db", retry_seconds=0.1) as recorder:
        shunt = ShuntRunnable(small=WordModel(), large=CountingLarge(), recorder=recorder)
        shunt.invoke("refund 0")
        recorder.flush()
        with CallLog(folder / "calls.db") as store, store.connection() as connection:
            connection.exec_driver_sql("DROP TABLE calls")
        shunt.invoke("refund 1")
        recorder.flush()
        counters = recorder.counters
        assert (counters.spooled, counters.failed) == (1, 0)
    with CallLog(tmp_path / "spool.db") as spool:
        assert [record.input for part in spool.iterate() for record in part] == ["refund 1"]


# Small model


class Broken(WordModel):
    """Small model that fails in the given way."""

    fault: str = "none"

    def predict_scores(self, texts: Any) -> Scores:
        scores = super().predict_scores(texts)
        logits = np.asarray(scores.logits, dtype=np.float64)
        if self.fault == "out of memory":
            raise MemoryError("cannot allocate 40 GiB")
        if self.fault == "out of GPU memory":
            import torch

            raise torch.OutOfMemoryError("CUDA out of memory")
        if self.fault == "nan":
            return Scores(np.full_like(logits, np.nan), None)
        if self.fault == "infinite":
            return Scores(np.full_like(logits, np.inf), None)
        if self.fault == "too few columns":
            return Scores(logits[:, :2], None)
        if self.fault == "too few rows":
            return Scores(logits[:-1], None)
        raise AssertionError(self.fault)


FAULTS = ["out of memory", "out of GPU memory", "nan", "infinite"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("way", ["invoke", "ainvoke", "batch", "abatch"])
async def test_shunt_failing_small_model_defers(fault: str, way: str) -> None:
    shunt = ShuntRunnable(small=Broken(fault=fault), large=CountingLarge(), return_decision=True)
    texts = ["surely refund", "surely cancel"]
    if way == "invoke":
        found = [shunt.invoke(text) for text in texts]
    elif way == "ainvoke":
        found = list(await asyncio.gather(*(shunt.ainvoke(text) for text in texts)))
    else:
        found = shunt.batch(texts) if way == "batch" else await shunt.abatch(texts)
    assert [(one.output, one.route, one.reason) for one in found] == [(f"L:{t}", "large", "small_error") for t in texts]


# Clock


def test_wall_clock_jumps_do_not_affect_retries_breaker_or_recorder(monkeypatch: Any, tmp_path: Path) -> None:
    """The wall clock jumps by days at each call. Retries, breaker and recorder use the monotonic clock."""
    real, rng = time.time, random.Random(0)
    monkeypatch.setattr(time, "time", lambda: real() + rng.uniform(-1e6, 1e6))
    breaker = CircuitBreaker(failures=2, reset_seconds=0.2)
    with FaultyServer(answer, faults("429", None, "500", "500"), retry_after="0") as serving:
        with Recorder(tmp_path / "calls.db", retry_seconds=0.1, sample_small=1.0) as recorder:
            chain = router(serving, retry=QUICK, breaker=breaker, recorder=recorder)
            started = time.monotonic()
            assert chain.invoke("my refund") == "refund"
            with pytest.raises(CircuitOpenError):
                chain.invoke("my refund now")
            time.sleep(0.25)
            assert chain.invoke("my refund then") == "refund", "the breaker allows a new attempt after `reset_seconds`"
            assert time.monotonic() - started < 5.0
            assert recorder.flush(10.0)
            assert recorder.counters.written == 3
        with CallLog(tmp_path / "calls.db") as store:
            assert store.verify() == []


# Event loops and processes


def test_shunt_closed_event_loop_does_not_affect_later_calls() -> None:
    """Tasks end with their event loop. Calls in later loops and from threads still work."""

    async def wait(asked: Any) -> str:
        await asyncio.sleep(0.3)
        return f"L:{asked['input']}"

    slow: Any = RunnableLambda(lambda asked: f"L:{asked['input']}", afunc=wait)
    shunt = ShuntRunnable(small=WordModel(), large=slow, max_concurrency=2)

    async def left_alone() -> None:
        for i in range(8):
            asyncio.ensure_future(shunt.ainvoke(f"refund {i}"))  # noqa: RUF006
        await asyncio.sleep(0.05)

    for _ in range(3):
        asyncio.run(left_alone())

    async def served() -> list[str]:
        return list(await asyncio.gather(*(shunt.ainvoke(f"refund {i}") for i in range(4))))

    started = time.perf_counter()
    assert asyncio.run(served()) == [f"L:refund {i}" for i in range(4)]
    assert time.perf_counter() - started < 2.0
    assert shunt.invoke("refund") == "L:refund"


BATCH = """
import sys, time
from langchain_datashunt import Prediction, ShuntRunnable
from langchain_datashunt.call_log import Recorder

def small(text):
    sure = 0.99 if text.startswith("sure") else 0.4
    return Prediction.from_probabilities({"a": sure, "b": 1 - sure})

def large(asked):
    print("asked", flush=True)
    time.sleep(30)
    return "b"

recorder = Recorder(sys.argv[1], sample_small=1.0)
shunt = ShuntRunnable(small=small, large=large, pruning=None, recorder=recorder, max_concurrency=1)
for i in range(20):
    shunt.invoke(f"sure {i}")
shunt.batch([f"sure in a batch {i}" for i in range(5)] + ["doubtful"])
"""


def test_recorder_sigterm_during_batch_keeps_answered_calls(tmp_path: Path) -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", BATCH, str(tmp_path / "calls.db")], stdout=subprocess.PIPE, text=True
    )
    assert program.stdout is not None
    assert program.stdout.readline() == "asked\n"
    program.send_signal(signal.SIGTERM)
    assert program.wait(20) == -signal.SIGTERM
    program.stdout.close()
    with CallLog(tmp_path / "calls.db") as store:
        inputs = {record.input for part in store.iterate() for record in part}
        assert {f"sure {i}" for i in range(20)} <= inputs
        assert "doubtful" not in inputs, "this call was not answered"
        assert store.verify() == []


def test_shunt_forked_after_loading_predicts_and_records(tmp_path: Path) -> None:
    texts = ["where is it", "where is my order", "money back", "a refund please"] * 3
    small = TextCNN.train(
        texts, ["status", "status", "refund", "refund"] * 3, settings=TrainingSettings(progress=False)
    )
    with Recorder(tmp_path / "calls.db", sample_small=1.0) as recorder:
        shunt = ShuntRunnable(small=small, large=CountingLarge(), recorder=recorder)
        before = shunt.invoke("money back")
        recorder.flush()
        child = os.fork()
        if child == 0:
            signal.alarm(25)  # a hanging child fails the test instead of blocking it
            same = shunt.invoke("money back") == before and shunt.batch(["money back"] * 3) == [before] * 3
            os._exit(0 if same and shunt.recorder.flush(20) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert shunt.invoke("money back") == before
    with CallLog(tmp_path / "calls.db") as store:
        assert store.stats()["calls"] == 6
