"""Dynamic batching: requests that arrive while a small model is busy are computed in one batch.

No request waits for others to fill a batch. An idle model computes a request immediately. If the model is busy, the
request is queued. The next free worker takes the oldest queued requests, up to `max_batch`.
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
"""Function from `n` inputs to `n` answers, with an exception as the answer to an input that failed."""

_GONE_KEPT = 64
"""Number of abandoned requests that may stay in the queue if fewer requests are waiting."""


class DynamicBatching(Strategy):
    """Settings for batching single requests to one small model."""

    max_batch: int = Field(default=32, ge=1)
    """Maximum number of requests in a batch."""

    workers: int | None = Field(default=None, ge=1)
    """Maximum number of batches computed concurrently. None lets the model decide.

    Models usually compute one batch at a time on an accelerator. On a CPU they compute one per available thread, up
    to 4, and the workers share the threads equally."""

    max_waiting: int | None = Field(default=None, ge=0)
    """Maximum number of queued requests. None means unlimited. Further requests raise `QueueFullError`.

    Requests that are being computed, or that a worker is about to take, do not count. A shunt defers requests that
    its small model refuses, so set a bound only if this is intended."""


class _Shift:
    """One turn of a thread at computing batches.

    Attributes:
        worker: Executor that becomes idle after the turn, or None if the thread is a caller's, or ends after the turn.
        revoked: Whether the turn could not be started, although it may still be queued in the executor.
        begun: Whether the turn has looked for its first batch.
    """

    __slots__ = ("begun", "revoked", "worker")

    def __init__(self, worker: ThreadPoolExecutor | None = None) -> None:
        self.worker = worker
        self.revoked = self.begun = False


class DynamicBatcher:
    """Request queue of one model and the worker threads that serve it, created by `SmallModel`.

    Any number of threads and event loops may use it concurrently. Worker threads start when first needed, and end with
    the process or with `close`. A forked child starts with an empty queue. Worker threads do not see the callers'
    context variables, because a batch has several callers.

    Args:
        compute: Function that computes a batch.
        settings: Batching settings.
        workers: Maximum number of concurrent batches. A function is called by the first thread that serves the queue,
            because it may have to load the model.
        prepare_worker: Function called once in each new worker thread with the number of workers. Its errors are
            ignored. None prepares nothing.
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
        """Number of batches computed, including batches of one request."""
        self.requests = 0
        """Number of requests computed, including failed ones."""
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
        """Number of queued requests."""
        return self._waiting

    # Requests

    def call(self, value: Any) -> Any:
        """Return the answer to one input, batched with concurrent requests if the model is busy.

        The input is computed in the calling thread if the model is idle, or if this thread is already computing for
        this batcher.

        Raises:
            Exception: The error that the model raised for this input.
            QueueFullError: If the queue is full.
        """
        if getattr(self._here, "computing", False):
            return _raised(self._compute([value])[0])
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
            return _raised(answers.pop())
        if alone is not None:
            self._serve(alone)
        try:
            return request.wait()
        except BaseException:
            self._leave(request)
            raise
        finally:
            del request  # breaks a reference cycle: its answer may be an error whose traceback holds this frame

    async def acall(self, value: Any) -> Any:
        """Async version of `call`, computed in a worker thread.

        A request that is cancelled in the queue is not computed.

        Raises:
            Exception: The error that the model raised for this input.
            QueueFullError: If the queue is full.
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
        bound, in_line = self._settings.max_waiting, self._waiting - self._starting  # each starting worker takes one
        if bound is not None and in_line >= bound and self._busy >= self._workers:
            raise QueueFullError(
                f"The queue of the small model is full: {in_line} requests are waiting, and max_waiting is {bound}. "
                f"Send fewer requests at once, or raise max_waiting of its DynamicBatching."
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
        """Start one more worker if there is work and a free slot. The caller must hold the mutex.

        The worker that became idle last is started first, because its caches are warm. A new thread is created only
        if no worker is idle.

        Returns:
            A turn for the calling thread to run itself if no thread could be started, else None.
        """
        if not (self._waiting or self._again) or self._busy >= self._workers:
            return None
        self._busy += 1
        self._starting += 1
        worker = self._idle.pop() if self._idle else ThreadPoolExecutor(1, "datashunt")
        shift = _Shift(None if self._closed else worker)
        try:
            worker.submit(self._serve, shift)
        except RuntimeError:  # the process is exiting, or no thread can be started
            shift.revoked = True
            return _Shift()
        if self._closed:
            worker.shutdown(wait=False)  # takes effect after this turn
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
        """Compute batches until the queue is empty."""
        if shift.revoked:
            return
        self._prepare()
        while batch := self._next_batch(shift):
            self._work(batch)
            del batch

    def _prepare(self) -> None:
        """Prepare this thread once. Errors are ignored, because preparation only affects speed."""
        with suppress(Exception):
            if (count := self._count_workers) is not None:
                self._workers, self._count_workers = max(1, count()), None
            if not getattr(self._here, "prepared", False) and self._prepare_worker is not None:
                self._here.prepared = True
                if threading.current_thread().name.startswith("datashunt"):
                    self._prepare_worker(self._workers)

    def _next_batch(self, shift: _Shift) -> list[_Request]:
        """Return the next batch. If the queue is empty, end the shift and return an empty list."""
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
        """Compute and answer a batch.

        A batch that fails as a whole is halved until only the failing requests fail. Any worker may take the halves.
        """
        try:
            answers: Sequence[Any] = self._computed([request.value for request in batch], count=batch[0].new)
        except (KeyboardInterrupt, SystemExit) as error:
            answers = [_wrapped(error) for _ in batch]
        except BaseException as error:  # extension modules raise errors that are not an Exception
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
            del answers, batch  # breaks reference cycles: the traceback of an error holds this frame

    def _computed(self, values: list[Any], *, count: bool = True) -> list[Any]:
        """Return one answer for each input.

        Raises:
            PredictionError: If the model returned a different number of answers.
        """
        self.batches += 1
        self.requests += len(values) if count else 0
        outer, self._here.computing = getattr(self._here, "computing", False), True
        try:
            answers = list(self._compute(values))
        finally:
            self._here.computing = outer
        if len(answers) != len(values):
            raise PredictionError(f"The small model returned {len(answers)} answers for {len(values)} inputs.")
        return answers

    # Closing

    def close(self) -> None:
        """Answer all queued requests, then end the worker threads.

        Later requests are computed by threads that end with them. If a thread that computes for this batcher calls
        `close`, the call returns without waiting, because the thread would wait for itself.
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
        """Wake threads that wait in `close` if the queue is empty. The caller must hold the mutex."""
        if self._closed and not self._waiting:
            self._ended.notify_all()


