"""Limits on how many large-model calls run, and wait, at once."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import Any

from langchain_datashunt.exceptions import QueueFullError


class CallLimiter:
    """Lets at most `limit` large calls run at once: over all threads, and over all tasks of one event loop.

    A grouped call takes as many places as it will use, so the bound holds for it too; whoever came first is served
    first. Whoever holds a place because of a stream that it has not read to its end may make further calls, also from
    tasks and threads that have its context; they do not wait for themselves.

    Callers that share it share their count of pending calls, too.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.pending = Pending()
        self._threads = _ThreadPlaces(limit) if limit else None
        self._loops: weakref.WeakKeyDictionary[Any, _TaskPlaces] = weakref.WeakKeyDictionary()

    @contextmanager
    def slot(self, places: int = 1) -> Iterator[None]:
        """Hold places for a sync call."""
        room = self._threads
        if room is None or self.limit is None or _holds(room):
            yield
            return
        taken = min(places, self.limit)
        room.take(taken)
        with _holding(room):
            try:
                yield
            finally:
                room.give(taken)

    @asynccontextmanager
    async def aslot(self, places: int = 1) -> AsyncIterator[None]:
        """Hold places for an async call."""
        if self.limit is None:
            yield
            return
        loop = asyncio.get_running_loop()
        if (room := self._loops.get(loop)) is None:
            room = self._loops.setdefault(loop, _TaskPlaces(self.limit))
        if _holds(room):
            yield
            return
        taken = min(places, self.limit)
        await room.take(taken)
        with _holding(room):
            try:
                yield
            finally:
                room.give(taken)

    def bound(self, limit: int | None) -> int | None:
        """The tighter of this limit and a caller's."""
        given = [n for n in (self.limit, limit) if n]
        return min(given) if given else None


class Pending:
    """How many calls wait or are under way."""

    def __init__(self) -> None:
        self.calls = 0
        self._lock = threading.Lock()

    @contextmanager
    def counted(self, calls: int, most: int) -> Iterator[None]:
        """Around calls.

        Raises:
            QueueFullError: With them there would be more than `most`.
        """
        with self._lock:
            if self.calls + calls > most:
                raise QueueFullError(
                    f"{self.calls} calls of the large model wait or are under way, and with {calls} more there "
                    f"would be more than the {most} that may. Send fewer at once, or raise max_pending."
                )
            self.calls += calls
        try:
            yield
        finally:
            with self._lock:
                self.calls -= calls


class _Holding:
    """That places of a room are held, until they are given back, by whoever has this in its context."""

    def __init__(self, room: object) -> None:
        self.room: object | None = room


_HELD: ContextVar[tuple[_Holding, ...]] = ContextVar("datashunt_held", default=())


def _holds(room: object) -> bool:
    return any(holding.room is room for holding in _HELD.get())


@contextmanager
def _holding(room: object) -> Iterator[None]:
    """While it lasts, this context holds places. A stream may end in another context than it began in."""
    holding = _Holding(room)
    _HELD.set((*_HELD.get(), holding))
    try:
        yield
    finally:
        holding.room = None
        _HELD.set(tuple(one for one in _HELD.get() if one.room is not None))


class _ThreadPlaces:
    """Places that threads share, first come first served."""

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    def take(self, places: int) -> None:
        with self._changed:
            ticket = object()
            self._waiting.append(ticket)
            try:
                self._changed.wait_for(lambda: self._waiting[0] is ticket and self._free >= places)
                self._free -= places
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()

    def give(self, places: int) -> None:
        with self._changed:
            self._free += places
            self._changed.notify_all()


class _TaskPlaces:
    """Places that the tasks of one event loop share, first come first served."""

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, places: int) -> None:
        if not self._waiting and self._free >= places:
            self._free -= places
            return
        ticket = (places, asyncio.get_running_loop().create_future())
        self._waiting.append(ticket)
        try:
            await ticket[1]
        except asyncio.CancelledError:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            else:
                self._free += places
            self._wake()
            raise

    def give(self, places: int) -> None:
        self._free += places
        self._wake()

    def _wake(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free:
            places, ticket = self._waiting.popleft()
            if not ticket.done():
                self._free -= places
                ticket.set_result(None)
