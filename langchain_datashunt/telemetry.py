"""OpenTelemetry spans (GenAI semantic conventions) and metrics of shunted calls. Disabled by default."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.outputs import ChatGeneration, LLMResult
from langchain_core.tracers.context import register_configure_hook
from typing_extensions import override

from langchain_datashunt._utils.optional import require
from langchain_datashunt._utils.pricing import cost_usd
from langchain_datashunt._version import __version__
from langchain_datashunt.decision import DECISION_EVENT
from langchain_datashunt.exceptions import MissingExtraError, ShuntWarning

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import Span, TracerProvider

SCOPE = "langchain_datashunt"
"""Name of the tracer and the meter."""

SWITCH_VARIABLE = "DATASHUNT_OTEL"
"""Environment variable that enables telemetry."""

_PART_TAGS = ("shunt:small", "shunt:student", "shunt:large")
_CLIENT_TOKENS = "gen_ai.client.token.usage"
_CLIENT_DURATION = "gen_ai.client.operation.duration"


@dataclass
class _Run:
    """A callback run in progress."""

    name: str
    parent: UUID | None
    started_ns: int
    context: Any
    span: Span | None = None
    decision: dict[str, Any] | None = None
    cost: float = 0.0
    priced: bool = False
    children: list[UUID] = field(default_factory=list)
    attributes: dict[str, Any] | None = None


class ShuntTelemetry(BaseCallbackHandler):
    """Create OpenTelemetry spans and metrics of shunted calls, without input and answer texts.

    Spans: one for each shunted call (`datashunt.route`, `datashunt.reason`, `datashunt.label`, `datashunt.confidence`,
    ...). Its child spans are one for each small model, and one CLIENT span for each call of a chat model with the GenAI
    attributes (`gen_ai.request.model`, `gen_ai.usage.input_tokens`, ...). The parent of a span is the span of the
    enclosing run, or the current span at the start of the call if there is none.

    Metrics: `datashunt.decisions` (counter, by route and reason), `datashunt.confidence` and `datashunt.duration`
    (histograms, by route), `datashunt.cost` (counter, USD by model) and `datashunt.cost_saved` (counter, USD: the
    average cost of deferred calls so far, added for each local answer), and the conventions'
    `gen_ai.client.token.usage` and `gen_ai.client.operation.duration`.

    Args:
        tracer_provider: Tracer provider. None uses the global one.
        meter_provider: Meter provider. None uses the global one.

    Raises:
        MissingExtraError: opentelemetry-api is not installed.
    """

    run_inline = True

    def __init__(
        self, tracer_provider: TracerProvider | None = None, meter_provider: MeterProvider | None = None
    ) -> None:
        self._trace: Any = require("opentelemetry.trace", "otel")
        self._context: Any = require("opentelemetry.context", "otel")
        metrics: Any = require("opentelemetry.metrics", "otel")
        self._tracer = self._trace.get_tracer(SCOPE, __version__, tracer_provider)
        meter = metrics.get_meter(SCOPE, __version__, meter_provider)
        self._decisions = meter.create_counter("datashunt.decisions", "{call}", "Shunted calls by route and reason.")
        self._confidence = meter.create_histogram("datashunt.confidence", "1", "Confidence of the small model.")
        self._duration = meter.create_histogram("datashunt.duration", "s", "Wall time of shunted calls.")
        self._cost = meter.create_counter("datashunt.cost", "{USD}", "Cost of large-model calls with a known price.")
        self._saved = meter.create_counter("datashunt.cost_saved", "{USD}", "Estimated cost saved by local answers.")
        self._tokens = meter.create_histogram(_CLIENT_TOKENS, "{token}", "Tokens used in requests.")
        self._operation = meter.create_histogram(_CLIENT_DURATION, "s", "Wall time of requests.")
        self._runs: dict[UUID, _Run] = {}
        self._asked, self._spent = 0, 0.0
        self._lock = threading.Lock()

    # Runs

    def _begin(self, run_id: UUID, parent_run_id: UUID | None, name: str) -> _Run:
        run = _Run(name, parent_run_id, time.time_ns(), self._context.get_current())
        with self._lock:
            self._runs[run_id] = run
            if parent_run_id is not None and (above := self._runs.get(parent_run_id)) is not None:
                above.children.append(run_id)
        return run

    def _end(self, run_id: UUID) -> _Run | None:
        with self._lock:
            run = self._runs.pop(run_id, None)
        for child in () if run is None else run.children:  # cancelled child runs do not always report their end
            if (left := self._end(child)) is not None:
                self._close(left, asyncio.CancelledError())
        return run

    def _open(self, run: _Run, kind: Any = None) -> Span:
        """Return the run's span. If it is not open yet, open it with the start time of the run."""
        if run.span is None:
            above, context = run.parent, run.context
            while above is not None and (found := self._runs.get(above)) is not None:
                if found.span is not None:
                    context = self._trace.set_span_in_context(found.span, run.context)
                    break
                above = found.parent
            more = {} if kind is None else {"kind": kind}
            run.span = self._tracer.start_span(run.name, context, start_time=run.started_ns, **more)
        return run.span

    def _shunt_above(self, run_id: UUID | None) -> _Run | None:
        """Return the nearest enclosing shunted call, or None."""
        while run_id is not None and (run := self._runs.get(run_id)) is not None:
            if run.span is not None and run.attributes is None:
                return run
            run_id = run.parent
        return None

    def _close(self, run: _Run, error: BaseException | None = None) -> None:
        if run.span is None:
            return
        if error is not None:
            run.span.set_attribute("error.type", type(error).__qualname__)
            run.span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, type(error).__name__))
        run.span.end()

    @override
    def on_chain_start(
        self, serialized: Any, inputs: Any, *, run_id: UUID, parent_run_id: UUID | None = None,
        tags: list[str] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        name = kwargs.get("name") or (serialized or {}).get("name") or "chain"
        run = self._begin(run_id, parent_run_id, str(name))
        part = next((tag for tag in tags or () if tag in _PART_TAGS), None)
        above = self._runs.get(parent_run_id) if parent_run_id is not None else None
        if part is None or above is None:
            return
        self._open(above)
        if part != "shunt:large":
            run.attributes = {"datashunt.part": part.removeprefix("shunt:")}
            self._open(run).set_attributes(run.attributes)

    @override
    def on_custom_event(self, name: str, data: Any, *, run_id: UUID, **kwargs: Any) -> None:
        run = self._runs.get(run_id)
        if name != DECISION_EVENT or run is None:
            return
        run.decision = {key.removeprefix("shunt_"): value for key, value in data.items() if value is not None}
        attributes = {f"datashunt.{key}": value for key, value in run.decision.items() if key != "error"}
        if "error" in run.decision:  # the message may quote the input
            attributes["datashunt.error"] = str(run.decision["error"]).partition(":")[0]
        self._open(run).set_attributes(attributes)

    @override
    def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        self._finish(run_id, None)

    @override
    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        self._finish(run_id, error)

    def _finish(self, run_id: UUID, error: BaseException | None) -> None:
        run = self._end(run_id)
        if run is None:
            return
        if run.decision is not None:
            self._measure(run, run.decision)
        self._close(run, error)

    def _measure(self, run: _Run, decision: dict[str, Any]) -> None:
        route = {"datashunt.route": decision["route"]}
        self._decisions.add(1, {**route, "datashunt.reason": decision["reason"]})
        self._duration.record((time.time_ns() - run.started_ns) / 1e9, route)
        if "confidence" in decision:
            self._confidence.record(decision["confidence"], route)
        with self._lock:
            if run.priced:
                self._asked, self._spent = self._asked + 1, self._spent + run.cost
            mean = self._spent / self._asked if self._asked else 0.0
        if decision["route"] != "large" and not run.priced and mean > 0.0:
            self._saved.add(mean)

    # Tools and retrievers have no spans. They are tracked so that runs inside them find their enclosing call.

    @override
    def on_tool_start(
        self, serialized: Any, input_str: str, *, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any
    ) -> None:
        self._begin(run_id, parent_run_id, "tool")

    @override
    def on_tool_end(self, output: Any, *, run_id: UUID, **kwargs: Any) -> None:
        self._end(run_id)

    @override
    def on_tool_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        self._end(run_id)

    @override
    def on_retriever_start(
        self, serialized: Any, query: str, *, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any
    ) -> None:
        self._begin(run_id, parent_run_id, "retriever")

    @override
    def on_retriever_end(self, documents: Any, *, run_id: UUID, **kwargs: Any) -> None:
        self._end(run_id)

    @override
    def on_retriever_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        self._end(run_id)

    # Chat models inside shunted calls

    @override
    def on_chat_model_start(
        self, serialized: Any, messages: Any, *, run_id: UUID, parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        shunt = self._shunt_above(parent_run_id)
        if shunt is None:
            return
        request, given = metadata or {}, kwargs.get("invocation_params") or {}
        model = str(request.get("ls_model_name") or given.get("model") or given.get("model_name") or "unknown")
        run = self._begin(run_id, parent_run_id, f"chat {model}")
        attributes = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": str(request.get("ls_provider") or "unknown"),
            "gen_ai.request.model": model,
            "gen_ai.request.temperature": request.get("ls_temperature"),
            "gen_ai.request.max_tokens": request.get("ls_max_tokens"),
        }
        run.attributes = {key: value for key, value in attributes.items() if value is not None}
        self._open(run, self._trace.SpanKind.CLIENT).set_attributes(run.attributes)

    @override
    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **kwargs: Any) -> None:
        run = self._end(run_id)
        if run is None or run.span is None:
            return
        generation = response.generations[0][0] if response.generations and response.generations[0] else None
        message = generation.message if isinstance(generation, ChatGeneration) else None
        shared = self._shared(run)
        try:
            if message is not None:
                self._describe(run, message, shared)
            self._operation.record((time.time_ns() - run.started_ns) / 1e9, shared)
        finally:
            self._close(run)

    def _describe(self, run: _Run, message: Any, shared: dict[str, Any]) -> None:
        """Add the reply's metadata to the span, the token metrics and the cost of the enclosing calls."""
        assert run.span is not None
        metadata, usage = message.response_metadata, getattr(message, "usage_metadata", None)
        attributes = {
            "gen_ai.response.model": metadata.get("model_name"),
            "gen_ai.response.id": metadata.get("id"),
            "gen_ai.response.finish_reasons": [metadata["finish_reason"]] if metadata.get("finish_reason") else None,
        }
        cached = usage is not None and usage.get("total_cost") == 0  # LangChain marks cached answers this way
        if usage and not cached and "input_tokens" in usage:
            for kind in ("input", "output"):
                attributes[f"gen_ai.usage.{kind}_tokens"] = usage[f"{kind}_tokens"]
                self._tokens.record(usage[f"{kind}_tokens"], {**shared, "gen_ai.token.type": kind})
            model = str(metadata.get("model_name") or shared["gen_ai.request.model"])
            if (price := cost_usd({model: usage})) is not None:
                self._cost.add(price, {"gen_ai.response.model": model})
                self._charge(run.parent, price)
        run.span.set_attributes({key: value for key, value in attributes.items() if value is not None})

    def _charge(self, run_id: UUID | None, price: float) -> None:
        """Add a price to all enclosing runs."""
        with self._lock:
            while run_id is not None and (run := self._runs.get(run_id)) is not None:
                run.cost, run.priced, run_id = run.cost + price, True, run.parent

    @staticmethod
    def _shared(run: _Run) -> dict[str, Any]:
        names = ("gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.request.model")
        return {name: (run.attributes or {})[name] for name in names}

    @override
    def on_llm_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        run = self._end(run_id)
        if run is None or run.span is None:
            return
        took = (time.time_ns() - run.started_ns) / 1e9
        self._operation.record(took, {**self._shared(run), "error.type": type(error).__qualname__})
        self._close(run, error)


