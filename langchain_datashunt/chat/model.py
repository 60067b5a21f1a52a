"""ShuntChatModel: a shunt with the interface of a LangChain chat model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, closing
from typing import Any
from uuid import UUID

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun, Callbacks
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import ensure_config, get_config_list
from typing_extensions import override

from langchain_datashunt.chat.answers import AnswerForm, check_tool_answers
from langchain_datashunt.chat.messages import (
    answered,
    as_chunk,
    each_answered,
    legacy_config,
    llm_result,
    marked,
    model_name,
)
from langchain_datashunt.chat.settings import NO_QUESTION, STANDARD, BoundSides, ShuntChatSettings
from langchain_datashunt.chat.structured import StructuredChat, unasked
from langchain_datashunt.decision import ShuntDecision
from langchain_datashunt.large_models.caller import END


class ShuntChatModel(ShuntChatSettings):
    """Answer chat requests with a small model if it is confident, and defer to a large chat model otherwise.

    The small side is a classifier whose labels map to answers, or a small chat model that returns log-probabilities.

    ```python
    model = ShuntChatModel(
        small=load_small_model("bundle"),
        large=ChatOpenAI(model="gpt-4o"),
        answers={"opening_hours": "We are open from 9 to 17.", "balance": ToolAnswer("get_balance")},
    )
    ```

    Messages carry the decision in `response_metadata["shunt"]`, and the token counts of the large model in
    `usage_metadata`.

    A classifier reads the last human message. If the conversation ends with another message, such as the result of a
    tool, the large model is called directly.

    A call creates a chain run, with child runs of the small model and, if deferred, of the large model. The large
    model's own cache, rate limiter and callbacks stay in effect. A call inside an outer chat-model run, such as
    `stream_events(version="v3")`, creates no runs of its own, so that tokens are counted once.
    """

    @override
    def invoke(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, *, stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:  # fmt: skip
        messages = self._convert_input(input).to_messages()
        config, settings = self._config(config), self._settings(stop, kwargs)
        if not self._has_question(messages):
            message: AIMessage = unasked(self._direct.invoke(messages, config, settings))
            return message
        return answered(self._shunt_for(settings).invoke(messages, config, **settings))

    @override
    async def ainvoke(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, *, stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:  # fmt: skip
        messages = self._convert_input(input).to_messages()
        config, settings = self._config(config), self._settings(stop, kwargs)
        if not self._has_question(messages):
            message: AIMessage = unasked(await self._direct.ainvoke(messages, config, settings))
            return message
        return answered(await self._shunt_for(settings).ainvoke(messages, config, **settings))

    @override
    def stream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, *, stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[AIMessageChunk]:  # fmt: skip
        if self._streaming_disabled(**kwargs):
            yield as_chunk(self.invoke(input, config, stop=stop, **kwargs))
            return
        messages = self._convert_input(input).to_messages()
        config, settings = self._config(config), self._settings(stop, kwargs)
        if not self._has_question(messages):
            with self._direct.place():
                chunk, chunks = self._direct.open(messages, config, settings)
                with closing(chunks):
                    mark: ShuntDecision | None = NO_QUESTION
                    while chunk is not END:
                        yield marked(chunk, mark)
                        chunk, mark = next(chunks, END), None
            return
        begun = False
        with closing(self._shunt_for(settings).stream(messages, config, **settings)) as results:  # type: ignore[type-var]
            for result in results:
                if result.output is not None:
                    yield as_chunk(result.output if begun else answered(result))
                    begun = True

    @override
    async def astream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, *, stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:  # fmt: skip
        if self._streaming_disabled(**kwargs):
            yield as_chunk(await self.ainvoke(input, config, stop=stop, **kwargs))
            return
        messages = self._convert_input(input).to_messages()
        config, settings = self._config(config), self._settings(stop, kwargs)
        if not self._has_question(messages):
            async with self._direct.aplace():
                chunk, chunks = await self._direct.aopen(messages, config, settings)
                async with aclosing(chunks):
                    mark: ShuntDecision | None = NO_QUESTION
                    while chunk is not END:
                        yield marked(chunk, mark)
                        chunk, mark = await anext(chunks, END), None
            return
        begun = False
        async with aclosing(self._shunt_for(settings).astream(messages, config, **settings)) as results:  # type: ignore[type-var]
            async for result in results:
                if result.output is not None:
                    yield as_chunk(result.output if begun else answered(result))
                    begun = True

    # Many conversations

    def _conversations(self, inputs: Sequence[LanguageModelInput]) -> list[list[BaseMessage]] | None:
        """Return the messages of all inputs if one grouped call can serve them, or None if they need separate calls."""
        try:
            found = [self._convert_input(one).to_messages() for one in inputs]
        except (TypeError, ValueError, NotImplementedError):
            return None
        return found if not self.drafts and all(map(self._has_question, found)) else None

    @override
    def batch(
        self, inputs: list[LanguageModelInput], config: RunnableConfig | list[RunnableConfig] | None = None, *,
        return_exceptions: bool = False, stop: list[str] | None = None, **kwargs: Any,
    ) -> list[Any]:  # fmt: skip
        """Answer `n` conversations with one small-model call and one grouped large call.

        If the small side is a chat model, or a conversation does not end with a human message of text, each
        conversation is a call of its own.
        """
        conversations = self._conversations(inputs)
        if conversations is None:
            more = {**kwargs, **({} if stop is None else {"stop": stop})}
            return super().batch(list(inputs), config, return_exceptions=return_exceptions, **more)
        configs = [self._config(one) for one in get_config_list(config, len(inputs))]
        settings = self._settings(stop, kwargs)
        shunt = self._shunt_for(settings)
        results = shunt.batch(conversations, configs, return_exceptions=return_exceptions, **settings)
        return each_answered(results, return_exceptions)

    @override
    async def abatch(
        self, inputs: list[LanguageModelInput], config: RunnableConfig | list[RunnableConfig] | None = None, *,
        return_exceptions: bool = False, stop: list[str] | None = None, **kwargs: Any,
    ) -> list[Any]:  # fmt: skip
        """Async version of `batch`."""
        conversations = self._conversations(inputs)
        if conversations is None:
            more = {**kwargs, **({} if stop is None else {"stop": stop})}
            return await super().abatch(list(inputs), config, return_exceptions=return_exceptions, **more)
        configs = [self._config(one) for one in get_config_list(config, len(inputs))]
        settings = self._settings(stop, kwargs)
        shunt = self._shunt_for(settings)
        results = await shunt.abatch(conversations, configs, return_exceptions=return_exceptions, **settings)
        return each_answered(results, return_exceptions)

    @override
    def generate(
        self, messages: list[list[BaseMessage]], stop: list[str] | None = None, callbacks: Callbacks = None, *,
        tags: list[str] | None = None, metadata: dict[str, Any] | None = None, run_name: str | None = None,
        run_id: UUID | None = None, **kwargs: Any,
    ) -> LLMResult:  # fmt: skip
        config = legacy_config(callbacks, tags, metadata, run_name, run_id)
        return llm_result(self.batch(list(messages), config, stop=stop, **kwargs))

    @override
    async def agenerate(
        self, messages: list[list[BaseMessage]], stop: list[str] | None = None, callbacks: Callbacks = None, *,
        tags: list[str] | None = None, metadata: dict[str, Any] | None = None, run_name: str | None = None,
        run_id: UUID | None = None, **kwargs: Any,
    ) -> LLMResult:  # fmt: skip
        config = legacy_config(callbacks, tags, metadata, run_name, run_id)
        return llm_result(await self.abatch(list(messages), config, stop=stop, **kwargs))

    # Calls inside another chat-model run, which counts the tokens. They report to no callbacks.

    @override
    def _generate(
        self, messages: list[BaseMessage], stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None, **kwargs: Any,
    ) -> ChatResult:  # fmt: skip
        message = self._alone().invoke(messages, self._inner(), stop=stop, **kwargs)
        return ChatResult(generations=[ChatGeneration(message=message)])

    @override
    async def _agenerate(
        self, messages: list[BaseMessage], stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None, **kwargs: Any,
    ) -> ChatResult:  # fmt: skip
        message = await self._alone().ainvoke(messages, self._inner(), stop=stop, **kwargs)
        return ChatResult(generations=[ChatGeneration(message=message)])

    @override
    def _stream(
        self, messages: list[BaseMessage], stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None, **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:  # fmt: skip
        for chunk in self._alone().stream(messages, self._inner(), stop=stop, **kwargs):
            yield ChatGenerationChunk(message=chunk)

    @override
    async def _astream(
        self, messages: list[BaseMessage], stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None, **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:  # fmt: skip
        async for chunk in self._alone().astream(messages, self._inner(), stop=stop, **kwargs):
            yield ChatGenerationChunk(message=chunk)

    def _alone(self) -> ShuntChatModel:
        return self.model_copy(update={"callbacks": None}) if self.callbacks is not None else self

    def _inner(self) -> RunnableConfig:
        return RunnableConfig(callbacks=[], configurable=self._carried)

    def _carrying(self, config: RunnableConfig | None) -> ShuntChatModel:
        """Return a copy that keeps the `configurable` values of one call, which the base class does not pass on."""
        copied = self.model_copy()
        copied._carried = dict(ensure_config(config).get("configurable", {}))
        return copied

    @override
    def stream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        return BaseChatModel.stream_events(self._carrying(config), input, config, **kwargs)

    @override
    def astream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        return BaseChatModel.astream_events(self._carrying(config), input, config, **kwargs)

    # Tools and structured output

    @override
    def bind_tools(
        self, tools: Sequence[Any], *, tool_choice: Any = None, **kwargs: Any
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Bind tools to both sides. The small side answers only if its answer fits the tools and the tool choice."""
        given = {**kwargs, **({} if tool_choice is None else {"tool_choice": tool_choice})}
        large = self.large.bind_tools(tools, **given)
        small = self.small.bind_tools(tools, **given) if isinstance(self.small, BaseChatModel) else self.small
        if not self.drafts:
            check_tool_answers(self.answers or {}, tools)
        sides = BoundSides(small, large, AnswerForm.from_tools(tools, tool_choice, kwargs))
        return self.model_copy(update={"bound": sides}).bind()

    @override
    def with_structured_output(
        self, schema: dict[str, Any] | type, *, include_raw: bool = False, **kwargs: Any
    ) -> Runnable[LanguageModelInput, Any]:
        """Return a version of this model in which both sides answer with objects of a schema.

        A classifier answers only if the answer to its label fits the schema. The answer can be an object or its fields.
        If the schema has a single field, a text answer (such as the label itself) fills it. A small chat model must
        return log-probabilities with its structured output.
        """
        large = self._with_settings(self.large).with_structured_output(schema, include_raw=include_raw, **kwargs)
        small = self.small
        if isinstance(small, BaseChatModel):
            small = self._with_settings(small).with_structured_output(schema, include_raw=True, **kwargs)
        form = AnswerForm(schema=schema, structured=True, closed=schema is None and not self.drafts)
        return StructuredChat(self, BoundSides(small, large, form), include_raw=include_raw)

    def _with_settings(self, model: BaseChatModel) -> BaseChatModel:
        """Return a chat model with this model's standard settings, as far as it has such fields.

        They are set as fields because a parser behind the model would not pass on keyword arguments.
        """
        own = {name: getattr(self, name) for name in STANDARD if getattr(self, name) is not None}
        return model.model_copy(update={name: value for name, value in own.items() if name in type(model).model_fields})

    # Identification and token counting

    @property
    @override
    def _llm_type(self) -> str:
        return "datashunt"

    @property
    @override
    def _identifying_params(self) -> dict[str, Any]:
        return {"large": model_name(self.large), "small": model_name(self.small), "policy": str(self._shunt.policy)}

    @override
    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        own = {name: kwargs.get(name, getattr(self, name)) for name in ("temperature", "max_tokens")}
        given = {name: value for name, value in own.items() if value is not None}
        params = self.large._get_ls_params(stop=stop or self.stop, **{**kwargs, **given})
        return LangSmithParams(**{**params, "ls_provider": "datashunt"})

    @override
    def _resolve_model_profile(self) -> Any:
        return self.large.profile

    @override
    def get_token_ids(self, text: str) -> list[int]:
        return self.large.get_token_ids(text)

    @override
    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Any = None) -> int:
        return self.large.get_num_tokens_from_messages(messages, tools)
