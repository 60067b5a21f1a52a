from __future__ import annotations

import asyncio
import copy
import json
import math
import pickle
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx
import pytest
from langchain.agents import create_agent
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import UsageMetadataCallbackHandler
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.rate_limiters import InMemoryRateLimiter
from langchain_core.runnables import Runnable, RunnableLambda
from langchain_core.tools import tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import BaseModel
from typing_extensions import TypedDict

from langchain_datashunt import AlwaysSmall, HardPruning, NoPruning, Prediction, Retry, ShuntChatModel, Threshold
from langchain_datashunt.chat import ToolAnswer
from langchain_datashunt.chat.answers import AnswerForm
from langchain_datashunt.chat.draft import min_token_probability
from langchain_datashunt.exceptions import ConfigurationError, LocalOnlyError, QueueFullError, ThresholdWarning
from langchain_datashunt.privacy import PrivacyGuard
from tests.support.at_once import AtOnce
from tests.support.faulty_server import FaultyServer
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


@pytest.mark.heavy
def test_chat_model_confident_label_returns_local_answer(server: ScriptedServer) -> None:
    model = shunt(server, answers={"cancel": "It is cancelled."})
    usage = UsageMetadataCallbackHandler()
    answer = model.invoke(SURE, {"callbacks": [usage]})
    assert (answer.content, len(server.bodies), usage.usage_metadata) == ("It is cancelled.", 0, {})
    told = answer.response_metadata
    assert (told["shunt"]["route"], told["shunt"]["label"], told["model_name"]) == ("small", "cancel", "words")
    assert answer.usage_metadata == {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    assert model.invoke(SURE).id != answer.id
    assert model.invoke("surely refund it").content == server.text, "a label without an answer is deferred"
    assert shunt(server).invoke(SURE).content == "cancel", "without answers the label is the answer"


def test_chat_model_low_confidence_defers_with_hint(server: ScriptedServer) -> None:
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
    shunt(server, pruning=HardPruning(proficient=())).invoke([blocks, HumanMessage(UNSURE)])
    assert [part["text"][:9] for part in server.bodies[2]["messages"][0]["content"]] == ["Be brief.", "About the"]
    for quiet in (None, NoPruning()):
        shunt(server, pruning=quiet).invoke(UNSURE)
        assert [message["role"] for message in server.bodies[-1]["messages"]] == ["user"]
    shunt(server, small=failing_word_model(ValueError("broken"))).invoke(UNSURE)
    assert [message["role"] for message in server.bodies[-1]["messages"]] == ["user"], "no prediction, no hint"
    with pytest.raises(ConfigurationError, match="unknown variables: verdict"):
        shunt(server, hint="{verdict}")


def test_chat_model_confident_label_calls_tool_or_fills_schema(server: ScriptedServer) -> None:
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
    assert text.bind_tools([cancel_order], tool_choice="any").invoke(SURE).tool_calls, (
        "a text answer is not a tool call, so it is deferred"
    )
    assert len(server.bodies) == 1
    text.bind_tools([cancel_order], response_format=Intent, strict=True).invoke(SURE)
    assert len(server.bodies) == 2, "labels cannot satisfy a response format"


def test_structured_output_one_field_schema_is_filled_by_label(server: ScriptedServer) -> None:
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


class Writes(Runnable[Any, Prediction]):
    """A confident small model that writes the last word of its input."""

    model_id = "writer"

    def invoke(self, input: Any, config: Any = None, **kwargs: Any) -> Prediction:
        return Prediction.from_answer(input[-1].text.split()[-1], 0.95, model_id=self.model_id)


def test_chat_model_written_answer_is_returned_if_it_fits_the_form(server: ScriptedServer) -> None:
    model = shunt(server, small=Writes())
    assert model.invoke("please refund").content == "refund"
    structured = model.with_structured_output(Intent)
    assert structured.invoke("please refund") == Intent(intent="refund")
    assert len(server.bodies) == 0
    found = structured.batch(["please cancel", "please dance", "please refund"])
    assert [found[0], found[2]] == [Intent(intent="cancel"), Intent(intent="refund")]
    assert len(server.bodies) == 1, "dance is not among the schema's values, so it is deferred"
    by_word = shunt(server, small=Writes(), answers={"hours": "From 9 to 17."})
    assert by_word.invoke("your hours").content == "From 9 to 17."
    assert by_word.invoke("your prices").content == server.text
    with pytest.raises(ConfigurationError, match="labels that the small model does not have: hours"):
        shunt(server, answers={"hours": "From 9 to 17."})


async def test_chat_model_stream_carries_decision_once(server: ScriptedServer) -> None:
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


async def test_chat_model_tool_result_last_skips_small_model(server: ScriptedServer) -> None:
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
async def test_chat_model_draft_routes_by_token_probability(sure: float, route: str) -> None:
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


def test_chat_model_draft_without_logprobs_defers(server: ScriptedServer) -> None:
    model = shunt(server, small=server.chat_model(model="tiny"))
    told = model.invoke(UNSURE).response_metadata["shunt"]
    assert (told["route"], told["reason"]) == ("large", "small_error")
    assert "no log-probabilities" in told["error"]
    tokens = {"logprobs": {"content": [{"logprob": math.log(p)} for p in (0.9, 0.5, 0.8)]}}
    assert min_token_probability(AIMessage("a b c", response_metadata=tokens)) == pytest.approx(0.5)
    assert min_token_probability(AIMessage("a")) is None


def test_chat_model_cache_and_rate_limiter_belong_to_large_model(server: ScriptedServer) -> None:
    limiter = InMemoryRateLimiter(requests_per_second=1000, max_bucket_size=1)
    model = shunt(server, large=server.chat_model(cache=InMemoryCache(), rate_limiter=limiter))
    assert model.invoke(UNSURE).content == model.invoke(UNSURE).content
    assert len(server.bodies) == 1, "the second came from the large model's cache"
    model.invoke(SURE)
    assert limiter.available_tokens < 1.0, "only LLM calls use the limiter"
    for name in ("cache", "rate_limiter"):
        with pytest.raises(ConfigurationError, match="to the large model"):
            shunt(server, **{name: InMemoryCache() if name == "cache" else limiter})


async def test_chat_model_batch_makes_one_small_call(server: ScriptedServer) -> None:
    small = WordModel()
    model = shunt(server, small=small)
    answers = model.batch([SURE, UNSURE, [HumanMessage("surely status")]], {"max_concurrency": 2})
    assert [answer.content for answer in answers] == ["cancel", server.text, "status"]
    assert small._calls == [3]
    assert [a.content for a in await model.abatch([SURE, UNSURE])] == ["cancel", server.text]
    assert model.batch([]) == []


async def test_chat_model_legacy_interfaces_count_tokens_once(server: ScriptedServer) -> None:
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
        for _ in range(200):  # a v3 stream ends its run in the background, after its output
            if usage.usage_metadata:
                break
            await asyncio.sleep(0.01)
        assert list(usage.usage_metadata) == ["scripted"], kind
        assert usage.usage_metadata["scripted"]["total_tokens"] == (expected or {})["total_tokens"], kind


def test_chat_model_in_agent_calls_tools_locally(server: ScriptedServer) -> None:
    model = shunt(server, answers={"cancel": ToolAnswer("cancel_order", {"order": "7"})})
    agent = create_agent(model, [cancel_order])
    messages = agent.invoke({"messages": [HumanMessage(SURE)]})["messages"]
    assert [message.type for message in messages] == ["human", "ai", "tool", "ai"]
    assert messages[2].content == "cancelled 7"
    assert len(server.bodies) == 1, "only the final answer is the large model's"
    shown = [chunk for chunk, _ in agent.stream({"messages": [HumanMessage(UNSURE)]}, stream_mode="messages")]
    assert sum(len(chunk.tool_call_chunks) > 0 for chunk in shown if isinstance(chunk, AIMessageChunk)) > 0


def test_chat_model_rejected_draft_is_not_streamed_by_graph() -> None:
    with ScriptedServer(reply_with_logprobs(0.5)) as server:
        agent = create_agent(shunt(server, small=server.chat_model(model="tiny", logprobs=True)), [])
        shown = agent.stream({"messages": [HumanMessage(UNSURE)]}, stream_mode="messages")
        assert "".join(str(chunk.text) for chunk, _ in shown) == server.text


def test_chat_model_settings_are_passed_to_large_model(server: ScriptedServer) -> None:
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


def _refund(message: AIMessage) -> Intent:
    return Intent(intent="refund")


def _refund_and_raw(message: AIMessage) -> dict[str, Any]:
    return {"raw": message, "parsed": _refund(message), "parsing_error": None}


class Filling(FakeListChatModel):
    """A chat model that can be pickled, with structured output."""

    responses: list[str] = ["refund"]

    def with_structured_output(self, schema: Any, *, include_raw: bool = False, **kwargs: Any) -> Any:
        return self | RunnableLambda(_refund_and_raw if include_raw else _refund)


def test_structured_output_copy_and_pickle_answer_alike() -> None:
    model = ShuntChatModel(small=WordModel(), large=Filling(), max_concurrency=2)
    plain, raw = model.with_structured_output(Intent), model.with_structured_output(Intent, include_raw=True)
    for again in (pickle.loads(pickle.dumps(plain)), copy.deepcopy(plain)):
        assert again.invoke(SURE) == Intent(intent="cancel")
        assert again.invoke(UNSURE) == Intent(intent="refund")
        assert again.shunt.limiter is again.owner._limiter, "both routes share one limiter"
        assert [spec.id for spec in again.config_specs] == ["shunt_threshold"]
    for again in (pickle.loads(pickle.dumps(raw)), copy.deepcopy(raw)):
        assert again.invoke(SURE)["parsed"] == Intent(intent="cancel")
    assert [spec.id for spec in model.config_specs] == ["shunt_threshold"]


def test_chat_model_copy_and_pickle_answer_alike(server: ScriptedServer) -> None:
    model = ShuntChatModel(small=WordModel(), large=server.chat_model(), answers={"cancel": "Done."})
    copied = model.model_copy(deep=False)
    assert copied.invoke(SURE).content == "Done."
    piped = RunnableLambda(lambda text: f"surely {text}") | model
    assert piped.invoke("cancel").content == "Done."
    with pytest.warns(ThresholdWarning):
        assert shunt(server, policy=Threshold(1.5)).invoke(SURE).content == server.text
    assert shunt(server, policy=AlwaysSmall()).invoke(UNSURE).content == "cancel"
    bound = ShuntChatModel(small=WordModel(), large=Busy(), answers={"cancel": "Done."}, max_concurrency=2)
    for again in (pickle.loads(pickle.dumps(bound)), copy.deepcopy(bound)):
        assert (again.invoke(SURE).content, again.invoke(UNSURE).content) == ("Done.", "done")
        assert again.answers is not bound.answers


def test_chat_model_own_callbacks_are_added_to_those_of_enclosing_run(server: ScriptedServer) -> None:
    own, around = RunBook(), RunBook()
    model = shunt(server, callbacks=[own])
    RunnableLambda(lambda text: model.invoke(text)).invoke(UNSURE, {"callbacks": [around]})
    assert {"ShuntChatModel", "WordModel", "ChatOpenAI"} <= {run["name"] for run in around.started.values()}
    assert "ShuntChatModel" in {run["name"] for run in own.started.values()}


def draft_of(content: str | None, calls: Any = (), seen: list[Any] | None = None) -> Any:
    """Reply as a confident small chat model with one fixed draft."""

    def reply(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
        if body["model"] != "tiny":
            return None
        if seen is not None:
            seen.append(body)
        return {"content": content, "tool_calls": list(calls), "logprob": -0.01}

    return reply


def test_chat_model_draft_without_requested_form_defers() -> None:
    seen: list[Any] = []
    with ScriptedServer(draft_of("Sure thing.", seen=seen)) as server:
        model = shunt(server, small=server.chat_model(model="tiny", logprobs=True), temperature=0.3)
        assert model.invoke(UNSURE, stop=["x"]).content == "Sure thing."
        assert (seen[-1]["stop"], seen[-1]["temperature"]) == (["x"], 0.3), (
            "settings are passed to the draft as to the large model"
        )
        forced = model.bind_tools([cancel_order], tool_choice="any").invoke(UNSURE)
        assert forced.tool_calls, "a text answer is not a tool call"
        parsed = model.with_structured_output(Intent, method="function_calling").invoke(UNSURE)
        assert isinstance(parsed, Intent), "a draft that cannot be parsed is rejected"
    with ScriptedServer(draft_of("Ok.", [("cancel_order", {"order": "ALL"})])) as server:
        model = shunt(server, small=server.chat_model(model="tiny", logprobs=True))
        told = model.bind_tools([cancel_order]).invoke(UNSURE).response_metadata["shunt"]
        assert told["route"] == "large", "token probabilities do not cover the tool call"


def test_chat_model_bound_tools_and_response_format_are_respected(server: ScriptedServer) -> None:
    model = shunt(server, answers={"cancel": ["It is cancelled.", ToolAnswer("cancel_order")]})
    described = convert_to_openai_tool(cancel_order)
    assert model.bind(tools=[described], tool_choice="required").invoke(SURE).tool_calls
    assert server.bodies == []
    model.bind(response_format={"type": "json_object"}).invoke(SURE)
    assert len(server.bodies) == 1
    assert AnswerForm.from_tools([cancel_order], {"type": "any"}, {}).must_call
    assert AnswerForm.from_tools([cancel_order], {"type": "none"}, {}).tools == frozenset()


def test_chat_model_concurrency_and_retry_apply_to_every_call() -> None:
    def plan(number: int, body: Mapping[str, Any]) -> str | None:
        return "500" if number == 1 else None

    call = AIMessage("", tool_calls=[{"name": "cancel_order", "args": {}, "id": "1", "type": "tool_call"}])
    talk = [HumanMessage(SURE), call, ToolMessage("cancelled", tool_call_id="1")]
    with FaultyServer(lambda messages: "fine", plan) as server:
        model = ShuntChatModel(small=WordModel(), large=server.chat_model(), retry=Retry(attempts=2, max_wait=0.01))
        assert model.invoke(talk).content == "fine"
    bound = shunt_over_busy(1)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda i: bound.bind_tools([cancel_order]).invoke(UNSURE if i % 2 else talk), range(6)))
    assert bound.large.most == 1  # type: ignore[attr-defined]


