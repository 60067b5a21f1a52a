"""Reset of locks, threads and connections in forked child processes."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from typing import Any, Protocol


class Forked(Protocol):
    """Object with state that a forked child must reset."""

    def after_fork(self) -> None:
        """Reset the state."""


AFTER_FORK: weakref.WeakSet[Forked] = weakref.WeakSet()
"""Objects whose `after_fork` runs in a forked child."""

LEFT_ALONE: list[Any] = []
"""Objects of the parent that a forked child keeps alive.

Destroying them would wait for threads that do not exist in the child, or close connections of the parent."""


class Mutex:
    """Lock that is released in a forked child, and that is replaced by a new one in copies and pickles."""

    def __init__(self) -> None:
        self.after_fork()
        AFTER_FORK.add(self)

    def after_fork(self) -> None:
        """Replace the lock, which another thread of the parent may have held."""
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Mutex:
        return Mutex()

    def __reduce__(self) -> tuple[Any, ...]:
        return Mutex, ()


def _begin_anew() -> None:
    one_thread = getattr(sys.modules.get("torch"), "set_num_threads", None)
    if one_thread is not None:  # OpenMP would wait for worker threads that do not exist in the child
        one_thread(1)
    for one in list(AFTER_FORK):
        one.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
