"""RecordingCallbackHandler: record the chat model answers of any LangChain chain."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import BaseMessage
from langchain_core.outputs import LLMResult
from langchain_core.runnables.config import ensure_config
from typing_extensions import override

from langchain_datashunt.call_log.record import CallRecord
from langchain_datashunt.call_log.recorder import Recorder
from langchain_datashunt.exceptions import InputError, PartialInputError, ShuntError
from langchain_datashunt.inputs import text_of, text_reader
from langchain_datashunt.large_models.messages import message_of
from langchain_datashunt.large_models.watcher import LargeCallWatcher, large_sureness
from langchain_datashunt.privacy.guard import SUBJECT_KEY


class RecordingCallbackHandler(BaseCallbackHandler):
    """Callback handler that records the chat model answers of any chain, for example before a shunt is in use.

    ```python
    chain.invoke(question, {"callbacks": [RecordingCallbackHandler(recorder, labels=[...])]})
    ```

    To name the data subject of a call, set `config["metadata"]["shunt_subject"]`. As with a shunt,
    `config["configurable"]["shunt_subject"]` works too, but only in single calls: in batches, LangChain does not pass
    it to handlers.

    Args:
        recorder: Recorder that writes the records.
        labels: Label set of the answers. Leave it empty if the answers are not labels.
        parse: Function from the answer's text to a label. None accepts only an exact label. If it raises a
            `ShuntError`, the record has no label.
    """

    def __init__(
        self, recorder: Recorder, labels: Sequence[str] = (), parse: Callable[[str], str] | None = None
    ) -> None:
        self.recorder = recorder
        self.labels = tuple(labels)
        self.parse = parse
        self._started: dict[UUID, tuple[str, str | None, float]] = {}

    @override
    def on_chat_model_start(
        self, serialized: dict[str, Any], messages: list[list[BaseMessage]], *, run_id: UUID, **kwargs: Any
    ) -> None:
        try:
            text = text_of(messages[0])
        except PartialInputError:
            text = text_reader().write(messages[0])
        except (InputError, IndexError):
            return
        self._started[run_id] = (text, _subject_of(kwargs.get("metadata") or {}), time.perf_counter())

    @override
    def on_llm_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        self._started.pop(run_id, None)

    @override
    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **kwargs: Any) -> None:
        started = self._started.pop(run_id, None)
        if started is None or message_of(response) is None:
            return
        watcher = LargeCallWatcher()
        watcher.on_llm_end(response)
        text, subject, since = started
        seconds = time.perf_counter() - since
        self.recorder.record([lambda: self._record(str(run_id), text, subject, seconds, watcher)])

    def _record(
        self, run_id: str, text: str, subject: str | None, seconds: float, watcher: LargeCallWatcher
    ) -> CallRecord:
        label = None if watcher.incomplete else self._label(watcher.text or "")
        distribution, confidence = large_sureness(watcher, self.labels, label)
        return CallRecord(
            id=run_id,
            task=self.recorder.task,
            input=text,
            subject=subject,
            labels=self.labels,
            large_model=watcher.model or "unknown",
            answer=watcher.text,
            answer_label=label,
            large_probabilities=distribution,
            large_confidence=confidence,
            **watcher.fields(),
            large_seconds=seconds,
        )

    def _label(self, text: str) -> str | None:
        if self.parse is None:
            return text.strip() if text.strip() in self.labels else None
        try:
            return self.parse(text)
        except ShuntError:
            return None


def _subject_of(metadata: dict[str, Any]) -> str | None:
    found = metadata.get(SUBJECT_KEY) or ensure_config().get("configurable", {}).get(SUBJECT_KEY)
    return None if found is None else str(found)
