"""ShuntLLM: a LlamaIndex LLM that answers locally if its small model is confident."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from copy import deepcopy
from typing import Any, Self

from langchain_core.utils.uuid import uuid7
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    LLMMetadata,
    MessageRole,
    TextBlock,
    ToolCallBlock,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import LLM, ToolSelection
from llama_index.core.tools.types import BaseTool
from typing_extensions import override

from langchain_datashunt.chat.answers import ToolAnswer
from langchain_datashunt.chat.hint import Hint
from langchain_datashunt.decision import ShuntDecision
from langchain_datashunt.exceptions import ConfigurationError
from langchain_datashunt.large_models.prompt_pruning import Pruning, SoftPruning
from langchain_datashunt.llama_index.deciding import Decider
from langchain_datashunt.llama_index.function_calling import PreparedByLarge
from langchain_datashunt.llama_index.responses import (
    arguments,
    completion_with_decision,
    each_with_decision,
    offered_tools,
    text_of_response,
    with_decision,
)
from langchain_datashunt.policies.thresholds import Policy, as_policy
from langchain_datashunt.prediction import answer_text

_REQUIRED = "_shunt_tool_required"
"""Key of a prepared call that requires a tool call, independent of the format of each LLM."""

_SETTINGS = frozenset({"small", "large", "answers", "policy", "pruning", "hint", "question_of", "recorder"})

_NO_QUESTION = ShuntDecision("large", "deferred", policy="the conversation does not end with a user's message")


class ShuntLLM(LLM):
    """LLM that answers locally if the small model is confident, and calls `large` otherwise.

    ```python
    llm = ShuntLLM(small=small, large=OpenAI(model="gpt-4o"), answers={"opening_hours": "From 9 to 17."})
    ```

    The classifier reads the user's last message, or the prompt. Responses carry the decision under
    `additional_kwargs["shunt"]`. Only calls of the large LLM emit LLM events, so token counters count them once. If
    `large` supports function calling, `ShuntLLM(...)` creates a `ShuntFunctionCallingLLM`.
    """

    small: Any = Field(description="Small model.", exclude=True)
    large: LLM = Field(description="Large LLM for deferred requests.")
    answers: dict[str, Any] | None = Field(
        default=None,
        description="Answer for each label: a text, a ToolAnswer, or a list of both. Labels without an answer are "
        "deferred. None answers with the label itself.",
    )
    policy: Any = Field(default=None, description="Policy that decides when to answer locally.", exclude=True)
    pruning: Any = Field(
        default_factory=SoftPruning, description="Prompt Pruning strategy; None sends no hint.", exclude=True
    )
    hint: str | None = Field(default=None, description="Template of the hint; None uses the strategy's own paragraph.")
    question_of: Callable[[str], str] | None = Field(
        default=None, description="Function that extracts the question from a longer prompt.", exclude=True
    )
    recorder: Any = Field(default=None, description="Recorder that logs the calls.", exclude=True)

    _decider: Decider = PrivateAttr()
    _hint: Hint | None = PrivateAttr(default=None)

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        """Create a `ShuntFunctionCallingLLM` if `large` supports function calling."""
        if cls is ShuntLLM and isinstance(settings.get("large"), FunctionCallingLLM):
            return super().__new__(ShuntFunctionCallingLLM)  # type: ignore[return-value]
        return super().__new__(cls)

    def __init__(self, **settings: Any) -> None:
        settings["policy"] = as_policy(settings.get("policy"))
        super().__init__(**settings)
        if self.policy is not None and not isinstance(self.policy, Policy):
            raise ConfigurationError(
                f"Expected a Policy for `policy`, got {type(self.policy).__name__}. Pass Threshold(0.9), for example."
            )
        if self.pruning is not None and not isinstance(self.pruning, Pruning):
            raise ConfigurationError(
                f"Expected a Pruning or None for `pruning`, got {type(self.pruning).__name__}. "
                f"Pass SoftPruning(), for example."
            )
        self._decider = Decider(self.small, self.policy, self.recorder)
        self._hint = None if self.pruning is None else Hint(self.pruning, self.hint)
        self._share_callbacks()

    def _share_callbacks(self) -> None:
        """Give this LLM's callback manager to the large LLM if that has no handlers of its own."""
        mine, its = self.callback_manager, self.large.callback_manager
        if mine is not its and mine.handlers and not its.handlers:
            self.large.callback_manager = mine

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field of LlamaIndex, such as `callback_manager`. The shunt's own settings are frozen."""
        if name in _SETTINGS and "_decider" in (self.__pydantic_private__ or {}):
            raise ConfigurationError(
                f"The settings of a {type(self).__name__} are frozen. Use model_copy(update={{{name!r}: ...}})."
            )
        super().__setattr__(name, value)
        if name == "callback_manager" and "_decider" in (self.__pydantic_private__ or {}):
            self._share_callbacks()

    @override
    def model_copy(self, *, update: Any = None, deep: bool = False) -> Self:
        fields = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**{**(deepcopy(fields) if deep else fields), **(update or {})})

    @classmethod
    @override
    def class_name(cls) -> str:
        return "ShuntLLM"

    @property
    @override
    def metadata(self) -> LLMMetadata:
        return self.large.metadata

    # Decisions

    def _question(self, messages: Sequence[ChatMessage]) -> str | None:
        """Return the text to classify, or None if the conversation does not end with a text from the user."""
        last = messages[-1] if messages else None
        if last is None or last.role != MessageRole.USER or not last.content:
            return None
        if not all(
            isinstance(block, TextBlock) for block in last.blocks
        ):  # a text classifier cannot see other content, such as images
            return None
        return self.question_of(last.content) if self.question_of else last.content

    def _small_message(
        self, decision: ShuntDecision, given: dict[str, Any], required: bool = False
    ) -> ChatMessage | None:
        """Return the local answer, or None if the call must be deferred."""
        if decision.route != "small" or decision.prediction is None:
            return None
        label, written = decision.prediction.label, decision.prediction.answer
        if written is not None:
            label = answer_text(written)
        answer = label if self.answers is None else self.answers.get(label)
        offered, forced = offered_tools(given), required or given.get("tool_choice") not in (None, "auto", "none")
        for one in answer if isinstance(answer, list) else [answer]:
            if isinstance(one, str) and not forced and "response_format" not in given:
                return ChatMessage(role=MessageRole.ASSISTANT, blocks=[TextBlock(text=one)])
            if isinstance(one, ToolAnswer) and one.tool in offered and _may_be_called(one.tool, given):
                call = ToolCallBlock(
                    tool_call_id=f"call_{uuid7().hex}", tool_name=one.tool, tool_kwargs=deepcopy(one.args)
                )
                return ChatMessage(role=MessageRole.ASSISTANT, blocks=[call])
        return None

    def _hinted(self, messages: Sequence[ChatMessage], decision: ShuntDecision) -> list[ChatMessage]:
        paragraph = "" if self._hint is None else self._hint.paragraph_for(decision.prediction)
        if not paragraph:
            return list(messages)
        if messages[0].role == MessageRole.SYSTEM:
            first = messages[0].model_copy(update={"blocks": [*messages[0].blocks, TextBlock(text=f"\n\n{paragraph}")]})
            return [first, *messages[1:]]
        return [ChatMessage(role=MessageRole.SYSTEM, content=paragraph), *messages]

    def _hinted_prompt(self, prompt: str, decision: ShuntDecision) -> str:
        paragraph = "" if self._hint is None else self._hint.paragraph_for(decision.prediction)
        return f"{paragraph}\n\n{prompt}" if paragraph else prompt

    def _kept(self, text: str, decision: ShuntDecision, seconds: float) -> tuple[dict[str, Any], list[Any]]:
        return self._decider.tell(decision), self._decider.finished(text, decision, None, "", (seconds, 0.0))

    def _asked(self, text: str, decision: ShuntDecision, answer: str, seconds: tuple[float, float]) -> list[Any]:
        return self._decider.finished(text, decision, answer, self.large.metadata.model_name, seconds)

    # Chat

    @override
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        text, required = self._question(messages), kwargs.pop(_REQUIRED, False)
        if text is None:
            return with_decision(self.large.chat(messages, **kwargs), self._decider.tell(_NO_QUESTION))
        decision, seconds = self._decider.decide(text)
        if (message := self._small_message(decision, kwargs, required)) is not None:
            metadata, log = self._kept(text, decision, seconds)
            self._decider.record(log)
            return with_decision(ChatResponse(message=message), metadata)
        decision, started = self._decider.deferred(decision), time.perf_counter()
        metadata = self._decider.tell(decision)
        response = self.large.chat(self._hinted(messages, decision), **kwargs)
        self._decider.record(
            self._asked(text, decision, text_of_response(response), (seconds, time.perf_counter() - started))
        )
        return with_decision(response, metadata)

    @override
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        text, required = self._question(messages), kwargs.pop(_REQUIRED, False)
        if text is None:
            return with_decision(await self.large.achat(messages, **kwargs), self._decider.tell(_NO_QUESTION))
        decision, seconds = await self._decider.adecide(text)
        if (message := self._small_message(decision, kwargs, required)) is not None:
            metadata, log = self._kept(text, decision, seconds)
            await self._decider.arecord(log)
            return with_decision(ChatResponse(message=message), metadata)
        decision, started = self._decider.deferred(decision), time.perf_counter()
        metadata = self._decider.tell(decision)
        response = await self.large.achat(self._hinted(messages, decision), **kwargs)
        took = (seconds, time.perf_counter() - started)
        await self._decider.arecord(self._asked(text, decision, text_of_response(response), took))
        return with_decision(response, metadata)

    @override
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> Generator[ChatResponse]:
        def chunks() -> Generator[ChatResponse]:
            text, required = self._question(messages), kwargs.pop(_REQUIRED, False)
            if text is None:
                yield from each_with_decision(
                    self.large.stream_chat(messages, **kwargs), self._decider.tell(_NO_QUESTION)
                )
                return
            decision, seconds = self._decider.decide(text)
            if (message := self._small_message(decision, kwargs, required)) is not None:
                metadata, log = self._kept(text, decision, seconds)
                self._decider.record(log)
                yield with_decision(ChatResponse(message=message, delta=message.content or ""), metadata)
                return
            decision, started, last = self._decider.deferred(decision), time.perf_counter(), None
            metadata = self._decider.tell(decision)
            for last in each_with_decision(
                self.large.stream_chat(self._hinted(messages, decision), **kwargs), metadata
            ):
                yield last
            if last is not None:
                took = (seconds, time.perf_counter() - started)
                self._decider.record(self._asked(text, decision, text_of_response(last), took))

        return chunks()

    @override
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> AsyncGenerator[ChatResponse]:
        async def chunks() -> AsyncGenerator[ChatResponse]:
            text, required = self._question(messages), kwargs.pop(_REQUIRED, False)
            if text is None:
                metadata = self._decider.tell(_NO_QUESTION)
                async for one in await self.large.astream_chat(messages, **kwargs):
                    yield with_decision(one, metadata)
                return
            decision, seconds = await self._decider.adecide(text)
            if (message := self._small_message(decision, kwargs, required)) is not None:
                metadata, log = self._kept(text, decision, seconds)
                await self._decider.arecord(log)
                yield with_decision(ChatResponse(message=message, delta=message.content or ""), metadata)
                return
            decision, started, last = self._decider.deferred(decision), time.perf_counter(), None
            metadata = self._decider.tell(decision)
            async for last in await self.large.astream_chat(self._hinted(messages, decision), **kwargs):
                yield with_decision(last, metadata)
            if last is not None:
                took = (seconds, time.perf_counter() - started)
                await self._decider.arecord(self._asked(text, decision, text_of_response(last), took))

        return chunks()

    # Structured output always uses the large LLM, since labels do not fit an arbitrary schema

    @override
    def structured_predict(self, *args: Any, **kwargs: Any) -> Any:
        return self.large.structured_predict(*args, **kwargs)

    @override
    async def astructured_predict(self, *args: Any, **kwargs: Any) -> Any:
        return await self.large.astructured_predict(*args, **kwargs)

    @override
    def stream_structured_predict(self, *args: Any, **kwargs: Any) -> Any:
        return self.large.stream_structured_predict(*args, **kwargs)

    @override
    async def astream_structured_predict(self, *args: Any, **kwargs: Any) -> Any:
        return await self.large.astream_structured_predict(*args, **kwargs)

    @override
    def as_structured_llm(self, *args: Any, **kwargs: Any) -> Any:
        return self.large.as_structured_llm(*args, **kwargs)

    # Completion

    @override
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        text = self.question_of(prompt) if self.question_of else prompt
        decision, seconds = self._decider.decide(text)
        if (message := self._small_message(decision, kwargs)) is not None:
            metadata, log = self._kept(text, decision, seconds)
            self._decider.record(log)
            return completion_with_decision(CompletionResponse(text=message.content or ""), metadata)
        decision, started = self._decider.deferred(decision), time.perf_counter()
        metadata = self._decider.tell(decision)
        response = self.large.complete(self._hinted_prompt(prompt, decision), formatted, **kwargs)
        self._decider.record(self._asked(text, decision, response.text, (seconds, time.perf_counter() - started)))
        return completion_with_decision(response, metadata)

    @override
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        text = self.question_of(prompt) if self.question_of else prompt
        decision, seconds = await self._decider.adecide(text)
        if (message := self._small_message(decision, kwargs)) is not None:
            metadata, log = self._kept(text, decision, seconds)
            await self._decider.arecord(log)
            return completion_with_decision(CompletionResponse(text=message.content or ""), metadata)
        decision, started = self._decider.deferred(decision), time.perf_counter()
        metadata = self._decider.tell(decision)
        response = await self.large.acomplete(self._hinted_prompt(prompt, decision), formatted, **kwargs)
        took = (seconds, time.perf_counter() - started)
        await self._decider.arecord(self._asked(text, decision, response.text, took))
        return completion_with_decision(response, metadata)

    @override
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Generator[CompletionResponse]:
        def chunks() -> Generator[CompletionResponse]:
            text = self.question_of(prompt) if self.question_of else prompt
            decision, seconds = self._decider.decide(text)
            if (message := self._small_message(decision, kwargs)) is not None:
                metadata, log = self._kept(text, decision, seconds)
                self._decider.record(log)
                answer = message.content or ""
                yield completion_with_decision(CompletionResponse(text=answer, delta=answer), metadata)
                return
            decision, started, last = self._decider.deferred(decision), time.perf_counter(), None
            metadata = self._decider.tell(decision)
            for last in self.large.stream_complete(self._hinted_prompt(prompt, decision), formatted, **kwargs):
                yield completion_with_decision(last, metadata)
            if last is not None:
                self._decider.record(self._asked(text, decision, last.text, (seconds, time.perf_counter() - started)))

        return chunks()

    @override
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> AsyncGenerator[CompletionResponse]:
        async def chunks() -> AsyncGenerator[CompletionResponse]:
            text = self.question_of(prompt) if self.question_of else prompt
            decision, seconds = await self._decider.adecide(text)
            if (message := self._small_message(decision, kwargs)) is not None:
                metadata, log = self._kept(text, decision, seconds)
                await self._decider.arecord(log)
                answer = message.content or ""
                yield completion_with_decision(CompletionResponse(text=answer, delta=answer), metadata)
                return
            decision, started, last = self._decider.deferred(decision), time.perf_counter(), None
            metadata = self._decider.tell(decision)
            asked = self._hinted_prompt(prompt, decision)
            async for last in await self.large.astream_complete(asked, formatted, **kwargs):
                yield completion_with_decision(last, metadata)
            if last is not None:
                took = (seconds, time.perf_counter() - started)
                await self._decider.arecord(self._asked(text, decision, last.text, took))

        return chunks()


