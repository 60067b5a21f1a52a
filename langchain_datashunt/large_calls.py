"""Asking the large model: one input or one group, with retries and a bound on parallel calls."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Sequence
from functools import partial
from typing import Any

from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import get_executor_for_config
from langchain_core.runnables.utils import gather_with_concurrency

from langchain_datashunt.effects import Effect, Steps
from langchain_datashunt.retries import CallLimiter, Retry, is_retryable, raise_control_flow

END: Any = object()
"""What an opened stream's first chunk is where there is none."""


class LargeCaller:
    """One large model with its retries and its bound. Errors are values here; the caller decides what they mean."""

    def __init__(self, large: Runnable[Any, Any], retry: Retry, limiter: CallLimiter) -> None:
        self.large = large
        self.retry = retry
        self.limiter = limiter

    def one(
        self, asked: Any, config: RunnableConfig, kwargs: dict[str, Any], failed: Exception | None = None
    ) -> Effect:
        """Ask about one input; the output, or the last attempt's error. `failed` is a first attempt's error."""
        return Effect(
            partial(self._one, asked, config, kwargs, failed), partial(self._aone, asked, config, kwargs, failed)
        )

    def _one(self, asked: Any, config: RunnableConfig, kwargs: dict[str, Any], failed: Exception | None) -> Any:
        def ask() -> Any:
            if self.limiter.limit is None:
                return self.large.invoke(asked, config, **kwargs)
            with self.limiter.slot():
                return self.large.invoke(asked, config, **kwargs)

        try:
            return self.retry.call(ask, failed)
        except Exception as error:
            raise_control_flow(error)
            return error

    async def _aone(self, asked: Any, config: RunnableConfig, kwargs: dict[str, Any], failed: Exception | None) -> Any:
        async def ask() -> Any:
            if self.limiter.limit is None:
                return await self.large.ainvoke(asked, config, **kwargs)
            async with self.limiter.aslot():
                return await self.large.ainvoke(asked, config, **kwargs)

        try:
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
        given = config if isinstance(config, dict) else [each[j] for j in ready]
        call = partial(self._batch, [asked[j] for j in ready], given, kwargs)
        found = yield Effect(call, partial(self._abatch, *call.args))
        for j, value in zip(ready, found, strict=True):
            if isinstance(value, Exception):
                raise_control_flow(value)
            results[j] = value
        again = [j for j in ready if self._worth_retrying(results[j])]
        if again:
            effects = [self.one(asked[j], each[j], kwargs, failed=results[j]) for j in again]
            retried = yield Effect(partial(_in_threads, effects, each[0]), partial(_gathered, effects, each[0]))
            for j, value in zip(again, retried, strict=True):
                results[j] = value
        return results

    def _batch(self, asked: list[Any], config: Any, kwargs: dict[str, Any]) -> Sequence[Any]:
        with self.limiter.slot(len(asked)):
            try:
                return self.large.batch(asked, config, return_exceptions=True, **kwargs)
            except Exception as error:
                return [error] * len(asked)

    async def _abatch(self, asked: list[Any], config: Any, kwargs: dict[str, Any]) -> Sequence[Any]:
        async with self.limiter.aslot(len(asked)):
            try:
                return await self.large.abatch(asked, config, return_exceptions=True, **kwargs)
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
            return await anext(chunks, END), chunks

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
