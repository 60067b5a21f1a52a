"""Dynamic batching and the cache of small models."""

from __future__ import annotations

import asyncio
import copy
import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.runnables import RunnableLambda
from langchain_core.tracers.base import BaseTracer
from langchain_core.tracers.context import collect_runs

from langchain_datashunt import AlwaysSmall, EmbeddingClassifier, Prediction, ShuntRunnable, Threshold, load_small_model
from langchain_datashunt.exceptions import ConfigurationError, InputError, PredictionError, QueueFullError
from langchain_datashunt.small_models import BundledSmallModel, CachedEmbeddings, Scores, TrainingSettings
from langchain_datashunt.small_models.engine.devices import share_of_threads
from langchain_datashunt.small_models.serving.caching import ResultCache
from langchain_datashunt.small_models.serving.dynamic_batching import DynamicBatcher, DynamicBatching
from langchain_datashunt.small_models.serving.serving import Serving
from tests.support.at_once import AtOnce
from tests.support.handlers import RunBook
from tests.support.models import LABELS, LetterEmbeddings, WordModel, failing_word_model


class Gated:
    """Doubles its inputs. A batch that contains "stop" waits until the gate is opened."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.batches: list[list[Any]] = []
        self.threads: list[int] = []

    def __call__(self, values: list[Any]) -> Sequence[Any]:
        self.batches.append(values)
        self.threads.append(threading.get_ident())
        if "stop" in values:
            self.entered.set()
            assert self.gate.wait(20)
        return [value * 2 for value in values]


def batcher_of(compute: Callable[[list[Any]], Sequence[Any]], workers: int = 1, **settings: Any) -> DynamicBatcher:
    return DynamicBatcher(compute, DynamicBatching(**settings), workers)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "the condition was not met within 20 seconds"
        time.sleep(0.001)


class TestBatching:
    def test_call_idle_model_computes_in_calling_thread(self) -> None:
        gated = Gated()
        assert batcher_of(gated).call(3) == 6
        assert gated.threads == [threading.get_ident()]

    def test_call_busy_model_batches_waiting_requests_in_order(self) -> None:
        gated = Gated()
        batcher = batcher_of(gated, max_batch=4)
        with ThreadPoolExecutor(20) as pool:
            first = pool.submit(batcher.call, "stop")
            assert gated.entered.wait(20)
            rest = []
            for number in range(10):
                rest.append(pool.submit(batcher.call, number))
                until(lambda n=number: batcher.waiting == n + 1)  # type: ignore[misc]
            gated.gate.set()
            assert first.result(20) == "stopstop"
            assert [each.result(20) for each in rest] == [2 * number for number in range(10)]
        assert gated.batches == [["stop"], [0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        assert (batcher.batches, batcher.requests, batcher.waiting) == (4, 11, 0)

    async def test_acall_busy_model_batches_coroutines_off_event_loop(self) -> None:
        gated = Gated()
        batcher = batcher_of(gated, max_batch=100)
        first = asyncio.create_task(batcher.acall("stop"))
        await asyncio.to_thread(gated.entered.wait, 20)
        rest = [asyncio.create_task(batcher.acall(number)) for number in range(50)]
        await asyncio.sleep(0)
        gated.gate.set()
        assert await asyncio.gather(*rest) == [2 * number for number in range(50)]
        assert await first == "stopstop"
        assert gated.batches == [["stop"], list(range(50))]
        assert threading.get_ident() not in gated.threads

    def test_call_several_workers_computes_batches_concurrently(self) -> None:
        barrier = threading.Barrier(3)

        def compute(values: list[Any]) -> list[Any]:
            barrier.wait(20)  # breaks unless three batches are computed concurrently
            return values

        batcher = batcher_of(compute, workers=3, max_batch=1)
        with ThreadPoolExecutor(6) as pool:
            assert sorted(pool.map(batcher.call, range(6))) == list(range(6))

    async def test_acall_idle_workers_reuses_most_recent_worker(self) -> None:
        """The most recent worker has warm caches. If idle workers took turns, all would have cold caches."""
        gates = [threading.Event(), threading.Event()]
        ran: dict[int, int] = {}

        def compute(values: list[Any]) -> list[Any]:
            ran[values[0]] = threading.get_ident()
            assert values[0] > 1 or gates[values[0]].wait(20)
            return values

        batcher = batcher_of(compute, workers=2, max_batch=1)
        both = [asyncio.create_task(batcher.acall(i)) for i in (0, 1)]
        await asyncio.to_thread(until, lambda: len(ran) == 2)
        for i in (1, 0):
            gates[i].set()
            await both[i]
            await asyncio.to_thread(until, lambda left=i: batcher._busy == left)  # type: ignore[misc]
        for i in range(2, 6):
            assert await batcher.acall(i) == i
            await asyncio.to_thread(until, lambda: batcher._busy == 0)
        assert ran[0] != ran[1]
        assert [ran[i] for i in range(2, 6)] == [ran[0]] * 4

    def test_batcher_threads_and_event_loops_returns_matching_answers(self) -> None:
        batcher = batcher_of(lambda values: [value * 2 for value in values], workers=2, max_batch=8)

        async def many(start: int) -> list[int]:
            return await asyncio.gather(*(batcher.acall(start + i) for i in range(200)))

        with ThreadPoolExecutor(8) as pool:
            loops = [pool.submit(lambda start=1000 * i: asyncio.run(many(start))) for i in range(4)]  # type: ignore[misc]
            threads = [pool.submit(lambda start=i: [batcher.call(start + j) for j in range(200)]) for i in range(4)]  # type: ignore[misc]
            for i, loop in enumerate(loops):
                assert loop.result(30) == [2 * (1000 * i + j) for j in range(200)]
            for i, thread in enumerate(threads):
                assert thread.result(30) == [2 * (i + j) for j in range(200)]
        assert batcher.requests == 1600
        assert batcher.waiting == 0


class TestFailures:
    @staticmethod
    def odd_fail(values: list[Any]) -> list[Any]:
        if any(value % 7 == 3 for value in values):
            raise ValueError(f"cannot do {values}")
        return [value * 2 for value in values]

    def test_call_failing_batch_fails_only_bad_inputs(self) -> None:
        gated = Gated()

        def compute(values: list[Any]) -> Sequence[Any]:
            return gated(values) if values == ["stop"] else self.odd_fail(values)

        batcher = batcher_of(compute)
        with ThreadPoolExecutor(30) as pool:
            first = pool.submit(batcher.call, "stop")
            assert gated.entered.wait(20)
            rest = {number: pool.submit(batcher.call, number) for number in range(20)}
            until(lambda: batcher.waiting == 20)
            gated.gate.set()
            first.result(20)
            for number, each in rest.items():
                if number % 7 == 3:
                    with pytest.raises(ValueError, match=rf"cannot do \[{number}\]"):
                        each.result(20)
                else:
                    assert each.result(20) == 2 * number

    async def test_batcher_system_exit_raises_and_keeps_serving(self) -> None:
        def compute(values: list[Any]) -> list[Any]:
            if values == ["leave"]:
                raise SystemExit(3)
            return values

        batcher = batcher_of(compute)
        with pytest.raises(SystemExit):  # computed in this thread
            batcher.call("leave")
        with pytest.raises(PredictionError, match="raised SystemExit: 3"):  # computed in a worker thread
            await batcher.acall("leave")
        assert batcher.call("stay") == "stay"
        assert await batcher.acall("stay") == "stay"

    async def test_acall_base_exception_fails_only_bad_input(self) -> None:
        """Extension modules raise such errors, and these must not end the worker thread."""

        class Panic(BaseException):
            pass

        gate = threading.Event()

        def compute(values: list[Any]) -> list[Any]:
            gate.wait(20)
            if 3 in values:
                raise Panic("three")
            return values

        batcher = batcher_of(compute)
        calls = [asyncio.create_task(batcher.acall(number)) for number in range(6)]
        await asyncio.sleep(0.05)
        gate.set()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert [answer for answer in answers if isinstance(answer, int)] == [0, 1, 2, 4, 5]
        assert isinstance(answers[3], PredictionError)
        assert "raised Panic: three" in str(answers[3])

    async def test_batcher_wrong_answer_count_raises_and_keeps_serving(self) -> None:
        batcher = batcher_of(lambda values: [] if "lost" in values else values)
        for _ in range(2):
            with pytest.raises(PredictionError, match="0 answers for 1 inputs"):
                await asyncio.wait_for(batcher.acall("lost"), 20)
            with pytest.raises(PredictionError, match="0 answers for 1 inputs"):
                batcher.call("lost")
        assert await asyncio.wait_for(batcher.acall("kept"), 20) == "kept"

    async def test_acall_failing_worker_preparation_still_answers(self) -> None:
        def fail(workers: int) -> None:
            raise RuntimeError("no")

        def count() -> int:
            raise RuntimeError("no")

        batcher = DynamicBatcher(lambda values: values, DynamicBatching(), count, fail)
        assert await asyncio.wait_for(asyncio.gather(*(batcher.acall(i) for i in range(50))), 20) == list(range(50))

    def test_small_model_without_torch_predicts(self) -> None:
        program = """