def _wrapped(error: BaseException) -> PredictionError:
    """Return a `PredictionError` caused by `error`, so that a SystemExit does not end the waiting callers."""
    failure = PredictionError(f"The small model raised {type(error).__name__}: {error}.")
    failure.__cause__ = error
    return failure


def _raised(answer: Any) -> Any:
    """Return an answer, or raise it if it is an error, without a reference cycle through this frame."""
    if not isinstance(answer, BaseException):
        return answer
    try:
        raise answer
    finally:
        del answer


class _Request:
    """One queued input.

    Attributes:
        value: Input of the request.
        taken: Whether a worker has taken it.
        left: Whether its caller stopped waiting.
        new: Whether it was not yet part of a failed batch. Retried requests are not counted again.
    """

    __slots__ = ("left", "new", "taken", "value")

    def __init__(self, value: Any) -> None:
        self.value = value
        self.taken = self.left = False
        self.new = True


class _ThreadRequest(_Request):
    """Request of a thread, which blocks on a lock until the answer is available."""

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
            return _raised(answer)
        finally:
            del answer

    def settle(self, answer: Any) -> None:
        self._answer = answer
        self._ready.release()


class _LoopRequest(_Request):
    """Request of a coroutine, which awaits a future of its event loop."""

    __slots__ = ("future", "loop")

    def __init__(self, value: Any, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(value)
        self.loop = loop
        self.future: asyncio.Future[Any] = loop.create_future()


def _settle(requests: Sequence[_Request], answers: Sequence[Any]) -> None:
    """Deliver the answers to the callers, waking each event loop once."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any]]] = {}
    for request, answer in zip(requests, answers, strict=True):
        if isinstance(request, _LoopRequest):
            by_loop.setdefault(request.loop, []).append((request.future, answer))
        elif isinstance(request, _ThreadRequest):
            request.settle(answer)
    for loop, resolved in by_loop.items():
        with suppress(RuntimeError):  # a closed loop has no waiting callers
            loop.call_soon_threadsafe(_resolve, resolved)


def _resolve(resolved: list[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, answer in resolved:
        if future.done():
            continue
        if isinstance(answer, StopIteration):  # a future does not accept it
            future.set_exception(RuntimeError(f"The small model raised {answer!r}."))
        elif isinstance(answer, BaseException):
            future.set_exception(answer)
        else:
            future.set_result(answer)
