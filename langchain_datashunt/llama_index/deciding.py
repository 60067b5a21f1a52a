"""What the LlamaIndex parts share: asking the small model, deciding, telling it to the dispatcher, and recording."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, Literal

from langchain_core.runnables import Runnable
from langchain_core.runnables.base import coerce_to_runnable
from langchain_core.utils.uuid import uuid7
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.base import BaseEvent

from langchain_datashunt._utils.control_flow import raise_control_flow
from langchain_datashunt.call_log.finished_call import FinishedCall, now
from langchain_datashunt.decision import Latency, ShuntDecision
from langchain_datashunt.inputs import text_reader
from langchain_datashunt.large_models.watcher import LargeCallWatcher
from langchain_datashunt.policies.thresholds import Policy
from langchain_datashunt.routing.plan import decide_one
from langchain_datashunt.routing.settings import policy_for

dispatcher = get_dispatcher(__name__)


class ShuntDecisionEvent(BaseEvent):
    """Where one question went, and why; see `ShuntDecision`. Never the question itself."""

    route: Literal["small", "student", "large"]
    reason: str
    label: str | None = None
    confidence: float | None = None
    score: float | None = None
    threshold: float | None = None
    policy: str = ""
    model: str | None = None
    error: str | None = None

    @classmethod
    def class_name(cls) -> str:
        """The event's name."""
        return "ShuntDecisionEvent"


class Decider:
    """A small model and its policy.

    Args:
        small: The small model.
        policy: When its answer is kept; None for the small model's own, or a threshold of 0.9.
        recorder: A `distillation.Recorder`, or None.
    """

    def __init__(self, small: Any, policy: Policy | None = None, recorder: Any = None) -> None:
        self.small: Runnable[Any, Any] = coerce_to_runnable(small)
        self.policy, self.recorder = policy_for(self.small, policy), recorder
        self.policy.check(self.labels)

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The labels that the small model knows, where that can be told."""
        found: tuple[str, ...] | None = getattr(self.small, "labels", None)
        return found

    def decide(self, text: str) -> tuple[ShuntDecision, float]:
        """Ask the small model about a question; the decision, and the seconds that took."""
        started = time.perf_counter()
        try:
            answer = self.small.invoke(text)
        except Exception as error:
            raise_control_flow(error)
            answer = error
        return decide_one(answer, self.policy), time.perf_counter() - started

    async def adecide(self, text: str) -> tuple[ShuntDecision, float]:
        """As `decide`; the small model computes in a thread."""
        started = time.perf_counter()
        try:
            answer = await self.small.ainvoke(text)
        except Exception as error:
            raise_control_flow(error)
            answer = error
        return decide_one(answer, self.policy), time.perf_counter() - started

    def deferred(self, decision: ShuntDecision) -> ShuntDecision:
        """The decision where there turned out to be no local answer."""
        return decision if decision.route == "large" else replace(decision, route="large", reason="deferred")

    def tell(self, decision: ShuntDecision) -> dict[str, Any]:
        """Send the decision to the dispatcher, and to the policy; JSON-ready, as responses carry it."""
        self.policy.observe(int(decision.route == "large"), 1)
        told = {key.removeprefix("shunt_"): value for key, value in decision.to_metadata().items() if value is not None}
        dispatcher.event(ShuntDecisionEvent(**told))
        return told

    def finished(
        self, text: str, decision: ShuntDecision, said: str | None, model: str, seconds: tuple[float, float]
    ) -> list[Any]:
        """The record of one question, for the recorder; none where nothing is to be recorded.

        Args:
            text: The question.
            decision: Where it went.
            said: What the large side answered, a label where it chose one; None where it was not asked.
            model: Its name.
            seconds: Wall time of the small and of the large side.
        """
        if self.recorder is None or (said is None and not self.recorder.wants("small")):
            return []
        watcher = None
        if said is not None:
            watcher = LargeCallWatcher()
            watcher.text, watcher.model = said, model
        labels = self.labels
        return [
            FinishedCall(
                self.recorder.task, str(uuid7()), text, decision, said, watcher, Latency(*seconds), labels, None,
                text_reader(), now(),
            )
        ]  # fmt: skip

    def record(self, log: list[Any]) -> None:
        """Hand records over."""
        if log:
            self.recorder.record(log)

    async def arecord(self, log: list[Any]) -> None:
        """Hand records over, without blocking the loop."""
        if log:
            await self.recorder.arecord(log)
