"""CircuitBreaker: stop calls to a failing large model for a while, then test it with probes."""

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
    """Counters of a circuit breaker.

    Attributes:
        opened: Number of times the breaker opened.
        refused: Calls refused while it was open.
        probes: Calls made to test whether the model has recovered.
    """

    opened: int = 0
    refused: int = 0
    probes: int = 0


class CircuitBreaker:
    """Refuse calls to a large model after several consecutive failures.

    One breaker can be shared by any number of threads, tasks and shunts. Only transient errors count as failures:
    timeouts, refused connections, 429 and 5xx. An invalid request does not count, and neither does one that a privacy
    guard keeps local. While the breaker is open, calls raise `CircuitOpenError` at once, so that a shunt with
    `on_large_error="small"` keeps answering. After `reset_seconds` it admits up to `probes` concurrent calls. If a
    probe succeeds, the breaker closes. If a probe fails, it opens again for twice as long, up to ten times
    `reset_seconds`.

    Args:
        failures: Consecutive failures until the breaker opens.
        reset_seconds: Seconds until the first probe.
        probes: Maximum concurrent calls while half-open.
        clock: Monotonic clock in seconds, independent of changes of the system time.

    Raises:
        ConfigurationError: A value is out of range.
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
                f"Expected failures >= 1, reset_seconds > 0 and probes >= 1, got failures={failures}, "
                f"reset_seconds={reset_seconds}, probes={probes}."
            )
        self.failures, self.reset_seconds, self.probes = failures, reset_seconds, probes
        self._clock, self._lock = clock, threading.Lock()
        self._failed = self._probing = 0
        self._open_until: float | None = None
        self._wait = reset_seconds
        self._counters = CircuitCounters()

    @property
    def state(self) -> State:
        """State: "closed" admits all calls, "open" refuses them, "half-open" admits a few probes."""
        with self._lock:
            if self._open_until is None:
                return "closed"
            return "open" if self._clock() < self._open_until else "half-open"

    @property
    def counters(self) -> CircuitCounters:
        """Counters since creation."""
        with self._lock:
            return self._counters

    def admit(self) -> bool:
        """Admit a call and return whether it is a probe.

        Raises:
            CircuitOpenError: The breaker is open, or enough probes are running.
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
        """Record the outcome of an admitted call.

        An error is ignored if it is not transient and has no HTTP status, since the request may not have reached
        the model.

        Args:
            error: Exception raised by the call; None if it succeeded.
            probe: Whether the call was a probe, as returned by `admit`.
        """
        bad = isinstance(error, Exception) and is_retryable(error)
        tells_nothing = error is not None and not bad and status_of(error) is None  # cancelled or never sent
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
        """Admit one sync or async call and record its outcome, without holding a lock during the call.

        Raises:
            CircuitOpenError: The breaker is open, or enough probes are running.
        """
        probe = self.admit()
        try:
            yield
        except BaseException as error:
            self.note(error, probe=probe)
            raise
        self.note(None, probe=probe)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> CircuitBreaker:
        return self  # copies of a shunt call the same model

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings only, since each process observes the model on its own."""
        return CircuitBreaker, (self.failures, self.reset_seconds, self.probes)

    def __repr__(self) -> str:
        return f"CircuitBreaker(failures={self.failures}, reset_seconds={self.reset_seconds}, probes={self.probes})"
