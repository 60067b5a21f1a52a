"""Write a computation once for sync and async: a generator yields effects, and a driver performs them.

The generator itself never awaits. Each call to a model, a callback or a log is an `Effect` with a sync and an async
form.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from contextlib import suppress
from typing import Any, NamedTuple, TypeAlias, TypeVar

T = TypeVar("T")


class Effect(NamedTuple):
    """An action in a sync and an async form."""

    sync: Callable[[], Any]
    asynchronous: Callable[[], Awaitable[Any]]


Steps: TypeAlias = Generator[Effect, Any, T]
"""A computation that yields effects, is sent their results, and returns a T."""


def perform(sync: Callable[[], T], asynchronous: Callable[[], Awaitable[T]]) -> Steps[T]:
    """Yield one action and return its result, for use with `yield from`."""
    result: T = yield Effect(sync, asynchronous)
    return result


def run(steps: Steps[T]) -> T:
    """Perform the steps in this thread and return their result."""
    try:
        effect = next(steps)
        while True:
            try:
                result = effect.sync()
            except BaseException as error:
                effect = steps.throw(error)
            else:
                effect = steps.send(result)
    except StopIteration as finished:
        value: T = finished.value
        return value


async def arun(steps: Steps[T]) -> T:
    """Async version of `run`."""
    try:
        effect = next(steps)
        while True:
            try:
                result = await effect.asynchronous()
            except BaseException as error:
                effect = steps.throw(error)
            else:
                effect = steps.send(result)
    except StopIteration as finished:
        value: T = finished.value
        return value


async def to_the_end(work: Awaitable[T]) -> T:
    """Await work to its end, even if this task is cancelled meanwhile, and raise the cancellation afterwards.

    Meant for short work such as callbacks, which delay the cancellation.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # mark the error as retrieved, or asyncio logs it, although the cancellation is raised
        raise
