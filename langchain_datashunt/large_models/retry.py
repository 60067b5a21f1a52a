"""Retries of one large call, and how many run at once; what is asked, and of whom, is the shunt's affair."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Awaitable, Callable
from contextvars import copy_context
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from pydantic import Field
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential,
    wait_random,
)

from langchain_datashunt._utils.settings import Strategy
from langchain_datashunt.exceptions import LargeTimeoutError

T = TypeVar("T")

RETRYABLE_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""HTTP statuses after which the same request may succeed."""

_RETRYABLE_NAMES = frozenset(
    {
        "APIConnectionError",
        "APITimeoutError",
        "APIResponseValidationError",
        "ChunkedEncodingError",
        "ClientConnectionError",
        "ClientPayloadError",
        "ConnectError",
        "ConnectTimeout",
        "ConnectionError",
        "InternalServerError",
        "JSONDecodeError",
        "OverloadedError",
        "RateLimitError",
        "ReadError",
        "ReadTimeout",
        "RemoteProtocolError",
        "ServiceUnavailable",
        "TransportError",
    }
)


def is_retryable(error: BaseException) -> bool:
    """Whether the same request may succeed later: by HTTP status, else by kind (connection, time-out, cut reply).

    Errors of client libraries are known by name, so that none of them is imported here.
    """
    status = status_of(error)
    if status is not None and status >= 400:  # an unreadable reply carries the status 200 that it came with
        return status in RETRYABLE_STATUS
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    return any(kind.__name__ in _RETRYABLE_NAMES for kind in type(error).__mro__)


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error says its answer had, by the names that client libraries have for it."""
    response = getattr(error, "response", None)
    said = (getattr(error, "status_code", None), getattr(response, "status_code", None), getattr(error, "status", None))
    return next((status for status in said if isinstance(status, int) and status), None)


def retry_after(error: BaseException | None) -> float | None:
    """Seconds that the server asked to wait (`Retry-After`, in seconds or as a date), None where it did not."""
    headers = getattr(getattr(error, "response", None), "headers", None)
    value = None
    if headers is not None:
        value = next((item for name, item in dict(headers).items() if str(name).lower() == "retry-after"), None)
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


class Retry(Strategy):
    """How one deferred input's large call is retried; the others of its batch are not held up by it.

    Many clients retry by themselves as well (ChatOpenAI: `max_retries=2`): set one of the two to none, or the
    attempts multiply.

    Args:
        attempts: Calls at the most, the first one counted; 1 never retries.
        initial_wait: Seconds before the second attempt; doubles from then on.
        max_wait: Seconds between two attempts at the most; also bounds a server's `Retry-After`.
        jitter: Random seconds added at the most, so that many callers do not return at once.
        attempt_seconds: How long one attempt may take in all; then it has failed with a `LargeTimeoutError`, and is
            retried like other failures. Time-outs of HTTP clients count from one byte to the next, so that a server
            which sends a byte now and then holds a call for ever; None leaves it at that. Waiting for a place is not
            counted. Async attempts are cancelled. A sync one goes on in a thread of its own until its client gives up;
            nobody waits for it, and it no longer counts for `max_concurrency`. Deferred inputs of a batch are then
            asked one by one. A sync stream is not bounded, an async one until its first chunk.
    """

    attempts: int = Field(default=3, ge=1)
    initial_wait: float = Field(default=0.5, ge=0.0)
    max_wait: float = Field(default=30.0, ge=0.0)
    jitter: float = Field(default=0.5, ge=0.0)
    attempt_seconds: float | None = Field(default=None, gt=0.0)

    def call(self, ask: Callable[[], T], failed: Exception | None = None) -> T:
        """Ask until it succeeds, fails for good, or attempts run out; the last error is raised.

        Args:
            ask: Makes one attempt.
            failed: The error of a first attempt that was made elsewhere (in a grouped call) and counts.
        """
        if failed is None:
            try:
                return ask()
            except Exception as error:
                if self.attempts == 1 or not is_retryable(error):
                    raise
                failed = error
        for attempt in Retrying(**self._rules()):
            with attempt:
                if failed is not None:
                    first, failed = failed, None
                    raise first
                return ask()
        raise AssertionError("tenacity ended without a result")  # pragma: no cover

    async def acall(self, ask: Callable[[], Awaitable[T]], failed: Exception | None = None) -> T:
        """As `call`, waiting without holding a thread."""
        if failed is None:
            try:
                return await ask()
            except Exception as error:
                if self.attempts == 1 or not is_retryable(error):
                    raise
                failed = error
        async for attempt in AsyncRetrying(**self._rules()):
            with attempt:
                if failed is not None:
                    first, failed = failed, None
                    raise first
                return await ask()
        raise AssertionError("tenacity ended without a result")  # pragma: no cover

    def within(self, ask: Callable[[], T]) -> T:
        """One attempt, within what it may take.

        Raises:
            LargeTimeoutError: It took longer.
        """
        return ask() if self.attempt_seconds is None else _within(self.attempt_seconds, ask)

    async def awithin(self, ask: Callable[[], Awaitable[T]]) -> T:
        """As `within`."""
        return await (ask() if self.attempt_seconds is None else _awithin(self.attempt_seconds, ask))

    def _rules(self) -> dict[str, Any]:
        return {
            "stop": stop_after_attempt(self.attempts),
            "wait": self._wait,
            "retry": retry_if_exception(is_retryable),
            "reraise": True,
        }

    def _wait(self, state: RetryCallState) -> float:
        asked = retry_after(state.outcome.exception() if state.outcome else None)
        backoff = wait_exponential(multiplier=self.initial_wait, max=self.max_wait)(state)
        backoff += wait_random(0.0, self.jitter)(state)
        return min(self.max_wait, max(asked, backoff) if asked is not None else backoff)


def _within(seconds: float, ask: Callable[[], T]) -> T:
    """An attempt in a thread of its own, which is left alone when it takes too long.

    Raises:
        LargeTimeoutError: It did.
    """
    done: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            done.put((ask(), None))
        except BaseException as error:  # for the caller, whatever it is
            done.put((None, error))

    threading.Thread(target=copy_context().run, args=(work,), name="datashunt-attempt", daemon=True).start()
    try:
        result, error = done.get(timeout=seconds)
    except queue.Empty:
        raise LargeTimeoutError(seconds) from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


async def _awithin(seconds: float, ask: Callable[[], Awaitable[T]]) -> T:
    try:
        async with asyncio.timeout(seconds) as limit:
            return await ask()
    except TimeoutError:
        if limit.expired():
            raise LargeTimeoutError(seconds) from None
        raise
