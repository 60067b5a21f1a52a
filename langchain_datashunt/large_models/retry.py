"""Retry: repeat failed large-model calls with exponential backoff, and limit the time of each attempt."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
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
    """Return whether the same request may succeed later.

    The HTTP status decides if there is one, otherwise the type of the error. Connection errors, time-outs and truncated
    replies are retryable. Errors of client libraries are matched by class name, so that no library is imported here.
    """
    if _FINAL_CODES & {str(value).lower() for value in _body_of(error).values() if isinstance(value, str)}:
        return False
    status = status_of(error)
    if status is not None and status >= 400:  # an unreadable reply has status 200, so its type decides
        return status in RETRYABLE_STATUS
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    return any(kind.__name__ in _RETRYABLE_NAMES for kind in type(error).__mro__)


_FINAL_CODES = frozenset(
    {
        "insufficient_quota",
        "billing_hard_limit_reached",
        "billing_not_active",
        "account_deactivated",
        "access_terminated",
    }
)
"""Error codes after which the same request cannot succeed, although their HTTP status is that of a rate limit."""


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of an error, from the attributes that client libraries use or from its body, or None.

    Gateways report errors of their upstream in the body of a reply with status 200, so an error status in the body
    takes precedence over that.
    """
    response = getattr(error, "response", None)
    stated = (
        getattr(error, "status_code", None),
        getattr(response, "status_code", None),
        getattr(error, "status", None),
    )
    status = next((status for status in stated if isinstance(status, int) and status), None)
    if status is not None and status >= 400:
        return status
    body = _body_of(error)
    for name in ("status", "status_code", "code", "http_code"):
        value = str(body.get(name, ""))
        if value.isdecimal() and 400 <= int(value) <= 599:
            return int(value)
    return status


def _body_of(error: BaseException) -> Mapping[str, Any]:
    """Return the error object in the body of a reply, or an empty mapping."""
    candidates = (getattr(error, "body", None), *error.args)
    for body in candidates:
        if isinstance(body, Mapping):
            inner = body.get("error")
            return inner if isinstance(inner, Mapping) else body
    code = getattr(error, "code", None)
    return {"code": code} if isinstance(code, (int, str)) else {}


def retry_after(error: BaseException | None) -> float | None:
    """Return the `Retry-After` header of an error in seconds, given in seconds or as a date, or None if it has none."""
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
    """Retry the large call of one input with exponential backoff, without delaying the other inputs of its batch.

    Many clients retry by themselves as well (ChatOpenAI: `max_retries=2`). Disable one of the two, or the attempts
    multiply.

    `attempt_seconds` limits the total time of an attempt. Time-outs of HTTP clients restart with each byte, so a server
    that sends a byte now and then can hold a call forever. With this limit:

    - The attempt fails with a `LargeTimeoutError`, and is retried like other failures.
    - An async attempt is cancelled. A sync attempt continues in a thread of its own until its client gives up, its
      result is discarded, and it no longer counts towards `max_concurrency`.
    - The deferred inputs of a batch are called one by one instead of as a group.
    - An async stream is limited until its first chunk, a sync stream not at all.

    Args:
        attempts: Maximum calls, including the first. 1 never retries.
        initial_wait: Seconds before the second attempt, doubled before each further one.
        max_wait: Maximum seconds between two attempts. Also limits a server's `Retry-After`.
        jitter: Maximum random seconds added to the backoff, so that many callers do not retry at the same time.
        attempt_seconds: Maximum seconds of one attempt, without the time in the queue. None means unlimited.
    """

    attempts: int = Field(default=3, ge=1)
    initial_wait: float = Field(default=0.5, ge=0.0)
    max_wait: float = Field(default=30.0, ge=0.0)
    jitter: float = Field(default=0.5, ge=0.0)
    attempt_seconds: float | None = Field(default=None, gt=0.0)

    def call(self, ask: Callable[[], T], failed: Exception | None = None) -> T:
        """Call `ask` until it succeeds, and return its result.

        Raises the last error if it is not retryable or no attempts are left.

        Args:
            ask: Makes one attempt.
            failed: Error of a first attempt that was part of a grouped call. It counts as an attempt.
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
        """Async version of `call`."""
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
        """Make one attempt within `attempt_seconds`.

        Raises:
            LargeTimeoutError: The attempt took longer.
        """
        return ask() if self.attempt_seconds is None else _within(self.attempt_seconds, ask)

    async def awithin(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Async version of `within`."""
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
    """Make one attempt in a thread of its own, which is abandoned after `seconds`.

    Raises:
        LargeTimeoutError: The attempt took longer.
    """
    done: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            done.put((ask(), None))
        except BaseException as error:  # passed on to the waiting thread, which raises it
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