class Busy(FakeListChatModel):
    """Counts how many calls run at once."""

    responses: list[str] = ["done"]
    most: int = 0
    running: int = 0

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self.bind()

    def _call(self, *args: Any, **kwargs: Any) -> str:
        self.running += 1
        self.most = max(self.most, self.running)
        time.sleep(0.02)
        self.running -= 1
        return "done"


def shunt_over_busy(limit: int) -> ShuntChatModel:
    return ShuntChatModel(small=WordModel(), large=Busy(), max_concurrency=limit)


def test_chat_model_answers_are_copied_and_llm_errors_raised(server: ScriptedServer) -> None:
    class Two(BaseModel):
        """Two fields."""

        intent: str
        n: list[int]

    given = Two(intent="cancel", n=[1])
    structured = shunt(server, answers={"cancel": given}).with_structured_output(Two)
    structured.invoke(SURE).n.append(2)  # type: ignore[union-attr]
    assert structured.invoke(SURE) == given

    class Count(TypedDict):
        """A number."""

        count: int

    shunt(server).with_structured_output(Count).invoke(SURE)
    assert len(server.bodies) == 1, "a label is not a number"
    raw = shunt(server, temperature=0.3).with_structured_output(Intent, include_raw=True).invoke(UNSURE)
    assert raw["raw"].response_metadata["shunt"]["route"] == "large"
    assert server.bodies[-1]["temperature"] == 0.3
    small = shunt(server).with_structured_output(Intent, include_raw=True).invoke(SURE)
    assert small["raw"].response_metadata["shunt"]["route"] == "small"
    with FaultyServer(lambda messages: "x", lambda number, body: "500") as broken:
        failing = ShuntChatModel(
            small=WordModel(), large=broken.chat_model(), answers={"refund": "x"}, on_large_error="small"
        )
        with pytest.raises(Exception, match="oops"):
            failing.invoke(UNSURE)


