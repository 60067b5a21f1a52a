"""The end of a process: what is pending is written at exit, on SIGTERM, and where a worker of multiprocessing ends."""

from __future__ import annotations

import atexit
import multiprocessing.util
import os
import signal
import threading
import weakref
from contextlib import suppress
from types import FrameType
from typing import Protocol

_SECONDS = 10.0
"""How long the end of a process waits for each."""


class Writes(Protocol):
    """Something with records that are not written yet."""

    def flush(self, timeout: float | None = ...) -> bool:
        """Write what is pending."""

    def close(self, timeout: float | None = ...) -> None:
        """Write what is pending and stop."""


_living: weakref.WeakSet[Writes] = weakref.WeakSet()
_installed = False


def written_at_the_end(one: Writes) -> None:
    """Have it closed at exit and flushed on SIGTERM, before whatever else is to happen then."""
    global _installed
    _living.add(one)
    if _installed:
        return
    _installed = True
    atexit.register(_close_all)
    at_the_end_of_a_worker()
    if threading.current_thread() is threading.main_thread():
        previous = signal.getsignal(signal.SIGTERM)

        def flush_then(number: int, frame: FrameType | None) -> None:
            for living in list(_living):
                living.flush(timeout=_SECONDS)
            if callable(previous):
                previous(number, frame)
            elif previous != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)

        with suppress(ValueError):
            signal.signal(signal.SIGTERM, flush_then)


def at_the_end_of_a_worker() -> None:
    """Have all closed where this is a process of multiprocessing, which ends without what `atexit` would do."""
    if multiprocessing.parent_process() is not None:
        multiprocessing.util.Finalize(None, _close_all, exitpriority=100)


def _close_all() -> None:
    for living in list(_living):
        living.close(timeout=_SECONDS)
