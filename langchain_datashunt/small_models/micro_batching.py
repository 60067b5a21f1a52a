"""Micro-batching: requests that arrive while a small model is busy are computed together, as soon as it is free.

Nothing waits for company: an idle model computes a request at once, alone. A request that finds it busy stands in
line, and whoever is free next takes all that stand there, first come first served, up to `max_batch`.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from pydantic import Field

from langchain_datashunt._extras import require
from langchain_datashunt.configured import Strategy
from langchain_datashunt.exceptions import MissingExtraError, QueueFullError

Compute = Callable[[list[Any]], Sequence[Any]]
"""From `n` inputs to `n` answers, an exception in the place of an answer that failed."""


class MicroBatching(Strategy):
    """How single requests to one small model are joined."""

    max_batch: int = Field(default=32, ge=1)
    """Requests computed together at the most."""

    workers: int | None = Field(default=None, ge=1)
    """Batches computed at once at the most; None leaves it to the model: as many as there are CPU threads for it (4
    at the most), which then compute with one share of the threads each, and one on an accelerator."""

    max_waiting: int | None = Field(default=None, ge=0)
    """Requests in line at the most: one more is refused with `QueueFullError`. None lets every caller wait its turn.

    A shunt sends what its small model refuses to the large one, so give a bound only where that is wanted."""


class MicroBatcher:
    """The line in front of one model, and the threads that serve it; made by `SmallModel`.

    May be used by any number of threads and event loops at once. Threads are made when they are first needed, and end
    with the process or with `close`; a forked child begins with an empty line.

    Args:
        compute: What is done with a batch.
        settings: How requests are joined.
        workers: Batches at once.
        prepare_worker: Called once in each new thread.
    """

    def __init__(
        self,
        compute: Compute,
        settings: MicroBatching,
        workers: int = 1,
        prepare_worker: Callable[[], None] | None = None,
    ) -> None:
        self._compute = compute
        self._settings = settings
        self._workers = workers
        self._prepare_worker = prepare_worker
        self.batches = 0
        """Batches computed so far."""
        self.requests = 0
        """Requests answered so far, failed ones too."""
        self._begin()
        _BATCHERS.add(self)

    def _begin(self) -> None:
        self._mutex = threading.Lock()
        self._line: deque[_Request] = deque()
        self._waiting = 0
        self._busy = 0
        self._threads: ThreadPoolExecutor | None = None

    @property
    def waiting(self) -> int:
        """Requests in line now."""
        return self._waiting

    # Asking

    def call(self, value: Any) -> Any:
        """The answer to one input; computed in this thread where the model is idle.

        Raises:
            Exception: What the model raised for this input.
            QueueFullError: The line is full.
        """
        request: _ThreadRequest | None = None
        with self._mutex:
            if not (self._busy or self._waiting):
                self._busy += 1
            else:
                request = _ThreadRequest(value)
                self._admit(request)
            alone = request is not None and self._staff()
        if request is not None:
            if alone:
                self._serve()
            try:
                return request.wait()
            except BaseException:
                self._leave(request)
                raise
        try:
            (answer,) = self._answers([value])
        finally:
            self._freed()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    async def acall(self, value: Any) -> Any:
        """The answer to one input, computed in a thread of this batcher; a cancelled request leaves the line.

        Raises:
            Exception: What the model raised for this input.
            QueueFullError: The line is full.
        """
        loop = asyncio.get_running_loop()
        request = _LoopRequest(value, loop)
        with self._mutex:
            self._admit(request)
            alone = self._staff()
        if alone:
            self._serve()
        try:
            return await request.future
        except asyncio.CancelledError:
            self._leave(request)
            raise

    def _admit(self, request: _Request) -> None:
        bound = self._settings.max_waiting
        if bound is not None and self._waiting >= bound and self._busy >= self._workers:
            raise QueueFullError(
                f"{self._waiting} requests stand in line for the small model already, and no more than {bound} may. "
                f"Send fewer at once, or raise max_waiting of its MicroBatching."
            )
        self._line.append(request)
        self._waiting += 1

    def _leave(self, request: _Request) -> None:
        with self._mutex:
            if not request.taken and not request.left:
                request.left = True
                self._waiting -= 1

    # Serving

    def _staff(self) -> bool:
        """Put one more thread to work, where there is work and may be one; the mutex is held.

        Returns:
            Whether the caller is to serve, because no thread can be had any more.
        """
        if not self._waiting or self._busy >= self._workers:
            return False
        self._busy += 1
        try:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self._workers, "datashunt", initializer=self._prepare_worker)
            self._threads.submit(self._serve)
        except RuntimeError:  # closed, or the process is ending
            return True
        return False

    def _freed(self) -> None:
        with self._mutex:
            self._busy -= 1
            alone = self._staff()
        if alone:
            self._serve()

    def _serve(self) -> None:
        """Compute batch after batch until nobody is in line."""
        while batch := self._next_batch():
            _settle(batch, self._answers([request.value for request in batch]))

    def _next_batch(self) -> list[_Request]:
        """Who is next; empty, and this thread no longer busy, where nobody is."""
        batch: list[_Request] = []
        with self._mutex:
            while self._line and len(batch) < self._settings.max_batch:
                request = self._line.popleft()
                if not request.left:
                    request.taken = True
                    self._waiting -= 1
                    batch.append(request)
            if not batch:
                self._busy -= 1
        return batch

    def _answers(self, values: list[Any]) -> Sequence[Any]:
        """One answer each; a batch that fails as a whole is halved until what fails, fails alone."""
        self.batches += 1
        self.requests += len(values)
        return self._computed(values)

    def _computed(self, values: list[Any]) -> Sequence[Any]:
        try:
            return self._compute(values)
        except Exception as error:
            if len(values) == 1:
                return [error]
        except BaseException as error:
            return [error] * len(values)
        middle = len(values) // 2
        return [*self._computed(values[:middle]), *self._computed(values[middle:])]

    # The end

    def close(self) -> None:
        """End the threads when all that stand in line are answered; later requests are computed by who makes them."""
        with self._mutex:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(1)
            threads = self._threads
        threads.shutdown(wait=True)


class _Request:
    """One input in line.

    Attributes:
        value: The input.
        taken: Whether it is being computed, or has been.
        left: Whether its caller has gone.
    """

    __slots__ = ("left", "taken", "value")

    def __init__(self, value: Any) -> None:
        self.value = value
        self.taken = self.left = False


class _ThreadRequest(_Request):
    """A request of a thread, which sleeps on a lock until the answer is there."""

    __slots__ = ("_answer", "_ready")

    def __init__(self, value: Any) -> None:
        super().__init__(value)
        self._answer: Any = None
        self._ready = threading.Lock()
        self._ready.acquire()

    def wait(self) -> Any:
        self._ready.acquire()
        if isinstance(self._answer, BaseException):
            raise self._answer
        return self._answer

    def settle(self, answer: Any) -> None:
        self._answer = answer
        self._ready.release()


class _LoopRequest(_Request):
    """A request of a coroutine, which awaits a future of its loop."""

    __slots__ = ("future", "loop")

    def __init__(self, value: Any, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(value)
        self.loop = loop
        self.future: asyncio.Future[Any] = loop.create_future()


def _settle(requests: Sequence[_Request], answers: Sequence[Any]) -> None:
    """Give each caller its answer; each event loop is woken once."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any]]] = {}
    for request, answer in zip(requests, answers, strict=True):
        if isinstance(request, _LoopRequest):
            by_loop.setdefault(request.loop, []).append((request.future, answer))
        elif isinstance(request, _ThreadRequest):
            request.settle(answer)
    for loop, settled in by_loop.items():
        with suppress(RuntimeError):  # a loop that was closed has nobody who waits
            loop.call_soon_threadsafe(_resolve, settled)


def _resolve(settled: list[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, answer in settled:
        if future.done():
            continue
        if isinstance(answer, StopIteration):  # a future refuses it
            future.set_exception(RuntimeError(f"The small model raised {answer!r}."))
        elif isinstance(answer, BaseException):
            future.set_exception(answer)
        else:
            future.set_result(answer)


def share_of_threads(workers: int) -> None:
    """Have this thread's torch and BLAS products use its share of the process's threads, where several work."""
    each = max(1, int(require("torch", "torch").get_num_threads()) // workers)
    with suppress(MissingExtraError):  # without it, threads compete
        require("threadpoolctl", "torch").threadpool_limits(each, user_api="openmp")


_BATCHERS: weakref.WeakSet[MicroBatcher] = weakref.WeakSet()


def _after_fork() -> None:
    """A forked child has none of the parent's threads, nor anybody in line."""
    for batcher in list(_BATCHERS):
        batcher._begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
