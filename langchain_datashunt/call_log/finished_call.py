"""From a routed call to its record; made in the recorder's thread, from what the call left behind."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from langchain_datashunt.call_log.record import CallRecord
from langchain_datashunt.decision import Latency, ShuntDecision, ShuntResult
from langchain_datashunt.exceptions import UnparsableAnswerError
from langchain_datashunt.inputs import InputReader
from langchain_datashunt.large_models.watcher import LargeCallWatcher, large_sureness
from langchain_datashunt.prediction import ANSWER_LABELS, answer_text


class FinishedCall(NamedTuple):
    """What one call left behind. Calling it makes the record.

    Attributes:
        task: The recorder's task.
        record_id: Id of the run.
        value: The caller's input.
        decision: Where it went.
        answer: The large model's output or error; None where it was not asked.
        watcher: What was seen of the large model; None where it was not asked.
        latency: Wall time of the parts.
        labels: The task's labels.
        subject: Whose data it is.
        reader: How the input is written down.
        ended: When, seconds since 1970 UTC.
        audit: Whether the large model was asked only to check a confident answer.
        disclosed: Returns what the large prompt disclosed, for `CallRecord.disclosed`; None if nothing was asked.
    """

    task: str
    record_id: str
    value: Any
    decision: ShuntDecision
    answer: Any
    watcher: LargeCallWatcher | None
    latency: Latency
    labels: Sequence[str] | None
    subject: str | None
    reader: InputReader
    ended: float
    audit: bool = False
    disclosed: Callable[[], str] | None = None

    def __call__(self) -> CallRecord:
        """Make the record."""
        prediction, watcher = self.decision.prediction, self.watcher
        labels = prediction.labels if prediction is not None else tuple(self.labels or ())
        said = _said(self.answer, watcher)
        label = self._large_label()
        written = None if prediction is None else prediction.answer
        distribution, confidence = (None, None) if watcher is None else large_sureness(watcher, labels, label)
        return CallRecord(
            id=self.record_id,
            time=self.ended,
            task=self.task,
            input=self.reader.write(self.value),
            subject=self.subject,
            labels=labels,
            small_model="" if prediction is None else prediction.model_id,
            probabilities=None if prediction is None else tuple(prediction.probabilities.tolist()),
            score=self.decision.score,
            threshold=self.decision.threshold,
            small_answer=None if written is None else answer_text(written),
            policy=self.decision.policy,
            route=self.decision.route,
            reason=self.decision.reason,
            large_model="" if watcher is None else watcher.model or "unknown",
            answer=said,
            answer_label=label,
            large_probabilities=distribution,
            large_confidence=confidence,
            **({} if watcher is None else watcher.fields()),
            small_seconds=self.latency.small_seconds,
            large_seconds=self.latency.large_seconds,
            audit=self.audit,
            disclosed=None if self.disclosed is None else self.disclosed(),
        )

    def _large_label(self) -> str | None:
        answer = self.answer.output if isinstance(self.answer, ShuntResult) else self.answer
        return answer if self.watcher is not None and isinstance(answer, str) and self._is_label(answer) else None

    def _is_label(self, answer: str) -> bool:
        """Whether it is one of the labels, or any text where answers are written."""
        return self.labels is None or answer in self.labels or tuple(self.labels) == ANSWER_LABELS


def now() -> float:
    """The time as records have it."""
    return time.time()


def _said(answer: Any, watcher: LargeCallWatcher | None) -> str | None:
    if watcher is None:
        return None
    if watcher.text is not None:
        return watcher.text
    if isinstance(answer, UnparsableAnswerError):
        return answer.raw
    return None if answer is None or isinstance(answer, Exception) else str(answer)


def snapped(log: list[FinishedCall]) -> list[FinishedCall]:
    """The same with inputs that nobody changes any more."""
    return [call._replace(value=call.reader.snapshot(call.value)) for call in log]