import asyncio, sys
sys.modules["torch"] = None
from tests.support.models import WordModel
model = WordModel()
print(asyncio.run(model.ainvoke("surely refund")).label, model.invoke("surely cancel").label)
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout == "refund cancel\n"

    async def test_small_model_reentrant_invoke_predicts(self) -> None:
        class Halves(WordModel):
            def predict_scores(self, texts: Sequence[str]) -> Scores:
                for text in texts:
                    if ";" in text:
                        self.invoke(text.split(";")[0])
                return super().predict_scores(texts)

        model = Halves(dynamic_batching=DynamicBatching(workers=1))
        assert model.invoke("surely refund; no").label == "refund"
        found = await asyncio.wait_for(asyncio.gather(*(model.ainvoke(f"surely refund; {i}") for i in range(20))), 20)
        assert {one.label for one in found} == {"refund"}

    def test_acall_no_thread_available_computes_in_caller(self, monkeypatch: Any) -> None:
        at_once = AtOnce()

        def compute(values: list[Any]) -> list[Any]:
            with at_once:
                time.sleep(0.01)
            return values

        batcher = batcher_of(compute, workers=1)
        start = threading.Thread.start

        def refuse(thread: threading.Thread) -> None:
            if thread.name.startswith("datashunt"):
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", refuse)
        assert asyncio.run(asyncio.wait_for(batcher.acall(1), 20)) == 1
        assert asyncio.run(asyncio.wait_for(batcher.acall(2), 20)) == 2
        monkeypatch.undo()

        async def many() -> list[Any]:
            return await asyncio.gather(*(batcher.acall(i) for i in range(100)))

        assert asyncio.run(asyncio.wait_for(many(), 20)) == list(range(100))
        until(lambda: batcher._busy == 0)
        assert at_once.most == 1

    async def test_acall_stop_iteration_raises_runtime_error(self) -> None:
        def compute(values: list[Any]) -> list[Any]:
            raise StopIteration

        with pytest.raises(RuntimeError, match="StopIteration"):
            await batcher_of(compute).acall(1)

    def test_call_full_queue_raises_queue_full_error(self) -> None:
        gated = Gated()
        batcher = batcher_of(gated, max_waiting=2)
        with ThreadPoolExecutor(4) as pool:
            first = pool.submit(batcher.call, "stop")
            assert gated.entered.wait(20)
            two = [pool.submit(batcher.call, number) for number in range(2)]
            until(lambda: batcher.waiting == 2)
            with pytest.raises(QueueFullError, match=r"2 requests are waiting.*max_waiting"):
                batcher.call(9)
            gated.gate.set()
            assert [each.result(20) for each in (first, *two)] == ["stopstop", 0, 2]
        assert batcher.call(9) == 18

    @pytest.mark.parametrize("bound", [0, 2])
    async def test_acall_burst_at_idle_model_admits_max_waiting_plus_one(self, bound: int) -> None:
        """A burst at an idle model computes one request and queues `max_waiting`, even while a worker is starting."""
        gated = Gated()
        batcher = batcher_of(gated, max_waiting=bound, max_batch=1)
        calls = [asyncio.create_task(batcher.acall("stop")) for _ in range(bound + 3)]
        await asyncio.sleep(0)
        gated.gate.set()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert answers[: bound + 1] == ["stopstop"] * (bound + 1)
        assert all(isinstance(answer, QueueFullError) for answer in answers[bound + 1 :])

    def test_acall_closed_event_loop_still_answers_others(self) -> None:
        gated = Gated()
        batcher = batcher_of(gated)
        loop = asyncio.new_event_loop()
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(batcher.call, "stop")
            assert gated.entered.wait(20)
            gone = loop.create_task(batcher.acall(1))
            loop.run_until_complete(asyncio.sleep(0))
            other = pool.submit(batcher.call, 2)
            until(lambda: batcher.waiting == 2)
            loop.close()
            gated.gate.set()
            assert (first.result(20), other.result(20)) == ("stopstop", 4)
        assert not gone.done()
        with pytest.raises(RuntimeError):
            gone.get_coro().throw(RuntimeError)  # type: ignore[union-attr]  # ends the coroutine, so that Python does not warn


