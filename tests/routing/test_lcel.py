"""Shunts composed with other LangChain and LangGraph components, with a real ChatOpenAI on a local server."""

from __future__ import annotations

import asyncio
import json
import operator
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Annotated, Any, Literal

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_core.callbacks import UsageMetadataCallbackHandler
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables import RunnableLambda, RunnableParallel, RunnablePassthrough
from langchain_core.runnables.history import RunnableWithMessageHistory
from langchain_core.tracers import LangChainTracer
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command
from langsmith import Client
from typing_extensions import TypedDict

from langchain_datashunt import ConfidenceRouterChain, Retry, ShuntChatModel, ShuntRunnable
from tests.support.faulty_server import FaultyServer
from tests.support.handlers import RunBook
from tests.support.models import LABELS, WordModel
from tests.support.scripted_server import ScriptedServer

SURE, UNSURE = "surely refund", "maybe a refund"


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(text="status") as running:
        yield running


def router(server: Any, **given: Any) -> ConfidenceRouterChain:
    chat = server.chat_model(http_async_client=httpx.AsyncClient())
    return ConfidenceRouterChain.from_models(WordModel(), chat, labels=LABELS, answer_format="text", **given)


async def test_router_in_sequence_and_parallel_returns_labels(server: ScriptedServer) -> None:
    chain = (
        {"input": RunnablePassthrough(), "length": RunnableLambda(len)}
        | RunnablePassthrough.assign(intent=router(server))
        | RunnableParallel(intent=operator.itemgetter("intent"), length=operator.itemgetter("length"))
    )
    assert chain.invoke(SURE) == {"intent": "refund", "length": len(SURE)}
    assert await chain.ainvoke(UNSURE) == {"intent": "status", "length": len(UNSURE)}
    both = RunnableParallel(first=router(server), second=router(server) | str.upper)
    assert both.invoke(SURE) == {"first": "refund", "second": "REFUND"}


async def test_router_supports_map_fallbacks_and_config(server: ScriptedServer) -> None:
    assert router(server).map().invoke([SURE, UNSURE]) == ["refund", "status"]
    assert await router(server).map().ainvoke([SURE, UNSURE]) == ["refund", "status"]
    with FaultyServer(lambda messages: "x", lambda number, body: "500") as broken:
        safe = router(broken, retry=Retry(attempts=1)).with_fallbacks([router(server)])
        assert safe.invoke(UNSURE) == "status"
        assert await safe.ainvoke(UNSURE) == "status"
        assert safe.batch([SURE, UNSURE]) == ["refund", "status"]
    eager = router(server).with_config(configurable={"shunt_threshold": 0.3}, tags=["mine"], run_name="intents")
    book = RunBook()
    assert eager.invoke(UNSURE, {"callbacks": [book]}) == "refund"
    root = next(run for run in book.started.values() if run["parent"] is None)
    assert root["name"] == "intents"
    assert "mine" in root["tags"]


async def test_shunt_astream_events_form_one_tree(server: ScriptedServer) -> None:
    chat = server.chat_model(http_async_client=httpx.AsyncClient())
    prompt = ChatPromptTemplate.from_template("Sort {input}: {candidate_probabilities}")
    shunt = ShuntRunnable(small=WordModel(), large=prompt | chat | StrOutputParser())
    events = [event async for event in shunt.astream_events(UNSURE, version="v2")]
    started = {event["name"]: event["parent_ids"] for event in events if event["event"].endswith("_start")}
    (root,) = [
        event["run_id"] for event in events if event["name"] == "ShuntRunnable" and event["event"].endswith("_start")
    ]
    assert started["WordModel"] == [root]
    assert started["RunnableSequence"] == [root]
    for name in ("ChatPromptTemplate", "ChatOpenAI", "StrOutputParser"):
        assert started[name][0] == root, "the root is the first parent"
    assert len(started) == 6
    ended = [event["name"] for event in events if event["event"].endswith("_end")]
    assert sorted(ended) == sorted(started)
    (decision,) = [event for event in events if event["event"] == "on_custom_event"]
    assert decision["data"]["shunt_route"] == "large"
    tokens = [event["data"]["chunk"].content for event in events if event["event"] == "on_chat_model_stream"]
    assert "".join(tokens) == "status"