def test_chat_model_chunk_keeps_additional_kwargs_and_call_threshold_applies(server: ScriptedServer) -> None:
    model = shunt(server, answers={"cancel": AIMessage("ok", additional_kwargs={"cites": [1]})})
    (chunk,) = model.stream(SURE)
    assert chunk.additional_kwargs == {"cites": [1]}
    eager: Any = {"configurable": {"shunt_threshold": 0.1}}
    assert model.stream_events(UNSURE, eager, version="v3").output.text == "ok"
    assert server.bodies == []


def test_chat_model_changed_settings_apply_and_invalid_ones_raise(server: ScriptedServer) -> None:
    model = shunt(server, answers={"cancel": "A"})
    assert model.model_copy(update={"answers": {"cancel": "B"}}).invoke(SURE).content == "B"
    assert model.invoke(SURE).content == "A"
    assert model.model_copy(update={"policy": AlwaysSmall()}).invoke(UNSURE).content == "A"
    with pytest.raises(ConfigurationError, match="frozen"):
        model.policy = AlwaysSmall()
    with pytest.raises(ConfigurationError, match="labels that the small model does not have: cancle"):
        shunt(server, answers={"cancle": "?"})
    with pytest.raises(ConfigurationError, match="Pass the settings to the chat model itself"):
        shunt(server, small=server.chat_model().bind(logprobs=True))
    good, bad = shunt(server).batch([SURE, 42], return_exceptions=True)  # type: ignore[list-item]
    assert (good.content, type(bad)) == ("cancel", ValueError)
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    seen = shunt(server).invoke([HumanMessage([{"type": "text", "text": SURE}, picture])])
    assert seen.response_metadata["shunt"]["route"] == "large", "the classifier cannot see the image"


