"""ShuntModelRouterMiddleware: route the model calls of an agent between a small and a large chat model."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

from langchain.agents.middleware.types import AgentMiddleware, ModelRequest, ModelResponse
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from typing_extensions import override

from langchain_datashunt._utils.control_flow import raise_if_control_flow
from langchain_datashunt.agents.turns import called_directly, drafting
from langchain_datashunt.chat.draft import SILENT_TAGS, DraftConfidence, mean_token_probability
from langchain_datashunt.chat.messages import marked, model_name
from langchain_datashunt.decision import ShuntDecision
from langchain_datashunt.exceptions import PredictionError
from langchain_datashunt.policies.thresholds import Policy, Threshold
from langchain_datashunt.prediction import ANSWER_LABELS, Prediction
from langchain_datashunt.routing.plan import decide_one


@dataclass
class ModelRouterStats:
    """Counts of turns by the model that answered.

    Attributes:
        small: Turns that the small model answered.
        large: Turns that the agent's own model answered.
        small_errors: Turns of `large` in which the small model failed.
    """

    small: int = 0
    large: int = 0
    small_errors: int = 0


class ShuntModelRouterMiddleware(AgentMiddleware[Any, Any, Any]):
    """Answer an agent's turn with a small chat model if it is confident, and with the agent's own model otherwise.

    Messages carry the decision in `response_metadata["shunt"]`. Rejected drafts of the small model do not appear in
    message streams.

    Args:
        small: The small chat model, with log-probabilities enabled.
        policy: Decides whether a draft is confident. None uses `Threshold(0.9)`.
        confidence: Computes the confidence of a message. Log-probabilities do not cover tool calls, so by default a
            turn with tool calls goes to the agent's own model.
        name: Name of this middleware. Each middleware of an agent needs its own name.
    """

    def __init__(
        self,
        small: BaseChatModel,
        *,
        policy: Policy | None = None,
        confidence: DraftConfidence = mean_token_probability,
        name: str = "ShuntModelRouterMiddleware",
    ) -> None:
        super().__init__()
        self.policy, self.confidence = policy or Threshold(0.9), confidence
        self.policy.check(ANSWER_LABELS)
        self.small = small.model_copy(update={"tags": [*(small.tags or []), *SILENT_TAGS]})
        self.stats = ModelRouterStats()
        self._name, self._lock = name, threading.Lock()

    @property
    @override
    def name(self) -> str:
        return self._name

    @override
    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        try:
            with drafting():
                draft = handler(request.override(model=self.small))
            kept, decision = self._judged(draft)
        except Exception as error:
            kept, decision = self._failed(error)
        if kept:
            return self._taken(draft, decision)
        return self._taken(handler(request), decision)

    @override
    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any]:
        try:
            with drafting():
                draft = await handler(request.override(model=self.small))
            kept, decision = self._judged(draft)
        except Exception as error:
            kept, decision = self._failed(error)
        if kept:
            return self._taken(draft, decision)
        return self._taken(await handler(request), decision)

    def _judged(self, draft: ModelResponse[Any]) -> tuple[bool, ShuntDecision]:
        message = next((one for one in draft.result if isinstance(one, AIMessage)), None)
        if message is not None and called_directly(message):
            return True, ShuntDecision("small", "confident", policy="a tool router called the tool")
        confidence = None if message is None else self.confidence(message)
        name = model_name(self.small)
        if confidence is None:
            raise PredictionError(
                f"{name} returned no log-probabilities, so its confidence is unknown. Enable logprobs."
            )
        decision = decide_one(Prediction.from_answer(message, confidence, model_id=name), self.policy)
        return decision.route == "small", decision

    def _failed(self, error: Exception) -> tuple[bool, ShuntDecision]:
        raise_if_control_flow(error)
        with self._lock:
            self.stats.small_errors += 1
        reason = f"{type(error).__name__}: {error}"
        return False, ShuntDecision("large", "small_error", policy=str(self.policy), error=reason)

    def _taken(self, response: ModelResponse[Any], decision: ShuntDecision) -> ModelResponse[Any]:
        self.policy.observe(int(decision.route == "large"), 1)
        with self._lock:
            setattr(self.stats, decision.route, getattr(self.stats, decision.route) + 1)
        result = [marked(one, decision) if isinstance(one, AIMessage) else one for one in response.result]
        return replace(response, result=result)
