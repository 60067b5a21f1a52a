"""ShuntChatModel: a shunt wherever a chat model goes."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from typing import Any, Literal, Self
from uuid import UUID

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun, Callbacks
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.runnables import Runnable, RunnableBinding, RunnableConfig, RunnableLambda
from langchain_core.runnables.base import coerce_to_runnable
from langchain_core.runnables.config import ensure_config, get_config_list, merge_configs
from pydantic import ConfigDict, Field, PrivateAttr, field_validator, model_validator
from typing_extensions import override

from langchain_datashunt.answers import AnswerForm, Answering, SmallAnswers
from langchain_datashunt.chat_messages import (
    answered,
    as_chunk,
    legacy_config,
    llm_result,
    marked,
    model_name,
    said_by,
    text_alone,
)
from langchain_datashunt.configured import Configured
from langchain_datashunt.drafting import DraftConfidence, DraftingModel, mean_token_probability
from langchain_datashunt.exceptions import ConfigurationError
from langchain_datashunt.hinted_model import HintedModel
from langchain_datashunt.large_calls import END, LargeCaller
from langchain_datashunt.policies import OnlyLabels, Policy
from langchain_datashunt.predictions import ShuntDecision, ShuntResult
from langchain_datashunt.privacy.gate import OutboundGate
from langchain_datashunt.pruning import Pruning, SoftPrompt
from langchain_datashunt.retries import CallLimiter, Retry
from langchain_datashunt.shunt import ShuntRunnable, policy_for

NO_QUESTION = ShuntDecision("large", "deferred", policy="the conversation does not end with a human message")
"""The decision where a classifier has nothing to read, as after a tool's result."""

_SETTINGS = (
    "on_large_error", "max_concurrency", "retry", "threshold_id", "monitor", "fail_safe", "shadow", "recorder",
    "gate", "breaker", "max_pending",
)  # fmt: skip
"""Fields that are handed on to the shunt as they are."""

_STANDARD = ("temperature", "max_tokens", "stop")
"""Fields that are handed on with each large call, where they are set."""


