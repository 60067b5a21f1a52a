"""Chat server that produces the faults of real APIs on request."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from typing import Any

from langchain_datashunt.large_models.replay import ChatServer
from langchain_datashunt.large_models.replay.server import stream_events

Plan = Callable[[int, Mapping[str, Any]], str | None]
"""Function from the number and body of a request to the name of a fault, or None."""


class FaultyServer(ChatServer):
    """Chat server that answers requests, except those for which `plan` returns a fault.

    Faults: "429" (with Retry-After), "500", "400", "timeout", "malformed" (truncated JSON), "html" (a web page with
    status 502), "cut" (a stream that breaks off), "cut-at-once" (the same before the first chunk), "wrong" (an answer
    that is not a label), "empty", "slow-loris" (one byte every 0.1 s for `hang` seconds), "page" and "error-body" (a
    web page or an error with status 200).
    """

    def __init__(self, answer: Any, plan: Plan | None = None, *, retry_after: str = "0", hang: float = 1.0) -> None:
        super().__init__(answer, model="gpt-4")
        self.plan = plan or (lambda number, body: None)
        self.retry_after = retry_after
        self.hang = hang
        self.faults: list[str] = []

    def fault(self, number: int, body: Mapping[str, Any], handler: BaseHTTPRequestHandler) -> bool:
        name = self.plan(number, body)
        if name is None:
            return False
        self.faults.append(name)
        getattr(self, "_" + name.replace("-", "_"))(body, handler)
        return True

    def _429(self, body: Any, handler: Any) -> None:
        error = {"error": {"message": "slow down", "type": "rate_limit", "code": "rate_limit"}}
        handler.send_json(429, error, {"Retry-After": self.retry_after})

    def _500(self, body: Any, handler: Any) -> None:
        handler.send_json(500, {"error": {"message": "oops", "type": "server_error"}})

    def _400(self, body: Any, handler: Any) -> None:
        handler.send_json(400, {"error": {"message": "bad request", "type": "invalid_request_error"}})

    def _timeout(self, body: Any, handler: Any) -> None:
        time.sleep(self.hang)
        handler.close_connection = True

    def _malformed(self, body: Any, handler: Any) -> None:
        self._raw(handler, b'{"id": "x", "choices": [{"message": {"content": "cut of', "application/json")

    def _slow_loris(self, body: Any, handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("content-type", "application/json")
        handler.send_header("content-length", "100000")
        handler.end_headers()
        ends = time.monotonic() + self.hang
        with suppress(OSError):
            while time.monotonic() < ends:
                handler.wfile.write(b" ")
                handler.wfile.flush()
                time.sleep(0.1)
        handler.close_connection = True

    def _page(self, body: Any, handler: Any) -> None:
        self._raw(handler, b"<html>Please log in to the hotel's network</html>", "text/html")

    def _error_body(self, body: Any, handler: Any) -> None:
        handler.send_json(200, {"error": {"message": "quota exceeded", "type": "insufficient_quota", "code": 403}})

    def _html(self, body: Any, handler: Any) -> None:
        self._raw(handler, b"<html>Bad gateway</html>", "text/html", status=502)

    def _raw(self, handler: Any, data: bytes, kind: str, status: int = 200) -> None:
        handler.send_response(status)
        handler.send_header("content-type", kind)
        handler.send_header("content-length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def _cut(self, body: Any, handler: Any, events: int = 2) -> None:
        """Send a chunked reply and close the connection without the closing chunk."""
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.send_header("transfer-encoding", "chunked")
        handler.end_headers()
        text = self.answer(body["messages"])
        for event in stream_events(0, self.model, text, {}, body)[:events]:
            handler.wfile.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")
            handler.wfile.flush()
        handler.close_connection = True

    def _cut_at_once(self, body: Any, handler: Any) -> None:
        self._cut(body, handler, events=0)

    def _wrong(self, body: Any, handler: Any) -> None:
        self._say(handler, "I would say it depends on the case.")

    def _empty(self, body: Any, handler: Any) -> None:
        self._say(handler, "")

    def _say(self, handler: Any, text: str) -> None:
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
        reply = {"id": "x", "object": "chat.completion", "created": 0, "model": self.model}
        handler.send_json(200, {**reply, "choices": [choice], "usage": usage})
