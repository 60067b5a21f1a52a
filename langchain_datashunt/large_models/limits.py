"""CallLimiter: limit how many large-model calls run or wait at the same time."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, contextmanager, nullcontext
from contextvars import ContextVar

from langchain_datashunt.exceptions import QueueFullError


class CallLimiter:
    """Limit concurrent large-model calls, per process for threads and per event loop for tasks.

    A grouped call takes one place for each call that it may run concurrently, so the limit holds for groups too.
    Callers acquire their places in turn, so that a series of single calls cannot starve a group.

    A stream holds its place until it has been read to its end. Nested calls in the same context, including tasks and
    threads that copied it, take no other place, because they would deadlock.

    Args:
        limit: Maximum concurrent calls. None means unlimited.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self._waiting = 0
        self._lock = threading.Lock()
        self._in_turn = threading.Lock()
        self._places = threading.BoundedSemaphore(limit) if limit else None
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[asyncio.Lock, asyncio.Semaphore]]
        self._loops = weakref.WeakKeyDictionary()

    @contextmanager
    def slot(self, places: int = 1) -> Iterator[None]:
        """Hold places during a sync call, and wait until they are free."""
        room = self._places
        if room is None or self.limit is None or _is_held(room):
            yield
            return
        with ExitStack() as held:
            with self._in_turn:
                for _ in range(min(places, self.limit)):
                    room.acquire()
                    held.callback(room.release)
            held.enter_context(_holding(room))
            yield

    @asynccontextmanager
    async def aslot(self, places: int = 1) -> AsyncIterator[None]:
        """Async version of `slot`, which limits the tasks of the running event loop."""
        if self.limit is None:
            yield
            return
        loop = asyncio.get_running_loop()
        if (own := self._loops.get(loop)) is None:
            own = self._loops.setdefault(loop, (asyncio.Lock(), asyncio.Semaphore(self.limit)))
        in_turn, room = own
        if _is_held(room):
            yield
            return
        with ExitStack() as held:
            async with in_turn:
                for _ in range(min(places, self.limit)):
                    await room.acquire()
                    held.callback(room.release)
            held.enter_context(_holding(room))
            yield

    @property
    def pending(self) -> int:
        """Number of calls that wait or run now, from callers with a limit on pending calls."""
        return self._waiting

    def admitted(self, calls: int, most: int | None) -> AbstractContextManager[None]:
        """Count calls as pending while the returned context lasts.

        Args:
            calls: Number of calls that start now.
            most: Maximum calls that wait or run. None means unlimited.

        Raises:
            QueueFullError: The calls would exceed `most`, together with those that already wait or run.
        """
        return nullcontext() if most is None else self._counted(calls, most)

    @contextmanager
    def _counted(self, calls: int, most: int) -> Iterator[None]:
        with self._lock:
            if self._waiting + calls > most:
                raise QueueFullError(
                    f"{self._waiting} large-model calls already wait or run, and {calls} more would exceed "
                    f"max_pending={most}. Send fewer calls at once, or raise max_pending."
                )
            self._waiting += calls
        try:
            yield
        finally:
            with self._lock:
                self._waiting -= calls

    def bound(self, limit: int | None) -> int | None:
        """Return the lower of this limit and `limit`, or None if both are unlimited."""
        given = [n for n in (self.limit, limit) if n]
        return min(given) if given else None


class _Hold:
    """Marker that a context holds places of a semaphore, until they are released."""

    def __init__(self, room: object) -> None:
        self.room: object | None = room


_HOLDS: ContextVar[tuple[_Hold, ...]] = ContextVar("datashunt_holds", default=())


def _is_held(room: object) -> bool:
    return any(hold.room is room for hold in _HOLDS.get())


@contextmanager
def _holding(room: object) -> Iterator[None]:
    # A stream may end in another context than it began in, where a ContextVar token is invalid. The hold is therefore
    # marked as released instead of reset.
    hold = _Hold(room)
    _HOLDS.set((*_HOLDS.get(), hold))
    try:
        yield
    finally:
        hold.room = None
        _HOLDS.set(tuple(one for one in _HOLDS.get() if one.room is not None))
