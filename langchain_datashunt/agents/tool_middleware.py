"""ShuntToolRouterMiddleware: offer the large model only the tools that a small model ranks as likely."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from langchain.agents.middleware.types import AgentMiddleware, ModelRequest, ModelResponse
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolCall, ToolMessage
from langchain_core.outputs import ChatGeneration, LLMResult
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_core.utils.uuid import uuid7
from langgraph.prebuilt.tool_node import ToolCallRequest
from langgraph.types import Command
from typing_extensions import override

from langchain_datashunt._utils.control_flow import raise_if_control_flow
from langchain_datashunt.agents.arguments import ArgumentExtractor, NoArguments, extracted
from langchain_datashunt.agents.tool_router import Mode, ToolRanking, ToolRouter
from langchain_datashunt.agents.turns import METADATA_KEY, is_draft
from langchain_datashunt.call_log.finished_call import FinishedCall, now
from langchain_datashunt.chat.messages import text_alone
from langchain_datashunt.decision import Latency, ShuntDecision
from langchain_datashunt.exceptions import ConfigurationError, PartialInputError, ShuntWarning
from langchain_datashunt.inputs import is_blank, is_question, text_of, text_reader
from langchain_datashunt.large_models.prompt_pruning import ConformalPruning
from langchain_datashunt.large_models.watcher import LargeCallWatcher
from langchain_datashunt.policies.thresholds import Policy
from langchain_datashunt.routing.plan import decide_one, is_wiring_error

REFUSED_KEY = "shunt_refused"
"""Key in `additional_kwargs` of a refusal message that holds the tool's name."""

_CHARACTERS_A_TOKEN = 4


@dataclass
class ToolRouterStats:
    """Counters of a tool router middleware.

    Attributes:
        model_calls: Turns prepared for the large model.
        direct_calls: Tool calls made without the large model.
        refused: Refused calls of tools that were not offered.
        tools_pruned: Tools removed from requests, in total.
        tokens_saved: Estimated tokens of the removed tools' descriptions, in total.
        router_errors: Turns in which the small model failed and all tools were offered.
    """

    model_calls: int = 0
    direct_calls: int = 0
    refused: int = 0
    tools_pruned: int = 0
    tokens_saved: int = 0
    router_errors: int = 0


@dataclass(frozen=True)
class _Turn:
    """One turn: the prepared request, the tool ranking and the decision metadata."""

    request: ModelRequest[Any]
    ranking: ToolRanking | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    direct: AIMessage | None = None


