"""ShuntQueryEngine: local answers in front of any query engine."""

from __future__ import annotations

import inspect
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

from langchain_core.runnables.config import run_in_executor
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.response.schema import RESPONSE_TYPE, Response
from llama_index.core.callbacks import CallbackManager
from llama_index.core.prompts.mixin import PromptMixinType
from llama_index.core.schema import NodeWithScore, QueryBundle

from langchain_datashunt.exceptions import ConfigurationError
from langchain_datashunt.llama_index.deciding import Decider
from langchain_datashunt.policies.thresholds import Policy
from langchain_datashunt.prediction import Prediction

LocalAnswer: TypeAlias = str | Response | BaseQueryEngine
"""Local answer for a label: a text, a complete response, or a query engine that answers the question."""

LocalAnswerer: TypeAlias = Callable[[str, Prediction], str | Response | None | Awaitable[str | Response | None]]
"""Function from the question and the prediction to a local answer, or None to defer."""


class ShuntQueryEngine(BaseQueryEngine):
    """Answer locally if the small model is confident, and query another engine otherwise.

    ```python
    engine = ShuntQueryEngine(small, {"opening_hours": "From 9 to 17."}, index.as_query_engine(llm=llm))
    ```

    Responses carry the decision under `metadata["shunt"]`.

    Args:
        small: Small model.
        local: Answers by label, or a function that returns them (sync, or async for `aquery`). Labels without an answer
            are deferred.
        large: Query engine for deferred questions.
        policy: Policy that decides when to answer locally. None uses the small model's own, or a threshold of 0.9.
        recorder: `call_log.Recorder` that logs the large engine's answers.
        callback_manager: LlamaIndex callback manager. None uses that of `large`.

    Raises:
        ConfigurationError: `local` has a label that the small model does not have.
    """

    def __init__(
        self,
        small: Any,
        local: Mapping[str, LocalAnswer] | LocalAnswerer,
        large: BaseQueryEngine,
        *,
        policy: Policy | None = None,
        recorder: Any = None,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        self._decider, self._local, self._large = Decider(small, policy, recorder), local, large
        labels = self._decider.labels
        if isinstance(local, Mapping) and labels and (unknown := sorted(set(local) - set(labels))):
            raise ConfigurationError(
                f"`local` has answers for labels that the small model does not have: {', '.join(unknown[:5])}. "
                f"Available labels: {', '.join(labels[:10])}."
            )
        super().__init__(callback_manager or large.callback_manager)

    def _get_prompt_modules(self) -> PromptMixinType:
        return {"large": self._large}

    def _query(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        text = query_bundle.query_str
        decision, seconds = self._decider.decide(text)
        if decision.route == "small" and decision.prediction is not None:
            found = self._find(text, decision.prediction)
            if inspect.isawaitable(found):
                _close(found)
                raise ConfigurationError(
                    "`local` is a coroutine function, but the call is synchronous. "
                    "Use `aquery`, or pass a plain function."
                )
            if isinstance(found, BaseQueryEngine):
                found = found.query(query_bundle)
            if found is not None:
                self._decider.record(self._decider.finished(text, decision, None, "", (seconds, 0.0)))
                return _with_metadata(found, self._decider.tell(decision))
            decision = self._decider.deferred(decision)
        decided, started = self._decider.tell(decision), time.perf_counter()
        response = self._large.query(query_bundle)
        took = (seconds, time.perf_counter() - started)
        self._decider.record(self._decider.finished(text, decision, _text(response), _name(self._large), took))
        return _with_metadata(response, decided)

    async def _aquery(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        text = query_bundle.query_str
        decision, seconds = await self._decider.adecide(text)
        if decision.route == "small" and decision.prediction is not None:
            found = await self._afind(text, decision.prediction)
            if isinstance(found, BaseQueryEngine):
                found = await found.aquery(query_bundle)
            if found is not None:
                await self._decider.arecord(self._decider.finished(text, decision, None, "", (seconds, 0.0)))
                return _with_metadata(found, self._decider.tell(decision))
            decision = self._decider.deferred(decision)
        decided, started = self._decider.tell(decision), time.perf_counter()
        response = await self._large.aquery(query_bundle)
        took = (seconds, time.perf_counter() - started)
        await self._decider.arecord(self._decider.finished(text, decision, _text(response), _name(self._large), took))
        return _with_metadata(response, decided)

    def _find(self, text: str, prediction: Prediction) -> Any:
        if isinstance(self._local, Mapping):
            return self._local.get(prediction.label)
        return self._local(text, prediction)

    async def _afind(self, text: str, prediction: Prediction) -> Any:
        """Async version of `_find` that runs plain functions in a thread, to keep the event loop free."""
        if isinstance(self._local, Mapping) or inspect.iscoroutinefunction(self._local):
            found = self._find(text, prediction)
        else:
            found = await run_in_executor(None, self._find, text, prediction)
        return await found if inspect.isawaitable(found) else found

    # Delegated to the large engine

    def retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        """Return the large engine's nodes."""
        return self._large.retrieve(query_bundle)

    def synthesize(self, query_bundle: QueryBundle, nodes: Any, additional_source_nodes: Any = None) -> RESPONSE_TYPE:
        """Return the large engine's response, synthesized from the nodes."""
        return self._large.synthesize(query_bundle, nodes, additional_source_nodes)

    async def asynthesize(
        self, query_bundle: QueryBundle, nodes: Any, additional_source_nodes: Any = None
    ) -> RESPONSE_TYPE:
        """Async version of `synthesize`."""
        return await self._large.asynthesize(query_bundle, nodes, additional_source_nodes)


def _with_metadata(found: Any, decided: dict[str, Any]) -> RESPONSE_TYPE:
    """Return a response with the decision attached. A `Response` is copied, since it may be shared."""
    if isinstance(found, str):
        return Response(response=found, metadata={"shunt": decided})
    if isinstance(found, Response):
        return Response(found.response, found.source_nodes, {**(found.metadata or {}), "shunt": decided})
    response: RESPONSE_TYPE = found
    response.metadata = {**(response.metadata or {}), "shunt": decided}
    return response


def _text(response: Any) -> str:
    """Return the text of a response, or an empty string if it is still streaming."""
    return str(response.response) if isinstance(response, Response) else ""


def _name(engine: Any) -> str:
    return type(engine).__name__


def _close(found: Any) -> None:
    if inspect.iscoroutine(found):
        found.close()
