from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import httpx
import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.runnables import RunnableConfig, RunnableLambda
from langchain_core.tools import BaseTool, StructuredTool, tool
from langgraph.prebuilt import InjectedState

from langchain_datashunt import AlwaysSmall, ConformalPruning, DeferralBudget, Threshold
from langchain_datashunt.agents import (
    NoArguments,
    PatternArguments,
    ShuntModelRouterMiddleware,
    ShuntToolRouterMiddleware,
    ToolRouter,
    WholeText,
)
from langchain_datashunt.agents.arguments import extracted
from langchain_datashunt.call_log import CallLog, Recorder
from langchain_datashunt.exceptions import ConfigurationError, InputError, PredictionError, ShuntWarning
from tests.support.handlers import RunBook
from tests.support.models import WordModel, failing_word_model, predict_words
from tests.support.scripted_server import ScriptedServer

SURE, UNSURE = "surely cancel order 7", "what about cancel"


def make_tool(name: str, *params: str) -> BaseTool:
    namespace: dict[str, Any] = {}
    exec(f"def {name}({', '.join(f'{p}: str' for p in params)}) -> str:\n  return '{name} done'", namespace)
    return StructuredTool.from_function(namespace[name], name=name, description=f"Does what {name} says. " * 5)


TOOLS = [make_tool("cancel", "order"), make_tool("refund"), make_tool("status", "text"), make_tool("search")]


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as running:
        yield running


def chat(server: ScriptedServer, **settings: Any) -> Any:
    return server.chat_model(http_async_client=httpx.AsyncClient(), **settings)


def offered(body: Mapping[str, Any]) -> list[str]:
    return [tool["function"]["name"] for tool in body.get("tools", [])]


def ask(agent: Any, text: str = UNSURE) -> list[Any]:
    messages: list[Any] = agent.invoke({"messages": [HumanMessage(text)]})["messages"]
    return messages


# ToolRouter alone


def test_tool_router_each_mode_ranks_and_shortlists_tools() -> None:
    router = ToolRouter(classifier=WordModel(), mode="hard", keep=2)
    ranking = router.invoke(UNSURE)
    assert ranking.best == "cancel"
    assert ranking.top(1) == [("cancel", pytest.approx(ranking.confidence))]
    assert ranking.probabilities.sum() == pytest.approx(1.0)
    assert ranking.shortlist == ranking.tools[:2]
    assert ToolRouter(classifier=WordModel(), mode="soft").invoke(UNSURE).shortlist == ranking.tools
    with pytest.raises(ConfigurationError, match="needs calibration"):
        ToolRouter(classifier=WordModel()).invoke(UNSURE)
    with pytest.raises(ConfigurationError, match="not fitted"):
        ToolRouter(classifier=WordModel(), conformal=ConformalPruning())
    queries = [f"{word} {'surely' if i % 4 else ''}" for i, word in enumerate(["cancel", "refund", "status"] * 20)]
    fitted = router.calibrate(queries, ["cancel", "refund", "status"] * 20, alpha=0.05)
    assert fitted.invoke("surely cancel").shortlist == ("cancel",)
    assert set(fitted.invoke("nothing known").shortlist) == {"cancel", "refund"}, (
        "an empty set falls back to the most likely tools"
    )
    with pytest.raises(PredictionError):
        router.invoke("nan")


async def test_tool_router_every_runnable_method_returns_rankings() -> None:
    small = WordModel()
    router = ToolRouter(classifier=small, mode="hard", keep=1)
    book = RunBook()
    expected = [("cancel",), ("refund",)]
    assert [r.shortlist for r in router.batch(["a cancel", "a refund"], {"callbacks": [book]})] == expected
    assert small._calls == [2]
    assert [r.shortlist for r in await router.abatch(["a cancel", "a refund"])] == expected
    assert (await router.ainvoke("a refund", {"callbacks": [book]})).best == "refund"
    assert set(book.ended) == set(book.started)
    good, bad = router.batch(["a cancel", "nan"], return_exceptions=True)
    assert (good.best, type(bad)) == ("cancel", PredictionError)
    bad, good = await router.abatch([{"no": "text"}, "a refund"], return_exceptions=True)
    assert (type(bad), good.best) == (InputError, "refund")
    assert router.rank_batch([]) == []
    plain = ToolRouter(classifier=predict_words, mode="hard", keep=1)
    assert plain.rank_batch(["surely refund"])[0].best == plain.invoke("surely refund").best == "refund"


# Tool routing in an agent