@pytest.mark.parametrize("on_local", ["abstain", "small", "raise"])
@pytest.mark.parametrize("way", ["batch", "abatch"])
async def test_chat_model_local_only_input_keeps_other_answers_of_batch(
    server: ScriptedServer, on_local: Any, way: str
) -> None:
    guard = PrivacyGuard(local_where=lambda text: "secret" in text, on_local=on_local)
    model = shunt(server, guard=guard, small=failing_word_model(ValueError("down")))
    inputs: list[Any] = ["tell me", "a secret", "tell me more"]
    if way == "batch":
        found = model.batch(inputs, return_exceptions=True)
    else:
        found = await model.abatch(inputs, return_exceptions=True)
    assert [type(one) for one in found] == [AIMessage, LocalOnlyError, AIMessage]
    with pytest.raises(LocalOnlyError):
        model.batch(inputs)


def test_chat_model_bound_models_share_one_queue() -> None:
    guard = threading.Event()
    large = ToolsChat(responses=["done"], wait=guard)
    model = ShuntChatModel(small=WordModel(), large=large, max_pending=2, max_concurrency=1)
    bound = [model.bind_tools([cancel_order]) for _ in range(6)]

    def ask(one: Any) -> Any:
        try:
            return one.invoke(UNSURE)
        except QueueFullError as error:
            return error

    with ThreadPoolExecutor(6) as pool:
        waiting = [pool.submit(ask, one) for one in bound]
        while sum(one.done() for one in waiting) < 4:
            time.sleep(0.01)
        guard.set()
        answered = [one.result(20) for one in waiting]
    assert sum(isinstance(one, QueueFullError) for one in answered) == 4


