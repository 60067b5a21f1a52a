from __future__ import annotations

import asyncio
import json
import math
import pickle
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import httpx
import pytest
from langchain.agents import create_agent
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import UsageMetadataCallbackHandler
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.rate_limiters import InMemoryRateLimiter
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from pydantic import BaseModel
from typing_extensions import TypedDict

from langchain_datashunt import AlwaysSmall, HardPrompt, NoHint, ShuntChatModel, Threshold, ToolAnswer
from langchain_datashunt.drafting import least_token_probability
from langchain_datashunt.exceptions import ConfigurationError, ThresholdWarning
from tests.support.handlers import RunBook
from tests.support.models import WordModel, failing_word_model
from tests.support.scripted_server import ScriptedServer

SURE, UNSURE = "surely cancel it", "maybe cancel it"


@tool
def cancel_order(order: str = "the last") -> str:
    """Cancel an order."""
    return f"cancelled {order}"


class Intent(BaseModel):
    """What the user wants."""

    intent: Literal["cancel", "refund", "status"]


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as running:
        yield running


def shunt(server: ScriptedServer, **settings: Any) -> ShuntChatModel:
    large = server.chat_model(stream_usage=True, http_async_client=httpx.AsyncClient())
    return ShuntChatModel(**{"small": WordModel(), "large": large, **settings})


