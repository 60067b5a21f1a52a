"""Privacy guards for LLM calls made by LlamaIndex and by agents."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.outputs import ChatResult
from langchain_core.tools import tool
from llama_index.core.base.llms.types import (
    ChatResponse,
    CompletionResponse,
    DocumentBlock,
    ImageBlock,
    LLMMetadata,
    ToolCallBlock,
)
from llama_index.core.llms import LLM, ChatMessage
from llama_index.core.llms.mock import MockFunctionCallingLLM
from llama_index.core.selectors import LLMSingleSelector
from llama_index.core.tools import FunctionTool, ToolMetadata
from pydantic import BaseModel, ConfigDict

from langchain_datashunt import PrivacyGuard, Threshold
from langchain_datashunt.agents import PrivacyGuardMiddleware, ShuntModelRouterMiddleware
from langchain_datashunt.exceptions import ConfigurationError, LocalOnlyError
from langchain_datashunt.llama_index import GuardedFunctionCallingLLM, GuardedLLM, ShuntLLM
from langchain_datashunt.privacy import DisclosureBudget, LocalLedger
from tests.support.models import WordModel

MAIL, IBAN = "jane@example.com", "DE89 3704 0044 0532 0130 00"
GATE = PrivacyGuard(local_kinds=frozenset({"IBAN"}))


class Echo(LLM):
    """LLM that returns its prompt, in chunks of three characters, and records it."""

    asked: list[str] = []

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(model_name="echo")

    def _parts(self, text: str) -> list[str]:
        self.asked.append(text)
        return [text[i : i + 3] for i in range(0, len(text), 3)]

    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return ChatResponse(message=ChatMessage(role="assistant", content="".join(self._parts(_last(messages)))))

    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return self.chat(messages)

    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> Generator[ChatResponse]:
        def chunks() -> Generator[ChatResponse]:
            said = ""
            for part in self._parts(_last(messages)):
                said += part
                yield ChatResponse(message=ChatMessage(role="assistant", content=said), delta=part)

        return chunks()

    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> AsyncGenerator[ChatResponse]:
        async def chunks() -> AsyncGenerator[ChatResponse]:
            for one in self.stream_chat(messages):
                yield one

        return chunks()

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return CompletionResponse(text="".join(self._parts(prompt)))

    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return self.complete(prompt)

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Generator[CompletionResponse]:
        def chunks() -> Generator[CompletionResponse]:
            said = ""
            for part in self._parts(prompt):
                said += part
                yield CompletionResponse(text=said, delta=part)

        return chunks()

    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> AsyncGenerator[CompletionResponse]:
        async def chunks() -> AsyncGenerator[CompletionResponse]:
            for one in self.stream_complete(prompt):
                yield one

        return chunks()


def _last(messages: Sequence[ChatMessage]) -> str:
    return messages[-1].content or ""


WAYS = ["chat", "achat", "stream_chat", "astream_chat", "complete", "acomplete", "stream_complete", "astream_complete"]


async def said(llm: LLM, way: str, text: str) -> tuple[str, str]:
    """Return the whole answer and the concatenated stream deltas."""
    asked: Any = [ChatMessage(role="user", content=text)] if "chat" in way else text
    found = getattr(llm, way)(asked)
    if way.startswith("a"):
        found = await found
    if "stream" not in way:
        whole = found.message.content if "chat" in way else found.text
        return whole, whole
    chunks = [one async for one in found] if way.startswith("a") else list(found)
    whole = chunks[-1].message.content if "chat" in way else chunks[-1].text
    return whole, "".join(chunk.delta or "" for chunk in chunks)


@pytest.mark.parametrize("way", WAYS)
async def test_guarded_llm_redacts_prompt_and_restores_answer(way: str) -> None:
    echo = Echo(asked=[])
    llm = GuardedLLM(large=echo, guard=GATE)
    text = f"write to {MAIL}, then to joe@example.org <soon"
    assert await said(llm, way, text) == (text, text)
    assert echo.asked == ["write to <EMAIL_1>, then to <EMAIL_2> <soon"]


@pytest.mark.parametrize("way", WAYS)
async def test_guarded_llm_local_input_never_reaches_model(way: str) -> None:
    echo = Echo(asked=[])
    whole, shown = await said(GuardedLLM(large=echo, guard=GATE), way, f"pay {IBAN}")
    assert whole == shown
    assert "stays on this machine" in whole
    assert IBAN not in whole
    strict = GuardedLLM(large=echo, guard=GATE.model_copy(update={"on_local": "raise"}))
    with pytest.raises(LocalOnlyError):
        await said(strict, way, f"pay {IBAN}")
    assert echo.asked == []


def test_guarded_llm_covers_history_images_and_budget() -> None:
    echo, ledger = Echo(asked=[]), LocalLedger()
    llm = GuardedLLM(large=echo, guard=PrivacyGuard(budget=DisclosureBudget(calls=1, ledger=ledger)))
    assert llm.chat([ChatMessage(role="system", content=MAIL), ChatMessage(role="user", content=f"is {MAIL} mine")])
    assert echo.asked == ["is <EMAIL_1> mine"]
    assert dict(ledger.trail[0].replaced) == {"EMAIL": 1}
    picture = ChatMessage(role="user", blocks=[ImageBlock(image=b"a picture")])
    assert "stays on this machine" in str(GuardedLLM(large=echo, guard=GATE).chat([picture]))
    assert "limit 'calls'" in str(llm.chat([ChatMessage(role="user", content="again")]))
    assert len(echo.asked) == 1


def test_guarded_llm_works_in_selector_and_shunt() -> None:
    class Chooser(Echo):
        def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
            self.asked.append(prompt)
            return CompletionResponse(text='[{"choice": 2, "reason": "because"}]')

    chooser = Chooser(asked=[])
    selector = LLMSingleSelector.from_defaults(llm=GuardedLLM(large=chooser, guard=GATE))
    choices = [ToolMetadata(description=name, name=name) for name in ("cancel", "status")]
    assert selector.select(choices, query=f"where is the parcel of {MAIL}").ind == 1
    assert MAIL not in chooser.asked[0]
    assert "<EMAIL_1>" in chooser.asked[0]
    echo = Echo(asked=[])
    shunt = ShuntLLM(small=WordModel(), large=GuardedLLM(large=echo, guard=GATE), policy=Threshold(0.9), pruning=None)
    assert shunt.complete(f"maybe cancel {MAIL}").text == f"maybe cancel {MAIL}"
    assert echo.asked == ["maybe cancel <EMAIL_1>"]


def test_guarded_llm_calls_tools_with_restored_arguments() -> None:
    asked: list[Any] = []

    def reply(messages: Sequence[ChatMessage], **kwargs: Any) -> ChatMessage:
        asked.append(messages[-1].content)
        call = ToolCallBlock(tool_call_id="1", tool_name="send", tool_kwargs={"to": "<EMAIL_1>"})
        return ChatMessage(role="assistant", blocks=[call])

    def send(to: str) -> str:
        """Send a letter."""
        return f"sent to {to}"

    llm = GuardedLLM(large=MockFunctionCallingLLM(response_generator=reply), guard=GATE)
    assert isinstance(llm, GuardedFunctionCallingLLM)
    response = llm.predict_and_call([FunctionTool.from_defaults(send)], user_msg=f"write to {MAIL}")
    assert str(response) == f"sent to {MAIL}"
    assert asked == ["write to <EMAIL_1>"]


def test_guard_local_labels_without_small_model_raise() -> None:
    guard = PrivacyGuard(local_labels=frozenset({"health"}))
    with pytest.raises(ConfigurationError, match="no small model to predict them"):
        GuardedLLM(large=Echo(), guard=guard)
    with pytest.raises(ConfigurationError, match="no small model to predict them"):
        PrivacyGuardMiddleware(guard)
    with pytest.raises(ConfigurationError, match="Expected a PrivacyGuard"):
        GuardedLLM(large=Echo(), guard=3)


class Scripted(GenericFakeChatModel):
    """Chat model with tools that records the messages it receives."""

    asked: list[list[BaseMessage]] = []

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        self.asked.append(list(messages))
        return super()._generate(messages, *args, **kwargs)


@tool
def find_order(mail: str) -> str:
    """Find an order by mail."""
    return f"order of {mail}, phone +49 30 901820"


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
async def test_guard_middleware_model_gets_placeholders_tools_get_texts(way: str) -> None:
    call = {"name": "find_order", "args": {"mail": "<EMAIL_1>"}, "id": "1", "type": "tool_call"}
    model = Scripted(messages=iter([AIMessage("", tool_calls=[call]), AIMessage("call <PHONE_1> about <EMAIL_1>")]))
    agent = create_agent(
        model, [find_order], system_prompt=f"Copies go to {MAIL}.", middleware=[PrivacyGuardMiddleware(GATE)]
    )
    asked = {"messages": [HumanMessage(f"where is the order of {MAIL}")]}
    found = agent.invoke(asked) if way == "invoke" else await agent.ainvoke(asked)
    messages = found["messages"]
    assert messages[-1].text == f"call +49 30 901820 about {MAIL}"
    assert [m.content for m in messages if isinstance(m, ToolMessage)] == [f"order of {MAIL}, phone +49 30 901820"]
    for turn in model.asked:
        assert MAIL not in repr(turn)
        assert "901820" not in repr(turn)
    assert model.asked[0][0].text == "Copies go to <EMAIL_1>."
    assert asked["messages"][0].text == f"where is the order of {MAIL}", "the caller's input is unchanged"


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
async def test_guard_middleware_local_input_abstains_or_raises(way: str) -> None:
    model = Scripted(messages=iter([]), asked=[])

    async def run(guard: PrivacyGuard) -> Any:
        agent = create_agent(model, [], middleware=[PrivacyGuardMiddleware(guard)])
        asked: Any = {"messages": [HumanMessage(f"pay {IBAN}")]}
        return agent.invoke(asked) if way == "invoke" else await agent.ainvoke(asked)

    assert "stays on this machine" in (await run(GATE))["messages"][-1].text
    with pytest.raises(LocalOnlyError):
        await run(GATE.model_copy(update={"on_local": "raise"}))
    assert model.asked == []


def test_guard_middleware_local_model_turn_is_not_redacted() -> None:
    sure = {"logprobs": {"content": [{"token": "x", "logprob": 0.0}]}}
    small = Scripted(messages=iter([AIMessage("local", response_metadata=sure)]), asked=[])
    large = Scripted(messages=iter([]), asked=[])
    agent = create_agent(large, [], middleware=[ShuntModelRouterMiddleware(small), PrivacyGuardMiddleware(GATE)])
    found = agent.invoke({"messages": [HumanMessage(f"pay {IBAN}")]})
    assert found["messages"][-1].text == "local"
    assert IBAN in repr(small.asked)
    assert large.asked == []


async def test_guard_middleware_applies_budget_per_subject() -> None:
    ledger = LocalLedger()
    guard = PrivacyGuard(budget=DisclosureBudget(subject_calls=1, ledger=ledger))
    model = Scripted(messages=iter([AIMessage("one"), AIMessage("two")]), asked=[])
    agent = create_agent(model, [], middleware=[PrivacyGuardMiddleware(guard)])
    jane: Any = {"configurable": {"shunt_subject": "jane"}}
    asked: Any = {"messages": [HumanMessage("hello")]}
    first, second = agent.invoke(asked, jane), await agent.ainvoke(asked, jane)
    assert first["messages"][-1].text == "one"
    assert "limit 'subject_calls'" in second["messages"][-1].text
    assert agent.invoke(asked)["messages"][-1].text == "two"


def test_guard_dataclass_and_pydantic_values_are_redacted_and_restored() -> None:
    @dataclass
    class Order:
        mail: str

    class Loose(BaseModel):
        model_config = ConfigDict(extra="allow")
        name: str

    loose = Loose(name="x", note=MAIL)  # type: ignore[call-arg]
    out, found = GATE.outbound([Order(MAIL), loose])
    assert MAIL not in repr(out)
    assert found.restore(out) == [Order(MAIL), loose]
    letter = ChatMessage(role="user", blocks=[DocumentBlock(url="https://example.com/letter.pdf")])
    assert "stays on this machine" in str(GuardedLLM(large=Echo(asked=[]), guard=GATE).chat([letter]))
