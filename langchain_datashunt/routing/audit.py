"""Background audits: re-ask the large model about a random sample of locally answered inputs."""

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
"""Maximum audits that wait or run. Further ones are dropped and counted."""

AUDIT_TAG = "shunt:audit"


@dataclass
class AuditCounters:
    """Counts of audits by outcome.

    Attributes:
        done: Audits that the large model answered. An unparsable answer counts too, as a disagreement.
        failed: Audits in which the large call failed, or returned something else than text.
        left_out: Audits that were dropped because too many were waiting.
    """

    done: int = 0
    failed: int = 0
    left_out: int = 0


class Auditor:
    """Call the large model about a random sample of locally answered inputs, in background threads.

    Args:
        rate: Share of inputs to audit, in [0, 1].
        caller: Caller of the large model.
        monitor: Monitor that compares both answers. None compares nothing.
        recorder: Recorder that logs the calls, marked as audits. None logs nothing.
        seed: Seed of the sample. None draws a new sample in each process.
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
        """Return a random sample of `rows` at the audit rate."""
        return [i for i in rows if self._random.random() < self.rate] if self.rate > 0 else []

    def submit(
        self, asked: Any, finished: FinishedCall | None, small_label: str, configurable: dict[str, Any] | None = None
    ) -> None:
        """Start an audit in the background, and return at once.

        The audit is dropped and counted if too many are waiting.

        Args:
            asked: Input of the large model, or the error that prevents the call.
            finished: The audited call, for the recorder. None logs nothing.
            small_label: The small model's answer.
            configurable: The `configurable` values of the audited call's config, such as the data subject.
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
            why = (
                answer
                if isinstance(answer, Exception)
                else f"expected a label from `large`, got {type(answer).__name__}"
            )
            logger.warning("Audit failed: %s", why)
            return
        if finished is not None and self.recorder is not None:
            latency = Latency(finished.latency.small_seconds, time.perf_counter() - started)
            record = finished._replace(answer=answer, watcher=watcher, latency=latency, ended=now(), audit=True)
            self.recorder.record([record])
        if self.monitor is not None:
            self.monitor.audited(small_label, answer if isinstance(answer, str) else None)

    def flush(self, timeout: float | None = 30.0) -> bool:
        """Wait for all audits submitted so far, or return False if `timeout` (in seconds) expires first."""
        with self._lock:
            waiting = set(self._waiting)
        return not wait(waiting, timeout).not_done


def _outcome_of(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except Exception as error:
        return error
