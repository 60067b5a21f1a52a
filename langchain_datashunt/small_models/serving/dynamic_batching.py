"""Micro-batching: requests that arrive while a small model is busy are computed together, as soon as it is free.

Nothing waits for company: an idle model computes a request at once, alone. A request that finds it busy stands in
line, and whoever is free next takes all that stand there, first come first served, up to `max_batch`.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from pydantic import Field

from langchain_datashunt._utils.fork import AFTER_FORK
from langchain_datashunt._utils.settings import Strategy
from langchain_datashunt.exceptions import PredictionError, QueueFullError

Compute = Callable[[list[Any]], Sequence[Any]]
"""From `n` inputs to `n` answers, an exception in the place of an answer that failed."""

_GONE_KEPT = 64
"""Requests whose callers have gone that may stay in line until their turn, where fewer wait."""


class DynamicBatching(Strategy):
    """How single requests to one small model are joined."""

    max_batch: int = Field(default=32, ge=1)
    """Requests computed together at the most."""

    workers: int | None = Field(default=None, ge=1)
    """Batches computed at once at the most; None leaves it to the model: as many as there are CPU threads for it (4
    at the most), which then compute with one share of the threads each, and one on an accelerator."""

    max_waiting: int | None = Field(default=None, ge=0)
    """Requests in line at the most, behind those that are computed or that a thread is about to take: one more is
    refused with `QueueFullError`. None lets every caller wait its turn.

    A shunt sends what its small model refuses to the large one, so give a bound only where that is wanted."""


class _Shift:
    """One turn of a thread at serving.

    Attributes:
        worker: The thread, which is idle again afterwards; None where it is a caller's own, or ends then.
        revoked: Whether it could not be begun, though it may stand in the worker's queue.
        begun: Whether it took a batch, or found none.
    """

    __slots__ = ("begun", "revoked", "worker")

    def __init__(self, worker: ThreadPoolExecutor | None = None) -> None:
        self.worker = worker
        self.revoked = self.begun = False


class DynamicBatcher:
    """The line in front of one model, and the threads that serve it; made by `SmallModel`.

    May be used by any number of threads and event loops at once. Threads are made when they are first needed, and end
    with the process or with `close`; a forked child begins with an empty line. What is computed in these threads does
    not see the callers' context variables, for a batch has many callers.

    Args:
        compute: What is done with a batch.
        settings: How requests are joined.
        workers: Batches at once; a function is asked in the first thread that serves, for it may take long.
        prepare_worker: Called with the number of workers once in each new thread; where it fails, nothing is lost.
    """

    def __init__(
        self,
        compute: Compute,
        settings: DynamicBatching,
        workers: int | Callable[[], int] = 1,
        prepare_worker: Callable[[int], None] | None = None,
    ) -> None:
        self._compute = compute
        self._settings = settings
        self._workers = workers if isinstance(workers, int) else 1
        self._count_workers = None if isinstance(workers, int) else workers
        self._prepare_worker = prepare_worker
        self.batches = 0
        """Batches computed so far, those of one too."""
        self.requests = 0
        """Requests computed so far, failed ones too."""
        self._begin()
        AFTER_FORK.add(self)

    def _begin(self) -> None:
        self._mutex = threading.Lock()
        self._line: deque[_Request] = deque()
        self._again: deque[list[_Request]] = deque()
        self._waiting = 0
        self._gone = 0
        self._busy = 0
        self._starting = 0
        self._closed = False
        self._ended = threading.Condition(self._mutex)
        self._hired: set[ThreadPoolExecutor] = set()
        self._idle: list[ThreadPoolExecutor] = []
        self._here = threading.local()

    after_fork = _begin

    @property
    def waiting(self) -> int:
        """Requests in line now."""
        return self._waiting

    # Asking

    def call(self, value: Any) -> Any:
        """The answer to one input; computed in this thread where the model is idle, or where it asks itself.

        Raises:
            Exception: What the model raised for this input.
            QueueFullError: The line is full.
        """
        if getattr(self._here, "computing", False):
            return _told(self._compute([value])[0])
        request: _ThreadRequest | None = None
        alone: _Shift | None = None
        with self._mutex:
            if not (self._busy or self._waiting):
                self._busy += 1
            else:
                request = _ThreadRequest(value)
                self._admit(request)
                alone = self._staff()
        if request is None:
            try:
                answers = self._computed([value])
            finally:
                self._freed()
            return _told(answers.pop())
        if alone is not None:
            self._serve(alone)
        try:
            return request.wait()
        except BaseException:
            self._leave(request)
            raise
        finally:
            del request  # its answer may be an error whose traceback holds this frame

    async def acall(self, value: Any) -> Any:
        """The answer to one input, computed in a thread of this batcher; a cancelled request leaves the line.

        Raises:
            Exception: What the model raised for this input.
            QueueFullError: The line is full.
        """
        if getattr(self._here, "computing", False):
            return self.call(value)
        request = _LoopRequest(value, asyncio.get_running_loop())
        with self._mutex:
            self._admit(request)
            alone = self._staff()
        if alone is not None:
            self._serve(alone)
        try:
            return await request.future
        except asyncio.CancelledError:
            self._leave(request)
            raise
        finally:
            del request

    def _admit(self, request: _Request) -> None:
        bound, in_line = self._settings.max_waiting, self._waiting - self._starting  # each that starts will take one
        if bound is not None and in_line >= bound and self._busy >= self._workers:
            raise QueueFullError(
                f"{in_line} requests stand in line for the small model already, and no more than {bound} may. "
                f"Send fewer at once, or raise max_waiting of its DynamicBatching."
            )
        self._line.append(request)
        self._waiting += 1

    def _leave(self, request: _Request) -> None:
        with self._mutex:
            if request.taken or request.left:
                return
            request.left, request.value = True, None
            self._waiting -= 1
            self._gone += 1
            self._tell_of_the_end()
            if self._gone > max(_GONE_KEPT, self._waiting):
                self._line = deque(one for one in self._line if not one.left)
                self._gone = 0

    # Serving

    def _staff(self) -> _Shift | None:
        """Put one more thread to work, where there is work and may be one; the mutex is held.

        It is the one that worked last, whose caches are warm, and a new one only where none is idle.

        Returns:
            A turn that the caller is to take itself, because no thread can be had; None for none.
        """
        if not (self._waiting or self._again) or self._busy >= self._workers:
            return None
        self._busy += 1
        self._starting += 1
        worker = self._idle.pop() if self._idle else ThreadPoolExecutor(1, "datashunt")
        shift = _Shift(None if self._closed else worker)
        try:
            worker.submit(self._serve, shift)
        except RuntimeError:  # the process is ending, or no thread can be started
            shift.revoked = True
            return _Shift()
        if self._closed:
            worker.shutdown(wait=False)  # when this turn is over
        else:
            self._hired.add(worker)
        return None

    def _freed(self) -> None:
        with self._mutex:
            self._busy -= 1
            alone = self._staff()
        if alone is not None:
            self._serve(alone)

    def _serve(self, shift: _Shift) -> None:
        """Compute batch after batch until nobody is in line."""
        if shift.revoked:
            return
        self._prepare()
        while batch := self._next_batch(shift):
            self._work(batch)
            del batch

    def _prepare(self) -> None:
        """Make this thread ready, once; what fails here costs speed only."""
        with suppress(Exception):
            if (count := self._count_workers) is not None:
                self._workers, self._count_workers = max(1, count()), None
            if not getattr(self._here, "prepared", False) and self._prepare_worker is not None:
                self._here.prepared = True
                if threading.current_thread().name.startswith("datashunt"):
                    self._prepare_worker(self._workers)

    def _next_batch(self, shift: _Shift) -> list[_Request]:
        """Who is next; empty, and the shift at its end, where nobody is."""
        batch: list[_Request] = []
        with self._mutex:
            if not shift.begun:
                shift.begun = True
                self._starting -= 1
            if self._again:
                return self._again.popleft()
            while self._line and len(batch) < self._settings.max_batch:
                request = self._line.popleft()
                if request.left:
                    self._gone -= 1
                    continue
                request.taken = True
                self._waiting -= 1
                batch.append(request)
            self._tell_of_the_end()
            if not batch:
                self._busy -= 1
                if shift.worker is not None and not self._closed:
                    self._idle.append(shift.worker)
        return batch

    def _work(self, batch: list[_Request]) -> None:
        """Answer a batch. One that fails as a whole is halved until what fails, fails alone; others may help."""
        try:
            answers: Sequence[Any] = self._computed([request.value for request in batch], count=batch[0].new)
        except (KeyboardInterrupt, SystemExit) as error:
            answers = [_wrapped(error) for _ in batch]
        except BaseException as error:  # of other languages' code, too, which raises some of its own
            if len(batch) > 1:
                for request in batch:
                    request.new = False
                middle = len(batch) // 2
                with self._mutex:
                    self._again.extend((batch[:middle], batch[middle:]))
                    alone = self._staff()
                if alone is not None:
                    self._serve(alone)
                return
            answers = [error if isinstance(error, Exception) else _wrapped(error)]
        try:
            _settle(batch, answers)
        finally:
            del answers, batch  # an error's traceback holds this frame, and a request its error

    def _computed(self, values: list[Any], *, count: bool = True) -> list[Any]:
        """An answer for each.

        Raises:
            PredictionError: The model gave another number of answers.
        """
        self.batches += 1
        self.requests += len(values) if count else 0
        outer, self._here.computing = getattr(self._here, "computing", False), True
        try:
            answers = list(self._compute(values))
        finally:
            self._here.computing = outer
        if len(answers) != len(values):
            raise PredictionError(f"The small model gave {len(answers)} answers for {len(values)} inputs.")
        return answers

    # The end

    def close(self) -> None:
        """End the threads when all that stand in line are answered.

        Later requests have threads that end with them. A thread that computes for this batcher does not wait for
        itself: from there, the end comes after this call.
        """
        inside = getattr(self._here, "computing", False)
        with self._mutex:
            self._closed = True
            hired, self._idle = list(self._hired), []
            while self._waiting and not inside:
                self._ended.wait()
        for worker in hired:
            worker.shutdown(wait=not inside)

    def _tell_of_the_end(self) -> None:
        """Wake who waits in `close`; the mutex is held."""
        if self._closed and not self._waiting:
            self._ended.notify_all()


def _wrapped(error: BaseException) -> PredictionError:
    """What ends a thread is no affair of those who wait for its answers: an error of its own for each."""
    told = PredictionError(f"The small model raised {type(error).__name__}: {error}.")
    told.__cause__ = error
    return told


def _told(answer: Any) -> Any:
    """An answer, raised where it is an error; the error is not held by the frame that its traceback holds."""
    if not isinstance(answer, BaseException):
        return answer
    try:
        raise answer
    finally:
        del answer


class _Request:
    """One input in line.

    Attributes:
        value: The input.
        taken: Whether it is being computed, or has been.
        left: Whether its caller has gone.
        new: Whether it was not yet part of a batch that failed.
    """

    __slots__ = ("left", "new", "taken", "value")

    def __init__(self, value: Any) -> None:
        self.value = value
        self.taken = self.left = False
        self.new = True


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
        answer, self._answer = self._answer, None
        try:
            return _told(answer)
        finally:
            del answer

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
    for loop, raise_first_error in by_loop.items():
        with suppress(RuntimeError):  # a loop that was closed has nobody who waits
            loop.call_soon_threadsafe(_resolve, raise_first_error)


def _resolve(raise_first_error: list[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, answer in raise_first_error:
        if future.done():
            continue
        if isinstance(answer, StopIteration):  # a future refuses it
            future.set_exception(RuntimeError(f"The small model raised {answer!r}."))
        elif isinstance(answer, BaseException):
            future.set_exception(answer)
        else:
            future.set_result(answer)
