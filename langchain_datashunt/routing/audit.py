"""Audits: a random part of what the small model answers is asked of the large model too, behind the caller's back."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

from langchain_core.runnables import RunnableConfig

from langchain_datashunt.call_log.finished_call import FinishedCall, now
from langchain_datashunt.decision import Latency, ShuntResult
from langchain_datashunt.evaluation.monitor import Monitor
from langchain_datashunt.exceptions import UnparsableAnswerError
from langchain_datashunt.large_models.caller import LargeCaller
from langchain_datashunt.large_models.watcher import LargeCallWatcher

logger = logging.getLogger(__name__)

WORKERS = 2
MOST_WAITING = 200
"""Audits that may wait; more are left out, and counted."""

AUDIT_TAG = "shunt:audit"


@dataclass
class AuditCounters:
    """What became of audits: asked and compared, failed, and left out because too many were waiting."""

    done: int = 0
    failed: int = 0
    left_out: int = 0


class Auditor:
    """Asks the large model about a random part of the confident inputs, in threads of its own.

    Args:
        rate: Share that is asked, in [0, 1].
        caller: The large model.
        monitor: Learns what came of it.
        recorder: Keeps the records, marked as audits.
        seed: Of the choice.
    """

    def __init__(
        self, rate: float, caller: LargeCaller, monitor: Monitor | None, recorder: Any, seed: int | None = None
    ) -> None:
        self.rate, self.caller, self.monitor, self.recorder = rate, caller, monitor, recorder
        self.counters = AuditCounters()
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: set[Future[None]] = set()

    def chosen(self, rows: Sequence[int]) -> list[int]:
        """Which of these rows to audit."""
        return [i for i in rows if self._random.random() < self.rate] if self.rate > 0 else []

    def submit(
        self, asked: Any, finished: FinishedCall | None, small_label: str, configurable: dict[str, Any] | None = None
    ) -> None:
        """Ask in the background; returns at once.

        Args:
            asked: What the large model gets, or why it cannot.
            finished: The call that is audited, for the recorder.
            small_label: What the small model said.
            configurable: Of that call's config: whose data it is, and which alternatives are chosen.
        """
        with self._lock:
            if len(self._waiting) >= MOST_WAITING:
                self.counters.left_out += 1
                return
            if self._pool is None:
                self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="datashunt-audit")
            future = self._pool.submit(self._audit, asked, finished, small_label, dict(configurable or {}))
            self._waiting.add(future)
        future.add_done_callback(self._forget)

    def _forget(self, future: Future[None]) -> None:
        with self._lock:
            self._waiting.discard(future)

    def _audit(self, asked: Any, finished: FinishedCall | None, small_label: str, configurable: dict[str, Any]) -> None:
        watcher, started = LargeCallWatcher(), time.perf_counter()
        config = RunnableConfig(tags=[AUDIT_TAG], callbacks=[watcher], configurable=configurable)
        answer = _outcome_of(partial(self.caller.invoke, asked, config, {}))
        answer = answer.output if isinstance(answer, ShuntResult) else answer
        silent = isinstance(answer, UnparsableAnswerError)
        failed = not silent and not isinstance(answer, str)
        with self._lock:
            self.counters.failed += failed
            self.counters.done += not failed
        if failed:
            why = answer if isinstance(answer, Exception) else f"the answer is a {type(answer).__name__}, and no label"
            logger.warning("An audit failed: %s", why)
            return
        if finished is not None and self.recorder is not None:
            latency = Latency(finished.latency.small_seconds, time.perf_counter() - started)
            record = finished._replace(answer=answer, watcher=watcher, latency=latency, ended=now(), audit=True)
            self.recorder.record([record])
        if self.monitor is not None:
            self.monitor.audited(small_label, answer if isinstance(answer, str) else None)

    def flush(self, timeout: float | None = 30.0) -> bool:
        """Wait until all audits so far are done; False where that took too long."""
        with self._lock:
            waiting = set(self._waiting)
        return not wait(waiting, timeout).not_done


def _outcome_of(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except Exception as error:
        return error
