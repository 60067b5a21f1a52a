"""Watchdog: run an action if a block of code takes longer than a number of seconds."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from langchain_datashunt._utils.fork import AFTER_FORK


class Watchdog:
    """One background thread that watches any number of blocks. It starts at the first use, and ends when idle."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self.after_fork()
        AFTER_FORK.add(self)

    def after_fork(self) -> None:
        """Forget what the parent watched, whose thread does not exist in the child."""
        self._changed = threading.Condition()
        self._watched: list[tuple[float, int]] = []
        self._actions: dict[int, Callable[[], None]] = {}
        self._thread: threading.Thread | None = None

    @contextmanager
    def watching(self, seconds: float, action: Callable[[], None]) -> Iterator[None]:
        """Run `action` in another thread if the block has not ended after `seconds`. Its errors are ignored."""
        number = next(self._numbers)
        with self._changed:
            heapq.heappush(self._watched, (time.monotonic() + seconds, number))
            self._actions[number] = action
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="datashunt-watchdog", daemon=True)
                self._thread.start()
            elif self._watched[0][1] == number:
                self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                self._actions.pop(number, None)

    def _watch(self) -> None:
        while True:
            with self._changed:
                while self._watched and self._watched[0][1] not in self._actions:
                    heapq.heappop(self._watched)  # the block has ended
                if not self._watched:
                    self._thread = None
                    return
                left = self._watched[0][0] - time.monotonic()
                if left > 0.0:
                    self._changed.wait(left)
                    continue
                action = self._actions.pop(heapq.heappop(self._watched)[1])
            with suppress(Exception):  # the connection may have ended by itself
                action()


WATCHDOG = Watchdog()
"""The watchdog of this process."""