def test_what_the_small_side_is_sure_of_it_answers(server: ScriptedServer) -> None:
    model = shunt(server, answers={"cancel": "It is cancelled."})
    usage = UsageMetadataCallbackHandler()
    answer = model.invoke(SURE, {"callbacks": [usage]})
    assert (answer.content, len(server.bodies), usage.usage_metadata) == ("It is cancelled.", 0, {})
    told = answer.response_metadata
    assert (told["shunt"]["route"], told["shunt"]["label"], told["model_name"]) == ("small", "cancel", "words")
    assert answer.usage_metadata == {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    assert model.invoke(SURE).id != answer.id
    assert model.invoke("surely refund it").content == server.text, "a label without an answer is left to the large one"
    assert shunt(server).invoke(SURE).content == "cancel", "without answers the label is the answer"


def test_the_rest_goes_to_the_large_model_with_a_hint(server: ScriptedServer) -> None:
    usage = UsageMetadataCallbackHandler()
    answer = shunt(server).invoke([SystemMessage("Be brief."), HumanMessage(UNSURE)], {"callbacks": [usage]})
    system, user = server.bodies[0]["messages"]
    assert system["content"].startswith("Be brief.\n\nAbout the user's last message:\n")
    assert "- cancel with probability 0.4" in system["content"]
    assert user["content"] == UNSURE
    assert answer.response_metadata["shunt"]["route"] == "large"
    assert answer.response_metadata["shunt"]["threshold"] == 0.9
    assert answer.usage_metadata is not None
    counted = usage.usage_metadata["scripted"]
    assert counted["total_tokens"] == answer.usage_metadata["total_tokens"] > 0, "counted once"
    shunt(server, hint="It may be {small_label}.").invoke(UNSURE)
    assert server.bodies[1]["messages"][0] == {"role": "system", "content": "It may be cancel."}
    blocks = SystemMessage([{"type": "text", "text": "Be brief."}])
    shunt(server, pruning=HardPrompt(proficient=())).invoke([blocks, HumanMessage(UNSURE)])
    assert [part["text"][:9] for part in server.bodies[2]["messages"][0]["content"]] == ["Be brief.", "About the"]
    for quiet in (None, NoHint()):
        shunt(server, pruning=quiet).invoke(UNSURE)
        assert [message["role"] for message in server.bodies[-1]["messages"]] == ["user"]
    shunt(server, small=failing_word_model(ValueError("broken"))).invoke(UNSURE)
    assert [message["role"] for message in server.bodies[-1]["messages"]] == ["user"], "no opinion, no hint"
    with pytest.raises(ConfigurationError, match="The hint uses verdict"):
        shunt(server, hint="{verdict}")


def test_a_sure_label_calls_a_tool_or_fills_a_schema(server: ScriptedServer) -> None:
    model = shunt(server, answers={"cancel": [ToolAnswer("cancel_order"), {"intent": "cancel"}, "It is cancelled."]})
    assert model.invoke(SURE).content == "It is cancelled.", "no tool is bound"
    called = model.bind_tools([cancel_order]).invoke(SURE)
    assert [(call["name"], call["args"]) for call in called.tool_calls] == [("cancel_order", {})]
    assert model.bind_tools([cancel_order], tool_choice="cancel_order").invoke(SURE).tool_calls
    assert model.bind_tools([cancel_order], tool_choice="none").invoke(SURE).content == "It is cancelled."
    assert model.with_structured_output(Intent).invoke(SURE) == Intent(intent="cancel")
    raw = model.with_structured_output(Intent, include_raw=True).invoke(SURE)
    assert (raw["parsed"], raw["parsing_error"]) == (Intent(intent="cancel"), None)
    assert len(server.bodies) == 0
    text = shunt(server, answers={"cancel": "It is cancelled."})
    assert text.bind_tools([cancel_order], tool_choice="any").invoke(SURE).tool_calls, "text is no call: the large one"
    assert len(server.bodies) == 1
    text.bind_tools([cancel_order], response_format=Intent, strict=True).invoke(SURE)
    assert len(server.bodies) == 2, "a response format asks for more than labels can give"


def test_labels_fill_schemas_of_one_field(server: ScriptedServer) -> None:
    model = shunt(server)

    class Wanted(TypedDict):
        """What the user wants."""

        intent: Literal["cancel", "refund"]

    assert model.with_structured_output(Intent).invoke(SURE) == Intent(intent="cancel")
    assert model.with_structured_output(Wanted).invoke(SURE) == {"intent": "cancel"}
    assert len(server.bodies) == 0
    model.with_structured_output(Wanted).invoke("surely status")
    assert len(server.bodies) == 1, "status is not among the schema's values"
    hidden = model.with_structured_output(Intent).invoke(UNSURE)
    assert isinstance(hidden, Intent)
    assert [message["role"] for message in server.bodies[-1]["messages"]] == ["system", "user"]


async def test_streams_carry_the_decision_once(server: ScriptedServer) -> None:
    model = shunt(server, answers={"cancel": ToolAnswer("cancel_order", {"order": "7"})})
    chunks = list(model.stream(UNSURE))
    whole = sum(chunks[1:], chunks[0])
    assert whole.content == server.text
    assert len(chunks) > 4, "word by word"
    assert whole.response_metadata["shunt"]["route"] == "large"
    assert whole.usage_metadata is not None
    again = [chunk async for chunk in model.astream(UNSURE)]
    assert sum(again[1:], again[0]).content == server.text
    (small,) = model.bind_tools([cancel_order]).stream(SURE)
    assert isinstance(small, AIMessageChunk)
    assert small.tool_calls[0]["args"] == {"order": "7"}
    assert small.response_metadata["shunt"]["route"] == "small"
    (only,) = shunt(server, streaming=False).stream(UNSURE)
    assert only.content == server.text
    events = [event async for event in model.astream_events(UNSURE, version="v2")]
    parents = {event["name"]: len(event["parent_ids"]) for event in events if event["event"].endswith("_start")}
    assert parents == {"ShuntChatModel": 0, "WordModel": 1, "ChatOpenAI": 1}


async def test_after_a_tools_result_the_large_model_is_asked_at_once(server: ScriptedServer) -> None:
    small = WordModel()
    model = shunt(server, small=small).bind_tools([cancel_order])
    call = AIMessage("", tool_calls=[{"name": "cancel_order", "args": {}, "id": "1", "type": "tool_call"}])
    talk = [HumanMessage(SURE), call, ToolMessage("cancelled", tool_call_id="1")]
    for answer in (model.invoke(talk), await model.ainvoke(talk), *model.batch([talk])):
        assert answer.content == server.text
        assert answer.response_metadata["shunt"]["policy"].startswith("the conversation does not end")
    chunks = list(model.stream(talk)) + [chunk async for chunk in model.astream(talk)]
    assert sum("shunt" in chunk.response_metadata for chunk in chunks) == 2
    assert small._calls == []


def reply_with_logprobs(sure: float) -> Any:
    def reply(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
        if body["model"] != "tiny":
            return None
        wants_json = "response_format" in body
        content = json.dumps({"intent": "refund"}) if wants_json else "A small answer."
        return {"content": content, "logprob": math.log(sure)}

    return reply


@pytest.mark.parametrize(("sure", "route"), [(0.97, "small"), (0.6, "large"), (0.02, "large")])
async def test_a_small_chat_model_is_believed_where_it_is_sure(sure: float, route: str) -> None:
    with ScriptedServer(reply_with_logprobs(sure)) as server:
        tiny = server.chat_model(model="tiny", logprobs=True, http_async_client=httpx.AsyncClient())
        model, usage = shunt(server, small=tiny), UsageMetadataCallbackHandler()
        answer = model.invoke(UNSURE, {"callbacks": [usage]})
        assert answer.response_metadata["shunt"]["route"] == route
        assert answer.response_metadata["shunt"]["model"] == "tiny"
        assert answer.content == ("A small answer." if route == "small" else server.text)
        assert set(usage.usage_metadata) == ({"tiny"} if route == "small" else {"tiny", "scripted"})
        asked = await model.ainvoke(UNSURE)
        assert asked.content == answer.content
        found = [one.content for one in model.batch([UNSURE, UNSURE])]
        assert found == [answer.content] * 2, "drafts are not mixed up in a batch"
        structured = model.with_structured_output(Intent)
        assert structured.invoke("surely cancel") == Intent(intent="refund" if route == "small" else "cancel")


def test_a_chat_model_without_log_probabilities_is_never_believed(server: ScriptedServer) -> None:
    model = shunt(server, small=server.chat_model(model="tiny"))
    told = model.invoke(UNSURE).response_metadata["shunt"]
    assert (told["route"], told["reason"]) == ("large", "small_error")
    assert "gave no log-probabilities" in told["error"]
    tokens = {"logprobs": {"content": [{"logprob": math.log(p)} for p in (0.9, 0.5, 0.8)]}}
    assert least_token_probability(AIMessage("a b c", response_metadata=tokens)) == pytest.approx(0.5)
    assert least_token_probability(AIMessage("a")) is None


def test_the_large_models_cache_and_rate_limiter_stay_its_own(server: ScriptedServer) -> None:
    limiter = InMemoryRateLimiter(requests_per_second=1000, max_bucket_size=1)
    model = shunt(server, large=server.chat_model(cache=InMemoryCache(), rate_limiter=limiter))
    assert model.invoke(UNSURE).content == model.invoke(UNSURE).content
    assert len(server.bodies) == 1, "the second came from the large model's cache"
    model.invoke(SURE)
    assert limiter.available_tokens < 1.0, "only large calls take from the limiter"
    for name in ("cache", "rate_limiter"):
        with pytest.raises(ConfigurationError, match="to the large model"):
            shunt(server, **{name: InMemoryCache() if name == "cache" else limiter})


async def test_many_conversations_are_one_small_call(server: ScriptedServer) -> None:
    small = WordModel()
    model = shunt(server, small=small)
    answers = model.batch([SURE, UNSURE, [HumanMessage("surely status")]], {"max_concurrency": 2})
    assert [answer.content for answer in answers] == ["cancel", server.text, "status"]
    assert small._calls == [3]
    assert [a.content for a in await model.abatch([SURE, UNSURE])] == ["cancel", server.text]
    assert model.batch([]) == []


async def test_older_interfaces_count_tokens_once(server: ScriptedServer) -> None:
    model = shunt(server)
    messages: Any = [[HumanMessage(UNSURE)], [HumanMessage(SURE)]]
    expected = model.invoke(UNSURE).usage_metadata
    for kind in ("generate", "agenerate", "stream v3", "astream v3"):
        usage = UsageMetadataCallbackHandler()
        if kind == "generate":
            told = model.generate(messages, callbacks=[usage], tags=["t"], run_name="mine")
        elif kind == "agenerate":
            told = await model.agenerate(messages, callbacks=[usage])
        elif kind == "stream v3":
            assert model.stream_events(UNSURE, {"callbacks": [usage]}, version="v3").output.text == server.text
        else:
            stream = await model.astream_events(UNSURE, {"callbacks": [usage]}, version="v3")
            assert (await stream.output).text == server.text
        if kind.endswith("generate"):
            assert [row[0].text for row in told.generations] == [server.text, "cancel"]
        for _ in range(200):  # a v3 stream ends its run in the background, after it has given its output
            if usage.usage_metadata:
                break
            await asyncio.sleep(0.01)
        assert list(usage.usage_metadata) == ["scripted"], kind
        assert usage.usage_metadata["scripted"]["total_tokens"] == (expected or {})["total_tokens"], kind


def test_a_chat_model_of_two_sides_drives_an_agent(server: ScriptedServer) -> None:
    model = shunt(server, answers={"cancel": ToolAnswer("cancel_order", {"order": "7"})})
    agent = create_agent(model, [cancel_order])
    messages = agent.invoke({"messages": [HumanMessage(SURE)]})["messages"]
    assert [message.type for message in messages] == ["human", "ai", "tool", "ai"]
    assert messages[2].content == "cancelled 7"
    assert len(server.bodies) == 1, "only the last word is the large model's"
    shown = [chunk for chunk, _ in agent.stream({"messages": [HumanMessage(UNSURE)]}, stream_mode="messages")]
    assert sum(len(chunk.tool_call_chunks) > 0 for chunk in shown if isinstance(chunk, AIMessageChunk)) > 0


def test_a_rejected_draft_is_not_shown_by_a_graph() -> None:
    with ScriptedServer(reply_with_logprobs(0.5)) as server:
        agent = create_agent(shunt(server, small=server.chat_model(model="tiny", logprobs=True)), [])
        shown = agent.stream({"messages": [HumanMessage(UNSURE)]}, stream_mode="messages")
        assert "".join(str(chunk.text) for chunk, _ in shown) == server.text


def test_settings_reach_the_large_model(server: ScriptedServer) -> None:
    model = shunt(server, temperature=0.3, max_tokens=9, tags=["mine"], metadata={"team": "a"})
    book = RunBook()
    model.invoke(UNSURE, {"callbacks": [book]}, stop=["day"])
    body = server.bodies[0]
    assert (body["temperature"], body["max_completion_tokens"], body["stop"]) == (0.3, 9, ["day"])
    assert set(book.ended) == set(book.started)
    model.invoke(UNSURE, {"configurable": {"shunt_threshold": 0.1}})
    assert len(server.bodies) == 1, "the threshold of one call"
    counting = server.chat_model(custom_get_token_ids=lambda text: [1] * len(text))
    assert shunt(server, large=counting).get_num_tokens("hello") == 5
    assert (model._llm_type, model.profile) == ("datashunt", model.large.profile)


def test_it_can_be_copied_and_pickled(server: ScriptedServer) -> None:
    model = ShuntChatModel(small=WordModel(), large=server.chat_model(), answers={"cancel": "Done."})
    copied = model.model_copy(deep=False)
    assert copied.invoke(SURE).content == "Done."
    piped = RunnableLambda(lambda text: f"surely {text}") | model
    assert piped.invoke("cancel").content == "Done."
    with pytest.warns(ThresholdWarning):
        assert shunt(server, policy=Threshold(1.5)).invoke(SURE).content == server.text
    assert shunt(server, policy=AlwaysSmall()).invoke(UNSURE).content == "cancel"
    assert pickle.loads(pickle.dumps(WordModel())).labels == WordModel().labels
