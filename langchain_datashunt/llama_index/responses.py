"""Helpers for responses of a shunted LLM: text, offered tools and the attached decision."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from llama_index.core.base.llms.types import (
    ChatResponse,
    CompletionResponse,
    ToolCallBlock,
)


def arguments(call: ToolCallBlock) -> dict[str, Any]:
    """Return the arguments of a tool call, or an empty dict if they are not an object."""
    return call.tool_kwargs if isinstance(call.tool_kwargs, dict) else {}


def offered_tools(given: dict[str, Any]) -> frozenset[str]:
    """Return the names of the tools offered in a call, in any LLM's request format."""
    names = set()
    for tool in given.get("tools") or ():
        if isinstance(tool, dict):
            names.add(str(tool.get("function", tool).get("name", "")))
        else:
            names.add(str(getattr(getattr(tool, "metadata", tool), "name", "")))
    return frozenset(names)


def text_of_response(response: ChatResponse) -> str:
    """Return the text of a response, or an empty string."""
    return response.message.content or ""


def with_decision(response: ChatResponse, decision: dict[str, Any]) -> ChatResponse:
    """Return a copy of the response that carries the decision."""
    return response.model_copy(update={"additional_kwargs": {**response.additional_kwargs, "shunt": decision}})


def completion_with_decision(response: CompletionResponse, decision: dict[str, Any]) -> CompletionResponse:
    """Return a copy of the completion response that carries the decision."""
    return response.model_copy(update={"additional_kwargs": {**(response.additional_kwargs or {}), "shunt": decision}})


def each_with_decision(responses: Generator[ChatResponse], decision: dict[str, Any]) -> Generator[ChatResponse]:
    """Yield copies of the responses that carry the decision."""
    for response in responses:
        yield with_decision(response, decision)