class _Switch:
    """Stand-in for the context variable of LangChain's configure hook, with one handler for all contexts."""

    def __init__(self) -> None:
        self.handler: ShuntTelemetry | None = None
        self._registered, self._lock = False, threading.Lock()

    def get(self) -> ShuntTelemetry | None:
        return self.handler

    def turn(self, handler: ShuntTelemetry | None) -> None:
        with self._lock:
            if handler is not None and not self._registered:
                register_configure_hook(self, inheritable=True)  # type: ignore[arg-type]
                self._registered = True
            self.handler = handler


_SWITCH = _Switch()


def instrument(
    tracer_provider: TracerProvider | None = None, meter_provider: MeterProvider | None = None
) -> ShuntTelemetry:
    """Trace and measure all shunted calls of this process, and return the handler.

    The environment variable `DATASHUNT_OTEL=true` does the same with the global providers.

    Args:
        tracer_provider: Tracer provider. None uses the global one.
        meter_provider: Meter provider. None uses the global one.

    Raises:
        MissingExtraError: opentelemetry-api is not installed.
    """
    handler = ShuntTelemetry(tracer_provider, meter_provider)
    _SWITCH.turn(handler)
    return handler


def uninstrument() -> None:
    """Stop tracing and measuring."""
    _SWITCH.turn(None)


def instrument_if_asked() -> None:
    """Call `instrument` if the environment requests it, and warn if opentelemetry-api is not installed."""
    if os.environ.get(SWITCH_VARIABLE, "").strip().lower() not in ("1", "true", "yes", "on"):
        return
    try:
        instrument()
    except MissingExtraError as error:
        warnings.warn(f"{SWITCH_VARIABLE} is set, but telemetry is disabled: {error}", ShuntWarning, stacklevel=2)