def test_tool_middleware_hard_mode_offers_shortlist_to_large_model(server: ScriptedServer) -> None:
    middleware = ShuntToolRouterMiddleware(WordModel(), mode="hard", keep=1, always_include=["status"])
    messages = ask(create_agent(chat(server), TOOLS, middleware=[middleware]))
    assert [message.type for message in messages] == ["human", "ai", "tool", "ai"]
    assert [offered(body) for body in server.bodies] == [["search", "cancel", "status"]] * 2, (
        "search is unknown to the classifier"
    )
    told = messages[1].response_metadata["shunt_tools"]["ShuntToolRouterMiddleware"]
    assert told["offered"] == ["search", "cancel", "status"]
    assert (told["label"], told["of"], told["route"]) == ("cancel", 4, "large")
    whole = len(json.dumps(TOOLS[1].description)) / 4
    assert told["tokens_saved"] > whole
    assert middleware.stats.model_calls == middleware.stats.tools_pruned == 2
    assert middleware.stats.tokens_saved == 2 * told["tokens_saved"]


def test_tool_middleware_soft_mode_adds_probabilities_and_keeps_tools(server: ScriptedServer) -> None:
    middleware = ShuntToolRouterMiddleware(WordModel(), mode="soft", keep=2)
    agent = create_agent(chat(server), TOOLS, middleware=[middleware], system_prompt="Be brief.")
    ask(agent)
    assert len(offered(server.bodies[0])) == 4
    system = server.bodies[0]["messages"][0]["content"]
    assert system.startswith("Be brief.\n\nA small classifier thinks")
    assert "- cancel with probability 0.48\n- refund with probability 0.26" in system


def test_tool_middleware_calibrated_router_offers_conformal_set(server: ScriptedServer) -> None:
    words = ["cancel", "refund", "status"] * 20
    router = ToolRouter(classifier=WordModel()).calibrate([f"surely {word}" for word in words], words)
    ask(create_agent(chat(server), TOOLS[:3], middleware=[ShuntToolRouterMiddleware(router)]), SURE)
    assert offered(server.bodies[0]) == ["cancel"]
    middleware = ShuntToolRouterMiddleware(WordModel(), conformal=router.conformal)
    ask(create_agent(chat(server), TOOLS[:3], middleware=[middleware]), SURE)
    assert offered(server.bodies[-1]) == ["cancel"]
    with pytest.raises(ConfigurationError, match="needs calibration"):
        ShuntToolRouterMiddleware(WordModel())


