"""LargeCaller: call the large model with retries, limits and a circuit breaker."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, aclosing, asynccontextmanager, closing, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeAlias

from langchain_core.messages import BaseMessage
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import get_executor_for_config
from langchain_core.runnables.utils import gather_with_concurrency

from langchain_datashunt._utils.control_flow import raise_if_control_flow
from langchain_datashunt.decision import ShuntResult
from langchain_datashunt.large_models.circuit_breaker import CircuitBreaker
from langchain_datashunt.large_models.limits import CallLimiter
from langchain_datashunt.large_models.retry import Retry, is_retryable

Configs: TypeAlias = RunnableConfig | list[RunnableConfig]
"""One config for all inputs, or one each."""

END: Any = object()
"""Placeholder for the first chunk of a stream without chunks."""


class LargeCaller:
    """Call a large model with retries, limits and a circuit breaker.

    `invoke`, `ainvoke`, `batch` and `abatch` return errors as values, because a shunt may replace them by the small
    model's answers. An input that is already an exception is returned unchanged, without a call.

    Args:
        large: The large model; any Runnable.
        retry: How each call is retried.
        limiter: Limits concurrent calls. It may be shared with other callers.
        breaker: Fails fast while the large model is down. None always calls it.
        max_pending: Maximum calls that wait or run. None means unlimited.
    """

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

    # One input

    def invoke(
        self, asked: Any, config: RunnableConfig, kwargs: dict[str, Any], failed: Exception | None = None
    ) -> Any:
        """Return the large model's output for one input, or the error of the last attempt.

        Args:
            asked: The input.
            config: Its config.
            kwargs: Keyword arguments for the large model.
            failed: Error of a first attempt that was part of a grouped call. It counts as an attempt.
        """
        call = partial(self.large.invoke, asked, config, **kwargs)

        def attempt() -> Any:
            if self.limiter.limit is None and self.breaker is None:
                return self.retry.within(call)
            with self.limiter.slot(), self._watched():
                return self.retry.within(call)

        if isinstance(asked, Exception):
            return asked
        try:
            with self.limiter.admitted(1, self.max_pending):
                return self.retry.call(attempt, failed)
        except Exception as error:
            raise_if_control_flow(error)
            return error

    async def ainvoke(
        self, asked: Any, config: RunnableConfig, kwargs: dict[str, Any], failed: Exception | None = None
    ) -> Any:
        """Async version of `invoke`."""
        call = partial(self.large.ainvoke, asked, config, **kwargs)

        async def attempt() -> Any:
            if self.limiter.limit is None and self.breaker is None:
                return await self.retry.awithin(call)
            async with self.limiter.aslot():
                with self._watched():
                    return await self.retry.awithin(call)

        if isinstance(asked, Exception):
            return asked
        try:
            with self.limiter.admitted(1, self.max_pending):
                return await self.retry.acall(attempt, failed)
        except Exception as error:
            raise_if_control_flow(error)
            return error

    def _watched(self) -> AbstractContextManager[None]:
        return nullcontext() if self.breaker is None else self.breaker.watching()

    # Many inputs

    def batch(self, asked: Sequence[Any], config: Configs, kwargs: dict[str, Any]) -> list[Any]:
        """Return outputs for `n` inputs, errors among them.

        All inputs go into one grouped call. Inputs that failed with a retryable error are then retried one by one.
        If attempts have a time limit, each input is called on its own from the start. While the circuit breaker is half
        open, single calls probe the model.

        Args:
            asked: `n` inputs.
            config: One for all, or one each.
            kwargs: Keyword arguments for the large model.
        """
        group = _Group(self, asked, config, kwargs)
        while group.asks_singly:
            _in_threads([partial(self.invoke, *call) for call in group.single_calls()], group)
        if group.waiting:
            group.answer(self._batch(*group.grouped_call()))
            _in_threads([partial(self.invoke, *call) for call in group.retries()], group)
        return group.results

    async def abatch(self, asked: Sequence[Any], config: Configs, kwargs: dict[str, Any]) -> list[Any]:
        """Async version of `batch`."""
        group = _Group(self, asked, config, kwargs)
        while group.asks_singly:
            await _gathered([self.ainvoke(*call) for call in group.single_calls()], group)
        if group.waiting:
            group.answer(await self._abatch(*group.grouped_call()))
            await _gathered([self.ainvoke(*call) for call in group.retries()], group)
        return group.results

    def _batch(self, asked: list[Any], config: Configs, kwargs: dict[str, Any]) -> Sequence[Any]:
        try:
            with self.limiter.admitted(len(asked), self.max_pending), self.limiter.slot(len(asked)):
                with self._watched_group() as results:
                    results += self.large.batch(asked, config, return_exceptions=True, **kwargs)
                return results
        except Exception as error:
            return [error] * len(asked)

    async def _abatch(self, asked: list[Any], config: Configs, kwargs: dict[str, Any]) -> Sequence[Any]:
        try:
            with self.limiter.admitted(len(asked), self.max_pending):
                async with self.limiter.aslot(len(asked)):
                    with self._watched_group() as results:
                        results += await self.large.abatch(asked, config, return_exceptions=True, **kwargs)
                    return results
        except Exception as error:
            return [error] * len(asked)

    @contextmanager
    def _watched_group(self) -> Iterator[list[Any]]:
        """Yield a list for the results of a grouped call, and report them to the breaker at its end."""
        probe = self.breaker is not None and self.breaker.admit()
        results: list[Any] = []
        ended: Sequence[Any] = results
        try:
            yield results
        except BaseException as error:
            ended = [error]
            raise
        finally:
            if self.breaker is not None:
                for i, result in enumerate(ended):
                    self.breaker.note(result if isinstance(result, BaseException) else None, probe=probe and i == 0)

    # Streams

    @contextmanager
    def place(self) -> Iterator[None]:
        """Reserve a place for one stream, from before it is opened until it is closed.

        Raises:
            QueueFullError: Too many calls already wait or run.
        """
        with self.limiter.admitted(1, self.max_pending), self.limiter.slot():
            yield

    @asynccontextmanager
    async def aplace(self) -> AsyncIterator[None]:
        """Async version of `place`."""
        with self.limiter.admitted(1, self.max_pending):
            async with self.limiter.aslot():
                yield

    def open(self, asked: Any, config: RunnableConfig, kwargs: dict[str, Any]) -> tuple[Any, Generator[Any]]:
        """Start a stream and wait for its first chunk that says something, with retries.

        Retries end with that chunk, because the caller may have shown it. Empty chunks before it, such as the one that
        names the role, are held back until then. The circuit breaker hears of errors until the end of the stream.

        Returns:
            The first chunk (`END` if there is none), and a generator of the others that the caller must close.
        """

        def begin() -> tuple[Any, Generator[Any]]:
            probe = self.breaker is not None and self.breaker.admit()
            chunks = _chunks(self.large.stream(asked, config, **kwargs))

            def until_it_begins() -> list[Any]:
                held = []
                for chunk in chunks:
                    held.append(chunk)
                    if says_something(chunk):
                        break
                return held

            try:
                held = until_it_begins()  # in this thread, as the rest of the stream
            except BaseException as error:
                self._note_end(error, probe)
                raise
            rest = self._rest(held, chunks, probe)
            return next(rest, END), rest  # started, so that closing it closes the stream

        if isinstance(asked, Exception):
            raise asked
        return self.retry.call(begin)

    async def aopen(
        self, asked: Any, config: RunnableConfig, kwargs: dict[str, Any]
    ) -> tuple[Any, AsyncGenerator[Any]]:
        """Async version of `open`."""

        async def begin() -> tuple[Any, AsyncGenerator[Any]]:
            probe = self.breaker is not None and self.breaker.admit()
            chunks = _achunks(self.large.astream(asked, config, **kwargs))

            async def until_it_begins() -> list[Any]:
                held = []
                async for chunk in chunks:
                    held.append(chunk)
                    if says_something(chunk):
                        break
                return held

            try:
                held = await self.retry.awithin(until_it_begins)
            except BaseException as error:
                self._note_end(error, probe)
                raise
            rest = self._arest(held, chunks, probe)
            return await anext(rest, END), rest

        if isinstance(asked, Exception):
            raise asked
        return await self.retry.acall(begin)

    def _rest(self, held: list[Any], chunks: Generator[Any], probe: bool) -> Generator[Any]:
        """Yield the held and the remaining chunks of a stream, and report its end to the breaker."""
        ended: BaseException | None = None
        try:
            with closing(chunks):
                yield from held
                yield from chunks
        except BaseException as error:
            ended = error
            raise
        finally:
            self._note_end(ended, probe)

    async def _arest(self, held: list[Any], chunks: AsyncGenerator[Any], probe: bool) -> AsyncGenerator[Any]:
        ended: BaseException | None = None
        try:
            async with aclosing(chunks):
                for chunk in held:
                    yield chunk
                async for chunk in chunks:
                    yield chunk
        except BaseException as error:
            ended = error
            raise
        finally:
            self._note_end(ended, probe)

    def _note_end(self, error: BaseException | None, probe: bool) -> None:
        if self.breaker is not None:
            self.breaker.note(error, probe=probe)


def says_something(chunk: Any) -> bool:
    """Return whether a chunk of a stream has content that a caller could show or act on."""
    chunk = chunk.output if isinstance(chunk, ShuntResult) else chunk
    if not isinstance(chunk, BaseMessage):
        return bool(chunk)
    if chunk.content or getattr(chunk, "tool_call_chunks", None) or getattr(chunk, "tool_calls", None):
        return True
    return bool(chunk.additional_kwargs)


class _Group:
    """The state of one `batch`: its inputs, results, and the inputs that wait for an answer."""

    def __init__(self, caller: LargeCaller, asked: Sequence[Any], config: Configs, kwargs: dict[str, Any]) -> None:
        self.asked, self.config, self.kwargs = list(asked), config, kwargs
        self.results: list[Any] = list(asked)
        self.waiting = [j for j, value in enumerate(asked) if not isinstance(value, Exception)]
        self.asking: list[int] = []
        self._caller = caller

    @property
    def asks_singly(self) -> bool:
        """Whether the next inputs are called one by one."""
        breaker = self._caller.breaker
        half_open = breaker is not None and breaker.state == "half-open"
        return bool(self.waiting) and (self._caller.retry.attempt_seconds is not None or half_open)

    def single_calls(self) -> list[tuple[Any, ...]]:
        """Return the arguments of the next single calls: all inputs, or one that probes a half-open breaker."""
        self.asking = self.waiting if self._caller.retry.attempt_seconds is not None else self.waiting[:1]
        self.waiting = self.waiting[len(self.asking) :]
        return [(self.asked[j], self.config_of(j), self.kwargs) for j in self.asking]

    def grouped_call(self) -> tuple[list[Any], Configs, dict[str, Any]]:
        """Return the arguments of the grouped call for all waiting inputs."""
        self.asking, self.waiting = self.waiting, []
        shared = isinstance(self.config, dict)
        return (
            [self.asked[j] for j in self.asking],
            self.config if shared else [self.config_of(j) for j in self.asking],
            self.kwargs,
        )

    def retries(self) -> list[tuple[Any, ...]]:
        """Return the arguments of single calls for inputs that failed with a retryable error."""
        retry = self._caller.retry
        failed = {j: self.results[j] for j in self.asking if isinstance(self.results[j], Exception)}
        self.asking = [j for j, error in failed.items() if retry.attempts > 1 and is_retryable(error)]
        return [(self.asked[j], self.config_of(j), self.kwargs, failed[j]) for j in self.asking]

    def answer(self, results: Sequence[Any]) -> None:
        """Store the results of the latest calls."""
        for j, value in zip(self.asking, results, strict=True):
            if isinstance(value, Exception):
                raise_if_control_flow(value)
            self.results[j] = value

    def config_of(self, j: int) -> RunnableConfig:
        """Return the config of input `j`."""
        return self.config if isinstance(self.config, dict) else self.config[j]


def _chunks(stream: Any) -> Generator[Any]:
    """Wrap any iterator as a generator, so that closing it also closes the stream and its runs."""
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


def _in_threads(calls: Sequence[Any], group: _Group) -> None:
    if calls:
        with get_executor_for_config(group.config_of(group.asking[0])) as executor:
            group.answer(list(executor.map(lambda call: call(), calls)))


async def _gathered(calls: Sequence[Any], group: _Group) -> None:
    if calls:
        limit = group.config_of(group.asking[0]).get("max_concurrency")
        group.answer(await gather_with_concurrency(limit, *calls))