class ShuntFunctionCallingLLM(ShuntLLM, PreparedByLarge):
    """`ShuntLLM` over an LLM that supports function calling, created by `ShuntLLM(...)`."""

    large: FunctionCallingLLM = Field(description="Large LLM for deferred requests.")

    @override
    def _prepare_chat_with_tools(
        self, tools: Sequence[BaseTool], user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None, verbose: bool = False, allow_parallel_tool_calls: bool = False,
        tool_required: bool = False, **kwargs: Any,
    ) -> dict[str, Any]:  # fmt: skip
        prepared = super()._prepare_chat_with_tools(
            tools, user_msg, chat_history, verbose, allow_parallel_tool_calls, tool_required, **kwargs
        )
        return {**prepared, _REQUIRED: tool_required}

    @override
    def _validate_chat_with_tools_response(
        self, response: ChatResponse, tools: Sequence[BaseTool], allow_parallel_tool_calls: bool = False, **kwargs: Any
    ) -> ChatResponse:
        if response.additional_kwargs.get("shunt", {}).get("route") == "small":
            return response
        return self.large._validate_chat_with_tools_response(response, tools, allow_parallel_tool_calls, **kwargs)

    @override
    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        if response.additional_kwargs.get("shunt", {}).get("route") != "small":
            return self.large.get_tool_calls_from_response(response, error_on_no_tool_call, **kwargs)
        calls = [block for block in response.message.blocks if isinstance(block, ToolCallBlock)]
        if not calls and error_on_no_tool_call:
            raise ValueError(f"Expected at least one tool call, but got {len(calls)} tool calls.")
        return [
            ToolSelection(tool_id=call.tool_call_id or "", tool_name=call.tool_name, tool_kwargs=arguments(call))
            for call in calls
        ]


def _may_be_called(tool: str, given: dict[str, Any]) -> bool:
    """Return whether the call's `tool_choice` allows this tool."""
    choice = given.get("tool_choice")
    if isinstance(choice, dict):
        choice = choice.get("name") or (choice.get("function") or {}).get("name")
    return choice in (None, "auto", "required", "any", tool)