def call_refund_at_first(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Calls a tool that was not offered, then follows the refusal message."""
    results = [message for message in body["messages"] if message["role"] == "tool"]
    if not results:
        return {"tool_calls": [("refund", {})]}
    if "refund is" in str(results[-1]["content"]) or "was not among" in str(results[-1]["content"]):
        return {"tool_calls": [("refund", {})]}
    return {"content": "Refunded."}


async def test_tool_middleware_tool_not_offered_refuses_call_and_agent_recovers() -> None:
    with ScriptedServer(call_refund_at_first) as server:
        middleware = ShuntToolRouterMiddleware(WordModel(), mode="hard", keep=1)
        agent = create_agent(chat(server), TOOLS, middleware=[middleware])
        messages = ask(agent)
        assert [message.type for message in messages] == ["human", "ai", "tool", "ai", "tool", "ai"]
        assert messages[2].status == "error"
        assert "was not among those offered for this message (search, cancel)" in messages[2].content
        assert offered(server.bodies[1]) == ["search", "cancel", "refund"], "offered from then on"
        assert (messages[4].content, messages[5].content) == ("refund done", "Refunded.")
        again = (await agent.ainvoke({"messages": [HumanMessage(UNSURE)]}))["messages"]
        assert [m.content for m in again] == [m.content for m in messages]
        assert middleware.stats.refused == 2


async def test_tool_middleware_confident_tool_is_called_without_large_model(server: ScriptedServer) -> None:
    middleware = ShuntToolRouterMiddleware(
        WordModel(),
        mode="hard",
        keep=1,
        direct=Threshold(0.9),
        arguments=PatternArguments({"cancel": r"order (?P<order>\d+)"}),
    )
    agent = create_agent(chat(server), TOOLS, middleware=[middleware])
    for messages in (ask(agent, SURE), (await agent.ainvoke({"messages": [HumanMessage(SURE)]}))["messages"]):
        assert messages[1].tool_calls[0]["args"] == {"order": "7"}
        assert messages[1].response_metadata["shunt_tools"]["ShuntToolRouterMiddleware"]["route"] == "small"
        assert messages[2].content == "cancel done"
    assert len(server.bodies) == 2, "the large model writes only the final answer"
    ask(agent, "surely cancel something")
    assert len(server.bodies) == 4, "without an order number the call is deferred"
    ask(agent, UNSURE)
    assert middleware.stats.direct_calls == 2


def test_argument_extractors_fitting_and_missing_arguments_return_dict_or_none() -> None:
    cancel, refund, status, _ = TOOLS
    assert (NoArguments()(refund, "x"), WholeText()(status, "how is it?")) == ({}, {"text": "how is it?"})
    assert WholeText()(refund, "x") is None
    assert extracted(NoArguments(), cancel, "x") is None, "cancel needs an order"
    assert extracted(NoArguments(), refund, "x") == {}
    assert extracted(PatternArguments({}), cancel, "x") is None
    with pytest.raises(ConfigurationError, match="Invalid regular expression"):
        PatternArguments({"cancel": "("})


async def test_tool_middleware_failing_small_model_offers_all_tools(server: ScriptedServer) -> None:
    middleware = ShuntToolRouterMiddleware(failing_word_model(ValueError("broken")), mode="hard")
    agent = create_agent(chat(server), TOOLS, middleware=[middleware])
    messages = ask(agent)
    assert len(offered(server.bodies[0])) == 4
    assert "broken" in messages[1].response_metadata["shunt_tools"]["ShuntToolRouterMiddleware"]["error"]
    await agent.ainvoke({"messages": [HumanMessage(UNSURE)]})
    assert middleware.stats.router_errors == 4
    with pytest.warns(ShuntWarning, match="`always_include` names tools that are not in this turn: nothing"):
        ask(
            create_agent(
                chat(server),
                TOOLS,
                middleware=[ShuntToolRouterMiddleware(WordModel(), mode="hard", always_include=["nothing"])],
            )
        )


def test_tool_middleware_two_routers_in_threads_keep_decisions_apart(server: ScriptedServer) -> None:
    narrow = ShuntToolRouterMiddleware(WordModel(), mode="hard", keep=1, name="narrow")
    hint = ShuntToolRouterMiddleware(WordModel(), mode="soft", keep=1, name="hint")
    agent = create_agent(chat(server), TOOLS, middleware=[narrow, hint])
    messages = ask(agent)
    assert set(messages[1].response_metadata["shunt_tools"]) == {"narrow", "hint"}
    guard = threading.Barrier(8)

    def one(word: str) -> str:
        guard.wait(timeout=30)
        found = ask(agent, f"what about {word}")
        return str(found[1].response_metadata["shunt_tools"]["narrow"]["offered"])

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, ["cancel", "refund", "status", "cancel"] * 2))
    assert found == [f"['search', '{word}']" for word in ["cancel", "refund", "status", "cancel"] * 2]
    assert narrow.stats.model_calls == 18


async def test_tool_middleware_agent_stream_returns_large_model_text(server: ScriptedServer) -> None:
    middleware = ShuntToolRouterMiddleware(WordModel(), mode="hard", keep=1)
    agent = create_agent(chat(server), TOOLS, middleware=[middleware])
    shown = [chunk async for chunk, _ in agent.astream({"messages": [HumanMessage(UNSURE)]}, stream_mode="messages")]
    text = "".join(str(chunk.text) for chunk in shown if chunk.type in ("AIMessageChunk", "ai"))
    assert text == server.text
    many = await asyncio.gather(*(agent.ainvoke({"messages": [HumanMessage(UNSURE)]}) for _ in range(5)))
    assert all(one["messages"][-1].content == server.text for one in many)


def test_tool_middleware_recorder_logs_tool_choice_of_large_model(server: ScriptedServer, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'tools.db'}"
    with Recorder(url, task="tools") as recorder:
        middleware = ShuntToolRouterMiddleware(WordModel(), mode="hard", keep=1, recorder=recorder)
        ask(create_agent(chat(server), TOOLS[:3], middleware=[middleware]))
    with CallLog(url) as store:
        ((record,),) = store.iterate()
    assert (record.input, record.answer_label, record.large_model) == (UNSURE, "cancel", "scripted")
    assert record.probabilities is not None
    assert record.input_tokens is not None


def test_extracted_json_schema_and_injected_state_checks_caller_arguments() -> None:
    """MCP tools have only a JSON schema, and injected state is not a caller argument."""
    mcp = StructuredTool(
        name="cancel", description="Cancels.", func=lambda **given: str(given),
        args_schema={"type": "object", "properties": {"order": {"type": "string"}}, "required": ["order"]},
    )  # fmt: skip
    bare = StructuredTool(name="ping", description="Pings.", func=lambda: "pong", args_schema={"type": "object"})
    assert extracted(NoArguments(), mcp, "x") is None
    assert extracted(WholeText(), mcp, "7") == {"order": "7"}
    assert extracted(lambda tool, text: {"order": 7}, mcp, "7") is None
    assert (extracted(WholeText(), bare, "x"), extracted(NoArguments(), bare, "x")) == (None, {})

    @tool
    def note(text: str, state: Annotated[dict, InjectedState]) -> str:  # type: ignore[type-arg]
        """Notes a text."""
        return text

    assert extracted(WholeText(), note, "hello") == {"text": "hello"}


def test_middleware_model_and_tool_router_together_discard_rejected_drafts(tmp_path: Path) -> None:
    """A rejected draft is neither counted nor recorded, and a direct call is not treated as a draft."""

    def reply(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
        return {"content": "Hm.", "tool_calls": [("refund", {})], "logprob": -0.01} if body["model"] == "tiny" else None

    with ScriptedServer(reply) as server, Recorder(tmp_path / "calls.db", task="tools") as recorder:
        tools = ShuntToolRouterMiddleware(
            WordModel(), mode="hard", keep=2, recorder=recorder, direct=Threshold(0.9),
            arguments=PatternArguments({"cancel": r"order (?P<order>\d+)"}),
        )  # fmt: skip
        turns = ShuntModelRouterMiddleware(chat(server, model="tiny", logprobs=True))
        agent = create_agent(chat(server), TOOLS, middleware=[turns, tools])
        messages = ask(agent)
        assert messages[1].tool_calls[0]["name"] == "cancel", "text confidence does not cover a tool call"
        assert (tools.stats.model_calls, turns.stats.small_errors) == (2, 2)
        messages = ask(agent, SURE)
        assert messages[1].response_metadata["shunt"]["policy"] == "a tool router called the tool"
        assert (tools.stats.direct_calls, turns.stats.small) == (1, 1)
        recorder.flush()
        with CallLog(tmp_path / "calls.db") as store:
            labels = [record.answer_label for batch in store.iterate() for record in batch]
        assert labels == ["cancel"], "the large model's choice is recorded, not the draft's"


def test_tool_middleware_content_blocks_are_preserved(server: ScriptedServer) -> None:
    middleware = ShuntToolRouterMiddleware(WordModel(), mode="soft", keep=1, direct=AlwaysSmall())
    system = SystemMessage([{"type": "text", "text": "Long."}, {"type": "text", "text": "Longer."}])
    agent = create_agent(chat(server), [TOOLS[1]], middleware=[middleware], system_prompt=system)
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    agent.invoke({"messages": [HumanMessage([{"type": "text", "text": "surely refund"}, picture])]})
    content = server.bodies[0]["messages"][0]["content"]
    assert [part["text"][:9] for part in content] == ["Long.", "Longer."], "the classifier has not seen the image"
    assert middleware.stats.direct_calls == 0
    hinting = ShuntToolRouterMiddleware(WordModel(), mode="soft", keep=1)
    agent = create_agent(chat(server), [TOOLS[1]], middleware=[hinting], system_prompt=system)
    agent.invoke({"messages": [HumanMessage("surely refund")]})
    content = server.bodies[-1]["messages"][0]["content"]
    assert [part["text"][:9] for part in content] == ["Long.", "Longer.", "A small c"]


# Model routing in an agent


def small_turns(sure: float, *, calls: bool = False) -> Any:
    def reply(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
        if body["model"] != "tiny":
            return None
        return {"tool_calls": [("refund", {})]} if calls else {"content": "A small answer.", "logprob": math.log(sure)}

    return reply


@pytest.mark.parametrize(("sure", "route"), [(0.97, "small"), (0.3, "large")])
async def test_model_middleware_confident_draft_takes_turn(sure: float, route: str) -> None:
    with ScriptedServer(small_turns(sure)) as server:
        middleware = ShuntModelRouterMiddleware(chat(server, model="tiny", logprobs=True))
        agent = create_agent(chat(server), [], middleware=[middleware])
        for messages in (ask(agent), (await agent.ainvoke({"messages": [HumanMessage(UNSURE)]}))["messages"]):
            assert messages[-1].content == ("A small answer." if route == "small" else server.text)
            assert messages[-1].response_metadata["shunt"]["route"] == route
        assert getattr(middleware.stats, route) == 2
        shown = agent.stream({"messages": [HumanMessage(UNSURE)]}, stream_mode="messages")
        assert "".join(str(chunk.text) for chunk, _ in shown) == messages[-1].content


async def test_model_middleware_tool_calls_only_defers_without_custom_confidence() -> None:
    with ScriptedServer(small_turns(0.99, calls=True)) as server:
        tiny = chat(server, model="tiny", logprobs=True)
        middleware = ShuntModelRouterMiddleware(tiny)
        messages = ask(create_agent(chat(server), TOOLS, middleware=[middleware]))
        assert messages[1].response_metadata["shunt"]["reason"] == "small_error"
        trusting = ShuntModelRouterMiddleware(tiny, confidence=lambda message: 0.95, policy=AlwaysSmall())
        agent = create_agent(chat(server), TOOLS, middleware=[trusting])
        first: Any = next(iter(agent.stream({"messages": [HumanMessage(UNSURE)]})))
        assert first["model"]["messages"][0].tool_calls[0]["name"] == "refund"
        assert first["model"]["messages"][0].response_metadata["shunt"]["route"] == "small"


def test_tool_middleware_likeliest_tool_missing_shortlists_available_tools(server: ScriptedServer) -> None:
    class Narrow(WordModel):
        """Ranks a tool first that the agent does not have."""

    present = [make_tool("status", "text"), make_tool("search")]
    middleware = ShuntToolRouterMiddleware(ToolRouter(classifier=Narrow(), mode="hard", keep=1))
    ask(create_agent(chat(server), present, middleware=[middleware]), "what about cancel")
    assert sorted(offered(server.bodies[-1])) == ["search", "status"]


def test_model_middleware_deferral_budget_observes_deferred_turn() -> None:
    with ScriptedServer(small_turns(0.5)) as server:
        policy = DeferralBudget(rate=0.2)
        middleware = ShuntModelRouterMiddleware(chat(server, model="tiny", logprobs=True), policy=policy)
        ask(create_agent(chat(server), [], middleware=[middleware]))
        assert policy.current == pytest.approx(0.9 - 0.02 * 0.8)


async def test_tool_router_batch_passes_config_to_classifier() -> None:
    seen: list[Any] = []

    def classify(text: str, config: RunnableConfig) -> Any:
        seen.append((config["configurable"].get("tenant"), "x" in config["tags"]))
        return predict_words(text)

    router, config = ToolRouter(classifier=RunnableLambda(classify), mode="hard", keep=1), RunBook()
    given: Any = {"callbacks": [config], "tags": ["x"], "configurable": {"tenant": "t1"}}
    router.batch(["a cancel", "a refund"], given)
    await router.abatch(["a cancel", "a refund"], given)
    assert seen == [("t1", True)] * 4
    assert len(config.started) == 8, "each ranking has a child run"


# Conversations that other middleware has changed


def test_tool_middleware_summary_is_no_question_and_used_tools_stay(server: ScriptedServer) -> None:
    """`SummarizationMiddleware` replaces old messages by a human message that nobody wrote."""
    summary = HumanMessage("Here is a summary: surely refund", additional_kwargs={"lc_source": "summarization"})
    called = AIMessage("", tool_calls=[{"name": "status", "args": {"text": "x"}, "id": "1"}])
    middleware = ShuntToolRouterMiddleware(WordModel(), mode="hard", keep=1)
    agent = create_agent(chat(server), TOOLS, middleware=[middleware])
    agent.invoke({"messages": [HumanMessage("surely cancel"), called, ToolMessage("done", tool_call_id="1"), summary]})
    assert set(offered(server.bodies[0])) == {"cancel", "status", "search"}, (
        "the question, the tool in use, the unknown"
    )
    agent.invoke({"messages": [summary]})
    assert len(offered(server.bodies[-1])) == len(TOOLS), "without a question all tools are offered"


def test_tool_middleware_small_model_that_cannot_work_raises(server: ScriptedServer) -> None:
    agent = create_agent(chat(server), TOOLS, middleware=[ShuntToolRouterMiddleware(WordModel(), mode="hard", keep=1)])
    broken = ShuntToolRouterMiddleware(
        failing_word_model(AttributeError("no such method")), mode="hard", keep=1
    )  # fmt: skip
    agent = create_agent(chat(server), TOOLS, middleware=[broken])
    with pytest.raises(AttributeError, match="no such method"):
        agent.invoke({"messages": [HumanMessage("surely cancel")]})
