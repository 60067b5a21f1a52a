"""StructuredChat: a `ShuntChatModel` with structured output."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, closing
from functools import partial
from typing import Any

from langchain_core.messages import BaseMessage
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.utils import ConfigurableFieldSpec
from typing_extensions import override

from langchain_datashunt.chat.messages import answer_of, marked
from langchain_datashunt.chat.settings import NO_QUESTION, BoundSides, ShuntChatSettings
from langchain_datashunt.decision import ShuntResult
from langchain_datashunt.large_models.caller import END


class StructuredChat(Runnable[Any, Any]):
    """Answer chat requests with objects of one schema, as `ShuntChatModel.with_structured_output` returns it.

    Args:
        owner: The chat model with the settings.
        sides: Both models with structured output, and the schema of the answers.
        include_raw: Whether to return mappings with the raw message, like LangChain's chat models.
    """

    def __init__(self, owner: ShuntChatSettings, sides: BoundSides, *, include_raw: bool) -> None:
        self.owner, self.sides, self.include_raw = owner, sides, include_raw
        self.shunt = owner._shunt_over(sides, name="ShuntChatModel structured", raw=include_raw)
        self.direct = owner._caller_of(sides.large)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(StructuredChat, include_raw=self.include_raw), (self.owner, self.sides)

    @property
    @override
    def config_specs(self) -> list[ConfigurableFieldSpec]:
        return self.shunt.config_specs

    def _read(self, value: Any, config: RunnableConfig | None) -> tuple[list[BaseMessage], RunnableConfig, bool]:
        messages = self.owner._convert_input(value).to_messages()
        return messages, self.owner._config(config), self.owner._has_question(messages)

    @override
    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        messages, config, question = self._read(input, config)
        if not question:
            return unasked(self.direct.invoke(messages, config, kwargs))
        return parsed(self.shunt.invoke(messages, config, **kwargs))

    @override
    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        messages, config, question = self._read(input, config)
        if not question:
            return unasked(await self.direct.ainvoke(messages, config, kwargs))
        return parsed(await self.shunt.ainvoke(messages, config, **kwargs))

    @override
    def stream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[Any]:
        messages, config, question = self._read(input, config)
        if not question:
            with self.direct.place():
                first, chunks = self.direct.open(messages, config, kwargs)
                with closing(chunks):
                    if first is not END:
                        yield first
                        yield from chunks
            return
        with closing(self.shunt.stream(messages, config, **kwargs)) as results:  # type: ignore[type-var]
            for result in results:
                if result.output is not None:
                    yield parsed(result)

    @override
    async def astream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> AsyncIterator[Any]:
        messages, config, question = self._read(input, config)
        if not question:
            async with self.direct.aplace():
                first, chunks = await self.direct.aopen(messages, config, kwargs)
                async with aclosing(chunks):
                    if first is not END:
                        yield first
                        async for chunk in chunks:
                            yield chunk
            return
        async with aclosing(self.shunt.astream(messages, config, **kwargs)) as results:  # type: ignore[type-var]
            async for result in results:
                if result.output is not None:
                    yield parsed(result)


def parsed(result: ShuntResult) -> Any:
    """Return the object of a result. With `include_raw`, the raw message of the mapping carries the decision."""
    output = answer_of(result)
    if isinstance(output, dict) and isinstance(output.get("raw"), BaseMessage) and "parsing_error" in output:
        return {**output, "raw": marked(output["raw"], result.decision)}
    return output


def unasked(message: Any) -> Any:
    """Return the large model's answer to a turn that skips the small side, with the decision, or raise its error."""
    if isinstance(message, Exception):
        raise message
    return marked(message, NO_QUESTION)
