"""ShuntRunnable: the one place where a call is routed. Its steps stand in `call_steps`, its runs in `tracing`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AsyncExitStack, ExitStack, aclosing, closing
from dataclasses import replace
from typing import Any

import numpy as np
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import get_executor_for_config, set_config_context
from langchain_core.runnables.utils import coro_with_context
from typing_extensions import override

from langchain_datashunt._utils.control_flow import raise_control_flow
from langchain_datashunt._utils.sync_async import arun, raise_first_error, run
from langchain_datashunt.decision import Latency, ShuntResult
from langchain_datashunt.large_models.caller import END
from langchain_datashunt.routing.plan import AnyPlan
from langchain_datashunt.routing.runs import Runs, atrace, trace
from langchain_datashunt.routing.settings import ShuntSettings
from langchain_datashunt.telemetry import instrument_if_asked

instrument_if_asked()


class ShuntRunnable(ShuntSettings):
    """A small model answers what it is sure of; the rest goes to a large one that is told what the small one thinks.

    ```python
    shunt = ShuntRunnable(small=load_small_model("bundle"), large=prompt | ChatOpenAI() | StrOutputParser())
    shunt.invoke("Where is my card?")
    ```

    `large` gets the caller's input as a mapping (`input`, for conversations also `history`) plus the variables
    `candidates`, `candidate_probabilities`, `small_label` and `small_confidence`; its prompt uses at least one that
    the pruning strategy fills. With `pruning=None` it gets the caller's input as it is.

    A small model that fails defers (reason "small_error"). A large model that fails is retried by `retry`, then
    raises, or with `on_large_error="small"` gives way to the small model's answer (reason "large_error").

    The threshold can be replaced for one call: `config={"configurable": {"shunt_threshold": 0.8}}`.
    """

    # One input

    @override
    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        runs = Runs(self, [input], config)
        run(runs.start())
        try:
            steps = self._steps.one(input, runs, kwargs)
            if runs.traced:
                with set_config_context(runs.child(0)) as context:
                    output = context.run(run, steps)
            else:
                output = run(steps)
        except BaseException as error:
            run(runs.fail_rest(error))
            raise
        run(runs.end({0: output}))
        return output

    @override
    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        runs = Runs(self, [input], config, asynchronous=True)
        await arun(runs.start())
        try:
            steps = self._steps.one(input, runs, kwargs)
            if runs.traced:
                with set_config_context(runs.child(0)) as context:
                    output = await coro_with_context(arun(steps), context)
            else:
                output = await arun(steps)
        except BaseException as error:
            await arun(runs.fail_rest(error))
            raise
        await arun(runs.end({0: output}))
        return output

    # Many inputs

    @override
    def batch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """Route `n` inputs with one small-model call and one grouped large call for all that are deferred."""
        if not inputs:
            return []
        runs = Runs(self, inputs, config)
        outputs = trace(runs, self._steps.many(inputs, runs, kwargs))
        return raise_first_error(outputs, return_exceptions)

    @override
    async def abatch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """Route `n` inputs with one small-model call and one grouped large call for all that are deferred."""
        if not inputs:
            return []
        runs = Runs(self, inputs, config, asynchronous=True)
        outputs = await atrace(runs, self._steps.many(inputs, runs, kwargs))
        return raise_first_error(outputs, return_exceptions)

    # As they are ready

    @override
    def batch_as_completed(
        self,
        inputs: Sequence[Any],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> Iterator[tuple[int, Any]]:
        """Yield (position, output) pairs: all the small model's answers first, then large ones as they come."""
        if not inputs:
            return
        values, runs, steps = list(inputs), Runs(self, inputs, config), self._steps
        run(runs.start())
        try:
            plan, seconds = run(steps.plan(values, runs))
            kept, rows = np.flatnonzero(plan.kept).tolist(), plan.deferred.tolist()
            for i, output in zip(kept, run(steps.conclude_kept(plan, kept, values, runs, seconds)), strict=True):
                run(runs.end({i: output}))
                yield i, _raised(output, return_exceptions)
            limit = steps.caller.limiter.bound(runs.max_concurrency())
            with get_executor_for_config(RunnableConfig(max_concurrency=limit)) as executor:

                def ask(i: int) -> Any:
                    return run(steps.answer(values[i], i, plan, runs, seconds, kwargs))

                waiting: dict[Future[Any], int] = {executor.submit(ask, i): i for i in rows}
                try:
                    while waiting:
                        for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                            i, output = waiting.pop(future), future.result()
                            run(runs.end({i: output}))
                            yield i, _raised(output, return_exceptions)
                finally:
                    for future in waiting:
                        future.cancel()
        except BaseException as error:
            run(runs.fail_rest(error))
            raise

    @override
    async def abatch_as_completed(
        self,
        inputs: Sequence[Any],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> AsyncIterator[tuple[int, Any]]:
        """Yield (position, output) pairs: all the small model's answers first, then large ones as they come."""
        if not inputs:
            return
        values, runs, steps = list(inputs), Runs(self, inputs, config, asynchronous=True), self._steps
        waiting: dict[asyncio.Task[Any], int] = {}
        await arun(runs.start())
        try:
            plan, seconds = await arun(steps.plan(values, runs))
            kept, rows = np.flatnonzero(plan.kept).tolist(), plan.deferred.tolist()
            for i, output in zip(kept, await arun(steps.conclude_kept(plan, kept, values, runs, seconds)), strict=True):
                await arun(runs.end({i: output}))
                yield i, _raised(output, return_exceptions)
            gate = asyncio.Semaphore(steps.caller.limiter.bound(runs.max_concurrency()) or max(1, len(rows)))

            async def ask(i: int) -> Any:
                async with gate:
                    return await arun(steps.answer(values[i], i, plan, runs, seconds, kwargs))

            waiting.update({asyncio.ensure_future(ask(i)): i for i in rows})
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=FIRST_COMPLETED)
                for task in done:
                    i, output = waiting.pop(task), task.result()
                    await arun(runs.end({i: output}))
                    yield i, _raised(output, return_exceptions)
        except BaseException as error:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            await arun(runs.fail_rest(error))
            raise

    # Streams

    @override
    def stream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[Any]:
        """Decide first, then yield the small model's answer, or the large model's chunks as they come."""
        runs, total = Runs(self, [input], config), Total()
        run(runs.start())
        try:
            plan, seconds = run(self._steps.plan_one(input, runs))
            if plan.keeps(0):
                yield total.add(_raised(run(self._steps.conclude_kept(plan, [0], [input], runs, seconds))[0]))
            else:
                with closing(self._stream_large(input, plan, runs, seconds, kwargs)) as chunks:
                    for chunk in chunks:
                        yield total.add(chunk)
        except BaseException as error:
            run(runs.fail_rest(error))
            raise
        run(runs.end({0: total.value}))

    def _stream_large(
        self, value: Any, plan: AnyPlan, runs: Runs, seconds: float, kwargs: dict[str, Any]
    ) -> Generator[Any]:
        """Large chunks; retried, or replaced by the small answer, only as long as nothing was shown."""
        steps = self._steps
        if steps.fusion is not None:
            yield _raised(run(steps.answer(value, 0, plan, runs, seconds, kwargs)))
            return
        asked, config, handler = run(steps.prepare(value, 0, plan, runs))
        started = time.perf_counter()
        with ExitStack() as held:
            try:
                held.enter_context(steps.caller.place())
                first, chunks = steps.caller.open(asked, config, kwargs)
            except Exception as error:
                raise_control_flow(error)
                latency = Latency(seconds, time.perf_counter() - started)
                yield _raised(run(steps.conclude_one(plan, value, error, runs, latency, handler)))
                return
            total = Total()
            with closing(chunks):
                if first is not END:
                    yield steps.chunk(total.add(first), plan)
                    for chunk in chunks:
                        yield steps.chunk(total.add(chunk), plan)
        latency = Latency(seconds, time.perf_counter() - started)
        last = run(steps.conclude_one(plan, value, total.value, runs, latency, handler))
        if isinstance(last, ShuntResult):
            yield replace(last, output=None, inner=None)

    @override
    async def astream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> AsyncIterator[Any]:
        """Decide first, then yield the small model's answer, or the large model's chunks as they come."""
        runs, total = Runs(self, [input], config, asynchronous=True), Total()
        await arun(runs.start())
        try:
            plan, seconds = await arun(self._steps.plan_one(input, runs))
            if plan.keeps(0):
                yield total.add(_raised((await arun(self._steps.conclude_kept(plan, [0], [input], runs, seconds)))[0]))
            else:
                async with aclosing(self._astream_large(input, plan, runs, seconds, kwargs)) as chunks:
                    async for chunk in chunks:
                        yield total.add(chunk)
        except BaseException as error:
            await arun(runs.fail_rest(error))
            raise
        await arun(runs.end({0: total.value}))

    async def _astream_large(
        self, value: Any, plan: AnyPlan, runs: Runs, seconds: float, kwargs: dict[str, Any]
    ) -> AsyncGenerator[Any]:
        steps = self._steps
        if steps.fusion is not None:
            yield _raised(await arun(steps.answer(value, 0, plan, runs, seconds, kwargs)))
            return
        asked, config, handler = await arun(steps.prepare(value, 0, plan, runs))
        started = time.perf_counter()
        async with AsyncExitStack() as held:
            try:
                await held.enter_async_context(steps.caller.aplace())
                first, chunks = await steps.caller.aopen(asked, config, kwargs)
            except Exception as error:
                raise_control_flow(error)
                latency = Latency(seconds, time.perf_counter() - started)
                yield _raised(await arun(steps.conclude_one(plan, value, error, runs, latency, handler)))
                return
            total = Total()
            async with aclosing(chunks):
                if first is not END:
                    yield steps.chunk(total.add(first), plan)
                    async for chunk in chunks:
                        yield steps.chunk(total.add(chunk), plan)
        latency = Latency(seconds, time.perf_counter() - started)
        last = await arun(steps.conclude_one(plan, value, total.value, runs, latency, handler))
        if isinstance(last, ShuntResult):
            yield replace(last, output=None, inner=None)


class Total:
    """The sum of a stream's chunks, for the end of its run; the last chunk where they cannot be added."""

    def __init__(self) -> None:
        self.value: Any = None
        self._addable = True

    def add(self, chunk: Any) -> Any:
        """Take one more chunk in, and give it back."""
        if self.value is None or not self._addable:
            self.value = chunk
        else:
            try:
                self.value = self.value + chunk
            except TypeError:
                self.value, self._addable = chunk, False
        return chunk


def _raised(output: Any, return_exceptions: bool = False) -> Any:
    if isinstance(output, Exception) and not return_exceptions:
        raise output
    return output