class TestCancellation:
    async def test_acall_cancelled_in_queue_is_not_computed(self) -> None:
        gated = Gated()
        batcher = batcher_of(gated)
        first = asyncio.create_task(batcher.acall("stop"))
        await asyncio.to_thread(gated.entered.wait, 20)
        rest = [asyncio.create_task(batcher.acall(number)) for number in range(6)]
        await asyncio.sleep(0)
        for task in rest[::2]:
            task.cancel()
        await asyncio.sleep(0)
        assert batcher.waiting == 3
        gated.gate.set()
        answers = await asyncio.gather(first, *rest, return_exceptions=True)
        assert [answer for answer in answers if not isinstance(answer, BaseException)] == ["stopstop", 2, 6, 10]
        assert gated.batches == [["stop"], [1, 3, 5]]

    async def test_acall_cancelled_while_model_busy_releases_inputs(self) -> None:
        class Question:
            pass

        gated = Gated()
        batcher = batcher_of(gated)
        first = asyncio.create_task(batcher.acall("stop"))
        await asyncio.to_thread(gated.entered.wait, 20)
        stays = asyncio.create_task(batcher.acall(4))
        questions = [Question() for _ in range(500)]
        alive = weakref.WeakSet(questions)
        calls = [asyncio.create_task(batcher.acall(question)) for question in questions]
        await asyncio.sleep(0)
        assert batcher.waiting == 501
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        del questions, calls, call
        await asyncio.sleep(0)  # the callback that wakes this test still refers to their errors
        gc.collect()
        assert (batcher.waiting, len(alive)) == (1, 0)
        assert len(batcher._line) < 100
        gated.gate.set()
        assert await asyncio.gather(first, stays) == ["stopstop", 8]
        assert gated.batches == [["stop"], [4]]

    async def test_acall_cancelled_during_computation_leaves_others_unaffected(self) -> None:
        gated = Gated()
        batcher = batcher_of(gated)
        first = asyncio.create_task(batcher.acall("stop"))
        await asyncio.to_thread(gated.entered.wait, 20)
        first.cancel()
        second = asyncio.create_task(batcher.acall(4))
        await asyncio.sleep(0)
        gated.gate.set()
        assert await second == 8
        assert first.cancelled()

    async def test_shunt_timeout_removes_request_from_queue(self) -> None:
        class Slow(WordModel):
            def predict_scores(self, texts: Sequence[str]) -> Scores:
                time.sleep(0.2)
                return super().predict_scores(texts)

        model = Slow(dynamic_batching=DynamicBatching(workers=1, max_batch=1))
        shunt = ShuntRunnable(small=model, large=RunnableLambda(lambda x: "L"), policy=AlwaysSmall(), pruning=None)
        assert await shunt.ainvoke("status") == "status"
        first = asyncio.create_task(shunt.ainvoke("cancel"))
        await asyncio.sleep(0.05)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(shunt.ainvoke("refund"), 0.02)
        assert await first == "cancel"
        await asyncio.sleep(0.3)
        assert model._calls == [1, 1]


