from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context, copy_context
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from langchain_core.runnables import RunnableLambda

from langchain_datashunt import Retry, ShuntRunnable
from langchain_datashunt.exceptions import LargeTimeoutError
from langchain_datashunt.large_models import CircuitBreaker
from langchain_datashunt.large_models.limits import CallLimiter
from langchain_datashunt.large_models.retry import is_retryable, retry_after
from tests.support.at_once import AtOnce
from tests.support.models import HttpError, WordModel

QUICK = Retry(attempts=3, initial_wait=0.0, jitter=0.0)


class ReadTimeout(Exception):
    """Has the name of the httpx exception."""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (HttpError(429), True),
        (HttpError(500), True),
        (HttpError(529), True),
        (HttpError(400), False),
        (HttpError(401), False),
        (HttpError(404), False),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (ReadTimeout(), True),
        (json.JSONDecodeError("cut", "", 0), True),
        (ValueError("wrong"), False),
    ],
)
def test_is_retryable_transient_errors_only(error: Exception, expected: bool) -> None:
    assert is_retryable(error) is expected


def test_retry_after_seconds_or_date_returns_seconds() -> None:
    assert retry_after(HttpError(429, {"retry-after": "2.5"})) == 2.5
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=30))
    assert retry_after(HttpError(429, {"retry-after": later})) == pytest.approx(30, abs=2)
    assert retry_after(HttpError(429, {"retry-after": "soon"})) is None
    assert retry_after(HttpError(429, {"Retry-After": "1"})) == 1.0
    assert retry_after(HttpError(429)) is None
    assert retry_after(ValueError()) is None


def flaky(*errors: Exception) -> tuple[list[int], object]:
    queue, calls = list(errors), [0]

    def ask() -> str:
        calls[0] += 1
        if queue:
            raise queue.pop(0)
        return "ok"

    return calls, ask


def test_retry_transient_errors_repeats_until_success() -> None:
    calls, ask = flaky(HttpError(500), HttpError(503))
    assert QUICK.call(ask) == "ok"  # type: ignore[arg-type]
    assert calls == [3]


def test_retry_attempts_exhausted_raises_last_error() -> None:
    calls, ask = flaky(HttpError(500), HttpError(502), HttpError(503), HttpError(504))
    with pytest.raises(HttpError, match="503"):
        QUICK.call(ask)  # type: ignore[arg-type]
    assert calls == [3]


def test_retry_permanent_error_is_not_repeated() -> None:
    calls, ask = flaky(HttpError(400))
    with pytest.raises(HttpError, match="400"):
        QUICK.call(ask)  # type: ignore[arg-type]
    assert calls == [1]
    calls, ask = flaky(HttpError(500))
    with pytest.raises(HttpError):
        Retry(attempts=1).call(ask)  # type: ignore[arg-type]
    assert calls == [1]


def test_retry_failed_attempt_passed_in_counts() -> None:
    calls, ask = flaky(HttpError(500), HttpError(500))
    with pytest.raises(HttpError):
        QUICK.call(ask, failed=HttpError(500))  # type: ignore[arg-type]
    assert calls == [2]


async def test_retry_acall_matches_call() -> None:
    for errors, attempts in (([500, 500], 3), ([400], 1)):
        calls, ask = flaky(*map(HttpError, errors))

        async def aask(ask: object = ask) -> str:
            return ask()  # type: ignore[operator, no-any-return]

        if attempts == 3:
            assert await QUICK.acall(aask) == "ok"
        else:
            with pytest.raises(HttpError):
                await QUICK.acall(aask)
        assert calls == [attempts]
    with pytest.raises(HttpError):
        await Retry(attempts=1).acall(aask, failed=HttpError(500))


def test_retry_retry_after_header_is_respected_up_to_max_wait() -> None:
    _, ask = flaky(HttpError(429, {"retry-after": "0.2"}))
    started = time.perf_counter()
    QUICK.call(ask)  # type: ignore[arg-type]
    assert time.perf_counter() - started >= 0.19
    _, ask = flaky(HttpError(429, {"retry-after": "3600"}))
    started = time.perf_counter()
    Retry(attempts=2, initial_wait=0.0, jitter=0.0, max_wait=0.05).call(ask)  # type: ignore[arg-type]
    assert time.perf_counter() - started < 5


def test_call_limiter_threads_stay_within_limit() -> None:
    limiter, at_once = CallLimiter(2), AtOnce()

    def work() -> None:
        with limiter.slot(), at_once:
            time.sleep(0.01)

    threads = [threading.Thread(target=work) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert at_once.most == 2


async def test_call_limiter_tasks_stay_within_limit() -> None:
    limiter, running, most = CallLimiter(3), 0, 0

    async def work() -> None:
        nonlocal running, most
        async with limiter.aslot():
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.005)
            running -= 1

    await asyncio.gather(*(work() for _ in range(12)))
    assert most == 3


async def test_call_limiter_cancelled_waiting_task_takes_no_slot() -> None:
    limiter = CallLimiter(1)
    async with limiter.aslot():
        places = [limiter.aslot() for _ in range(3)]
        waiting = [asyncio.create_task(place.__aenter__(), context=Context()) for place in places]  # unrelated tasks
        await asyncio.sleep(0)
        waiting[1].cancel()
        await asyncio.sleep(0)
    first = await asyncio.wait_for(waiting[0], 1)
    assert first is None
    assert waiting[1].cancelled()
    assert not waiting[2].done(), "the only slot is taken by the first in the queue"
    waiting[2].cancel()