class ShuntToolRouterMiddleware(AgentMiddleware[Any, Any, Any]):
    """Shortlist an agent's tools with a small model before each turn of the large model.

    ```python
    agent = create_agent(
        ChatOpenAI(model="gpt-4o"), tools,
        middleware=[ShuntToolRouterMiddleware(router, always_include=["search"])],
    )
    ```

    The classifier reads the last human message. Tools unknown to the classifier are always offered, and so are
    provider-side tools, which are given as dicts. If the large model calls a tool that was not offered, the call is
    refused with a message that lets the agent continue. That tool is offered from then on. If the small model fails,
    all tools are offered.

    Args:
        classifier: Small model whose labels are tool names, or a `ToolRouter`.
        mode: "conformal" offers a conformal set and requires a calibrated router, "hard" offers the `keep` most likely
            tools, "soft" offers all and lists their probabilities in the system message. None uses the router's mode.
        keep: Number of tools offered in "hard" mode or listed in "soft" mode; None uses the router's.
        conformal: Fitted `ConformalPruning` in place of a calibrated router.
        always_include: Names of tools that are always offered.
        direct: Policy for calling the most likely tool without the large model. None never does. Direct calls are made
            only in reply to the user's message, and only if `arguments` returns arguments that fit the tool.
        arguments: Extractor of tool arguments from the text. None means `NoArguments()`.
        recorder: `call_log.Recorder` that logs the large model's choice of tool, to train the classifier on.
        name: Middleware name, unique within the agent.
        count_tokens: Function from a tool's JSON description to a token count. None assumes four characters per token.

    Raises:
        ConfigurationError: The mode is "conformal" and the router is not calibrated.
    """

    def __init__(
        self,
        classifier: Runnable[Any, Any],
        *,
        mode: Mode | None = None,
        keep: int | None = None,
        conformal: ConformalPruning | None = None,
        always_include: Sequence[str] = (),
        direct: Policy | None = None,
        arguments: ArgumentExtractor | None = None,
        recorder: Any = None,
        name: str = "ShuntToolRouterMiddleware",
        count_tokens: Callable[[str], int] | None = None,
    ) -> None:
        super().__init__()
        given = {"mode": mode, "keep": keep, "conformal": conformal}
        changed = {key: value for key, value in given.items() if value is not None}
        if isinstance(classifier, ToolRouter):
            self.router = ToolRouter(**{**_fields(classifier), **changed})
        else:
            self.router = ToolRouter(classifier=classifier, **changed)
        if self.router.mode == "conformal" and self.router.conformal is None:
            raise ConfigurationError(
                "mode='conformal' needs calibration. Pass ToolRouter(classifier=...).calibrate(queries, tools), or use "
                "mode='hard' or mode='soft'."
            )
        self.always_include = frozenset(always_include)
        self.direct, self.arguments, self.recorder = direct, arguments or NoArguments(), recorder
        self.stats = ToolRouterStats()
        self._name, self._count, self._lock = name, count_tokens or _estimate, threading.Lock()
        self._tokens: dict[tuple[str, str], int] = {}
        self._warned = False

    @property
    @override
    def name(self) -> str:
        return self._name

    # Model turns

    @override
    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any] | AIMessage:
        text = self._question(request)
        if text is None:
            return handler(request)
        try:
            turn = self._prepared(request, text, self.router.invoke(text))
        except Exception as error:
            turn = self._unrouted(request, error)
        if turn.direct is not None:
            return turn.direct
        response = self._finished(turn, handler(turn.request))
        if log := self._log(turn, response, text):
            self.recorder.record(log)
        return response

    @override
    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any] | AIMessage:
        text = self._question(request)
        if text is None:
            return await handler(request)
        try:
            turn = self._prepared(request, text, await self.router.ainvoke(text))
        except Exception as error:
            turn = self._unrouted(request, error)
        if turn.direct is not None:
            return turn.direct
        response = self._finished(turn, await handler(turn.request))
        if log := self._log(turn, response, text):
            await self.recorder.arecord(log)
        return response

    def _question(self, request: ModelRequest[Any]) -> str | None:
        """Return the text to classify, or None if there is nothing to route."""
        missing = sorted(self.always_include - {_name(tool) for tool in request.tools})
        if missing and not self._warned:  # warn only: other middleware may have removed them from this turn
            self._warned = True
            warnings.warn(
                f"{self.name}: `always_include` names tools that are not in this turn: {', '.join(missing)}. "
                f"Available: {', '.join(sorted(_name(tool) for tool in request.tools)[:10])}.",
                ShuntWarning,
                stacklevel=2,
            )
        if not any(isinstance(tool, BaseTool) for tool in request.tools):
            return None
        if not any(map(is_question, request.messages)):
            return None
        try:
            text = text_of(request.messages)
        except PartialInputError:  # the small model cannot read an image, so all tools stay
            return None
        return None if is_blank(text) else text

    def _unrouted(self, request: ModelRequest[Any], error: Exception) -> _Turn:
        """Return a turn that offers all tools, after the small model failed."""
        raise_if_control_flow(error)
        if is_wiring_error(error):
            raise error
        self._add(model_calls=1, router_errors=1)
        return _Turn(request, metadata={"error": f"{type(error).__name__}: {error}"})

    def _prepared(self, request: ModelRequest[Any], text: str, ranking: ToolRanking) -> _Turn:
        metadata = {"label": ranking.best, "confidence": round(ranking.confidence, 4), "mode": self.router.mode}
        if (direct := self._direct(request, text, ranking)) is not None:
            self._add(direct_calls=1)
            return _Turn(request, ranking, metadata, _noted(direct, self.name, {**metadata, "route": "small"}))
        metadata["route"] = "large"
        if self.router.mode == "soft":
            self._add(model_calls=1)
            return _Turn(request.override(system_message=self._with_hint(request, ranking)), ranking, metadata)
        offered, pruned = self._split(request, ranking)
        saved = sum(self._tokens_of(tool) for tool in pruned)
        self._add(model_calls=1, tools_pruned=len(pruned), tokens_saved=saved)
        metadata |= {"offered": [_name(tool) for tool in offered], "of": len(request.tools), "tokens_saved": saved}
        return _Turn(request.override(tools=offered), ranking, metadata)

    def _split(self, request: ModelRequest[Any], ranking: ToolRanking) -> tuple[list[Any], list[Any]]:
        """Return the offered tools (unknown ones first, then by probability) and the removed tools."""
        known, there = frozenset(ranking.tools), {_name(tool) for tool in request.tools}
        likeliest = [tool for tool in ranking.tools if tool in there][: self.router.keep]
        shortlist = frozenset(likeliest if self.router.mode == "hard" else ranking.shortlist)
        wanted = {message.additional_kwargs.get(REFUSED_KEY) for message in request.messages}
        used = {call["name"] for message in request.messages for call in getattr(message, "tool_calls", None) or ()}
        forced = _forced(request.tool_choice)
        place = {tool: i for i, tool in enumerate(ranking.tools)}
        offered: list[Any] = []
        pruned: list[Any] = []
        for tool in request.tools:
            name = _name(tool)
            stays = (
                isinstance(tool, dict)
                or name not in known
                or name in shortlist
                or name in self.always_include
                or name in wanted
                or name in used
                or name == forced
            )
            (offered if stays else pruned).append(tool)
        if not any(isinstance(tool, BaseTool) for tool in offered) and pruned:  # no shortlisted tool is available
            best = min(pruned, key=lambda tool: place[_name(tool)])
            offered, pruned = [*offered, best], [tool for tool in pruned if tool is not best]
        offered.sort(key=lambda tool: place.get(_name(tool), -1))
        return offered, pruned

    def _direct(self, request: ModelRequest[Any], text: str, ranking: ToolRanking) -> AIMessage | None:
        """Return a direct call of the most likely tool, or None if the large model is needed."""
        last = request.messages[-1] if request.messages else None
        if self.direct is None or not is_question(last) or last is None or request.response_format is not None:
            return None
        if not text_alone(last):  # a text classifier cannot see other content, such as images
            return None
        confident = decide_one(ranking.prediction, self.direct).route == "small"
        tool = next((t for t in request.tools if isinstance(t, BaseTool) and t.name == ranking.best), None)
        forced = _forced(request.tool_choice)
        if not confident or tool is None or request.tool_choice == "none" or forced not in (None, tool.name):
            return None
        args = extracted(self.arguments, tool, text)
        if args is None:
            return None
        call = ToolCall(name=tool.name, args=args, id=f"call_{uuid7().hex}", type="tool_call")
        usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
        return AIMessage("", tool_calls=[call], id=f"shunt-{uuid7()}", usage_metadata=usage)

    def _with_hint(self, request: ModelRequest[Any], ranking: ToolRanking) -> SystemMessage:
        there = {_name(tool) for tool in request.tools}
        likely = [(name, p) for name, p in ranking.top(len(ranking.tools)) if name in there][: self.router.keep]
        lines = "\n".join(f"- {name} with probability {p:.2f}" for name, p in likely)
        hint = (
            f"A small classifier thinks that these tools fit the user's last message:\n{lines}\n"
            f"Use this as a hint; it may be wrong."
        )
        own = request.system_message
        if own is None:
            return SystemMessage(hint)
        if isinstance(own.content, str):
            return own.model_copy(update={"content": f"{own.content}\n\n{hint}"})
        return own.model_copy(update={"content": [*own.content, {"type": "text", "text": hint}]})

    def _finished(self, turn: _Turn, response: ModelResponse[Any]) -> ModelResponse[Any]:
        """Return the response with the decision attached to its messages."""
        result = [
            _noted(message, self.name, turn.metadata) if isinstance(message, AIMessage) else message
            for message in response.result
        ]
        return replace(response, result=result)

    def _log(self, turn: _Turn, response: ModelResponse[Any], text: str) -> list[Any]:
        """Return a record if the large model answered the user with one call of a known tool, else nothing."""
        answer = next((message for message in response.result if isinstance(message, AIMessage)), None)
        if self.recorder is None or turn.ranking is None or answer is None or len(answer.tool_calls) != 1:
            return []
        if is_draft() or answer.tool_calls[0]["name"] not in turn.ranking.tools:
            return []
        if not isinstance(turn.request.messages[-1], HumanMessage):
            return []
        prediction, watcher = turn.ranking.prediction, LargeCallWatcher()
        watcher.on_llm_end(LLMResult(generations=[[ChatGeneration(message=answer)]]))
        decision = ShuntDecision("large", "deferred", prediction, policy=f"tools: {self.router.mode}")
        return [
            FinishedCall(
                self.recorder.task, str(uuid7()), text, decision, answer.tool_calls[0]["name"], watcher, Latency(),
                prediction.labels, None, text_reader(), now(),
            )
        ]  # fmt: skip

    # Tool calls

    @override
    def wrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], ToolMessage | Command[Any]]
    ) -> ToolMessage | Command[Any]:
        return self._refusal(request) or handler(request)

    @override
    async def awrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], Awaitable[ToolMessage | Command[Any]]]
    ) -> ToolMessage | Command[Any]:
        return self._refusal(request) or await handler(request)

    def _refusal(self, request: ToolCallRequest) -> ToolMessage | None:
        """Return a refusal message if the called tool was not offered, else None."""
        name, call_id = request.tool_call["name"], request.tool_call["id"]
        metadata = _metadata_with(_messages(request.state), call_id).get(self.name, {})
        if request.tool is None or "offered" not in metadata or name in metadata["offered"]:
            return None
        self._add(refused=1)
        return ToolMessage(
            f"The tool {name} was not among those offered for this message ({', '.join(metadata['offered'])}), so it "
            f"was not called. Use one of these, or call {name} once more if nothing else fits: it is offered now.",
            name=name,
            tool_call_id=str(call_id),
            status="error",
            additional_kwargs={REFUSED_KEY: name},
        )

    # Counters

    def _add(self, **counts: int) -> None:
        if is_draft() and "direct_calls" not in counts:
            return
        with self._lock:
            for name, n in counts.items():
                setattr(self.stats, name, getattr(self.stats, name) + n)

    def _tokens_of(self, tool: BaseTool) -> int:
        key = (tool.name, tool.description)
        if key not in self._tokens:
            self._tokens[key] = self._count(json.dumps(convert_to_openai_tool(tool), ensure_ascii=False))
        return self._tokens[key]


