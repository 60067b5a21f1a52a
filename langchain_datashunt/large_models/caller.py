"""Asking the large model: one input or one group, with retries and a bound on parallel calls."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext
from functools import partial
from typing import Any

from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import get_executor_for_config
from langchain_core.runnables.utils import gather_with_concurrency

from langchain_datashunt._utils.control_flow import raise_control_flow
from langchain_datashunt._utils.sync_async import Effect, Steps
from langchain_datashunt.large_models.circuit_breaker import CircuitBreaker
from langchain_datashunt.large_models.limits import CallLimiter
from langchain_datashunt.large_models.retry import Retry, is_retryable

END: Any = object()
"""What an opened stream's first chunk is where there is none."""


class LargeCaller:
    """One large model with its retries and its bound. Errors are values here; the caller decides what they mean."""

    def __init__(
        self,
        large: Runnable[Any, Any],
        retry: Retry,
        limiter: CallLimiter,
        breaker: CircuitBreaker | None = None,
        max_pending: int | None = None,
    ) -> None:
        self.large = large
        self.retry = retry
        self.limiter = limiter
        self.breaker = breaker
        self.max_pending = max_pending

    def _admitted(self, calls: int = 1) -> AbstractContextManager[None]:
        """Around calls that wait or are under way.

        Raises:
            QueueFullError: There are too many already.
        """
        return nullcontext() if self.max_pending is None else self.limiter.pending.counted(calls, self.max_pending)

    @contextmanager
    def place(self) -> Iterator[None]:
        """Around one stream, from before it is opened until it is closed.

        Raises:
            QueueFullError: Too many calls wait or are under way already.
        """
        with self._admitted(), self.limiter.slot():
            yield

    @asynccontextmanager
    async def aplace(self) -> AsyncIterator[None]:
        """As `place`."""
        with self._admitted():
            async with self.limiter.aslot():
                yield

    def _watched(self) -> AbstractContextManager[None]:
        """Around one attempt."""
        return nullcontext() if self.breaker is None else self.breaker.watching()

    def one(
        self, asked: Any, config: RunnableConfig, kwargs: dict[str, Any], failed: Exception | None = None
    ) -> Effect:
        """Ask about one input; the output, or the last attempt's error. `failed` is a first attempt's error."""
        return Effect(
            partial(self._one, asked, config, kwargs, failed), partial(self._aone, asked, config, kwargs, failed)
        )

    def _one(self, asked: Any, config: RunnableConfig, kwargs: dict[str, Any], failed: Exception | None) -> Any:
        invoke = partial(self.large.invoke, asked, config, **kwargs)

        def ask() -> Any:
            if self.limiter.limit is None and self.breaker is None:
                return self.retry.within(invoke)
            with self.limiter.slot(), self._watched():
                return self.retry.within(invoke)

        try:
            with self._admitted():
                return self.retry.call(ask, failed)
        except Exception as error:
            raise_control_flow(error)
            return error

    async def _aone(self, asked: Any, config: RunnableConfig, kwargs: dict[str, Any], failed: Exception | None) -> Any:
        invoke = partial(self.large.ainvoke, asked, config, **kwargs)

        async def ask() -> Any:
            if self.limiter.limit is None and self.breaker is None:
                return await self.retry.awithin(invoke)
            async with self.limiter.aslot():
                with self._watched():
                    return await self.retry.awithin(invoke)

        try:
            with self._admitted():
                return await self.retry.acall(ask, failed)
        except Exception as error:
            raise_control_flow(error)
            return error

    def group(
        self, asked: Sequence[Any], config: RunnableConfig | list[RunnableConfig], kwargs: dict[str, Any]
    ) -> Steps[list[Any]]:
        """One grouped call; what failed and may succeed is then retried item by item, beside the others.

        Args:
            asked: `n` inputs; one that is an exception already stays as it is.
            config: One for all, or one each.
            kwargs: Passed on.
        """
        results = list(asked)
        ready = [j for j, value in enumerate(asked) if not isinstance(value, Exception)]
        if not ready:
            return results
        each = [config] * len(results) if isinstance(config, dict) else config
        if self.retry.attempt_seconds is not None:  # how long one may take cannot be said of a group
            yield from self._each(results, ready, each, kwargs)
            return results
        while ready and self.breaker is not None and self.breaker.state == "half-open":
            yield from self._each(results, ready[:1], each, kwargs)  # whether the model is back is seen by one call
            del ready[0]
        if not ready:
            return results
        given = config if isinstance(config, dict) else [each[j] for j in ready]
        call = partial(self._batch, [asked[j] for j in ready], given, kwargs)
        found = yield Effect(call, partial(self._abatch, *call.args))
        for j, value in zip(ready, found, strict=True):
            if isinstance(value, Exception):
                raise_control_flow(value)
            results[j] = value
        again = [j for j in ready if self._worth_retrying(results[j])]
        if again:
            failed = {j: results[j] for j in again}
            yield from self._each(results, again, each, kwargs, asked, failed)
        return results

    def _each(
        self,
        results: list[Any],
        rows: list[int],
        configs: Sequence[RunnableConfig],
        kwargs: dict[str, Any],
        asked: Sequence[Any] | None = None,
        failed: Mapping[int, Exception] | None = None,
    ) -> Steps[None]:
        """Ask about these rows one by one, beside each other, and put the answers into the results."""
        wanted = results if asked is None else asked
        effects = [self.one(wanted[j], configs[j], kwargs, failed=(failed or {}).get(j)) for j in rows]
        found = yield Effect(partial(_in_threads, effects, configs[0]), partial(_gathered, effects, configs[0]))
        for j, value in zip(rows, found, strict=True):
            results[j] = value

    def _batch(self, asked: list[Any], config: Any, kwargs: dict[str, Any]) -> Sequence[Any]:
        try:
            with self._admitted(len(asked)), self.limiter.slot(len(asked)):
                probe = self.breaker is not None and self.breaker.admit()
                results: Sequence[Any] = [None]
                try:
                    results = self.large.batch(asked, config, return_exceptions=True, **kwargs)
                except BaseException as error:
                    results = [error]
                    raise
                finally:
                    self._note(results, probe)
                return results
        except Exception as error:
            return [error] * len(asked)

    def _note(self, results: Sequence[Any], probe: bool) -> None:
        """Tell the breaker how a grouped call ended."""
        if self.breaker is None:
            return
        for i, result in enumerate(results):
            self.breaker.note(result if isinstance(result, BaseException) else None, probe=probe and i == 0)

    async def _abatch(self, asked: list[Any], config: Any, kwargs: dict[str, Any]) -> Sequence[Any]:
        try:
            with self._admitted(len(asked)):
                async with self.limiter.aslot(len(asked)):
                    probe = self.breaker is not None and self.breaker.admit()
                    results: Sequence[Any] = [None]
                    try:
                        results = await self.large.abatch(asked, config, return_exceptions=True, **kwargs)
                    except BaseException as error:
                        results = [error]
                        raise
                    finally:
                        self._note(results, probe)
                    return results
        except Exception as error:
            return [error] * len(asked)

    def _worth_retrying(self, result: Any) -> bool:
        return isinstance(result, Exception) and self.retry.attempts > 1 and is_retryable(result)

    def open(self, asked: Any, config: RunnableConfig, kwargs: dict[str, Any]) -> tuple[Any, Generator[Any]]:
        """Start a stream and wait for its first chunk, with retries: nothing has been shown until then.

        Returns:
            The first chunk (`END` where there is none) and the rest, which the caller closes.
        """

        def begin() -> tuple[Any, Generator[Any]]:
            with self._watched():
                chunks = _chunks(self.large.stream(asked, config, **kwargs))
                return next(chunks, END), chunks

        if isinstance(asked, Exception):
            raise asked
        return self.retry.call(begin)

    async def aopen(
        self, asked: Any, config: RunnableConfig, kwargs: dict[str, Any]
    ) -> tuple[Any, AsyncGenerator[Any]]:
        """As `open`."""

        async def begin() -> tuple[Any, AsyncGenerator[Any]]:
            chunks = _achunks(self.large.astream(asked, config, **kwargs))

            async def first() -> Any:
                return await anext(chunks, END)

            with self._watched():
                return await self.retry.awithin(first), chunks

        if isinstance(asked, Exception):
            raise asked
        return await self.retry.acall(begin)


def _chunks(stream: Any) -> Generator[Any]:
    """A stream that can be closed, whatever it is made of: closing ends the runs below."""
    try:
        yield from stream
    finally:
        if (close := getattr(stream, "close", None)) is not None:
            close()


async def _achunks(stream: Any) -> AsyncGenerator[Any]:
    try:
        async for chunk in stream:
            yield chunk
    finally:
        if (close := getattr(stream, "aclose", None)) is not None:
            await close()


def _in_threads(effects: Sequence[Effect], config: RunnableConfig) -> list[Any]:
    with get_executor_for_config(config) as executor:
        return list(executor.map(lambda effect: effect.sync(), effects))


async def _gathered(effects: Sequence[Effect], config: RunnableConfig) -> list[Any]:
    calls: list[Any] = [effect.asynchronous() for effect in effects]
    return await gather_with_concurrency(config.get("max_concurrency"), *calls)
