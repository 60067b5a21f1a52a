"""Continual mode: whenever enough new answers are recorded, distil in the background, test, and promote."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from langchain_datashunt._utils.optional import require
from langchain_datashunt.call_log.filters import CallFilter
from langchain_datashunt.call_log.record import CallRecord
from langchain_datashunt.call_log.store import CallLog
from langchain_datashunt.distillation.distiller import DistillationSettings, TwoStageDistiller, readable_calls
from langchain_datashunt.distillation.gate import PromotionGate, PromotionResult
from langchain_datashunt.distillation.registry import ModelRegistry
from langchain_datashunt.distillation.teacher import TeacherCheck, TeacherCheckResult
from langchain_datashunt.exceptions import DataError
from langchain_datashunt.small_models.base import SmallModel

logger = logging.getLogger(__name__)

HELD_OUT_SHARE = 5
"""Without a labelled hold-out every fifth answered input, by its hash, is kept from learning and tests the gate."""

_STATE = "continual.json"


class ContinualDistiller:
    """Distils every so many new records of large answers, and promotes what passes the gate.

    ```python
    with ContinualDistiller(registry, "sqlite:///calls.db", every=500, holdout=(texts, labels)):
        ...  # a shunt whose small model is registry.model() picks promoted versions up by itself
    ```

    Every round starts from the registry's first version in service (S1), with the whole log: a bad round leaves no
    trace in the next one.

    Args:
        registry: Where versions are; it has one in service.
        store: URL of the store.
        every: New records with a large answer after which a round is due.
        holdout: Texts and true labels for the gate. None tests on held-out large answers: then the gate bounds
            disagreement with the large model, not error.
        holdout_large: The large model's answers to the texts of `holdout`: a candidate is then rejected, too, where
            the log's answers are no longer like these (`TeacherCheck`).
        task: Only records of this task.
        settings: How S2 is taught.
        gate: What a candidate must pass.
        teacher_check: How the log's answers are compared with `holdout_large`.
        labelled: Texts and true labels to learn beside the log.
        poll_seconds: How often the store is looked at.
        nice: How much lower than normal the priority of the background process is.

    Raises:
        DataError: `holdout_large` does not belong to `holdout`.
    """

    def __init__(
        self,
        registry: ModelRegistry | str | Path,
        store: str | Path,
        *,
        every: int = 500,
        holdout: tuple[Sequence[str], Sequence[str]] | None = None,
        holdout_large: Sequence[str | None] | None = None,
        task: str | None = None,
        settings: DistillationSettings | None = None,
        gate: PromotionGate | None = None,
        teacher_check: TeacherCheck | None = None,
        labelled: tuple[Sequence[str], Sequence[str]] | None = None,
        poll_seconds: float = 10.0,
        nice: int = 10,
    ) -> None:
        self.registry = registry if isinstance(registry, ModelRegistry) else ModelRegistry(registry)
        self.store = str(store)
        self.every = every
        n = 0 if holdout is None else len(holdout[0])
        if holdout_large is not None and len(holdout_large) != n:
            raise DataError(
                f"{len(holdout_large)} large answers for {n} held-out texts: give one for each text of `holdout`, None "
                f"where the large model gave no label."
            )
        self.holdout = holdout
        self.holdout_large = holdout_large
        self.task = task
        self.settings = settings or DistillationSettings()
        self.gate = gate or PromotionGate()
        self.teacher_check = teacher_check or TeacherCheck()
        self.labelled = labelled
        self.poll_seconds = poll_seconds
        self.nice = nice
        self.rounds = 0
        self.failures = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # One round

    def due(self) -> bool:
        """Whether enough new answers are there."""
        state = self._state()
        with CallLog(self.store) as store:
            more = self._answers(store) - int(state.get("answers", 0))
            if more < self.every and "time" in state:  # where old records are pruned there are never more of them
                since = CallFilter(task=self.task, asked=True, since=math.nextafter(state["time"], math.inf))
                more = max(more, store.count(since, repeated=False))
        return more >= self.every

    def _answers(self, store: CallLog) -> int:
        return store.count(CallFilter(task=self.task, asked=True))

    def step(self) -> tuple[int, PromotionResult] | None:
        """Distil, test and keep, in this process; the version and the verdict, None where there is too little yet."""
        small = self.registry.load(self.registry.first_version())
        with CallLog(self.store) as store:
            answers = self._answers(store)
            calls = [call for batch in store.iterate(CallFilter(task=self.task)) for call in batch]
        learn, texts, labels = self._split(calls, small)
        try:
            distilled = TwoStageDistiller(self.settings).distill(small, learn, labelled=self.labelled)
            metrics = {"distillation": vars(distilled.report), "answers": answers}
            found = self.registry.consider(
                distilled.model, texts, labels, gate=self.gate, metrics=metrics, teacher=self._teacher(calls)
            )
        except DataError as error:
            logger.info("Nothing distilled yet: %s", error)
            found = None
        state = {"answers": answers, "time": max((call.time for call in calls), default=0.0)}
        (self.registry.folder / _STATE).write_text(json.dumps(state), encoding="utf-8")
        return found

    def _split(self, calls: list[CallRecord], small: SmallModel) -> tuple[list[CallRecord], list[str], list[str]]:
        """What is learnt from, and what the gate tests on."""
        if self.holdout is not None:
            return calls, list(self.holdout[0]), list(self.holdout[1])
        learn, texts, labels = [], [], []
        readable = {call.input_hash for call in readable_calls(small, [call for call in calls if call.readable])[0]}
        for call in calls:
            answer = call.gold or call.label
            if (
                answer in small.labels
                and call.input_hash in readable
                and int(call.input_hash[:8], 16) % HELD_OUT_SHARE == 0
            ):
                texts.append(call.input)
                labels.append(str(answer))
            else:
                learn.append(call)
        return learn, texts, labels

    def _teacher(self, calls: list[CallRecord]) -> TeacherCheckResult | None:
        """What is to be thought of the answers since the version in service took over."""
        if self.holdout is None or self.holdout_large is None:
            return None
        since = self.registry.in_service_since()
        newer = (call for call in calls if call.time >= since)
        return self.teacher_check.test(self.registry.load(), newer, self.holdout[0], self.holdout_large)

    def _state(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            state: dict[str, Any] = json.loads((self.registry.folder / _STATE).read_text(encoding="utf-8"))
            return state
        return {}

    # In the background

    def run_once(self) -> bool:
        """Run a round in a process of its own at low priority, where one is due; whether it was run."""
        if not self.due():
            return False
        process = multiprocessing.get_context("spawn").Process(target=_round, args=(self._arguments(),), daemon=True)
        process.start()
        while process.is_alive():
            process.join(0.2)
            if self._stop.is_set():
                process.terminate()
        self.rounds += 1
        if process.exitcode:
            self.failures += 1
            logger.error("A round of distillation failed with exit status %s.", process.exitcode)
        return True

    def _arguments(self) -> dict[str, Any]:
        return {
            "registry": str(self.registry.folder),
            "store": self.store,
            "every": self.every,
            "holdout": self.holdout,
            "holdout_large": self.holdout_large,
            "task": self.task,
            "settings": self.settings.model_dump(),
            "gate": asdict(self.gate),
            "teacher_check": asdict(self.teacher_check),
            "labelled": self.labelled,
            "nice": self.nice,
        }

    def run(self) -> None:
        """Look at the store again and again, until `stop`."""
        while not self._stop.is_set():
            try:
                self.run_once()
            except Exception as error:  # a thread has nobody to raise to, and goes on
                self.failures += 1
                logger.error("No round was run, %s: %s", type(error).__name__, error)
            self._stop.wait(self.poll_seconds)

    def start(self) -> Self:
        """Run in a thread."""
        self._stop.clear()
        self._thread = threading.Thread(target=self.run, name="datashunt-continual", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop; a round that is under way is ended, and what is in service stays."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def _round(arguments: dict[str, Any]) -> None:
    """The background process: one round, at low priority and on one core."""
    with suppress(OSError, AttributeError):
        os.nice(arguments["nice"])
    require("torch", "torch").set_num_threads(1)
    settings = DistillationSettings(**arguments.pop("settings"))
    gate, check = PromotionGate(**arguments.pop("gate")), TeacherCheck(**arguments.pop("teacher_check"))
    registry, store = arguments.pop("registry"), arguments.pop("store")
    ContinualDistiller(registry, store, settings=settings, gate=gate, teacher_check=check, **arguments).step()