class TestClosing:
    def test_close_queued_requests_answers_them_and_later_ones(self) -> None:
        gated = Gated()
        batcher = batcher_of(gated)
        with ThreadPoolExecutor(4) as pool:
            calls = [pool.submit(batcher.call, "stop")]
            assert gated.entered.wait(20)
            calls += [pool.submit(batcher.call, number) for number in range(3)]
            until(lambda: batcher.waiting == 3)
            closing = pool.submit(batcher.close)
            gated.gate.set()
            assert [each.result(20) for each in calls] == ["stopstop", 0, 2, 4]
            closing.result(20)
        assert batcher.call(5) == 10
        assert asyncio.run(batcher.acall(6)) == 12
        assert gated.threads[-2] == threading.get_ident()
        assert gated.threads[-1] != threading.get_ident(), "the event loop must not compute"
        until(lambda: not [one for one in threading.enumerate() if one.ident == gated.threads[-1]])

    async def test_call_closed_batcher_computes_one_request_at_a_time(self) -> None:
        """A closed batcher still limits concurrency, and reports errors as before. No caller computes for another."""
        others, at_once = [], [0]

        def compute(values: list[Any]) -> list[Any]:
            at_once[0] += 1
            assert at_once[0] == 1
            own = threading.get_ident()
            others.append(own in callers and values != [own])
            time.sleep(0.001)
            at_once[0] -= 1
            if "stop" in values:
                raise StopIteration
            if "leave" in values:
                raise SystemExit(3)
            return values

        callers: set[int] = set()
        batcher = batcher_of(compute, max_batch=1)
        batcher.close()
        batcher.close()

        def ask() -> None:
            callers.add(threading.get_ident())
            for _ in range(20):
                assert batcher.call(threading.get_ident()) == threading.get_ident()

        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(ask) for _ in range(4)]
            told = [batcher.acall(value) for value in ("stop", "leave", 1)]
            stopped, left, answer = await asyncio.gather(*told, return_exceptions=True)
            for done in asked:
                await asyncio.wrap_future(done)
        assert len(others) == 83
        assert not any(others)
        assert isinstance(stopped, RuntimeError)
        assert isinstance(left, PredictionError)
        assert answer == 1

    async def test_close_from_worker_or_during_call_answers_pending(self) -> None:
        def compute(values: list[Any]) -> list[Any]:
            if "close" in values:
                batcher.close()
            return values

        batcher = batcher_of(compute)
        assert await batcher.acall("close") == "close"
        assert await batcher.acall("after") == "after"
        gated = Gated()
        batcher = batcher_of(gated)
        with ThreadPoolExecutor(3) as pool:
            first = pool.submit(batcher.call, "stop")  # computed in its own thread
            assert await asyncio.to_thread(gated.entered.wait, 20)
            second = pool.submit(batcher.call, 2)
            await asyncio.to_thread(until, lambda: batcher.waiting == 1)
            closing = pool.submit(batcher.close)
            await asyncio.sleep(0.05)
            assert not closing.done()
            gated.gate.set()
            closing.result(20)
            assert batcher.waiting == 0
            assert (first.result(20), second.result(20)) == ("stopstop", 4)

    def test_process_exit_idle_workers_answers_in_exit_handlers(self) -> None:
        program = """
import asyncio, atexit
from tests.support.models import WordModel
model = WordModel()
async def many():
    return [p.label for p in await asyncio.gather(*(model.ainvoke("surely refund") for _ in range(50)))]
atexit.register(lambda: print("at exit:", set(asyncio.run(many())), model.invoke("surely cancel").label))
print(set(asyncio.run(many())))
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.splitlines() == ["{'refund'}", "at exit: {'refund'} cancel"]
        assert done.stderr == ""

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="requires os.fork")
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_batcher_forked_child_starts_with_empty_queue(self) -> None:
        gated = Gated()
        batcher = batcher_of(gated, workers=2)
        asyncio.run(batcher.acall(1))  # starts a worker thread, which the child does not inherit
        with ThreadPoolExecutor(4) as pool:
            first = pool.submit(batcher.call, "stop")
            second = pool.submit(batcher.call, "stop")
            until(lambda: gated.batches.count(["stop"]) == 2)  # both workers are busy, so the third request is queued
            third = pool.submit(batcher.call, 7)
            until(lambda: batcher.waiting == 1)
            context = multiprocessing.get_context("fork")
            answers = context.Queue()

            def child() -> None:
                answers.put((batcher.waiting, batcher.call(4), asyncio.run(batcher.acall(5))))

            process = context.Process(target=child)
            process.start()
            assert answers.get(timeout=20) == (0, 8, 10)
            process.join(20)
            gated.gate.set()
            assert [each.result(20) for each in (first, second, third)] == ["stopstop", "stopstop", 14]


class TestSmallModels:
    async def test_shunt_concurrent_calls_share_small_model_batches(self) -> None:
        class Slow(WordModel):
            def predict_scores(self, texts: Sequence[str]) -> Scores:
                time.sleep(0.005)
                return super().predict_scores(texts)

        model, book = Slow(), RunBook()
        shunt = ShuntRunnable(small=model, large=RunnableLambda(lambda x: "L"), policy=Threshold(0.9), pruning=None)
        texts = [f"surely {LABELS[i % 3]} {i}" if i % 2 else f"maybe {i}" for i in range(200)]
        wanted = [LABELS[i % 3] if i % 2 else "L" for i in range(200)]
        assert await asyncio.gather(*(shunt.ainvoke(text) for text in texts)) == wanted
        assert sum(model._calls) == 200
        assert len(model._calls) <= 20
        traced = await asyncio.gather(*(shunt.ainvoke(text, {"callbacks": [book]}) for text in texts))
        assert traced == wanted
        book.assert_balanced()
        assert len(model._calls) <= 60

    async def test_small_model_bad_input_fails_alone(self) -> None:
        model = WordModel()
        given: list[Any] = ["surely refund", 7, "nan", "surely cancel"] * 20
        found = await asyncio.gather(*(model.ainvoke(value) for value in given), return_exceptions=True)
        kinds = [type(one) for one in found]
        assert kinds == [Prediction, InputError, PredictionError, Prediction] * 20
        assert [one.label for one in found if isinstance(one, Prediction)] == ["refund", "cancel"] * 20

    async def test_batch_with_and_without_callbacks_returns_same_results(self) -> None:
        model = WordModel()
        given: list[Any] = ["surely refund", 7, "nan", "surely cancel"]
        for config in (None, {"tags": ["t"]}, {"callbacks": [RunBook()]}, [{}, {}, {}, {}]):
            one = model.batch(given, config, return_exceptions=True)  # type: ignore[arg-type]
            two = await model.abatch(given, config, return_exceptions=True)  # type: ignore[arg-type]
            for found in (one, two):
                assert [type(each) for each in found] == [Prediction, InputError, PredictionError, Prediction]
            with pytest.raises(InputError):
                model.batch(given, config)  # type: ignore[arg-type]
            with pytest.raises(InputError):
                await model.abatch(given, config)  # type: ignore[arg-type]
            assert model.batch([], config if not isinstance(config, list) else []) == []  # type: ignore[arg-type]

        class Losing(WordModel):
            def predict_batch(self, inputs: Sequence[Any], **given: Any) -> Any:
                outcome = super().predict_batch(inputs, return_errors=True)
                return outcome._replace(batch=outcome.batch.take([0]), rows=outcome.rows[:1])  # type: ignore[union-attr]

        kept, lost = Losing().batch(["refund", "cancel"], return_exceptions=True)
        assert kept.label == "refund"
        assert isinstance(lost, PredictionError)

    def test_small_model_copy_or_new_settings_has_own_batcher(self) -> None:
        model = WordModel(dynamic_batching=DynamicBatching(max_batch=5), cache_size=10)
        model.predict("surely refund")
        hot = model.model_copy(update={"temperature": 50.0})
        assert hot.predict("surely refund").confidence < 0.5 < model.predict("surely refund").confidence
        for other in (hot, copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert other.predict("surely cancel").label == "cancel"
            assert other.batcher is not model.batcher
            assert other.cache is not model.cache
            assert other.dynamic_batching == DynamicBatching(max_batch=5)
        before = model.batcher
        model.dynamic_batching = DynamicBatching(max_batch=6)
        assert model.batcher is not before
        model.dynamic_batching = None
        assert model.predict("surely cancel").label == "cancel"
        with pytest.raises(ConfigurationError, match="dynamic_batching is None"):
            _ = model.batcher

    async def test_small_model_without_dynamic_batching_computes_each_alone(self) -> None:
        model = WordModel(dynamic_batching=None)
        await asyncio.gather(*(model.ainvoke("surely refund") for _ in range(20)))
        assert model._calls == [1] * 20

    def test_small_model_unreferenced_is_freed(self) -> None:
        model = WordModel(cache_size=5)
        asyncio.run(model.apredict("surely refund"))
        seen = weakref.ref(model)
        gc.disable()
        try:
            del model
            until(lambda: seen() is None)
            assert seen() is None
        finally:
            gc.enable()

    def test_small_model_unreferenced_after_failure_is_freed(self) -> None:
        failing = failing_word_model(RuntimeError("broken"))

        async def fail(model: WordModel) -> bool:
            try:
                await model.apredict("surely refund")
            except RuntimeError:
                return True  # caught here, because asyncio.run keeps an escaping error in a cycle
            return False

        assert asyncio.run(fail(failing))
        with suppress(RuntimeError):
            failing.predict("surely refund")
            raise AssertionError("expected a RuntimeError")
        failing._fail = None  # the traceback of the error refers to the model
        seen = weakref.ref(failing)
        gc.disable()
        try:
            del failing
            until(lambda: seen() is None)
            assert seen() is None
        finally:
            gc.enable()

    async def test_bundled_model_ainvoke_loads_off_event_loop(self, tmp_path: Path, monkeypatch: Any) -> None:
        model = EmbeddingClassifier.train(
            ["aaa", "zzz"] * 6, ["a", "z"] * 6, embeddings=LetterEmbeddings(), settings=TrainingSettings(progress=False)
        )
        model.save(tmp_path / "bundle")
        loaders: list[int] = []

        def load(path: str, **overrides: Any) -> Any:
            loaders.append(threading.get_ident())
            return load_small_model(path, **overrides)

        monkeypatch.setattr("langchain_datashunt.small_models.bundles.loading.load_small_model", load)
        light = BundledSmallModel.from_folder(
            tmp_path / "bundle",
            embeddings=LetterEmbeddings(),
            cache_size=7,
            dynamic_batching=DynamicBatching(max_batch=3),
        )
        assert (light.cache_size, light.dynamic_batching) == (7, DynamicBatching(max_batch=3))
        assert (await light.ainvoke("aaa")).label == "a"
        assert loaders
        assert threading.get_ident() not in loaders
        for wrong in ({"cache_size": -1}, {"dynamic_batching": "often"}):
            with pytest.raises(ConfigurationError, match=next(iter(wrong))):
                load_small_model(tmp_path / "bundle", embeddings=LetterEmbeddings(), **wrong)

    @pytest.mark.parametrize("traced", [False, True])
    async def test_small_model_inner_runnable_is_traced_below_model_run(self, traced: bool) -> None:
        inner = RunnableLambda(lambda text: text).with_config(run_name="inner")

        class Asking(WordModel):
            def predict_scores(self, texts: Sequence[str]) -> Scores:
                for text in texts:
                    inner.invoke(text)
                return super().predict_scores(texts)

        book = RunBook()
        model = Asking(dynamic_batching=None)
        shunt = ShuntRunnable(small=model, large=RunnableLambda(lambda _: "L"), policy=Threshold(0.9), pruning=None)
        config: Any = {"callbacks": [book]}
        for run in (shunt, model) if traced else (shunt,):
            run.invoke("surely refund", config)
            await run.ainvoke("surely refund", config)
        book.assert_balanced()
        runs = book.named("inner")
        assert len(runs) == (4 if traced else 2)
        for one in runs:
            assert book.started[one["parent"]]["name"] == "Asking"

    def test_shunt_small_model_with_own_invoke_calls_it(self) -> None:
        class Own(WordModel):
            def invoke(self, input: Any, config: Any = None, **kwargs: Any) -> Prediction:
                return Prediction.from_probabilities({"cancel": 0.99, "refund": 0.01})

        shunt = ShuntRunnable(small=Own(), large=RunnableLambda(lambda _: "L"), policy=Threshold(0.9), pruning=None)
        assert shunt.invoke("surely refund") == "cancel"

    def test_shunt_batch_runs_have_own_metadata_and_child_runs(self) -> None:
        class Noting(BaseTracer):
            def _persist_run(self, run: Any) -> None:
                kept.append((run.inputs["input"], run.extra["metadata"]["length"]))

            def on_chain_start(self, serialized: Any, inputs: Any, **kwargs: Any) -> Any:
                run = super().on_chain_start(serialized, inputs, **kwargs)
                run.extra["metadata"]["length"] = len(inputs)
                return run

        kept: list[tuple[str, int]] = []
        shunt = ShuntRunnable(
            small=WordModel(), large=RunnableLambda(lambda _: "L"), policy=Threshold(0.9), pruning=None
        )
        shunt.batch(["surely refund", "x"], {"callbacks": [Noting()], "metadata": {"user": 1}, "tags": ["t"]})
        assert sorted(kept) == [("surely refund", 13), ("x", 1)]
        for call in (lambda: shunt.invoke("surely refund"), lambda: shunt.batch(["surely refund"])):
            with collect_runs() as collected:
                call()
            (root,) = collected.traced_runs
            assert [child.name for child in root.child_runs] == ["WordModel"]

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="requires os.fork")
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_small_model_locks_held_at_fork_are_free_in_child(self) -> None:
        model = WordModel(cache_size=3)
        model.predict("surely refund")
        assert model.cache is not None
        context = multiprocessing.get_context("fork")
        answers = context.Queue()

        def child() -> None:
            answers.put(model.predict("surely refund").label)

        with model.cache._mutex, model._serving._mutex, model.batcher._mutex:
            process = context.Process(target=child)
            process.start()
        assert answers.get(timeout=20) == "refund"
        process.join(20)

    @pytest.mark.parametrize("setting", [{"max_batch": 0}, {"workers": 0}, {"max_waiting": -1}, {"wait_ms": 2}])
    def test_dynamic_batching_invalid_setting_raises(self, setting: dict[str, int]) -> None:
        with pytest.raises(ConfigurationError, match=next(iter(setting))):
            DynamicBatching(**setting)

    def test_share_of_threads_in_worker_keeps_threads_of_others(self) -> None:
        torch = pytest.importorskip("torch")
        before, found = torch.get_num_threads(), []

        def work() -> None:
            share_of_threads(max(2, before))
            found.append(torch.get_num_threads())

        thread = threading.Thread(target=work)
        thread.start()
        thread.join(20)
        assert found == [1]
        assert torch.get_num_threads() == before

    def test_share_of_threads_concurrent_workers_keep_default(self) -> None:
        pytest.importorskip("torch")
        program = """
