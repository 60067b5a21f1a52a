"""CircuitBreaker: a large model that keeps failing is left alone for a while, then tried again with single calls."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from langchain_datashunt.exceptions import CircuitOpenError, ConfigurationError
from langchain_datashunt.large_models.retry import is_retryable, status_of

State = Literal["closed", "open", "half-open"]


@dataclass(frozen=True)
class CircuitCounters:
    """What a breaker has seen.

    Attributes:
        opened: How often it opened.
        refused: Calls that were not made while it was open.
        probes: Calls that were made to see whether the model is back.
    """

    opened: int = 0
    refused: int = 0
    probes: int = 0


class CircuitBreaker:
    """Opens when a large model has failed several times in a row; for any number of threads, tasks and shunts.

    Only errors after which the same request may succeed count (time-outs, refused connections, 429, 5xx): a request
    that is wrong, or that a gate keeps here, says nothing of the model. While it is open, calls end at once with a
    `CircuitOpenError`, so that a shunt with `on_large_error="small"` goes on answering. After `reset_seconds` it lets
    `probes` calls through at a time: one that succeeds closes it, one that fails opens it again, for twice as long, up
    to ten times as long.

    Kept libraries hold a lock while they call, or know only one of sync and async; this is no more than a counter.

    Args:
        failures: In a row, until it opens.
        reset_seconds: Until the first probe.
        probes: Calls at once while it is half-open.
        clock: Seconds that only rise; a change of the machine's time does not matter.

    Raises:
        ConfigurationError: A number is out of range.
    """

    def __init__(
        self,
        failures: int = 5,
        reset_seconds: float = 30.0,
        probes: int = 1,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if failures < 1 or probes < 1 or not reset_seconds > 0.0:
            raise ConfigurationError(
                f"A circuit breaker cannot have failures={failures}, reset_seconds={reset_seconds}, probes={probes}; "
                f"give at least one failure and one probe, and more than no time."
            )
        self.failures, self.reset_seconds, self.probes = failures, reset_seconds, probes
        self._clock, self._lock = clock, threading.Lock()
        self._failed = self._probing = 0
        self._open_until: float | None = None
        self._wait = reset_seconds
        self._counters = CircuitCounters()

    @property
    def state(self) -> State:
        """Closed: calls are made; open: none; half-open: single ones, to see whether the model is back."""
        with self._lock:
            if self._open_until is None:
                return "closed"
            return "open" if self._clock() < self._open_until else "half-open"

    @property
    def counters(self) -> CircuitCounters:
        """What it has seen so far."""
        with self._lock:
            return self._counters

    def admit(self) -> bool:
        """Let a call through; whether it is a probe.

        Raises:
            CircuitOpenError: It is not to be made now.
        """
        with self._lock:
            if self._open_until is None:
                return False
            left = self._open_until - self._clock()
            if left > 0.0 or self._probing >= self.probes:
                self._counters = replace(self._counters, refused=self._counters.refused + 1)
                raise CircuitOpenError(self._failed, max(0.0, left))
            self._probing += 1
            self._counters = replace(self._counters, probes=self._counters.probes + 1)
            return True

    def note(self, error: BaseException | None, *, probe: bool = False) -> None:
        """Take in how a call that was let through ended; None where it succeeded.

        An error that neither may pass nor has the status of an answer tells nothing of the model: the request may never
        have got to it.
        """
        bad = isinstance(error, Exception) and is_retryable(error)
        tells_nothing = error is not None and not bad and status_of(error) is None  # cancelled, or never sent
        with self._lock:
            self._probing -= probe
            if tells_nothing:
                return
            if not bad:
                self._failed, self._open_until, self._wait = 0, None, self.reset_seconds
                return
            self._failed += 1
            if probe:
                self._wait = min(2.0 * self._wait, 10.0 * self.reset_seconds)
            if probe or (self._open_until is None and self._failed >= self.failures):
                self._open_until = self._clock() + self._wait
                self._counters = replace(self._counters, opened=self._counters.opened + 1)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around one call, sync or async; nothing is held while it goes on.

        Raises:
            CircuitOpenError: It is not to be made now.
        """
        probe = self.admit()
        try:
            yield
        except BaseException as error:
            self.note(error, probe=probe)
            raise
        self.note(None, probe=probe)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> CircuitBreaker:
        return self  # copies of a shunt ask the same model

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its settings: another process sees the model for itself."""
        return CircuitBreaker, (self.failures, self.reset_seconds, self.probes)

    def __repr__(self) -> str:
        return f"CircuitBreaker(failures={self.failures}, reset_seconds={self.reset_seconds}, probes={self.probes})"
