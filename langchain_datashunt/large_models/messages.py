"""Read a chat model's message: whether it is whole, its text, token usage and cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, LLMResult

from langchain_datashunt._utils.pricing import cost_usd

_REASON_KEYS = ("finish_reason", "stop_reason", "done_reason", "completion_reason")
"""Keys of `response_metadata` under which providers say why a message ended."""

_CUT = (
    "length", "max_token", "max_output", "filter", "safety", "refus", "recitation", "blocklist", "prohibited", "spii",
    "guardrail", "incomplete", "fail", "cancel", "error", "abort", "timeout", "interrupt", "pause",
)  # fmt: skip
"""Parts of reasons that say that a message was cut, filtered or refused."""

_MOST_TOKENS = 10_000_000
"""Token counts above this many per call are not believed."""


def message_of(response: LLMResult) -> AIMessage | None:
    """Return the message of a chat model's response, or None if the response is not a chat message."""
    generation = response.generations[0][0] if response.generations and response.generations[0] else None
    message = generation.message if isinstance(generation, ChatGeneration) else None
    return message if isinstance(message, AIMessage) else None


def message_text(message: AIMessage) -> str:
    """Return the text of a message, or the arguments of its tool calls as JSON if it has no text."""
    text = str(message.text)
    return text if text or not message.tool_calls else json.dumps([call["args"] for call in message.tool_calls])


def incomplete_reason(message: Any) -> str | None:
    """Return why a message is not a whole answer, or None if it is whole.

    A message is not whole if the provider cut, filtered or refused it, if its stream ended without saying why, or if it
    has neither text nor a tool call. The reasons of OpenAI (both APIs), Anthropic, Google, Mistral, Cohere, Bedrock and
    Ollama are known.
    """
    if not isinstance(message, BaseMessage):
        return None
    metadata: Mapping[str, Any] = message.response_metadata or {}
    if refusal := message.additional_kwargs.get("refusal"):
        return f"refusal: {str(refusal)[:80]}"
    if isinstance(message.content, list):
        blocks = [block for block in message.content if isinstance(block, Mapping)]
        blocks += [block["value"] for block in blocks if isinstance(block.get("value"), Mapping)]  # "non_standard"
        if any(block.get("type") == "refusal" for block in blocks):
            return "refusal"
    reasons = [str(metadata[key]) for key in _REASON_KEYS if metadata.get(key)]
    status = metadata.get("status")
    if isinstance(status, str) and status.lower() not in ("completed", "complete", "success", "ok"):
        details = metadata.get("incomplete_details")
        reason = details.get("reason") if isinstance(details, Mapping) else None
        return str(reason or status)
    for reason in reasons:
        if any(part in reason.lower() for part in _CUT):
            return reason
    streamed = isinstance(message, AIMessageChunk)
    if streamed and not reasons and status is None and metadata.get("model_provider"):
        return "the stream ended without a finish reason"
    calls = getattr(message, "tool_calls", None) or getattr(message, "invalid_tool_calls", None)
    if not str(message.text).strip() and not calls:
        return "empty"
    return None


def message_cost_usd(message: AIMessage, model: str = "") -> float | None:
    """Return the cost of a message in USD, or None if it is not known.

    The cost that the message states is used, which is 0 for answers from LangChain's cache. Otherwise the cost follows
    from the token counts and the public prices of the model.
    """
    usage: Any = message.usage_metadata
    if not usage:
        return None
    stated = usage.get("total_cost")
    if isinstance(stated, (int, float)) and not isinstance(stated, bool) and stated >= 0.0:
        return float(stated)
    if max(usage.get("input_tokens") or 0, usage.get("output_tokens") or 0) > _MOST_TOKENS:
        return None
    name = str(message.response_metadata.get("model_name") or model)
    return cost_usd({name: usage}) if name else None
