from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from langchain_datashunt import AlwaysLarge, ConfidenceRouterChain, ShuntChatModel, ShuntRunnable
from langchain_datashunt.telemetry import ShuntTelemetry, instrument, uninstrument
from tests.support.faulty_server import FaultyServer
from tests.support.models import LABELS, WordModel
from tests.support.scripted_server import ScriptedServer


class Desk:
    """In-memory spans and metrics."""

    def __init__(self) -> None:
        self.exporter, self.reader = InMemorySpanExporter(), InMemoryMetricReader()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.meters = MeterProvider([self.reader])

    def spans(self) -> dict[str, Any]:
        return {span.name: span for span in self.exporter.get_finished_spans()}

    def points(self, name: str) -> list[Any]:
        data = self.reader.get_metrics_data()
        metrics = [] if data is None else [m for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics]
        return [point for metric in metrics if metric.name == name for point in metric.data.data_points]

    def total(self, name: str, **attributes: str) -> float:
        wanted = {f"datashunt.{key}": value for key, value in attributes.items()}
        return float(
            sum(
                getattr(point, "value", getattr(point, "count", 0))
                for point in self.points(name)
                if wanted.items() <= dict(point.attributes).items()
            )
        )


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk()
    yield made
    uninstrument()


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(model="gpt-4", text="refund") as running:
        yield running


def router(server: ScriptedServer, **settings: Any) -> ConfidenceRouterChain:
    chat = server.chat_model(http_async_client=httpx.AsyncClient())
    return ConfidenceRouterChain.from_models(WordModel(), chat, labels=LABELS, answer_format="text", **settings)


async def test_telemetry_spans_follow_call_without_content(desk: Desk, server: ScriptedServer) -> None:
    instrument(desk.tracers, desk.meters)
    chain = RunnableLambda(lambda text: text, name="before") | router(server)
    with desk.tracers.get_tracer("mine").start_as_current_span("request") as request:
        assert chain.invoke("what about a refund") == "refund"
        assert await chain.ainvoke("what about a refund") == "refund"
    spans = desk.spans()
    assert set(spans) == {"ConfidenceRouterChain", "WordModel", "chat gpt-4", "request"}
    assert len(desk.exporter.get_finished_spans()) == 7
    call, small, large = spans["ConfidenceRouterChain"], spans["WordModel"], spans["chat gpt-4"]
    assert call.parent.span_id == request.get_span_context().span_id
    assert small.parent.span_id == large.parent.span_id == call.context.span_id
    assert call.attributes["datashunt.route"] == "large"
    assert call.attributes["datashunt.label"] == "refund"
    assert small.attributes["datashunt.part"] == "small"
    assert large.kind == SpanKind.CLIENT
    assert large.attributes["gen_ai.operation.name"] == "chat"
    assert large.attributes["gen_ai.provider.name"] == "openai"
    assert large.attributes["gen_ai.request.model"] == large.attributes["gen_ai.response.model"] == "gpt-4"
    assert large.attributes["gen_ai.usage.input_tokens"] > 0
    assert large.attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert call.start_time <= small.start_time <= small.end_time <= large.start_time <= large.end_time <= call.end_time
    everything = str([(span.name, dict(span.attributes)) for span in desk.exporter.get_finished_spans()])
    assert "what about" not in everything


async def test_telemetry_metrics_count_routes_tokens_and_saved_cost(desk: Desk, server: ScriptedServer) -> None:
    instrument(desk.tracers, desk.meters)
    chain = router(server)
    chain.batch(["what about a refund", "what about cancel", "surely status"])
    await chain.ainvoke("surely cancel")
    assert desk.total("datashunt.decisions", route="large", reason="deferred") == 2
    assert desk.total("datashunt.decisions", route="small", reason="confident") == 2
    assert desk.total("datashunt.confidence", route="small") == desk.total("datashunt.duration", route="small") == 2
    assert desk.total("gen_ai.client.operation.duration") == 2
    (asked,) = [p for p in desk.points("gen_ai.client.token.usage") if p.attributes["gen_ai.token.type"] == "input"]
    assert (asked.count, asked.attributes["gen_ai.request.model"]) == (2, "gpt-4")
    spent = desk.total("datashunt.cost")
    assert spent > 0.0
    assert desk.total("datashunt.cost_saved") == pytest.approx(spent), (
        "two local answers saved the cost of two deferred calls"
    )


