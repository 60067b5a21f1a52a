"""Steps written once for sync and async: a generator yields effects, a driver carries them out.

Logic that only decides stays free of `await`; each thing that touches the world is an `Effect` with both forms.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from contextlib import suppress
from typing import Any, NamedTuple, TypeAlias, TypeVar

T = TypeVar("T")


class Effect(NamedTuple):
    """One thing to be done, in its sync and its async form."""

    sync: Callable[[], Any]
    asynchronous: Callable[[], Awaitable[Any]]


Steps: TypeAlias = Generator[Effect, Any, T]
"""A computation that yields effects, is sent their results, and returns a T."""


def run(steps: Steps[T]) -> T:
    """Carry steps out in this thread."""
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
    """Carry steps out in this event loop."""
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
    """Await short work that must not be left half done: a cancellation is raised when it is through."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # taken note of; the cancellation is what counts
        raise


def raise_first_error(outputs: list[Any], return_exceptions: bool) -> list[Any]:
    """The outputs; the first error is raised, where errors are not to be returned."""
    if not return_exceptions:
        for output in outputs:
            if isinstance(output, Exception):
                raise output
    return outputs
