"""ChatServer: a small OpenAI-compatible chat server on the loopback interface. Subclasses can simulate faults."""

from __future__ import annotations

import atexit
import itertools
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from langchain_datashunt.exceptions import ReplayError
from langchain_datashunt.large_models.replay.answers import RecordedAnswers
from langchain_datashunt.large_models.replay.tokens import estimate_message_tokens, estimate_tokens

Answer = Callable[[Sequence[Mapping[str, Any]]], str]
"""Function from the messages of a request to the text of the reply."""


class ChatServer:
    """Serve /v1/chat/completions on 127.0.0.1, with streaming and structured output.

    Use it as a context manager. Token counts are estimates (see `replay.tokens`). Any local process may call the
    server, which has no data except the given answers.

    Args:
        answer: Function that creates the replies.
        model: Model name in replies.
    """

    def __init__(self, answer: Answer, model: str = "replay") -> None:
        self.answer = answer
        self.model = model
        self.requests = itertools.count(1)
        self._lock = threading.Lock()
        self.bodies: list[dict[str, Any]] = []
        self.keep_bodies = False
        self.served = 0
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"chat": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, name="datashunt-replay", daemon=True)

    @property
    def base_url(self) -> str:
        """Base URL for clients."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)

    def fault(self, number: int, body: Mapping[str, Any], handler: BaseHTTPRequestHandler) -> bool:
        """Simulate a fault on request `number` in a subclass, and return whether the request is handled."""
        return False

    def take(self, body: dict[str, Any]) -> int:
        """Count a request and return its number."""
        with self._lock:
            if self.keep_bodies:
                self.bodies.append(body)
            return next(self.requests)

    def count_served(self) -> None:
        """Count a reply that was sent completely."""
        with self._lock:
            self.served += 1

    def chat_model(self, **settings: Any) -> Any:
        """Return a `ChatOpenAI` connected to this server.

        Args:
            settings: Settings of `ChatOpenAI` that override the defaults.

        Raises:
            MissingExtraError: langchain-openai is not installed.
        """
        from langchain_datashunt._utils.optional import require

        defaults = {"model": self.model, "base_url": self.base_url, "api_key": "not-needed", "max_retries": 0}
        return require("langchain_openai", "openai").ChatOpenAI(**{**defaults, **settings})


def replay_model(answer: Answer | Mapping[str, str], model: str = "replay") -> Any:
    """Return a `ChatOpenAI` that receives recorded answers over HTTP from a local server.

    The server runs until the process ends.

    ```python
    model = replay_model({"has my parcel shipped": "status"})  # in place of ChatOpenAI(model="gpt-4o")
    ```

    Args:
        answer: Answers by input text, or a function that creates the replies.
        model: Model name in replies.

    Raises:
        MissingExtraError: langchain-openai is not installed.
    """
    replies = RecordedAnswers(answer) if isinstance(answer, Mapping) else answer
    server = ChatServer(replies, model).__enter__()  # stays open until the process ends
    atexit.register(server.__exit__)
    return server.chat_model()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors of a request, such as a disconnected client."""


class _Handler(BaseHTTPRequestHandler):
    chat: ChatServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Suppress the access log."""

    def do_POST(self) -> None:  # noqa: N802
        body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or b"{}")
        number = self.chat.take(body)
        if self.chat.fault(number, body, self):
            return
        try:
            text = self.chat.answer(body.get("messages", []))
        except ReplayError as error:
            self.send_json(404, {"error": {"message": str(error), "type": "not_recorded", "code": "not_recorded"}})
            return
        tool = _forced_tool(body)
        if tool or (body.get("response_format") or {}).get("type") == "json_schema":
            text = json.dumps({"label": text})
        usage = _usage(body, text)
        if body.get("stream"):
            self._stream(number, text, usage, body)
        else:
            self.send_json(200, _completion(number, self.chat.model, text, usage, tool))
        self.chat.count_served()

    def send_json(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
        """Send a JSON reply."""
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, number: int, text: str, usage: dict[str, int], body: Mapping[str, Any]) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.close_connection = True
        self.end_headers()
        for event in stream_events(number, self.chat.model, text, usage, body):
            self.wfile.write(event)
            self.wfile.flush()


def stream_events(number: int, model: str, text: str, usage: dict[str, int], body: Mapping[str, Any]) -> list[bytes]:
    """Return the server-sent events of a streamed reply, one per word."""
    head = {"id": f"chatcmpl-{number}", "object": "chat.completion.chunk", "created": 0, "model": model}
    words = text.split(" ")
    pieces = [word if i == 0 else " " + word for i, word in enumerate(words)]
    chunks: list[dict[str, Any]] = [
        {**head, "choices": [{"index": 0, "delta": {"role": "assistant", "content": piece}, "finish_reason": None}]}
        for piece in pieces
    ]
    chunks.append({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    if (body.get("stream_options") or {}).get("include_usage"):
        chunks.append({**head, "choices": [], "usage": usage})
    return [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks] + [b"data: [DONE]\n\n"]


def _forced_tool(body: Mapping[str, Any]) -> str | None:
    """Return the name of the function that the request forces, which older models use for structured output."""
    choice = body.get("tool_choice")
    return str(choice["function"]["name"]) if isinstance(choice, Mapping) else None


def _completion(number: int, model: str, text: str, usage: dict[str, int], tool: str | None) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if tool is not None:
        call = {"id": f"call-{number}", "type": "function", "function": {"name": tool, "arguments": text}}
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
    return {
        "id": f"chatcmpl-{number}",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": usage,
    }


def _usage(body: Mapping[str, Any], text: str) -> dict[str, int]:
    contents = [
        json.dumps(m["content"]) if not isinstance(m.get("content"), str) else m["content"]
        for m in body.get("messages", [])
    ]
    prompt, completion = estimate_message_tokens(contents), estimate_tokens(text)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
