"""FinishedCall: data of a routed call, from which the recorder's thread creates the record."""

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
    """Data of one routed call. Calling it returns the record.

    Attributes:
        task: Task name of the recorder.
        record_id: LangChain run id.
        value: The caller's input.
        decision: Routing decision.
        answer: Output or error of the large model, or None if it was not called.
        watcher: Observed text, tokens and cost of the large model, or None if it was not called.
        latency: Wall time of the models.
        labels: Label set of the task, or None if any text is an answer.
        subject: Id of the data subject, or None.
        reader: Input reader, which converts `value` to the text of the record.
        ended: End of the call, in seconds since 1970 UTC.
        audit: Whether the large model was called only to check a confident answer.
        weight: Number of calls that the record stands for.
        disclosed: Function that returns the value of `CallRecord.disclosed`, or None if the large model was not called.
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
    weight: float = 1.0
    disclosed: Callable[[], str] | None = None

    def __call__(self) -> CallRecord:
        """Return the record of the call."""
        prediction, watcher = self.decision.prediction, self.watcher
        labels = prediction.labels if prediction is not None else tuple(self.labels or ())
        text = _answer_text(self.answer, watcher)
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
            answer=text,
            answer_label=label,
            large_probabilities=distribution,
            large_confidence=confidence,
            **({} if watcher is None else watcher.fields()),
            small_seconds=self.latency.small_seconds,
            large_seconds=self.latency.large_seconds,
            audit=self.audit,
            weight=self.weight,
            disclosed=None if self.disclosed is None else self.disclosed(),
        )

    def _large_label(self) -> str | None:
        if self.watcher is not None and self.watcher.incomplete:
            return None  # a cut or filtered message is no answer
        answer = self.answer.output if isinstance(self.answer, ShuntResult) else self.answer
        return answer if self.watcher is not None and isinstance(answer, str) and self._is_label(answer) else None

    def _is_label(self, answer: str) -> bool:
        """Return whether an answer is a valid label, or any text if answers are generated."""
        return self.labels is None or answer in self.labels or tuple(self.labels) == ANSWER_LABELS


def now() -> float:
    """Return the current time in seconds since 1970 UTC."""
    return time.time()


def _answer_text(answer: Any, watcher: LargeCallWatcher | None) -> str | None:
    if watcher is None:
        return None
    if watcher.text is not None:
        return watcher.text
    if isinstance(answer, UnparsableAnswerError):
        return answer.raw
    return None if answer is None or isinstance(answer, Exception) else str(answer)


def snapped(log: list[FinishedCall]) -> list[FinishedCall]:
    """Return the calls with snapshots of their inputs, because callers may modify the originals."""
    return [call if type(call.value) is str else call._replace(value=call.reader.snapshot(call.value)) for call in log]
