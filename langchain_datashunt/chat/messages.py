"""Messages of a shunted chat model: with their decision, as chunks, and in the forms of older interfaces."""

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
    """The answer with its decision."""
    message: AIMessage = marked(said_by(result), result.decision)
    return message


def each_answered(results: Sequence[Any], return_exceptions: bool) -> list[Any]:
    """The answers of a batch; errors in their places, or the first of them raised."""
    found: list[Any] = []
    for result in results:
        try:
            found.append(result if isinstance(result, Exception) else answered(result))
        except LocalOnlyError as error:
            if not return_exceptions:
                raise
            found.append(error)
    return found


def said_by(result: ShuntResult) -> Any:
    """The output of a result.

    Raises:
        LocalOnlyError: There is none: the input must not leave, and no small model could answer.
    """
    if isinstance(result.output, AbstainedLocally):
        raise LocalOnlyError(result.output.reason, result.output.kinds)
    return result.output


def marked(message: Any, decision: ShuntDecision | None) -> Any:
    """A message that carries a decision under `response_metadata["shunt"]`; anything else as it is."""
    if decision is None or not isinstance(message, BaseMessage):
        return message
    told = {key.removeprefix("shunt_"): value for key, value in decision.to_metadata().items() if value is not None}
    return message.model_copy(update={"response_metadata": {**message.response_metadata, "shunt": told}})


def text_alone(message: BaseMessage) -> bool:
    """Whether a message is text and nothing else, so that a classifier of text has seen all of it."""
    if isinstance(message.content, str):
        return True
    return all(isinstance(part, str) or part.get("type") == "text" for part in message.content)


def as_chunk(message: Any) -> Any:
    """A message as the last chunk of a stream; chunks stay what they are."""
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
    """What a model is called."""
    for name in ("model_name", "model", "model_id"):
        if isinstance(found := getattr(model, name, None), str) and found:
            return found
    return type(model).__name__


def legacy_config(
    callbacks: Callbacks, tags: list[str] | None, metadata: dict[str, Any] | None, name: str | None, run_id: UUID | None
) -> RunnableConfig:
    """What `generate` is given, as a config."""
    config = RunnableConfig(tags=tags or [], metadata=metadata or {})
    if callbacks is not None:
        config["callbacks"] = callbacks
    if name is not None:
        config["run_name"] = name
    if run_id is not None:
        config["run_id"] = run_id
    return config


def llm_result(messages: Sequence[AIMessage]) -> LLMResult:
    """Messages as `generate` returns them."""
    return LLMResult(generations=[[ChatGeneration(message=message)] for message in messages])
