"""How many calls are under way at once, for tests of limits."""

from __future__ import annotations

import threading


class AtOnce:
    """Around each call, from any thread.

    Attributes:
        most: The most that ever were under way.
    """

    def __init__(self) -> None:
        self.most = 0
        self._now = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._now -= 1