def test_structured_stream_after_tool_result_respects_concurrency(server: ScriptedServer) -> None:
    at_once = AtOnce()

    class Counting(FakeListChatModel):
        def with_structured_output(self, schema: Any, **kwargs: Any) -> Any:
            def answer(_: Any) -> Intent:
                with at_once:
                    time.sleep(0.02)
                return Intent(intent="cancel")

            return RunnableLambda(answer)

    model = ShuntChatModel(small=WordModel(), large=Counting(responses=["x"]), max_concurrency=1)
    structured = model.with_structured_output(Intent)
    history = [HumanMessage("hi"), AIMessage("", tool_calls=[{"name": "t", "args": {}, "id": "1"}]),
               ToolMessage("done", tool_call_id="1")]  # fmt: skip
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: list(structured.stream(history)), range(4)))
    assert found == [[Intent(intent="cancel")]] * 4
    assert at_once.most == 1


class ToolsChat(FakeListChatModel):
    """A chat model that accepts tools and waits for an event."""

    wait: Any

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self.bind()

    def _call(self, *args: Any, **kwargs: Any) -> str:
        self.wait.wait(20)
        return super()._call(*args, **kwargs)


def test_chat_model_call_arguments_are_merged_with_bound_ones() -> None:
    answers = {"cancel": [ToolAnswer("cancel_order"), "It is cancelled."]}
    large = ToolsChat(responses=["LARGE"], wait=threading.Event())
    large.wait.set()
    model = ShuntChatModel(small=WordModel(), large=large, answers=answers)
    held = model.bind_tools([cancel_order], response_format={"type": "json_object"})
    assert held.invoke(SURE, tool_choice="auto").content == "LARGE"
    forced = model.bind_tools([cancel_order], tool_choice="any")
    other = {"type": "function", "function": {"name": "other", "parameters": {}}}
    assert forced.invoke(SURE, tools=[other]).content == "LARGE", "a text answer is not a tool call"
    assert model.bind_tools([cancel_order]).invoke(SURE, tool_choice="cancel_order").tool_calls
    assert model.bind_tools([cancel_order]).invoke(SURE, tool_choice="none").content == "It is cancelled."
