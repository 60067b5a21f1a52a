from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.runnables import Runnable, RunnableLambda

from langchain_datashunt import AlwaysLarge, NoPruning, Retry, ShuntRunnable, SubtaskShunt
from langchain_datashunt.exceptions import CircuitOpenError, ConfigurationError, LocalOnlyError, QueueFullError
from langchain_datashunt.large_models import CircuitBreaker
from langchain_datashunt.large_models.limits import CallLimiter
from langchain_datashunt.routing import Subtask
from tests.support.handlers import RunBook
from tests.support.models import HttpError, WordModel


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Flaky(Runnable[Any, Any]):
    """A large model that fails while `error` is set, and counts its calls."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.calls = error, 0

    def invoke(self, input: Any, config: Any = None, **kwargs: Any) -> Any:
        self.calls += 1
        if self.error is not None:
            raise self.error
        return "large"


def shunt(large: Any, breaker: CircuitBreaker | None, **settings: Any) -> ShuntRunnable:
    given: dict[str, Any] = {"policy": AlwaysLarge(), "pruning": NoPruning(), "retry": Retry(attempts=1)}
    return ShuntRunnable(small=WordModel(), large=large, breaker=breaker, **{**given, **settings})


def test_circuit_breaker_consecutive_failures_open_then_probe_closes() -> None:
    clock, large = Clock(), Flaky(HttpError(503))
    breaker = CircuitBreaker(failures=3, reset_seconds=10.0, clock=clock)
    chain = shunt(large, breaker)
    for _ in range(3):
        with pytest.raises(HttpError):
            chain.invoke("refund")
    assert breaker.state == "open"
    with pytest.raises(CircuitOpenError, match="3 times in a row.*10.0 s") as caught:
        chain.invoke("refund")
    assert (caught.value.failures, caught.value.seconds) == (3, 10.0)
    assert large.calls == 3
    clock.now += 10.1
    assert breaker.state == "half-open"
    with pytest.raises(HttpError):
        chain.invoke("refund")  # the probe fails and doubles the wait
    clock.now += 10.1
    with pytest.raises(CircuitOpenError):
        chain.invoke("refund")
    clock.now += 10.0
    large.error = None
    assert chain.invoke("refund") == "large"
    assert breaker.state == "closed"
    assert breaker.counters.opened == 2
    assert breaker.counters.refused == 2
    assert breaker.counters.probes == 2


def test_circuit_breaker_open_with_small_fallback_answers_locally() -> None:
    large = Flaky(HttpError(503))
    chain = shunt(large, CircuitBreaker(failures=2), on_large_error="small", return_decision=True)
    book = RunBook()
    results = [chain.invoke("refund", {"callbacks": [book]}) for _ in range(5)]
    assert {(one.output, one.reason) for one in results} == {("refund", "large_error")}
    assert large.calls == 2
    assert "circuit breaker is open" in str(results[-1].decision.error)
    book.assert_balanced()


@pytest.mark.parametrize("error", [ValueError("wrong"), HttpError(400), HttpError(401)])
def test_circuit_breaker_invalid_request_stays_closed(error: Exception) -> None:
    breaker = CircuitBreaker(failures=1)
    with pytest.raises(type(error)):
        shunt(Flaky(error), breaker).invoke("x")
    assert breaker.state == "closed"


async def test_circuit_breaker_every_call_method_counts_failures() -> None:
    for way in ("invoke", "ainvoke", "batch", "abatch", "stream", "astream", "as_completed"):
        breaker, large = CircuitBreaker(failures=2, reset_seconds=1000), Flaky(HttpError(503))
        chain = shunt(large, breaker)
        for _ in range(4):
            with pytest.raises((HttpError, CircuitOpenError)):
                if way == "invoke":
                    chain.invoke("x")
                elif way == "ainvoke":
                    await chain.ainvoke("x")
                elif way == "batch":
                    chain.batch(["x"])
                elif way == "abatch":
                    await chain.abatch(["x"])
                elif way == "stream":
                    list(chain.stream("x"))
                elif way == "astream":
                    [chunk async for chunk in chain.astream("x")]
                else:
                    list(chain.batch_as_completed(["x"]))
        assert (large.calls, breaker.state, breaker.counters.refused) == (2, "open", 2), way


def test_circuit_breaker_opening_stops_retries_and_batch_counts_inputs() -> None:
    large, breaker = Flaky(HttpError(503)), CircuitBreaker(failures=3)
    chain = shunt(large, breaker, retry=Retry(attempts=10, initial_wait=0.0, jitter=0.0))
    with pytest.raises(CircuitOpenError):
        chain.invoke("x")
    assert large.calls == 3
    breaker = CircuitBreaker(failures=3)
    found = shunt(Flaky(HttpError(503)), breaker).batch(["a", "b", "c", "d"], return_exceptions=True)
    assert {type(one) for one in found} == {HttpError}
    assert breaker.state == "open"
    mixed = CircuitBreaker(failures=2)
    half = RunnableLambda(lambda asked: "fine" if asked["input"] == "good" else (_ for _ in ()).throw(HttpError(503)))
    assert shunt(half, mixed).batch(["bad", "good", "bad", "good"], return_exceptions=True)[1] == "fine"
    assert mixed.state == "closed"


def test_circuit_breaker_half_open_limits_concurrent_probes() -> None:
    clock = Clock()
    breaker = CircuitBreaker(failures=1, reset_seconds=1.0, probes=2, clock=clock)
    breaker.note(HttpError(500))
    clock.now += 2
    assert breaker.admit()
    assert breaker.admit()
    with pytest.raises(CircuitOpenError, match="a trial call is running"):
        breaker.admit()
    breaker.note(asyncio.CancelledError(), probe=True)  # ignored, and releases its probe slot
    assert breaker.admit()
    breaker.note(None, probe=True)
    assert breaker.state == "closed"


@given(st.lists(st.sampled_from(["ok", "bad", "wrong", "wait", "cancel"]), max_size=60))
def test_circuit_breaker_any_sequence_can_close_again(steps: list[str]) -> None:
    clock = Clock()
    breaker = CircuitBreaker(failures=2, reset_seconds=1.0, clock=clock)
    for step in steps:
        if step == "wait":
            clock.now += 0.7
            continue
        try:
            probe = breaker.admit()
        except CircuitOpenError:
            continue
        ends = {"ok": None, "bad": HttpError(503), "wrong": ValueError(), "cancel": asyncio.CancelledError()}
        breaker.note(ends[step], probe=probe)
    clock.now += 100.0
    probe = breaker.admit()
    breaker.note(None, probe=probe)
    assert breaker.state == "closed"


def test_circuit_breaker_threads_share_one_state() -> None:
    breaker, large = CircuitBreaker(failures=5, reset_seconds=1000), Flaky(HttpError(503))
    chain = shunt(large, breaker, on_large_error="small")
    threads = [threading.Thread(target=lambda: [chain.invoke("refund") for _ in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert breaker.state == "open"
    assert large.calls < 5 + 8
    assert breaker.counters.refused + large.calls == 400


def test_circuit_breaker_copies_share_state_and_pickles_reset_it() -> None:
    breaker = CircuitBreaker(failures=1)
    chain = shunt(Flaky(), breaker)
    assert copy.deepcopy(chain).breaker is breaker
    assert chain.model_copy(update={"shadow": True}).breaker is breaker
    breaker.note(HttpError(500))
    again = pickle.loads(pickle.dumps(breaker))
    assert (again.state, again.failures) == ("closed", 1)
    for wrong in ({"failures": 0}, {"probes": 0}, {"reset_seconds": 0.0}, {"reset_seconds": float("nan")}):
        with pytest.raises(ConfigurationError):
            CircuitBreaker(**wrong)  # type: ignore[arg-type]


def test_max_pending_full_queue_raises_queue_full() -> None:
    guard = threading.Event()

    def slow(_: Any) -> str:
        guard.wait(10)
        return "large"

    limiter = CallLimiter(1)
    chain = shunt(RunnableLambda(slow), None, max_pending=2, limiter=limiter)
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(chain.invoke("x"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    while limiter.pending < 2:
        pass
    with pytest.raises(QueueFullError, match="max_pending"):
        chain.invoke("x")
    with pytest.raises(QueueFullError):
        next(chain.stream("x"))
    guard.set()
    for thread in threads:
        thread.join()
    assert found == ["large", "large"]
    too_many = chain.batch(["a", "b", "c"], return_exceptions=True)
    assert {type(one) for one in too_many} == {QueueFullError}
    assert chain.batch(["a", "b"]) == ["large", "large"]


async def test_max_pending_full_queue_with_small_fallback_answers_locally() -> None:
    async def slow(_: Any) -> str:
        await asyncio.sleep(0.2)
        return "large"

    chain = shunt(RunnableLambda(lambda _: "x", afunc=slow), None, max_pending=3, on_large_error="small")
    answers = await asyncio.gather(*(chain.ainvoke("refund") for _ in range(10)))
    assert sorted(answers) == ["large"] * 3 + ["refund"] * 7


def test_subtask_shunt_breaker_open_raises_circuit_open() -> None:
    breaker, large = CircuitBreaker(failures=1), Flaky(HttpError(503))
    parts = (Subtask(name="reply"),)
    triage = SubtaskShunt(subtasks=parts, large=large, breaker=breaker, retry=Retry(attempts=1))
    for error in (HttpError, CircuitOpenError):
        with pytest.raises(error):
            triage.invoke("x")
    assert large.calls == 1


def test_circuit_breaker_error_before_request_is_ignored() -> None:
    clock, breaker = Clock(), CircuitBreaker(failures=2, reset_seconds=10.0)
    breaker._clock = clock
    breaker.note(HttpError(503))
    breaker.note(LocalOnlyError("a rule of yours keeps it here"))
    breaker.note(KeyError("a variable of the prompt"))
    breaker.note(HttpError(503))
    assert breaker.state == "open", "two failures in a row"
    clock.now += 10.1
    with pytest.raises(LocalOnlyError), breaker.watching():
        raise LocalOnlyError("a rule of yours keeps it here")
    assert breaker.state == "half-open", "the model was not called"
    with pytest.raises(HttpError), breaker.watching():
        raise HttpError(400)
    assert breaker.state == "closed", "a 400 shows that the model responds"


@pytest.mark.parametrize("down", [True, False])
@pytest.mark.parametrize("way", ["batch", "abatch"])
async def test_circuit_breaker_half_open_batch_makes_one_probe(down: bool, way: str) -> None:
    clock, large = Clock(), Flaky(HttpError(503))
    breaker = CircuitBreaker(failures=1, reset_seconds=10.0, clock=clock)
    chain = shunt(large, breaker)
    with pytest.raises(HttpError):
        chain.invoke("refund")
    clock.now += 10.1
    large.calls, large.error = 0, HttpError(503) if down else None
    inputs = [f"refund {i}" for i in range(20)]
    if way == "batch":
        found = chain.batch(inputs, return_exceptions=True)
    else:
        found = await chain.abatch(inputs, return_exceptions=True)
    assert large.calls == (1 if down else 20)
    assert breaker.counters.probes == 1
    assert [type(one) for one in found] == ([HttpError] + [CircuitOpenError] * 19 if down else [str] * 20)