async def test_call_limiter_group_takes_one_slot_per_call() -> None:
    limiter, running, most = CallLimiter(3), 0, 0

    async def group(places: int) -> None:
        nonlocal running, most
        async with limiter.aslot(places):
            used = min(places, 3)
            running += used
            most = max(most, running)
            await asyncio.sleep(0.003)
            running -= used

    await asyncio.gather(*(group(n) for n in (1, 3, 2, 5, 1, 2, 1)))
    assert most == 3


async def test_call_limiter_none_is_unlimited() -> None:
    limiter = CallLimiter(None)
    with limiter.slot():
        async with limiter.aslot():
            assert limiter.bound(None) is None
    assert limiter.bound(4) == 4
    assert CallLimiter(2).bound(4) == 2


BOUNDED = Retry(attempts=1, attempt_seconds=0.3)


@pytest.mark.parametrize("way", ["invoke", "ainvoke", "batch", "abatch"])
async def test_retry_attempt_seconds_excludes_wait_for_slot(way: str) -> None:
    """Make ten calls of 0.1 s, one at a time, each within its limit of 0.3 s."""
    asked: list[Any] = []

    def answer(value: Any) -> str:
        asked.append(value)
        time.sleep(0.1)
        return "x"

    async def aanswer(value: Any) -> str:
        asked.append(value)
        await asyncio.sleep(0.1)
        return "x"

    large: Any = RunnableLambda(answer, afunc=aanswer)
    shunt = ShuntRunnable(small=WordModel(), large=large, pruning=None, retry=BOUNDED, max_concurrency=1)
    texts = [f"refund {i}" for i in range(10)]
    if way == "invoke":
        with ThreadPoolExecutor(10) as pool:
            found = list(pool.map(shunt.invoke, texts))
    elif way == "ainvoke":
        found = list(await asyncio.gather(*map(shunt.ainvoke, texts)))
    else:
        found = shunt.batch(texts) if way == "batch" else await shunt.abatch(texts)
    assert found == ["x"] * 10
    assert len(asked) == 10


@pytest.mark.parametrize("way", ["invoke", "ainvoke", "batch", "astream"])
async def test_retry_attempt_timeout_counts_as_breaker_failure(way: str) -> None:
    done = threading.Event()

    async def hang(value: Any) -> str:
        await asyncio.sleep(30)
        return "x"

    large: Any = RunnableLambda(lambda value: "x" if done.wait(5) else "", afunc=hang)
    breaker = CircuitBreaker(failures=1)
    shunt = ShuntRunnable(small=WordModel(), large=large, pruning=None, retry=BOUNDED, breaker=breaker)
    with pytest.raises(LargeTimeoutError):
        if way == "astream":
            [chunk async for chunk in shunt.astream("refund")]
        elif way == "batch":
            shunt.batch(["refund"])
        else:
            shunt.invoke("refund") if way == "invoke" else await shunt.ainvoke("refund")
    done.set()
    assert breaker.state == "open"


def test_call_limiter_call_inside_own_stream_does_not_deadlock() -> None:
    inner = ShuntRunnable(
        small=WordModel(), large=lambda value: "inner", pruning=None, retry=BOUNDED, max_concurrency=1
    )
    stream = inner.stream("refund")
    assert next(stream) == "inner"
    assert inner.invoke("refund") == "inner"
    stream.close()


async def test_call_limiter_nested_calls_in_tasks_and_threads_share_slot() -> None:
    limiter = CallLimiter(1)

    async def call() -> str:
        async with limiter.aslot():
            return "done"

    async with limiter.aslot():
        assert await asyncio.wait_for(asyncio.gather(call(), call()), 5) == ["done"] * 2
        stranger = asyncio.create_task(call(), context=Context())
        await asyncio.sleep(0.01)
        assert not stranger.done()
    assert await asyncio.wait_for(stranger, 5) == "done"

    def ask() -> str:
        with limiter.slot():
            return "done"

    with ThreadPoolExecutor(1) as pool, limiter.slot():
        assert pool.submit(copy_context().run, ask).result(5) == "done"
        waits = pool.submit(ask)
        with pytest.raises(TimeoutError):
            waits.result(0.05)
    assert waits.result(5) == "done"


def test_call_limiter_stream_ending_in_other_thread_releases_slot() -> None:
    limiter = CallLimiter(1)

    def stream() -> Any:
        with limiter.slot():
            yield 1
            yield 2

    with ThreadPoolExecutor(1) as pool:
        first, second = stream(), stream()
        assert pool.submit(Context().run, next, first).result(5) == 1
        waits = pool.submit(Context().run, next, second)
        with pytest.raises(TimeoutError):
            waits.result(0.05)
        assert list(first) == [2]
        assert waits.result(5) == 1
        second.close()
        assert pool.submit(lambda: list(stream())).result(5) == [1, 2]


def test_call_limiter_group_is_served_despite_steady_single_calls() -> None:
    limiter, stop = CallLimiter(2), threading.Event()

    def singles() -> None:
        while not stop.is_set():
            with limiter.slot():
                time.sleep(0.002)

    threads = [threading.Thread(target=singles) for _ in range(4)]
    for thread in threads:
        thread.start()
    served = threading.Event()

    def group() -> None:
        with limiter.slot(2):
            served.set()

    asking = threading.Thread(target=group)
    asking.start()
    found = served.wait(10)
    stop.set()
    for thread in (*threads, asking):
        thread.join()
    assert found


def test_is_retryable_errors_of_other_http_clients_are_recognised() -> None:
    refused = type("ConnectionError", (OSError,), {})()
    cut = type("ServerDisconnectedError", (type("ClientConnectionError", (Exception,), {}),), {})()
    busy, wrong = type("ClientResponseError", (Exception,), {})(), type("ClientResponseError", (Exception,), {})()
    busy.status, wrong.status = 503, 404
    assert [is_retryable(error) for error in (refused, cut, busy, wrong)] == [True, True, True, False]