def _fields(router: ToolRouter) -> dict[str, Any]:
    return {name: getattr(router, name) for name in ("classifier", "mode", "keep", "conformal")}


def _estimate(text: str) -> int:
    return -(-len(text) // _CHARACTERS_A_TOKEN)


def _name(tool: Any) -> str:
    if isinstance(tool, BaseTool):
        return tool.name
    return str(tool.get("name") or tool.get("function", {}).get("name") or tool.get("type", "")) if tool else ""


def _forced(choice: Any) -> str | None:
    """Return the name of the tool that must be called, or None."""
    if isinstance(choice, Mapping):
        return str(choice.get("function", choice).get("name"))
    return choice if isinstance(choice, str) and choice not in ("auto", "any", "required", "none") else None


def _noted(message: AIMessage, name: str, metadata: Mapping[str, Any]) -> AIMessage:
    """Return a copy of the message that carries a middleware's decision next to those of other middleware."""
    all_metadata = {**message.response_metadata.get(METADATA_KEY, {}), name: dict(metadata)}
    return message.model_copy(update={"response_metadata": {**message.response_metadata, METADATA_KEY: all_metadata}})


def _messages(state: Any) -> Sequence[BaseMessage]:
    found = state.get("messages", []) if isinstance(state, Mapping) else getattr(state, "messages", [])
    return list(found)


def _metadata_with(messages: Sequence[BaseMessage], call_id: str | None) -> Mapping[str, Any]:
    """Return the middleware decisions attached to the message that made a tool call."""
    for message in reversed(messages):
        if isinstance(message, AIMessage) and any(call["id"] == call_id for call in message.tool_calls):
            metadata: Mapping[str, Any] = message.response_metadata.get(METADATA_KEY, {})
            return metadata
    return {}
