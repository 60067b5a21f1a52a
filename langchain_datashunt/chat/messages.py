"""Message helpers of shunted chat models: attached decisions, chunks and legacy interfaces."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from langchain_core.callbacks import Callbacks
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, LLMResult
from langchain_core.runnables import RunnableConfig

from langchain_datashunt.decision import ShuntDecision, ShuntResult
from langchain_datashunt.exceptions import LocalOnlyError
from langchain_datashunt.privacy.guard import AbstainedLocally


def answered(result: ShuntResult) -> AIMessage:
    """Return the answer of a result with its decision attached.

    Raises:
        LocalOnlyError: The input must stay local, and no small model could answer.
    """
    message: AIMessage = marked(answer_of(result), result.decision)
    return message


def each_answered(results: Sequence[Any], return_exceptions: bool) -> list[Any]:
    """Return the answers of a batch, with exceptions in their places.

    Raises:
        LocalOnlyError: An input must stay local, no small model could answer, and `return_exceptions` is False.
    """
    found: list[Any] = []
    for result in results:
        try:
            found.append(result if isinstance(result, Exception) else answered(result))
        except LocalOnlyError as error:
            if not return_exceptions:
                raise
            found.append(error)
    return found


def answer_of(result: ShuntResult) -> Any:
    """Return the output of a result.

    Raises:
        LocalOnlyError: The input must stay local, and no small model could answer.
    """
    if isinstance(result.output, AbstainedLocally):
        raise LocalOnlyError(result.output.reason, result.output.kinds)
    return result.output


def marked(message: Any, decision: ShuntDecision | None) -> Any:
    """Return a copy of a message with the decision under `response_metadata["shunt"]`.

    Other objects, and messages without a decision, are returned unchanged.
    """
    if decision is None or not isinstance(message, BaseMessage):
        return message
    metadata = {key.removeprefix("shunt_"): value for key, value in decision.to_metadata().items() if value is not None}
    return message.model_copy(update={"response_metadata": {**message.response_metadata, "shunt": metadata}})


def text_alone(message: BaseMessage) -> bool:
    """Return whether a message contains only text, so that a text classifier has seen all of it."""
    if isinstance(message.content, str):
        return True
    return all(isinstance(part, str) or part.get("type") == "text" for part in message.content)


def as_chunk(message: Any) -> Any:
    """Return a message as the last chunk of a stream. Chunks and other objects are returned unchanged."""
    if isinstance(message, AIMessageChunk) or not isinstance(message, AIMessage):
        return message
    calls = [
        {
            "name": call["name"],
            "args": json.dumps(call["args"]),
            "id": call["id"],
            "index": i,
            "type": "tool_call_chunk",
        }
        for i, call in enumerate(message.tool_calls)
    ]
    calls += [
        {"name": call["name"], "args": call["args"], "id": call["id"], "index": i, "type": "tool_call_chunk"}
        for i, call in enumerate(message.invalid_tool_calls, start=len(calls))
    ]
    names = ("content", "id", "response_metadata", "additional_kwargs", "usage_metadata", "name")
    kept = {name: getattr(message, name) for name in names}
    return AIMessageChunk(**kept, tool_call_chunks=calls, chunk_position="last")


def model_name(model: Any) -> str:
    """Return a model's name, or its class name if it has none."""
    for name in ("model_name", "model", "model_id"):
        if isinstance(found := getattr(model, name, None), str) and found:
            return found
    return type(model).__name__


def legacy_config(
    callbacks: Callbacks, tags: list[str] | None, metadata: dict[str, Any] | None, name: str | None, run_id: UUID | None
) -> RunnableConfig:
    """Return the arguments of `generate` as a config."""
    config = RunnableConfig(tags=tags or [], metadata=metadata or {})
    if callbacks is not None:
        config["callbacks"] = callbacks
    if name is not None:
        config["run_name"] = name
    if run_id is not None:
        config["run_id"] = run_id
    return config


def llm_result(messages: Sequence[AIMessage]) -> LLMResult:
    """Return messages in the result type of `generate`."""
    return LLMResult(generations=[[ChatGeneration(message=message)] for message in messages])