class Collector(ThreadingHTTPServer):
    """Server that accepts runs like the LangSmith API."""

    def __init__(self) -> None:
        posted: list[dict[str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                pass

            def _take(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                if self.headers.get("content-type", "").startswith("application/json"):
                    posted.append({"path": self.path, "method": self.command, **json.loads(body or b"{}")})
                self.send_response(202)
                self.send_header("content-length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            do_POST = do_PATCH = _take

            def do_GET(self) -> None:
                self.send_response(200)
                data = b'{"batch_ingest_config": {"use_multipart_endpoint": false, "size_limit": 100}}'
                self.send_header("content-length", str(len(data)))
                self.send_header("content-type", "application/json")
                self.end_headers()
                self.wfile.write(data)

        self.posted = posted
        super().__init__(("127.0.0.1", 0), Handler)


def test_langsmith_trace_is_one_tree_with_decision(server: ScriptedServer) -> None:
    collector = Collector()
    thread = threading.Thread(target=collector.serve_forever, daemon=True)
    thread.start()
    try:
        url = f"http://127.0.0.1:{collector.server_address[1]}"
        client = Client(api_url=url, api_key="test", auto_batch_tracing=False)
        tracer = LangChainTracer(client=client, project_name="shunts")
        router(server).invoke(UNSURE, {"callbacks": [tracer]})
        tracer.wait_for_futures()
    finally:
        collector.shutdown()
        collector.server_close()
    created = [one for one in collector.posted if one["method"] == "POST"]
    changed = {one["path"].rsplit("/", 1)[1]: one for one in collector.posted if one["method"] == "PATCH"}
    names = {one["name"]: one for one in created}
    assert {"ConfidenceRouterChain", "WordModel", "ChatOpenAI"} <= set(names)
    root = names["ConfidenceRouterChain"]
    assert {one["trace_id"] for one in created} == {root["id"]}
    assert root.get("parent_run_id") is None
    assert names["WordModel"]["parent_run_id"] == root["id"]
    ended = changed[root["id"]]
    assert ended["end_time"] is not None
    assert ended["extra"]["metadata"]["shunt_route"] == "large"
    assert "shunt_route:large" in ended["tags"]
    assert all(changed[one["id"]]["end_time"] for one in created), "every run must end"


class State(TypedDict):
    """State of the graph."""

    question: str
    answers: Annotated[list[str], operator.add]


async def test_langgraph_node_routes_by_decision(server: ScriptedServer) -> None:
    shunt = router(server, return_decision=True)

    def route(state: State) -> Command[Literal["refund", "human"]]:
        result = shunt.invoke(state["question"])
        sure = result.decision.route == "small" and result.output == "refund"
        return Command(goto="refund" if sure else "human", update={"answers": [result.decision.route]})

    graph = StateGraph(State)
    graph.add_node("route", route)
    graph.add_node("refund", lambda state: {"answers": ["refunded"]})
    graph.add_node("human", lambda state: {"answers": ["asked a human"]})
    graph.add_edge(START, "route")
    graph.add_edge("refund", END)
    graph.add_edge("human", END)
    app = graph.compile()
    assert app.invoke({"question": SURE, "answers": []})["answers"] == ["small", "refunded"]
    assert (await app.ainvoke({"question": UNSURE, "answers": []}))["answers"] == ["large", "asked a human"]


def test_message_history_contains_answers_of_both_models(server: ScriptedServer) -> None:
    histories: dict[str, InMemoryChatMessageHistory] = {}
    prompt = ChatPromptTemplate.from_messages(
        [
            ("system", "Hint: {candidate_probabilities}"),
            MessagesPlaceholder("history", optional=True),
            ("human", "{input}"),
        ]
    )
    shunt = ShuntRunnable(small=WordModel(), large=prompt | server.chat_model() | StrOutputParser())
    talk = RunnableWithMessageHistory(
        shunt, lambda session_id: histories.setdefault(session_id, InMemoryChatMessageHistory()),
        input_messages_key="input", history_messages_key="history",
    )  # fmt: skip
    config: Any = {"configurable": {"session_id": "1"}}
    assert talk.invoke({"input": SURE}, config) == "refund"
    assert talk.invoke({"input": UNSURE}, config) == "status"
    said = [message.content for message in histories["1"].messages]
    assert said == [SURE, "refund", UNSURE, "status"], "the history contains the answers of both models"
    sent = [message["content"] for message in server.bodies[0]["messages"]]
    assert sent[0].startswith("Hint: - refund with probability")
    assert sent[1:] == [SURE, "refund", UNSURE], "the large model gets the small model's earlier answer"
    model = RunnableWithMessageHistory(
        ShuntChatModel(small=WordModel(), large=server.chat_model()), lambda session_id: histories["1"]
    )
    answer = model.invoke([HumanMessage("surely status")], config)
    assert isinstance(answer, AIMessage)
    assert histories["1"].messages[-1].content == "status"


FAULTS = st.sampled_from([None, None, "400", "malformed", "cut", "wrong", "cancel"])


TEXTS = st.sampled_from(["surely cancel", "refund", "status", "nan"])
OURS = ("ShuntRunnable", "ShuntChatModel", "WordModel")
"""Names of our own runs. LangChain's own Runnables lose a run that is cancelled while it starts."""

WAYS = st.sampled_from(["ainvoke", "astream", "abatch", "as_completed", "chat"])


@given(st.lists(st.tuples(TEXTS, FAULTS), min_size=1, max_size=5), WAYS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_runs_end_once_under_faults_and_cancellations(calls: list[tuple[str, str | None]], way: str) -> None:
    """Runs end exactly once for all inputs, faults and cancellations, including those during a stream."""
    faults = {f"{text} {i}": fault for i, (text, fault) in enumerate(calls) if fault not in (None, "cancel")}

    def plan(number: int, body: Mapping[str, Any]) -> str | None:
        return faults.get(str(body["messages"][-1]["content"]))

    async def one(text: str, cancel: bool) -> None:
        task: asyncio.Task[Any]
        if way == "chat":
            task = asyncio.ensure_future(collect(chat_model.astream(text, config)))
        elif way == "astream":
            task = asyncio.ensure_future(collect(shunt.astream(text, config)))
        elif way == "abatch":
            task = asyncio.ensure_future(shunt.abatch([text, "surely cancel"], config, return_exceptions=True))
        elif way == "as_completed":
            task = asyncio.ensure_future(collect(shunt.abatch_as_completed([text, "surely cancel"], config)))
        else:
            task = asyncio.ensure_future(shunt.ainvoke(text, config))
        if cancel:
            await asyncio.sleep(0.004)
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def collect(stream: Any) -> list[Any]:
        return [chunk async for chunk in stream]

    async def everything() -> None:
        await asyncio.gather(*(one(f"{text} {i}", fault == "cancel") for i, (text, fault) in enumerate(calls)))
        await asyncio.sleep(0.02)

    book, usage = RunBook(), UsageMetadataCallbackHandler()
    config: Any = {"callbacks": [book, usage]}
    with FaultyServer(lambda messages: "refund", plan) as server:
        chat = server.chat_model(stream_usage=True, http_async_client=httpx.AsyncClient())
        prompt = ChatPromptTemplate.from_messages([("system", "{candidate_probabilities}"), ("human", "{input}")])
        shunt = ShuntRunnable(small=WordModel(), large=prompt | chat | StrOutputParser(), retry=Retry(attempts=1))
        chat_model = ShuntChatModel(small=WordModel(), large=chat)
        asyncio.run(everything())
    if all(fault != "cancel" for _, fault in calls):
        book.assert_balanced()
    closed = [*book.ended, *book.failed]
    assert len(closed) == len(set(closed)), "a run ended twice"
    ours = {run_id for run_id, run in book.started.items() if run["name"] in OURS}
    assert ours <= set(closed), "each of our own runs must end"
    whole = sum(1 for run in book.started.values() if run["name"] == "ChatOpenAI")
    assert whole <= len(calls)
    counted = sum(each["total_tokens"] for each in usage.usage_metadata.values())
    assert (counted > 0) <= (whole > 0)


async def test_runs_end_at_any_time_of_cancellation(server: ScriptedServer) -> None:
    """Sync handlers run in a thread, so a cancellation can occur while they run."""
    shunt, model = router(server), ShuntChatModel(small=WordModel(), large=server.chat_model())

    class Slow(RunBook):
        def _start(self, *args: Any, **kwargs: Any) -> None:
            time.sleep(0.002)
            super()._start(*args, **kwargs)

    for step in range(40):
        book, text = Slow(), (SURE if step % 2 else UNSURE)
        asked: Any = (shunt.ainvoke, shunt.abatch, model.ainvoke)[step % 3]
        given: Any = [text, SURE] if step % 3 == 1 else text
        task = asyncio.ensure_future(asked(given, {"callbacks": [book]}))
        await asyncio.sleep(0.0005 * step)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        closed = {*book.ended, *book.failed}
        left = {run["name"] for run_id, run in book.started.items() if run_id not in closed}
        assert left <= {"ChatOpenAI", "ChatAsker", "ChatPromptTemplate", "small answer"}, left
