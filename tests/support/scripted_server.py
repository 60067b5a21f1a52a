"""Chat server that imitates a model with tools, structured output and log-probabilities by simple rules."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from typing import Any

from langchain_datashunt.large_models.replay import ChatServer, estimate_message_tokens, estimate_tokens

Reply = Callable[[Mapping[str, Any]], Mapping[str, Any] | None]
"""Function from a request body to a reply with `content`, `tool_calls` [(name, args)] and `logprob`.

If it returns None, the rules below apply."""


class ScriptedServer(ChatServer):
    """Chat server that answers with text, a tool call or structured output.

    If the request has tools, it calls the tool that the user names, or the first one. If the request has a schema, it
    returns a matching value. Integers are the first number in the user's text, and other values follow from the schema.
    """

    def __init__(self, reply: Reply | None = None, *, model: str = "scripted", text: str = "Good day to you.") -> None:
        super().__init__(lambda messages: text, model=model)
        self.reply, self.text, self.keep_bodies = reply, text, True

    def fault(self, number: int, body: Mapping[str, Any], handler: BaseHTTPRequestHandler) -> bool:
        message = (self.reply(body) if self.reply else None) or rule(body, self.text)
        usage = _usage(body, message)
        name = body.get("model") or self.model
        if body.get("stream"):
            handler.send_response(200)
            handler.send_header("content-type", "text/event-stream")
            handler.send_header("connection", "close")
            handler.close_connection = True
            handler.end_headers()
            for event in _events(number, name, message, usage, body):
                handler.wfile.write(event)
                handler.wfile.flush()
        else:
            handler.send_json(200, _completion(number, name, message, usage, body))  # type: ignore[attr-defined]
        self.count_served()
        return True


def rule(body: Mapping[str, Any], text: str) -> dict[str, Any]:
    """Return the scripted reply to a request."""
    last = body["messages"][-1]
    question = _text(last) if last["role"] == "user" else ""
    wanted = (body.get("response_format") or {}).get("json_schema")
    tools = [tool["function"] for tool in body.get("tools") or []]
    choice = body.get("tool_choice")
    forced = choice["function"]["name"] if isinstance(choice, dict) else None
    if tools and choice != "none" and (last["role"] == "user" or forced or choice == "required"):
        named = [tool for tool in tools if tool["name"] == forced or (not forced and tool["name"] in question)]
        tool = (named or tools)[0]
        return {"tool_calls": [(tool["name"], instance(tool.get("parameters") or {}, question))]}
    if wanted:
        return {"content": json.dumps(instance(wanted["schema"], question))}
    for stop in body.get("stop") or []:
        text = text.split(stop)[0]
    return {"content": text}


def instance(schema: Mapping[str, Any], text: str, root: Mapping[str, Any] | None = None, name: str = "") -> Any:
    """Return a value that matches a JSON schema."""
    root = root if root is not None else schema
    if "$ref" in schema:
        return instance(root["$defs"][schema["$ref"].rsplit("/", 1)[1]], text, root, name)
    if "anyOf" in schema:
        return instance(schema["anyOf"][0], text, root, name)
    if "enum" in schema:
        return next((value for value in schema["enum"] if str(value) in text), schema["enum"][0])
    if "const" in schema:
        return schema["const"]
    kind = schema.get("type", "object" if "properties" in schema else "string")
    if kind == "object":
        return {key: instance(part, text, root, key) for key, part in schema.get("properties", {}).items()}
    if kind == "array":
        return [instance(schema.get("items", {}), text, root, name)]
    number = re.search(r"-?\d+", text)
    if kind in ("integer", "number"):
        return int(number.group()) if number else 1
    if kind == "boolean":
        return True
    quoted = re.search(r"named?:?\s+([^\s,.]+)", text)
    return quoted.group(1) if quoted and "name" in name else f"some {name or 'text'}"


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)


def _said(message: Mapping[str, Any]) -> str:
    calls = message.get("tool_calls") or []
    return (message.get("content") or "") + "".join(name + json.dumps(args, ensure_ascii=False) for name, args in calls)


def _usage(body: Mapping[str, Any], message: Mapping[str, Any]) -> dict[str, int]:
    asked, said = estimate_message_tokens(body["messages"]), max(1, estimate_tokens(_said(message)))
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


def _calls(number: int, message: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "index": i,
            "id": f"call_{number}_{i}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(args, ensure_ascii=False)},
        }
        for i, (name, args) in enumerate(message.get("tool_calls") or [])
    ]


def _logprobs(message: Mapping[str, Any], body: Mapping[str, Any]) -> Any:
    if not body.get("logprobs") or "logprob" not in message:
        return None
    words = re.findall(r"\s*\S+", message.get("content") or "")
    return {"content": [{"token": word, "logprob": message["logprob"], "top_logprobs": []} for word in words]}


def _next(told: Any, delta: Mapping[str, Any]) -> Any:
    """Return the log-probability of one streamed word."""
    token = next(told, None) if delta.get("content") else None
    return None if token is None else {"content": [token]}


def _completion(
    number: int, model: str, message: Mapping[str, Any], usage: Mapping[str, int], body: Mapping[str, Any]
) -> dict[str, Any]:
    calls = _calls(number, message)
    said: dict[str, Any] = {"role": "assistant", "content": message.get("content")}
    if calls:
        said["tool_calls"] = calls
    choice = {"index": 0, "message": said, "finish_reason": "tool_calls" if calls else "stop"}
    choice["logprobs"] = _logprobs(message, body)
    head = {"id": f"chatcmpl-{number}", "object": "chat.completion", "created": 0, "model": model}
    return {**head, "choices": [choice], "usage": dict(usage)}


def _events(
    number: int, model: str, message: Mapping[str, Any], usage: Mapping[str, int], body: Mapping[str, Any]
) -> list[bytes]:
    head = {"id": f"chatcmpl-{number}", "object": "chat.completion.chunk", "created": 0, "model": model}
    calls = _calls(number, message)
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": piece} for piece in re.findall(r"\s*\S+", message.get("content") or "")]
    for call in calls:
        whole = call["function"]["arguments"]
        deltas.append({"tool_calls": [{**call, "function": {**call["function"], "arguments": whole[:5]}}]})
        deltas.append({"tool_calls": [{"index": call["index"], "function": {"arguments": whole[5:]}}]})
    told = iter((_logprobs(message, body) or {"content": []})["content"])
    chunks: list[dict[str, Any]] = [
        {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None, "logprobs": _next(told, delta)}]}
        for delta in deltas
    ]
    end = "tool_calls" if calls else "stop"
    chunks.append({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": end}]})
    if (body.get("stream_options") or {}).get("include_usage"):
        chunks.append({**head, "choices": [], "usage": dict(usage)})
    return [f"data: {json.dumps(chunk)}\n\n".encode() for chunk in chunks] + [b"data: [DONE]\n\n"]