import threading, torch
from langchain_datashunt.small_models.engine.devices import share_of_threads
torch.set_num_threads(4)
seen = set()
for _ in range(60):
    together = threading.Barrier(4)
    def work():
        together.wait()
        share_of_threads(4)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    new = threading.Thread(target=lambda: seen.add(torch.get_num_threads()))
    new.start()
    new.join()
print(seen)
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
        assert done.stdout.strip() == "{4}"

    def test_batcher_concurrent_first_access_creates_one(self, monkeypatch: Any) -> None:
        class Slow(Serving):
            def __init__(self, owner: Any = None) -> None:
                time.sleep(0.02)
                super().__init__(owner)

        model = WordModel()
        monkeypatch.setattr("langchain_datashunt.small_models.base.Serving", Slow)
        copied = model.model_copy()
        with ThreadPoolExecutor(4) as pool:
            lines = [each.result(20) for each in [pool.submit(lambda: copied.batcher) for _ in range(4)]]
        assert len(set(map(id, lines))) == 1
        assert lines[0] is not model.batcher

    def test_share_of_threads_in_worker_limits_mkl_too(self) -> None:
        """After `torch.set_num_threads`, MKL no longer follows OpenMP's per-thread setting."""
        torch = pytest.importorskip("torch")
        if "mkl_get_max_threads" not in torch.__config__.parallel_info():
            pytest.skip("requires torch with MKL")
        program = """
import re, threading, torch
from langchain_datashunt.small_models.engine.devices import share_of_threads
torch.set_num_threads(4)
def told():
    torch.ones(10) + 1
    print(*re.findall(r"(?:omp|mkl)_get_max_threads\\(\\) : (\\d+)", torch.__config__.parallel_info()))
def worker():
    share_of_threads(4)
    told()
for work in (worker, told):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
told()
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.splitlines() == ["1 1", "4 4", "4 4"], "expected in order: worker, new thread, first thread"

    def test_small_model_workers_use_their_share_of_threads(self) -> None:
        pytest.importorskip("torch")
        program = """
