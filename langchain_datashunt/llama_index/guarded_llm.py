"""GuardedLLM: any LlamaIndex LLM behind a privacy guard."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Sequence
from typing import Any, Self

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    LLMMetadata,
    MessageRole,
    TextBlock,
)
from llama_index.core.bridge.pydantic import Field
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import LLM, ToolSelection
from llama_index.core.tools.types import BaseTool
from typing_extensions import override

from langchain_datashunt.exceptions import ConfigurationError, LocalOnlyError
from langchain_datashunt.llama_index.function_calling import PreparedByLarge
from langchain_datashunt.privacy.guard import PrivacyGuard
from langchain_datashunt.privacy.redaction import Placeholders, without_unfinished


class GuardedLLM(LLM):
    """LLM that redacts its requests with a privacy guard and restores the responses.

    ```python
    llm = GuardedLLM(large=OpenAI(model="gpt-4o"), guard=PrivacyGuard(local_kinds={"IBAN"}))
    selector = ShuntSelector(small, LLMSingleSelector.from_defaults(llm=llm))
    ```

    It can be used in a `ShuntLLM`, an `LLMSingleSelector`, a response synthesizer or an agent. Prompts and messages
    are sent with placeholders, and answers are restored, streamed or not. If an input must stay local, the answer is
    the text of an `AbstainedLocally`, or `LocalOnlyError` is raised with `on_local="raise"`. If `large` supports
    function calling, `GuardedLLM(...)` creates a `GuardedFunctionCallingLLM`.
    """

    large: LLM = Field(description="LLM that receives the redacted requests.")
    guard: Any = Field(description="Privacy guard that redacts requests and restores responses.", exclude=True)

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        """Create a `GuardedFunctionCallingLLM` if `large` supports function calling."""
        if cls is GuardedLLM and isinstance(settings.get("large"), FunctionCallingLLM):
            return super().__new__(GuardedFunctionCallingLLM)  # type: ignore[return-value]
        return super().__new__(cls)

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        if not isinstance(self.guard, PrivacyGuard):
            raise ConfigurationError(
                f"Expected a PrivacyGuard for `guard`, got {type(self.guard).__name__}. Pass PrivacyGuard(...)."
            )
        self.guard.check_without_labels("a LlamaIndex LLM")
        if self.callback_manager.handlers and not self.large.callback_manager.handlers:
            self.large.callback_manager = self.callback_manager

    @classmethod
    @override
    def class_name(cls) -> str:
        return "GuardedLLM"

    @property
    @override
    def metadata(self) -> LLMMetadata:
        return self.large.metadata

    # Redaction

    def _out(self, messages: Sequence[ChatMessage]) -> tuple[list[ChatMessage], Placeholders]:
        payload = [{"blocks": list(one.blocks), "more": one.additional_kwargs} for one in messages]
        out, found = self.guard.outbound(payload)
        changed = [
            one.model_copy(update={"blocks": new["blocks"], "additional_kwargs": new["more"]})
            for one, new in zip(messages, out, strict=True)
        ]
        return changed, found

    def _abstained(self, error: LocalOnlyError) -> str:
        if self.guard.on_local == "raise":
            raise error
        return str(self.guard.abstained(error, None))

    def _chat_abstained(self, error: LocalOnlyError) -> ChatResponse:
        words = self._abstained(error)
        return ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, content=words), delta=words)

    def _text_abstained(self, error: LocalOnlyError) -> CompletionResponse:
        words = self._abstained(error)
        return CompletionResponse(text=words, delta=words)

    # Chat

    @override
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        try:
            asked, found = self._out(messages)
        except LocalOnlyError as error:
            return self._chat_abstained(error)
        return _restored(self.large.chat(asked, **kwargs), found)

    @override
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        try:
            asked, found = self._out(messages)
        except LocalOnlyError as error:
            return self._chat_abstained(error)
        return _restored(await self.large.achat(asked, **kwargs), found)

    @override
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> Generator[ChatResponse]:
        def chunks() -> Generator[ChatResponse]:
            try:
                asked, found = self._out(messages)
            except LocalOnlyError as error:
                yield self._chat_abstained(error)
                return
            shown = _Shown(found)
            for response in self.large.stream_chat(asked, **kwargs):
                yield shown.chat(response)
            yield from shown.rest()

        return chunks()

    @override
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> AsyncGenerator[ChatResponse]:
        async def chunks() -> AsyncGenerator[ChatResponse]:
            try:
                asked, found = self._out(messages)
            except LocalOnlyError as error:
                yield self._chat_abstained(error)
                return
            shown = _Shown(found)
            async for response in await self.large.astream_chat(asked, **kwargs):
                yield shown.chat(response)
            for last in shown.rest():
                yield last

        return chunks()

    # Completion

    @override
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        try:
            asked, found = self.guard.outbound(prompt)
        except LocalOnlyError as error:
            return self._text_abstained(error)
        return _restored_text(self.large.complete(asked, formatted, **kwargs), found)

    @override
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        try:
            asked, found = self.guard.outbound(prompt)
        except LocalOnlyError as error:
            return self._text_abstained(error)
        return _restored_text(await self.large.acomplete(asked, formatted, **kwargs), found)

    @override
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Generator[CompletionResponse]:
        def chunks() -> Generator[CompletionResponse]:
            try:
                asked, found = self.guard.outbound(prompt)
            except LocalOnlyError as error:
                yield self._text_abstained(error)
                return
            shown = _Shown(found)
            for response in self.large.stream_complete(asked, formatted, **kwargs):
                yield shown.text(response)
            yield from shown.rest()

        return chunks()

    @override
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> AsyncGenerator[CompletionResponse]:
        async def chunks() -> AsyncGenerator[CompletionResponse]:
            try:
                asked, found = self.guard.outbound(prompt)
            except LocalOnlyError as error:
                yield self._text_abstained(error)
                return
            shown = _Shown(found)
            async for response in await self.large.astream_complete(asked, formatted, **kwargs):
                yield shown.text(response)
            for last in shown.rest():
                yield last

        return chunks()


class GuardedFunctionCallingLLM(GuardedLLM, PreparedByLarge):
    """`GuardedLLM` over an LLM that supports function calling, created by `GuardedLLM(...)`."""

    large: FunctionCallingLLM = Field(description="LLM that receives the redacted requests.")

    @override
    def _validate_chat_with_tools_response(
        self, response: ChatResponse, tools: Sequence[BaseTool], allow_parallel_tool_calls: bool = False, **kwargs: Any
    ) -> ChatResponse:
        return self.large._validate_chat_with_tools_response(response, tools, allow_parallel_tool_calls, **kwargs)

    @override
    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        return self.large.get_tool_calls_from_response(response, error_on_no_tool_call, **kwargs)


class _Shown:
    """Restored text of a stream whose chunks each contain all text so far."""

    def __init__(self, found: Placeholders) -> None:
        self.found, self.so_far, self.whole = found, "", ""
        self.last: ChatResponse | CompletionResponse | None = None

    def _next(self, text: str) -> str:
        self.whole, before = text, self.so_far
        self.so_far = self.found.restore_text(without_unfinished(text))
        return self.so_far.removeprefix(before)

    def chat(self, response: ChatResponse) -> ChatResponse:
        self.last = response
        delta = self._next(response.message.content or "")
        return _with_text(_restored(response, self.found), self.so_far, delta)

    def text(self, response: CompletionResponse) -> CompletionResponse:
        self.last = response
        delta = self._next(response.text)
        return _restored_text(response, self.found).model_copy(update={"text": self.so_far, "delta": delta})

    def rest(self) -> Generator[Any]:
        """Yield the text that was held back until the end of the stream."""
        whole, before = self.found.restore_text(self.whole), self.so_far
        if self.last is None or whole == before:
            return
        delta = whole.removeprefix(before)
        if isinstance(self.last, ChatResponse):
            yield _with_text(_restored(self.last, self.found), whole, delta)
        else:
            yield _restored_text(self.last, self.found).model_copy(update={"text": whole, "delta": delta})


def _with_text(response: ChatResponse, text: str, delta: str) -> ChatResponse:
    """Return the chunk with another text and delta, and with its other content blocks unchanged."""
    others = [block for block in response.message.blocks if not isinstance(block, TextBlock)]
    message = response.message.model_copy(update={"blocks": [*([TextBlock(text=text)] if text else []), *others]})
    return response.model_copy(update={"message": message, "delta": delta})


def _restored(response: ChatResponse, found: Placeholders) -> ChatResponse:
    if not found:
        return response
    message = response.message
    changed = {"blocks": found.restore(message.blocks), "additional_kwargs": found.restore(message.additional_kwargs)}
    delta = None if response.delta is None else found.restore_text(response.delta)
    return response.model_copy(update={"message": message.model_copy(update=changed), "delta": delta})


def _restored_text(response: CompletionResponse, found: Placeholders) -> CompletionResponse:
    delta = None if response.delta is None else found.restore_text(response.delta)
    return response.model_copy(update={"text": found.restore_text(response.text), "delta": delta})
