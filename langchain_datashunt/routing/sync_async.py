"""Write a computation once for sync and async: a generator yields effects, and a driver performs them.

Decisions stay free of `await`. Each action on the outside world is an `Effect` with a sync and an async form.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from contextlib import suppress
from typing import Any, NamedTuple, TypeAlias, TypeVar

T = TypeVar("T")


class Effect(NamedTuple):
    """One action, in its sync and its async form."""

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
    """Perform the steps in this event loop and return their result."""
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
    """Await short work to its end, even if this task is cancelled meanwhile; the cancellation is raised afterwards."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # retrieved, so that asyncio does not log it; the cancellation is raised instead
        raise
