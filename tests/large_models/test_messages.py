"""Whether a message is whole, and what it cost, wherever a message becomes an answer."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.language_models import FakeMessagesListChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda

from langchain_datashunt import ConfidenceRouterChain, ShuntRunnable
from langchain_datashunt.call_log import CallLog, Recorder, RecordingCallbackHandler
from langchain_datashunt.exceptions import IncompleteAnswerError
from langchain_datashunt.large_models import LabelParser
from langchain_datashunt.large_models.messages import incomplete_reason, message_cost_usd
from tests.routing.test_shunt import EVERY_WAY, QUICK, Records, call
from tests.support.models import LABELS, WordModel

CUT: dict[str, AIMessage] = {
    "OpenAI, cut": AIMessage("refund", response_metadata={"finish_reason": "length"}),
    "OpenAI, filtered": AIMessage("refund", response_metadata={"finish_reason": "content_filter"}),
    "OpenAI, refused": AIMessage("", additional_kwargs={"refusal": "I cannot help with that."}),
    "OpenAI Responses, incomplete": AIMessage(
        "refund", response_metadata={"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    ),
    "OpenAI Responses, refused": AIMessage(
        [{"type": "refusal", "refusal": "No."}], response_metadata={"status": "completed"}
    ),
    "OpenAI Responses, failed": AIMessage("refund", response_metadata={"status": "failed"}),
    "Anthropic, cut": AIMessage("refund", response_metadata={"stop_reason": "max_tokens"}),
    "Anthropic, refused": AIMessage("refund", response_metadata={"stop_reason": "refusal"}),
    "Google, cut": AIMessage("refund", response_metadata={"finish_reason": "MAX_TOKENS"}),
    "Google, safety": AIMessage("refund", response_metadata={"finish_reason": "SAFETY"}),
    "Mistral, cut": AIMessage("refund", response_metadata={"finish_reason": "model_length"}),
    "Cohere, cut": AIMessage("refund", response_metadata={"finish_reason": "MAX_TOKENS"}),
    "Bedrock, guardrail": AIMessage("refund", response_metadata={"stop_reason": "guardrail_intervened"}),
    "Ollama, cut": AIMessage("refund", response_metadata={"done_reason": "length"}),
    "empty": AIMessage(""),
    "white space": AIMessage("  \n"),
    "a stream without an end": AIMessageChunk("refund", response_metadata={"model_provider": "openai"}),
}
WHOLE: dict[str, AIMessage] = {
    "OpenAI": AIMessage("refund", response_metadata={"finish_reason": "stop"}),
    "OpenAI, tool": AIMessage(
        "", tool_calls=[{"name": "f", "args": {}, "id": "1"}], response_metadata={"finish_reason": "tool_calls"}
    ),
    "OpenAI Responses": AIMessage([{"type": "text", "text": "refund"}], response_metadata={"status": "completed"}),
    "Anthropic": AIMessage("refund", response_metadata={"stop_reason": "end_turn"}),
    "Anthropic, stop sequence": AIMessage("refund", response_metadata={"stop_reason": "stop_sequence"}),
    "Google": AIMessage("refund", response_metadata={"finish_reason": "STOP"}),
    "Ollama": AIMessage("refund", response_metadata={"done_reason": "stop"}),
    "no metadata": AIMessage("refund"),
    "a stream": AIMessageChunk("refund", response_metadata={"model_provider": "openai", "finish_reason": "stop"}),
    "a stream of a model without metadata": AIMessageChunk("refund"),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(CUT))
def test_incomplete_reason_cut_filtered_refused_or_empty_is_named(kind: str) -> None:
    assert incomplete_reason(CUT[kind])


@pytest.mark.parametrize("kind", list(WHOLE))
def test_incomplete_reason_whole_message_is_none(kind: str) -> None:
    assert incomplete_reason(WHOLE[kind]) is None


def replies(*messages: AIMessage) -> FakeMessagesListChatModel:
    return FakeMessagesListChatModel(responses=[AIMessage(**one.model_dump(exclude={"type"})) for one in messages])


@pytest.mark.parametrize("way", EVERY_WAY)
@pytest.mark.parametrize("kind", [kind for kind in CUT if "stream" not in kind])
async def test_label_chain_incomplete_message_is_no_answer_and_not_learnt(way: str, kind: str) -> None:
    records: list[Any] = []
    router = ConfidenceRouterChain.from_models(
        WordModel(), replies(CUT[kind]), max_reasks=1, answer_format="text", recorder=Records(records), retry=QUICK
    )
    with pytest.raises(IncompleteAnswerError) as caught:
        await call(router, way, "status")
    assert caught.value.attempts == 2
    (record,) = records
    assert (record.reason, record.answer_label) == ("large_error", None)
    small = ConfidenceRouterChain.from_models(
        WordModel(), replies(CUT[kind]), max_reasks=0, answer_format="text", on_large_error="small"
    )
    assert await call(small, way, "status") == "status"


@pytest.mark.parametrize("way", EVERY_WAY)
@pytest.mark.parametrize("parser", [LabelParser(labels=LABELS), StrOutputParser()])
async def test_own_chain_incomplete_message_is_no_label(way: str, parser: Any) -> None:
    prompt = ChatPromptTemplate.from_messages([("human", "{input} {candidate_probabilities}")])
    shunt = ShuntRunnable(small=WordModel(), large=prompt | replies(CUT["OpenAI, cut"]) | parser, retry=QUICK)
    with pytest.raises(IncompleteAnswerError, match="length"):
        await call(shunt, way, "status")
    whole = ShuntRunnable(small=WordModel(), large=prompt | replies(WHOLE["OpenAI"]) | parser, retry=QUICK)
    assert await call(whole, way, "status") == "refund"


def test_reask_after_incomplete_message_can_succeed() -> None:
    router = ConfidenceRouterChain.from_models(
        WordModel(), replies(CUT["OpenAI, cut"], WHOLE["OpenAI"]), answer_format="text"
    )
    assert router.invoke("status") == "refund"


def test_callback_handler_incomplete_message_has_no_label(tmp_path: Any) -> None:
    with CallLog(tmp_path / "c.db") as store:
        with Recorder(store) as recorder:
            handler = RecordingCallbackHandler(recorder, labels=LABELS)
            for message in (CUT["OpenAI, cut"], WHOLE["OpenAI"]):
                replies(message).invoke("hello", {"callbacks": [handler]})
        labels = [record.answer_label for batch in store.iterate() for record in batch]
    assert labels == [None, "refund"]


def usage(**more: Any) -> dict[str, Any]:
    return {"input_tokens": 1000, "output_tokens": 10, "total_tokens": 1010, **more}


def priced(**more: Any) -> AIMessage:
    return AIMessage("refund", usage_metadata=usage(**more), response_metadata={"model_name": "gpt-4o"})


def test_message_cost_stated_total_takes_precedence() -> None:
    pytest.importorskip("genai_prices")
    plain = message_cost_usd(priced())
    assert plain is not None
    assert plain > 0.0
    assert message_cost_usd(priced(total_cost=0)) == 0.0
    assert message_cost_usd(priced(total_cost=0.5)) == 0.5
    assert message_cost_usd(AIMessage("x")) is None
    absurd = AIMessage(
        "x", usage_metadata=usage() | {"input_tokens": 10**30}, response_metadata={"model_name": "gpt-4o"}
    )
    assert message_cost_usd(absurd) is None


@pytest.mark.parametrize("way", EVERY_WAY)
async def test_cached_answer_costs_nothing(way: str) -> None:
    pytest.importorskip("genai_prices")
    model = replies(priced())
    model.cache = InMemoryCache()
    prompt = ChatPromptTemplate.from_messages([("human", "{input} {candidate_probabilities}")])
    shunt = ShuntRunnable(small=WordModel(), large=prompt | model | StrOutputParser(), return_decision=True)
    first, again = await call(shunt, way, "status"), await call(shunt, way, "status")
    assert first.cost_usd > 0.0
    if "stream" not in way:  # LangChain's cache does not answer streams
        assert again.cost_usd == 0.0


def test_function_as_large_model_has_no_message_to_check() -> None:
    shunt = ShuntRunnable(small=WordModel(), large=RunnableLambda(lambda asked: "cancel"))
    assert shunt.invoke("status") == "cancel"