class ShuntChatModel(Configured, BaseChatModel):
    """A chat model that answers by itself what its small side is sure of, and asks a large chat model for the rest.

    The small side is a small model whose labels have answers, or a small local chat model that gives
    log-probabilities.

    ```python
    model = ShuntChatModel(
        small=load_small_model("bundle"),
        large=ChatOpenAI(model="gpt-4o"),
        answers={"opening_hours": "We are open from 9 to 17.", "balance": ToolAnswer("get_balance")},
    )
    ```

    Messages carry the decision under `response_metadata["shunt"]`, and in `usage_metadata` what the large model
    counted. Runs: a chain run with one run of the small model and, where it was asked, one of the large model, whose
    own cache, rate limiter and callbacks work as ever. A call inside an outer chat-model run (`generate` of another
    wrapper, `stream_events(version="v3")`) has that one run alone, so that tokens are counted once.

    A classifier reads the last human message. Where the conversation ends with something else, a tool's result for
    example, the large model is asked at once.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", validate_assignment=False)

    small: Runnable[Any, Any]
    """A small model (`Runnable` to a `Prediction`), or a chat model that drafts."""

    large: BaseChatModel
    """The large chat model."""

    answers: dict[str, Any] | None = None
    """By label what the small side says: text, `AIMessage`, `ToolAnswer`, an object or its fields for structured
    output, or a list of them of which the first is taken that fits the call. A label without an answer is left to the
    large model. None answers with the label itself. Of no use with a chat model as small side."""

    confidence: DraftConfidence = Field(default=mean_token_probability, exclude=True, repr=False)
    """How sure a chat model as small side is of its message."""

    policy: Policy | None = None
    """When to keep; see `ShuntRunnable.policy`."""

    pruning: Pruning | None = SoftPrompt()
    """What the large model is told of a small model's opinion, in the system message; None tells it nothing."""

    hint: str | None = None
    """A template of what it is told, over the variables of `pruning`; None for the strategy's own words."""

    on_large_error: Literal["raise", "small"] = "raise"
    """See `ShuntRunnable.on_large_error`."""

    max_concurrency: int | None = Field(default=None, ge=1)
    """Large calls at once at the most."""

    retry: Retry = Retry(attempts=1)
    """Around each large call; once by default, since chat models retry by themselves."""

    threshold_id: str = "shunt_threshold"
    """The key of `config["configurable"]` that replaces the threshold for one call."""

    monitor: Any = Field(default=None, exclude=True, repr=False)
    """See `ShuntRunnable.monitor`."""

    fail_safe: Literal["none", "large"] = "none"
    """See `ShuntRunnable.fail_safe`."""

    shadow: bool = False
    """See `ShuntRunnable.shadow`."""

    recorder: Any = Field(default=None, exclude=True, repr=False)
    """See `ShuntRunnable.recorder`."""

    gate: OutboundGate | None = None
    """See `ShuntRunnable.gate`. What stays and has no small answer raises a `StaysLocal`; turns without a question for
    the small side pass the gate too."""

    breaker: Any = Field(default=None, exclude=True, repr=False)
    """See `ShuntRunnable.breaker`."""

    max_pending: int | None = Field(default=None, ge=1)
    """See `ShuntRunnable.max_pending`."""

    temperature: float | None = None
    """Handed on with each large call; None leaves it to the large model."""

    max_tokens: int | None = Field(default=None, ge=1)
    """Likewise."""

    stop: list[str] | None = None
    """Likewise."""

    streaming: bool | None = None
    """False has `stream` give whole answers."""

    _form: AnswerForm = PrivateAttr(default=AnswerForm())
    _asked: Runnable[Any, Any] = PrivateAttr()
    _drafter: Runnable[Any, Any] = PrivateAttr()
    _shunt: ShuntRunnable = PrivateAttr()
    _direct: LargeCaller = PrivateAttr()
    _limiter: CallLimiter = PrivateAttr()
    _carried: dict[str, Any] = PrivateAttr(default_factory=dict)

    @field_validator("small", mode="before")
    @classmethod
    def _runnable(cls, value: Any) -> Any:
        try:
            return coerce_to_runnable(value)
        except TypeError as error:
            raise ConfigurationError(f"A {type(value).__name__} is no small model: give a Runnable.") from error

    @field_validator("rate_limiter", "cache", check_fields=False)
    @classmethod
    def _of_the_large(cls, value: Any) -> Any:
        if value not in (None, False):
            raise ConfigurationError(
                "Give `cache` and `rate_limiter` to the large model: only its calls cost something."
            )
        return value

    def model_post_init(self, context: Any, /) -> None:
        """Lay the shunt out."""
        super().model_post_init(context)
        self._limiter = CallLimiter(self.max_concurrency)
        self._lay_out(self.large, self.small, AnswerForm())

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if isinstance(self.small, RunnableBinding) and isinstance(self.small.bound, BaseChatModel):
            raise ConfigurationError(
                "`small` is a chat model with bound settings, whose tools could not be bound; give the chat model "
                "itself with these settings, for example ChatOpenAI(..., logprobs=True)."
            )
        labels = getattr(self.small, "labels", None)
        if labels and (unknown := sorted(set(self.answers or ()) - set(labels))):
            raise ConfigurationError(
                f"There are answers for labels that the small model does not have: {', '.join(unknown[:5])}. Its "
                f"labels are: {', '.join(labels[:10])}."
            )
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        """Change a setting; the next call follows it."""
        super().__setattr__(name, value)
        if name in type(self).model_fields and "_shunt" in (self.__pydantic_private__ or {}):
            self._again({name})

    @override
    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        copied = super().model_copy(update=update, deep=deep)
        if update:
            copied._again(set(update))
        return copied

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """A copy with answers of its own; models hold connections and are shared."""
        return self.model_copy(update={"answers": copy.deepcopy(self.answers, memo)})

    def __getstate__(self) -> dict[Any, Any]:
        """Without what holds locks; it is laid out again where the model is unpickled."""
        state = super().__getstate__()
        kept = {
            name: (state["__pydantic_private__"] or {})[name] for name in ("_form", "_asked", "_drafter", "_carried")
        }
        return {**state, "__pydantic_private__": kept}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        super().__setstate__(state)
        self._limiter = CallLimiter(self.max_concurrency)
        self._lay_out(self._asked, self._drafter, self._form)

    def _again(self, changed: set[str]) -> None:
        """Lay out anew after settings have changed."""
        if "max_concurrency" in changed:
            self._limiter = CallLimiter(self.max_concurrency)
        if changed & {"small", "large"}:
            self._lay_out(self.large, self.small, AnswerForm())
        else:
            self._lay_out(self._asked, self._drafter, self._form)

    # The shunt underneath

    @property
    def drafts(self) -> bool:
        """Whether the small side is a chat model."""
        return isinstance(self.small, BaseChatModel)

    def _lay_out(self, large: Runnable[Any, Any], drafter: Runnable[Any, Any], form: AnswerForm) -> None:
        self._form, self._asked, self._drafter = form, large, drafter
        self._shunt = self._shunt_over(large, drafter, form, name="ShuntChatModel")
        self._direct = self._caller_of(large)

    def _caller_of(self, large: Runnable[Any, Any]) -> LargeCaller:
        """What asks the large model where there is no question for the small side; it passes the same gate."""
        gated = large if self.gate is None else self.gate.around(large)
        return LargeCaller(gated, self.retry, self._limiter, self.breaker, self.max_pending)

    def _shunt_over(
        self, large: Runnable[Any, Any], drafter: Runnable[Any, Any], form: AnswerForm, *, name: str, raw: bool = False
    ) -> ShuntRunnable:
        """A shunt whose both sides answer in one form."""
        settings = {field: getattr(self, field) for field in _SETTINGS}
        if self.drafts:
            told = model_name(self.small)
            small: Runnable[Any, Any] = DraftingModel(drafter, self.confidence, told, form=form, give_raw=raw)
            return ShuntRunnable(
                name=name, small=small, large=large, pruning=None, return_decision=True,
                policy=policy_for(self.small, self.policy), **settings,
            ).sharing(self._limiter)  # fmt: skip
        answers = SmallAnswers(answers=self.answers, model_id=getattr(self.small, "model_id", "") or "small")
        policy = policy_for(self.small, self.policy)
        labels = getattr(self.small, "labels", None) or tuple(self.answers or ())
        if self.answers is not None or form != AnswerForm():
            policy = policy & OnlyLabels(labels=answers.answerable(labels, form))
        asked = large if self.pruning is None else HintedModel(large, self.pruning, self.hint)
        return ShuntRunnable(
            name=name, small=self.small, large=asked, policy=policy, pruning=self.pruning, return_decision=True,
            small_output=RunnableLambda(Answering(answers, form, raw), name="small answer"), **settings,
        ).sharing(self._limiter)  # fmt: skip

    def _shunt_for(self, settings: dict[str, Any]) -> ShuntRunnable:
        """The shunt of one call: another one where the call itself binds tools or a format, or there is a drafter."""
        form = self._form
        if settings.keys() & {"tools", "tool_choice", "response_format"}:
            form = form.with_call(settings)
        if self.drafts and settings:
            return self._shunt_over(self._asked, self._drafter.bind(**settings), form, name="ShuntChatModel")
        if form != self._form:
            return self._shunt_over(self._asked, self._drafter, form, name="ShuntChatModel")
        return self._shunt

    def _has_question(self, messages: Sequence[BaseMessage]) -> bool:
        """Whether the small side can read what is asked: a classifier reads a human message of text alone."""
        return self.drafts or (bool(messages) and isinstance(messages[-1], HumanMessage) and text_alone(messages[-1]))

    def _config(self, config: RunnableConfig | None) -> RunnableConfig:
        own = RunnableConfig(tags=self.tags or [], metadata=self.metadata or {})
        if self.callbacks is not None:
            own["callbacks"] = self.callbacks
        return merge_configs(ensure_config(config), own)

    def _settings(self, stop: list[str] | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        standard = {name: getattr(self, name) for name in _STANDARD if getattr(self, name) is not None}
        return {**standard, **({} if stop is None else {"stop": stop}), **kwargs}

    # One conversation

    @override
    def invoke(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, *, stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:  # fmt: skip
        messages = self._convert_input(input).to_messages()
        config, settings = self._config(config), self._settings(stop, kwargs)
        if not self._has_question(messages):
            message: AIMessage = _unasked(self._direct.one(messages, config, settings).sync())
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
            message: AIMessage = _unasked(await self._direct.one(messages, config, settings).asynchronous())
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
                    told: ShuntDecision | None = NO_QUESTION
                    while chunk is not END:
                        yield marked(chunk, told)
                        chunk, told = next(chunks, END), None
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
                    told: ShuntDecision | None = NO_QUESTION
                    while chunk is not END:
                        yield marked(chunk, told)
                        chunk, told = await anext(chunks, END), None
            return
        begun = False
        async with aclosing(self._shunt_for(settings).astream(messages, config, **settings)) as results:  # type: ignore[type-var]
            async for result in results:
                if result.output is not None:
                    yield as_chunk(result.output if begun else answered(result))
                    begun = True

    # Many conversations

    def _conversations(self, inputs: Sequence[LanguageModelInput]) -> list[list[BaseMessage]] | None:
        """The messages of inputs that can be one grouped call, None where each must be a call of its own."""
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
        """Answer `n` conversations with one small-model call and one grouped large call, where that can be."""
        conversations = self._conversations(inputs)
        if conversations is None:
            more = {**kwargs, **({} if stop is None else {"stop": stop})}
            return super().batch(list(inputs), config, return_exceptions=return_exceptions, **more)
        configs = [self._config(one) for one in get_config_list(config, len(inputs))]
        settings = self._settings(stop, kwargs)
        shunt = self._shunt_for(settings)
        results = shunt.batch(conversations, configs, return_exceptions=return_exceptions, **settings)
        return [one if isinstance(one, Exception) else answered(one) for one in results]

    @override
    async def abatch(
        self, inputs: list[LanguageModelInput], config: RunnableConfig | list[RunnableConfig] | None = None, *,
        return_exceptions: bool = False, stop: list[str] | None = None, **kwargs: Any,
    ) -> list[Any]:  # fmt: skip
        """Answer `n` conversations with one small-model call and one grouped large call, where that can be."""
        conversations = self._conversations(inputs)
        if conversations is None:
            more = {**kwargs, **({} if stop is None else {"stop": stop})}
            return await super().abatch(list(inputs), config, return_exceptions=return_exceptions, **more)
        configs = [self._config(one) for one in get_config_list(config, len(inputs))]
        settings = self._settings(stop, kwargs)
        shunt = self._shunt_for(settings)
        results = await shunt.abatch(conversations, configs, return_exceptions=return_exceptions, **settings)
        return [one if isinstance(one, Exception) else answered(one) for one in results]

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

    # Inside another chat-model run: that one counts the tokens, so nothing is reported below it

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
        """A copy that knows what is configured for one call, where the base class hands only callbacks on."""
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
        """Bind tools to both sides; the small side answers only what is allowed then."""
        given = {**kwargs, **({} if tool_choice is None else {"tool_choice": tool_choice})}
        large = self.large.bind_tools(tools, **given)
        drafter = self.small.bind_tools(tools, **given) if isinstance(self.small, BaseChatModel) else self.small
        bound = self.model_copy()
        bound._lay_out(large, drafter, AnswerForm.of_tools(tools, tool_choice, kwargs))
        return bound.bind()

    @override
    def with_structured_output(
        self, schema: dict[str, Any] | type, *, include_raw: bool = False, **kwargs: Any
    ) -> Runnable[LanguageModelInput, Any]:
        """Structured answers of both sides.

        The small side answers where an answer of its label fits the schema: an object, fields, or where the schema has
        one field only a label's text. A chat model as small side needs log-probabilities beside its structured output.
        """
        large = self._with_settings(self.large).with_structured_output(schema, include_raw=include_raw, **kwargs)
        drafter = self.small
        if isinstance(drafter, BaseChatModel):
            drafter = self._with_settings(drafter).with_structured_output(schema, include_raw=True, **kwargs)
        form = AnswerForm(schema=schema, structured=True, closed=schema is None and not self.drafts)
        shunt = self._shunt_over(large, drafter, form, name="ShuntChatModel structured", raw=include_raw)
        return _Structured(shunt, self, large)

    def _with_settings(self, model: BaseChatModel) -> BaseChatModel:
        """A chat model with this one's settings where it has such fields: a parser after it passes no keywords on."""
        own = {name: getattr(self, name) for name in _STANDARD if getattr(self, name) is not None}
        return model.model_copy(update={name: value for name, value in own.items() if name in type(model).model_fields})

    # What a chat model says of itself

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


class _Structured(Runnable[Any, Any]):
    """Structured answers: a shunt that takes what chat models take.

    Args:
        shunt: From messages to results with objects, or with mappings that hold the raw message too.
        owner: Reads inputs, and knows whether there is a question.
        large: Asked where there is no question to classify.
    """

    def __init__(self, shunt: ShuntRunnable, owner: ShuntChatModel, large: Runnable[Any, Any]) -> None:
        self.shunt, self.owner = shunt, owner
        self.direct = owner._caller_of(large)

    def _read(self, value: Any, config: RunnableConfig | None) -> tuple[list[BaseMessage], RunnableConfig, bool]:
        messages = self.owner._convert_input(value).to_messages()
        return messages, self.owner._config(config), self.owner._has_question(messages)

    @override
    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        messages, config, question = self._read(input, config)
        if not question:
            return _unasked(self.direct.one(messages, config, kwargs).sync())
        return _parsed(self.shunt.invoke(messages, config, **kwargs))

    @override
    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        messages, config, question = self._read(input, config)
        if not question:
            return _unasked(await self.direct.one(messages, config, kwargs).asynchronous())
        return _parsed(await self.shunt.ainvoke(messages, config, **kwargs))

    @override
    def stream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[Any]:
        messages, config, question = self._read(input, config)
        if not question:
            yield from self.direct.large.stream(messages, config, **kwargs)
            return
        with closing(self.shunt.stream(messages, config, **kwargs)) as results:  # type: ignore[type-var]
            for result in results:
                if result.output is not None:
                    yield _parsed(result)

    @override
    async def astream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> AsyncIterator[Any]:
        messages, config, question = self._read(input, config)
        side: Any = self.shunt if question else self.direct.large
        async with aclosing(side.astream(messages, config, **kwargs)) as results:
            async for result in results:
                if not question:
                    yield result
                elif result.output is not None:
                    yield _parsed(result)


def _parsed(result: ShuntResult) -> Any:
    """The object, or the mapping whose raw message carries the decision."""
    output = said_by(result)
    if isinstance(output, dict) and isinstance(output.get("raw"), BaseMessage) and "parsing_error" in output:
        return {**output, "raw": marked(output["raw"], result.decision)}
    return output


def _unasked(message: Any) -> Any:
    """A large model's answer, or its error, where there was no question for the small side."""
    if isinstance(message, Exception):
        raise message
    return marked(message, NO_QUESTION)
