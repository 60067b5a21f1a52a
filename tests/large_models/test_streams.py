"""Streams that begin with empty chunks or break off, and errors that gateways report in the body of a reply."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from langchain_core.messages import AIMessageChunk
from langchain_core.runnables import Runnable

from langchain_datashunt.exceptions import CircuitOpenError
from langchain_datashunt.large_models import CircuitBreaker
from langchain_datashunt.large_models.retry import is_retryable, status_of
from tests.routing.test_shunt import Records, make
from tests.support.models import HttpError


class Streaming(Runnable[Any, Any]):
    """Large model whose streams follow scripts of chunks and errors, one script for each call."""

    def __init__(self, *scripts: list[Any]) -> None:
        self.scripts, self.calls = list(scripts), 0

    def invoke(self, input: Any, config: Any = None, **kwargs: Any) -> Any:
        raise NotImplementedError

    def stream(self, input: Any, config: Any = None, **kwargs: Any) -> Iterator[Any]:
        script = self.scripts[min(self.calls, len(self.scripts) - 1)]
        self.calls += 1
        for chunk in script:
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk

    async def astream(self, input: Any, config: Any = None, **kwargs: Any) -> AsyncIterator[Any]:
        for chunk in self.stream(input, config):
            yield chunk


EMPTY = [AIMessageChunk(""), AIMessageChunk("", response_metadata={"role": "assistant"})]
DOWN = HttpError(503)


async def texts(shunt: Any, way: str, value: str = "status") -> str:
    if way == "stream":
        return "".join(chunk if isinstance(chunk, str) else str(chunk.text) for chunk in shunt.stream(value))
    return "".join([chunk if isinstance(chunk, str) else str(chunk.text) async for chunk in shunt.astream(value)])


@pytest.mark.parametrize("way", ["stream", "astream"])
async def test_stream_error_after_empty_chunks_is_retried(way: str) -> None:
    large = Streaming([*EMPTY, DOWN], [*EMPTY, AIMessageChunk("hel"), AIMessageChunk("lo")])
    assert await texts(make(large=large), way) == "hello"
    assert large.calls == 2


@pytest.mark.parametrize("way", ["stream", "astream"])
async def test_stream_error_after_empty_chunks_gives_way_to_small_answer(way: str) -> None:
    large = Streaming([*EMPTY, DOWN])
    assert await texts(make(large=large, on_large_error="small"), way) == "status"
    assert large.calls == 3


@pytest.mark.parametrize("way", ["stream", "astream"])
async def test_stream_error_after_shown_chunk_is_raised_and_recorded(way: str) -> None:
    records: list[Any] = []
    large = Streaming([AIMessageChunk("hel"), DOWN])
    with pytest.raises(HttpError):
        await texts(make(large=large, on_large_error="small", recorder=Records(records)), way)
    assert large.calls == 1
    assert [(record.route, record.reason) for record in records] == [("large", "large_error")]


@pytest.mark.parametrize("way", ["stream", "astream"])
async def test_stream_that_breaks_off_opens_circuit_breaker(way: str) -> None:
    breaker = CircuitBreaker(failures=2, reset_seconds=60.0)
    shunt = make(large=Streaming([AIMessageChunk("hel"), DOWN]), breaker=breaker)
    for _ in range(2):
        with pytest.raises(HttpError):
            await texts(shunt, way)
    assert breaker.state == "open"
    with pytest.raises(CircuitOpenError):
        await texts(shunt, way)


@pytest.mark.parametrize("way", ["stream", "astream"])
async def test_stream_closed_by_caller_is_recorded_and_releases_probe(way: str) -> None:
    records: list[Any] = []
    breaker = CircuitBreaker(failures=1)
    shunt = make(
        large=Streaming([AIMessageChunk("a"), AIMessageChunk("b")]), recorder=Records(records), breaker=breaker
    )
    if way == "stream":
        chunks = shunt.stream("status")
        next(chunks)
        chunks.close()
    else:
        achunks = shunt.astream("status")
        await anext(achunks)
        await achunks.aclose()
    (record,) = records
    assert record.reason == "large_error"
    assert breaker.state == "closed"


@pytest.mark.parametrize("way", ["stream", "astream"])
async def test_stream_without_content_is_passed_on(way: str) -> None:
    assert await texts(make(large=Streaming([*EMPTY])), way) == ""
    assert await texts(make(large=Streaming([])), way) == ""


class Body(Exception):
    def __init__(self, body: Any, status: int | None = None) -> None:
        super().__init__("failed")
        self.body = body
        if status is not None:
            self.status_code = status


@pytest.mark.parametrize(
    ("error", "status", "retryable"),
    [
        (Body({"code": 502, "message": "bad gateway"}), 502, True),
        (Body({"error": {"code": 502}}), 502, True),
        (Body({"error": {"code": "503"}}), 503, True),
        (Body({"error": {"status": 400}}), 400, False),
        (ValueError({"code": 429, "message": "slow down"}), 429, True),
        (Body({"error": {"code": 502}}, 200), 502, True),
        (Body({"code": "insufficient_quota", "type": "insufficient_quota"}, 429), 429, False),
        (Body({"error": {"code": "insufficient_quota"}}, 429), 429, False),
        (Body({"error": {"type": "billing_hard_limit_reached", "code": None}}, 429), 429, False),
        (Body({"code": "rate_limit_exceeded"}, 429), 429, True),
        (ValueError("502"), None, False),
    ],
)
def test_status_in_body_and_final_quota_errors_are_recognized(
    error: Exception, status: int | None, retryable: bool
) -> None:
    assert status_of(error) == status
    assert is_retryable(error) is retryable
