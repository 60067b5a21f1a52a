"""What becomes of the sub-tasks of one input: answers, decisions, and what is still open. Nothing is asked here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from langchain_core.messages.ai import UsageMetadata

from langchain_datashunt.decision import Latency, ShuntDecision
from langchain_datashunt.exceptions import ConfigurationError, LocalOnlyError, UnparsableAnswerError
from langchain_datashunt.inputs import InputReader
from langchain_datashunt.large_models.watcher import LargeCallWatcher
from langchain_datashunt.prediction import Prediction
from langchain_datashunt.routing.plan import Plan
from langchain_datashunt.routing.subtask_questions import (
    OpenQuestions,
    Subtask,
)


@dataclass(frozen=True, slots=True)
class SubtaskResult:
    """The answers to one input with their decisions.

    Attributes:
        outputs: Answer by sub-task; None where the large model failed and no small one had anything to say.
        decisions: Who answered each, and why.
        usage: Tokens that the large model counted, by model name.
        cost_usd: Price of `usage`; 0.0 where it was not asked, None where the price is not known.
        latency: Wall time of all small models together, and of the large call.
        record_id: Id of the run.
        record_ids: Under which each sub-task's call is recorded.
    """

    outputs: Mapping[str, Any]
    decisions: Mapping[str, ShuntDecision]
    usage: Mapping[str, UsageMetadata] = field(default_factory=dict)
    cost_usd: float | None = 0.0
    latency: Latency = field(default_factory=Latency)
    record_id: str | None = None
    record_ids: Mapping[str, str] = field(default_factory=dict)


@dataclass
class SubtaskWork:
    """One input on its way: what is known, what is open, and how the large model's part went."""

    known: dict[str, Any]
    open: OpenQuestions
    answer: Any = None
    watcher: LargeCallWatcher | None = None


def announced(decisions: Mapping[int, Mapping[str, ShuntDecision]], name: str, i: int) -> dict[str, Any]:
    """What a sub-task's decision is announced as."""
    return {"shunt_subtask": name, **decisions[i][name].to_metadata()}


def reader_of(subtasks: Sequence[Subtask]) -> InputReader | None:
    """The reader of the first small model that has one."""
    found = (getattr(subtask.small, "reader", None) for subtask in subtasks)
    return next((reader for reader in found if reader is not None), None)


def answer_of(prediction: Prediction | None) -> Any:
    """What a small model answers; None where it said nothing."""
    if prediction is None:
        return None
    return prediction.label if prediction.answer is None else prediction.answer


def decision_of(plan: Plan | None, i: int, failed: Exception | None, fell_back: bool) -> ShuntDecision:
    """Who answers one sub-task of one input, and why."""
    if plan is not None:
        return plan.decision(i, failed, fell_back=fell_back and plan.has_prediction(i))
    if failed is None:
        return ShuntDecision("large", "deferred", policy="no small model")
    if isinstance(failed, LocalOnlyError):
        return ShuntDecision("small", "local_only", policy="no small model", error=str(failed))
    return ShuntDecision("large", "large_error", policy="no small model", error=f"{type(failed).__name__}: {failed}")


def checked_answers(answer: Any, questions: OpenQuestions) -> Any:
    """The large model's answers, or an error where one is missing."""
    if isinstance(answer, Exception):
        return answer
    names = [question.subtask.name for question in questions]
    if not isinstance(answer, Mapping):
        return ConfigurationError(
            f"`large` gave a {type(answer).__name__}; a mapping with {', '.join(names)} is needed."
        )
    missing = [name for name in names if answer.get(name) is None]
    for question in questions:
        labels, name = question.subtask.labels, question.subtask.name
        if labels is not None and name not in missing and answer[name] not in labels:
            return UnparsableAnswerError(str(answer[name]), labels)
    return UnparsableAnswerError(str(dict(answer)), missing) if missing else answer