import asyncio, torch
torch.set_num_threads(4)
from tests.support.models import WordModel
from langchain_datashunt.small_models import DynamicBatching
class Telling(WordModel):
    def predict_scores(self, texts):
        print(torch.get_num_threads())
        return super().predict_scores(texts)
model = Telling(dynamic_batching=DynamicBatching(workers=2))
asyncio.run(model.ainvoke("refund"))
while model.batcher._busy:
    pass
model.invoke("refund")
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.split() == ["2", "4"]


class TestCache:
    def test_cache_exact_repeat_is_not_recomputed(self) -> None:
        model = WordModel(cache_size=100)
        own = WordModel().predict_batch(["surely refund", "cancel", "surely refund"])
        first = model.predict_batch(["surely refund", "cancel", "surely refund"])
        again = model.predict_batch(["cancel", "surely refund", "status"])
        assert model._calls == [2, 1]
        np.testing.assert_array_equal(first.probabilities, own.probabilities)
        np.testing.assert_array_equal(again.probabilities[:2], own.probabilities[[1, 0]])
        assert model.cache is not None
        assert (model.cache.hits, model.cache.misses, len(model.cache)) == (3, 3, 3)

    def test_cache_temperature_change_reuses_scores(self) -> None:
        model = WordModel(cache_size=100)
        warm = model.predict("surely refund").confidence
        model.temperature = 10.0
        assert model.predict("surely refund").confidence < warm
        assert model._calls == [1]

    def test_cache_hit_keeps_truncation_and_features(self) -> None:
        class Cut(WordModel):
            def predict_scores(self, texts: Sequence[str]) -> Scores:
                scores = super().predict_scores(texts)
                lengths = np.array([[len(text)] for text in texts], dtype=float)
                return scores._replace(truncated=lengths[:, 0] > 10, features=lengths)

        model = Cut(cache_size=100)
        for _ in range(2):
            with pytest.warns(UserWarning, match="were truncated"):
                batch = model.predict_batch(["cancel", "surely refund"])
            assert [one.truncated for one in batch] == [False, True]
            assert batch.features is not None
            assert batch.features.tolist() == [[6.0], [13.0]]
        assert model._calls == [2]

    def test_cache_nan_scores_are_not_stored(self) -> None:
        model = WordModel(cache_size=100)
        for _ in range(2):
            outcome = model.predict_batch(["nan", "refund"], return_errors=True)
            assert list(outcome.errors) == [0]
        assert model._calls == [2, 1]

    def test_cache_hit_returns_copies(self) -> None:
        class Writing(WordModel):
            def predict_scores(self, texts: Sequence[str]) -> Scores:
                answers = tuple({"items": [text]} for text in texts)
                return (
                    super()
                    .predict_scores(texts)
                    ._replace(answers=answers, token_logprobs=tuple(np.array([-1.0, -2.0]) for _ in texts))
                )

        model = Writing(cache_size=10)
        for _ in range(3):
            given = model.predict("refund")
            assert given.answer == {"items": ["refund"]}
            assert given.token_logprobs is not None
            assert given.token_logprobs.tolist() == [-1.0, -2.0]
            given.answer["items"].append("mine")
            with suppress(ValueError):  # if the array is writable at all
                given.token_logprobs[0] = 5.0
        assert model._calls == [1]

    def test_forget_clears_cache_and_counters(self) -> None:
        model, encoder = WordModel(cache_size=10), CachedEmbeddings(LetterEmbeddings(), 10)
        for _ in range(2):
            model.predict("refund")
            model.forget()
            encoder.embed_query("a")
            encoder.encode(["a"])
            encoder.forget()
        assert model._calls == [1, 1]
        assert (encoder.cache.hits, encoder.cache.misses, len(encoder.cache)) == (0, 2, 0)

    def test_cache_cleared_during_computation_stores_nothing(self) -> None:
        cache: ResultCache[str] = ResultCache(2)

        def old(texts: list[str]) -> list[str]:
            cache.clear()
            return texts

        assert cache.get_all(["a"], old) == ["a"]
        assert len(cache) == 0

    def test_cached_embeddings_nan_is_not_stored(self) -> None:
        class Odd(LetterEmbeddings):
            calls = 0

            def embed_documents(self, texts: list[str]) -> list[list[float]]:
                self.calls += 1
                return [[float("nan") if self.calls == 1 else 1.0, 2.0] for _ in texts]

        encoder = CachedEmbeddings(Odd(), 10)
        assert np.isnan(encoder.encode(["a"])[0]).any()
        assert encoder.encode(["a"])[0].tolist() == [[1.0, 2.0]]

    def test_cache_full_evicts_least_recently_used(self) -> None:
        cache: ResultCache[str] = ResultCache(2)

        def shout(texts: list[str]) -> list[str]:
            return [text.upper() for text in texts]

        for text in ("a", "b", "a", "c"):
            assert cache.get_all([text], shout) == [text.upper()]
        assert (cache.hits, cache.misses, len(cache)) == (1, 3, 2)
        cache.get_all(["a"], shout)
        assert (cache.hits, cache.misses) == (2, 3), "a was used more recently than b"
        cache.get_all(["b"], shout)
        assert (cache.hits, cache.misses) == (2, 4), "b was evicted"

    def test_cache_new_model_setting_clears_scores(self) -> None:
        class Loud(WordModel):
            loudness: float = 1.0

            def predict_scores(self, texts: Sequence[str]) -> Scores:
                scores = super().predict_scores(texts)
                features = np.ones((len(texts), 2)) if self.loudness > 1 and "refund" in texts else None
                return Scores(np.asarray(scores.logits) * self.loudness, None, features)

        model = Loud(cache_size=10)
        quiet = model.predict("surely refund").confidence
        model.loudness = 2.0
        assert model.predict("surely refund").confidence > quiet
        model.predict("cancel")
        batch = model.predict_batch(["cancel", "refund", "surely refund"])
        assert batch.features is None, "only some rows have features"

    def test_cached_embeddings_repeat_is_not_recomputed(self) -> None:
        class Counted(LetterEmbeddings):
            def __init__(self) -> None:
                super().__init__()
                self.asked: list[list[str]] = []

            def embed_documents(self, texts: list[str]) -> list[list[float]]:
                self.asked.append(list(texts))
                return super().embed_documents(texts)

        inner = Counted()
        cached = CachedEmbeddings(inner, size=3)
        own = LetterEmbeddings().embed_documents(["a", "bb", "a"])
        np.testing.assert_allclose(cached.embed_documents(["a", "bb", "a"]), own, rtol=1e-6)
        np.testing.assert_allclose(cached.embed_documents(["c", "bb"]), LetterEmbeddings().embed_documents(["c", "bb"]))
        assert inner.asked == [["a", "bb"], ["c"]]
        np.testing.assert_allclose(cached.embed_query("zz"), LetterEmbeddings().embed_query("zz"))
        assert cached.embed_query("zz") == cached.embed_query("zz")
        assert inner.asked == [["a", "bb"], ["c"], ["zz"]]
        again = pickle.loads(pickle.dumps(CachedEmbeddings(LetterEmbeddings())))
        np.testing.assert_allclose(again.embed_documents(["a"]), own[:1], rtol=1e-6)
        with pytest.raises(ConfigurationError, match="`size` of at least 1"):
            CachedEmbeddings(inner, size=0)

    def test_cached_embeddings_classifier_saves_encoder_name(self, tmp_path: Path) -> None:
        pytest.importorskip("torch")
        texts, labels = ["aaa", "aab", "zzz", "zzy"] * 5, ["a", "a", "z", "z"] * 5
        encoder = CachedEmbeddings(LetterEmbeddings())
        model = EmbeddingClassifier.train(texts, labels, embeddings=encoder, settings=TrainingSettings(progress=False))
        model.save(tmp_path / "bundle")
        again = load_small_model(tmp_path / "bundle", embeddings=LetterEmbeddings(), cache_size=7)
        assert "LetterEmbeddings" in str(model.settings()["encoder"])
        assert again.cache_size == 7
        np.testing.assert_allclose(
            again.predict_batch(["aaz"]).probabilities, model.predict_batch(["aaz"]).probabilities, rtol=1e-5
        )

    def test_cache_many_threads_returns_matching_values(self) -> None:
        cache: ResultCache[int] = ResultCache(50)

        def lengths(texts: list[str]) -> list[int]:
            return [int(text) for text in texts]

        def work(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for _ in range(300):
                texts = [str(number) for number in rng.integers(0, 100, 5)]
                assert cache.get_all(texts, lengths) == [int(text) for text in texts]

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        assert len(cache) <= 50
        assert cache.hits + cache.misses == 8 * 300 * 5
