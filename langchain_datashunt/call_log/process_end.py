"""Write pending records when the process exits, receives SIGTERM, or ends as a worker of multiprocessing."""

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
"""Maximum time to wait for each recorder when the process ends, in seconds."""


class Writes(Protocol):
    """Object with pending records, such as a `Recorder`."""

    def flush(self, timeout: float | None = ...) -> bool:
        """Write all pending records."""

    def rescue(self) -> None:
        """Write what is still pending elsewhere."""

    def close(self, timeout: float | None = ...) -> None:
        """Write all pending records and stop."""


_living: weakref.WeakSet[Writes] = weakref.WeakSet()
_at_exit = False
_on_sigterm = False


def written_at_the_end(one: Writes) -> None:
    """Close an object at exit, and flush it on SIGTERM before the previous signal handler runs.

    The object is held by a weak reference. The signal handler is installed by the first call from the main thread,
    because Python allows no other thread to install one.
    """
    global _at_exit, _on_sigterm
    _living.add(one)
    if not _at_exit:
        _at_exit = True
        atexit.register(_close_all)
        at_the_end_of_a_worker()
    if not _on_sigterm and threading.current_thread() is threading.main_thread():
        _on_sigterm = True
        previous = signal.getsignal(signal.SIGTERM)

        def flush_then(number: int, frame: FrameType | None) -> None:
            for living in list(_living):
                if not living.flush(timeout=_SECONDS):
                    living.rescue()
            if callable(previous):
                previous(number, frame)
            elif previous != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)

        with suppress(ValueError):
            signal.signal(signal.SIGTERM, flush_then)


def at_the_end_of_a_worker() -> None:
    """Close all objects when this process ends, if it is a worker of multiprocessing, which skips `atexit`."""
    if multiprocessing.parent_process() is not None:
        multiprocessing.util.Finalize(None, _close_all, exitpriority=100)


def _close_all() -> None:
    for living in list(_living):
        living.close(timeout=_SECONDS)