def test_telemetry_failure_is_set_on_spans(desk: Desk) -> None:
    telemetry = ShuntTelemetry(desk.tracers, desk.meters)
    with FaultyServer(lambda messages: "refund", lambda number, body: "400") as server:
        chain = ConfidenceRouterChain.from_models(WordModel(), server.chat_model(), labels=LABELS)
        with pytest.raises(Exception, match="bad request"):
            chain.invoke("what about a refund", {"callbacks": [telemetry]})
    spans = desk.spans()
    for name in ("ConfidenceRouterChain", "chat gpt-4"):
        assert spans[name].status.status_code == StatusCode.ERROR
        assert spans[name].attributes["error.type"] == "OpenAIInvalidRequestError"
    assert telemetry._runs == {}, "ended runs are removed"
    broken: ShuntRunnable = ShuntRunnable(small=RunnableLambda(lambda text: 1 / 0), large=lambda x: "L", pruning=None)
    assert broken.invoke("x", {"callbacks": [telemetry]}) == "L"
    assert desk.spans()["ShuntRunnable"].attributes["datashunt.reason"] == "small_error"
    assert desk.spans()["ShuntRunnable"].attributes["datashunt.error"] == "ZeroDivisionError", (
        "the message may quote the input"
    )


async def test_telemetry_cancelled_call_closes_spans(desk: Desk) -> None:
    telemetry = ShuntTelemetry(desk.tracers, desk.meters)
    with FaultyServer(lambda messages: "refund", lambda number, body: "timeout", hang=0.3) as server:
        chat = server.chat_model(http_async_client=httpx.AsyncClient())
        shunt: ShuntRunnable = ShuntRunnable(small=WordModel(), large=chat, pruning=None)
        for _ in range(5):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(shunt.ainvoke("maybe", {"callbacks": [telemetry]}), 0.1)
    assert telemetry._runs == {}
    names = [span.name for span in desk.exporter.get_finished_spans()]
    assert names.count("ShuntRunnable") == names.count("chat gpt-4") == 5


def test_telemetry_cached_answers_cost_nothing_and_tools_keep_parents(desk: Desk, server: ScriptedServer) -> None:
    telemetry = ShuntTelemetry(desk.tracers, desk.meters)
    large = server.chat_model(cache=InMemoryCache())
    shunt: ShuntRunnable = ShuntRunnable(small=WordModel(), large=large, pruning=None, policy=AlwaysLarge())
    for _ in range(3):
        shunt.invoke("maybe", {"callbacks": [telemetry]})
    (asked,) = [p for p in desk.points("gen_ai.client.token.usage") if p.attributes["gen_ai.token.type"] == "input"]
    assert asked.count == 1
    desk.exporter.clear()

    @tool
    def ask(text: str) -> str:
        """Asks the shunt."""
        return str(shunt.invoke(text).content)

    outer: ShuntRunnable = ShuntRunnable(small=WordModel(), large=ask, pruning=None, policy=AlwaysLarge(), name="outer")
    outer.invoke("hello", {"callbacks": [telemetry]})
    spans = desk.spans()
    assert spans["ShuntRunnable"].parent.span_id == spans["outer"].context.span_id
    assert telemetry._runs == {}


def test_telemetry_other_runs_are_not_traced(desk: Desk, server: ScriptedServer) -> None:
    instrument(desk.tracers, desk.meters)
    (ChatPromptTemplate.from_template("{x}") | server.chat_model()).invoke({"x": "y"})
    assert desk.spans() == {}
    model = ShuntChatModel(small=WordModel(), large=server.chat_model(), policy=AlwaysLarge())
    model.invoke("hello")
    assert set(desk.spans()) == {"ShuntChatModel", "WordModel", "chat gpt-4"}
    uninstrument()
    desk.exporter.clear()
    model.invoke("hello")
    assert desk.spans() == {}


def test_telemetry_environment_variable_enables_it() -> None:
    code = (
        "import langchain_datashunt.routing.shunt\n"
        "import langchain_datashunt.telemetry as t\n"
        "print(t._SWITCH.handler is not None)"
    )
    for value, expected in (("", "False"), ("true", "True")):
        environment = {**os.environ, "DATASHUNT_OTEL": value}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected, done.stderr
