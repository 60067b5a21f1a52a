"""Counter of concurrent calls, for tests of concurrency limits."""

from __future__ import annotations

import threading


class AtOnce:
    """Context manager around each call that counts concurrent calls from any thread.

    Attributes:
        most: Highest number of concurrent calls so far.
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
