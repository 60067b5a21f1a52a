"""What a forked child begins anew: locks that another thread of the parent may have held, threads and connections."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from typing import Any, Protocol


class Forked(Protocol):
    """Something that begins anew in a forked child."""

    def after_fork(self) -> None:
        """Begin anew."""


AFTER_FORK: weakref.WeakSet[Forked] = weakref.WeakSet()
"""Whatever is to begin anew."""

LEFT_ALONE: list[Any] = []
"""What a forked child has of its parent and must not end: threads that it would wait for, the parent's connections."""


class Mutex:
    """A lock that nobody holds in a forked child, and that copies and pickles of its owner have anew."""

    def __init__(self) -> None:
        self.after_fork()
        AFTER_FORK.add(self)

    def after_fork(self) -> None:
        """Begin anew."""
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
    if one_thread is not None:  # the team of threads that OpenMP would wait for is not here
        one_thread(1)
    for one in list(AFTER_FORK):
        one.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
