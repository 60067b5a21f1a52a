"""What a shunted LLM does to responses: what was said, which tools were offered, and the decision on them."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from llama_index.core.base.llms.types import (
    ChatResponse,
    CompletionResponse,
    ToolCallBlock,
)


def arguments(call: ToolCallBlock) -> dict[str, Any]:
    """The arguments of a tool call; none where they are no object."""
    return call.tool_kwargs if isinstance(call.tool_kwargs, dict) else {}


def offered_tools(given: dict[str, Any]) -> frozenset[str]:
    """Names of the tools of a call, in whatever form the large LLM's own preparation gave them."""
    names = set()
    for tool in given.get("tools") or ():
        if isinstance(tool, dict):
            names.add(str(tool.get("function", tool).get("name", "")))
        else:
            names.add(str(getattr(getattr(tool, "metadata", tool), "name", "")))
    return frozenset(names)


def text_of_response(response: ChatResponse) -> str:
    """The text of a response."""
    return response.message.content or ""


def with_decision(response: ChatResponse, decision: dict[str, Any]) -> ChatResponse:
    """A response that carries the decision."""
    return response.model_copy(update={"additional_kwargs": {**response.additional_kwargs, "shunt": decision}})


def completion_with_decision(response: CompletionResponse, decision: dict[str, Any]) -> CompletionResponse:
    """As `with_decision`."""
    return response.model_copy(update={"additional_kwargs": {**(response.additional_kwargs or {}), "shunt": decision}})


def each_with_decision(responses: Generator[ChatResponse], decision: dict[str, Any]) -> Generator[ChatResponse]:
    """Responses that carry the decision."""
    for response in responses:
        yield with_decision(response, decision)
