"""StructuredChat: a shunt over a chat model whose answers are objects. It routes nothing itself."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, closing
from typing import Any

from langchain_core.messages import BaseMessage
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.utils import ConfigurableFieldSpec
from typing_extensions import override

from langchain_datashunt.chat.messages import marked, said_by
from langchain_datashunt.chat.settings import NO_QUESTION, ShuntChatSettings
from langchain_datashunt.decision import ShuntResult
from langchain_datashunt.large_models.caller import END
from langchain_datashunt.routing.shunt import ShuntRunnable


class StructuredChat(Runnable[Any, Any]):
    """Structured answers: a shunt that takes what chat models take.

    Args:
        shunt: From messages to results with objects, or with mappings that hold the raw message too.
        owner: Reads inputs, and knows whether there is a question.
        large: Asked where there is no question to classify.
    """

    def __init__(self, shunt: ShuntRunnable, owner: ShuntChatSettings, large: Runnable[Any, Any]) -> None:
        self.shunt, self.owner, self.large = shunt, owner, large
        self.direct = owner._caller_of(large)

    def __getstate__(self) -> dict[str, Any]:
        """What it was made of: its caller holds places of this process."""
        return {"shunt": self.shunt, "owner": self.owner, "large": self.large}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]
        self.shunt.sharing(self.owner._limiter)

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
            return unasked(self.direct.one(messages, config, kwargs).sync())
        return parsed(self.shunt.invoke(messages, config, **kwargs))

    @override
    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        messages, config, question = self._read(input, config)
        if not question:
            return unasked(await self.direct.one(messages, config, kwargs).asynchronous())
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
    """The object, or the mapping whose raw message carries the decision."""
    output = said_by(result)
    if isinstance(output, dict) and isinstance(output.get("raw"), BaseMessage) and "parsing_error" in output:
        return {**output, "raw": marked(output["raw"], result.decision)}
    return output


def unasked(message: Any) -> Any:
    """A large model's answer, or its error, where there was no question for the small side."""
    if isinstance(message, Exception):
        raise message
    return marked(message, NO_QUESTION)
