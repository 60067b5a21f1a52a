"""Decider: the routing decisions, events and log records that all LlamaIndex components share."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, Literal

from langchain_core.runnables import Runnable
from langchain_core.runnables.base import coerce_to_runnable
from langchain_core.utils.uuid import uuid7
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.base import BaseEvent

from langchain_datashunt._utils.control_flow import raise_if_control_flow
from langchain_datashunt.call_log.finished_call import FinishedCall, now
from langchain_datashunt.decision import Latency, ShuntDecision
from langchain_datashunt.inputs import text_reader
from langchain_datashunt.large_models.watcher import LargeCallWatcher
from langchain_datashunt.policies.thresholds import Policy
from langchain_datashunt.routing.plan import decide_one
from langchain_datashunt.routing.settings import policy_for

dispatcher = get_dispatcher(__name__)


class ShuntDecisionEvent(BaseEvent):
    """The routing decision about one question, without its text. See `ShuntDecision` for the fields."""

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
        """Return the name of the event."""
        return "ShuntDecisionEvent"


MAX_INPUT_CHARACTERS = 100_000
"""Maximum length of a question, in characters."""


class Decider:
    """Decide by a small model and a policy whether a question is answered locally.

    Args:
        small: The small model.
        policy: Decides which predictions are confident. None uses the small model's policy, then its threshold, then
            `Threshold(0.9)`.
        recorder: A `call_log.Recorder` that logs calls. None logs nothing.
    """

    def __init__(self, small: Any, policy: Policy | None = None, recorder: Any = None) -> None:
        self.small: Runnable[Any, Any] = coerce_to_runnable(small)
        self.policy, self.recorder = policy_for(self.small, policy), recorder
        self.policy.check(self.labels)

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Labels of the small model, or None if they are unknown."""
        found: tuple[str, ...] | None = getattr(self.small, "labels", None)
        return found

    def decide(self, text: str) -> tuple[ShuntDecision, float]:
        """Return the decision about a question, and the wall time of the small model in seconds.

        Raises:
            InputError: The question is blank or too long.
            Exception: The error of a small model that cannot work as it is set up.
        """
        started = time.perf_counter()
        self._check(text)
        try:
            answer = self.small.invoke(text)
        except Exception as error:
            raise_if_control_flow(error)
            answer = error
        return decide_one(answer, self.policy), time.perf_counter() - started

    async def adecide(self, text: str) -> tuple[ShuntDecision, float]:
        """Async version of `decide`."""
        started = time.perf_counter()
        self._check(text)
        try:
            answer = await self.small.ainvoke(text)
        except Exception as error:
            raise_if_control_flow(error)
            answer = error
        return decide_one(answer, self.policy), time.perf_counter() - started

    def _check(self, text: str) -> None:
        if (refusal := text_reader().refusal(text, MAX_INPUT_CHARACTERS)) is not None:
            raise refusal

    def deferred(self, decision: ShuntDecision) -> ShuntDecision:
        """Return the decision, changed to deferred if the confident prediction turned out to have no local answer."""
        return decision if decision.route == "large" else replace(decision, route="large", reason="deferred")

    def tell(self, decision: ShuntDecision) -> dict[str, Any]:
        """Send the decision to the dispatcher and the policy, and return it as a JSON-serializable mapping."""
        self.policy.observe(int(decision.route == "large"), 1)
        metadata = {
            key.removeprefix("shunt_"): value for key, value in decision.to_metadata().items() if value is not None
        }
        dispatcher.event(ShuntDecisionEvent(**metadata))
        return metadata

    def finished(
        self, text: str, decision: ShuntDecision, answer: str | None, model: str, seconds: tuple[float, float]
    ) -> list[Any]:
        """Return the log record of one question, or an empty list if nothing is to be logged.

        Args:
            text: The question.
            decision: The routing decision.
            answer: Answer of the large model, a label if it chose one. None if it was not called.
            model: Name of the large model.
            seconds: Wall times of the small and the large model, in seconds.
        """
        if self.recorder is None or (answer is None and not self.recorder.wants("small")):
            return []
        watcher = None
        if answer is not None:
            watcher = LargeCallWatcher()
            watcher.text, watcher.model = answer, model
        labels = self.labels
        return [
            FinishedCall(
                self.recorder.task, str(uuid7()), text, decision, answer, watcher, Latency(*seconds), labels, None,
                text_reader(), now(), weight=self.recorder.weight("small" if answer is None else "large"),
            )
        ]  # fmt: skip

    def record(self, log: list[Any]) -> None:
        """Pass records to the recorder."""
        if log:
            self.recorder.record(log)

    async def arecord(self, log: list[Any]) -> None:
        """Async version of `record`."""
        if log:
            await self.recorder.arecord(log)
