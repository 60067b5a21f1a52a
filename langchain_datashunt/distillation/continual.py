"""Continual distillation: distil in the background when enough new answers are logged, and promote good candidates."""

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
from langchain_datashunt.call_log.record import CallRecord, latest_of_each_input
from langchain_datashunt.call_log.store import CallLog
from langchain_datashunt.distillation.distiller import TwoStageDistiller, readable_calls
from langchain_datashunt.distillation.gate import PromotionGate, PromotionResult
from langchain_datashunt.distillation.prepared import DistillationSettings
from langchain_datashunt.distillation.registry import ModelRegistry
from langchain_datashunt.distillation.teacher import TeacherCheck, TeacherCheckResult
from langchain_datashunt.exceptions import DataError
from langchain_datashunt.small_models.base import SmallModel

logger = logging.getLogger(__name__)

HELD_OUT_SHARE = 5
"""Modulus of the input hash: if `holdout` is None, one in five answered inputs tests the gate instead of training."""

_STATE = "continual.json"


class ContinualDistiller:
    """Distils after a number of new large-model answers, and promotes candidates that pass the gate.

    ```python
    with ContinualDistiller(registry, "sqlite:///calls.db", every=500, holdout=(texts, labels)):
        ...  # a shunt with small=registry.model() follows the promotions
    ```

    Every round starts from the registry's first version in service (S1) and trains on the whole log. A bad round
    therefore has no effect on the next one.

    Args:
        registry: Registry with a version in service, or its folder.
        store: URL or file of the call log.
        every: Number of new large-model answers that makes a round due.
        holdout: Texts and true labels for the gate. None holds out large-model answers from the log. The gate then
            bounds the disagreement with the large model instead of the error.
        holdout_large: Large-model answers to the texts of `holdout`. If given, a candidate is also rejected if the
            logged answers are not consistent with these (see `TeacherCheck`).
        task: Task whose records are used, or None for all tasks.
        settings: Distillation settings, or None for the defaults.
        gate: Promotion gate, or None for the defaults.
        teacher_check: Comparison of the logged answers with `holdout_large`, or None for the defaults.
        labelled: Texts and true labels to train on in addition to the log.
        poll_seconds: Seconds between two checks of the log.
        nice: Increment of the background process's niceness. Higher values lower its priority.

    Raises:
        DataError: If `holdout_large` and `holdout` differ in length.
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
                f"Expected one answer in `holdout_large` for each text of `holdout`, got {len(holdout_large)} answers "
                f"and {n} texts. Pass None for a missing answer."
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
        """Return whether enough new answers are logged for a round."""
        state = self._state()
        with CallLog(self.store) as store:
            more = self._answers(store) - int(state.get("answers", 0))
            if more < self.every and "time" in state:  # pruning keeps the total low, so count new records by time too
                since = CallFilter(task=self.task, asked=True, since=math.nextafter(state["time"], math.inf))
                more = max(more, store.count(since, distinct=True))
        return more >= self.every

    def _answers(self, store: CallLog) -> int:
        return store.count(CallFilter(task=self.task, asked=True), distinct=True)

    def step(self) -> tuple[int, PromotionResult] | None:
        """Run one round in this process: distil, test the candidate, and promote or reject it.

        Returns:
            Version number of the candidate and result of the gate, or None if the data does not suffice yet.
        """
        small = self.registry.load(self.registry.first_version())
        with CallLog(self.store) as store:
            answers = self._answers(store)
            calls = latest_of_each_input(store.iterate(CallFilter(task=self.task)))
        learn, texts, labels = self._split(calls, small)
        try:
            distilled = TwoStageDistiller(self.settings).distill(small, learn, labelled=self.labelled)
            metrics = {"distillation": vars(distilled.report), "answers": answers}
            result = self.registry.consider(
                distilled.model, texts, labels, gate=self.gate, metrics=metrics, teacher=self._teacher(calls)
            )
        except DataError as error:
            logger.info("No candidate was distilled: %s", error)
            result = None
        # Saved even without a candidate, so that the next round waits for new answers.
        state = {"answers": answers, "time": max((call.time for call in calls), default=0.0)}
        (self.registry.folder / _STATE).write_text(json.dumps(state), encoding="utf-8")
        return result

    def _split(self, calls: list[CallRecord], small: SmallModel) -> tuple[list[CallRecord], list[str], list[str]]:
        """Return the records to train on, and the texts and labels for the gate."""
        if self.holdout is not None:
            return calls, list(self.holdout[0]), list(self.holdout[1])
        learn, texts, labels = [], [], []
        readable = {call.input_hash for call in readable_calls(small, [call for call in calls if call.readable])[0]}
        for call in calls:
            answer = call.gold or call.answer_label
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
        """Check the answers logged since the version in service was created, if `holdout_large` is given."""
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
        """Run a round in a low-priority process if one is due, and return whether it ran."""
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
            logger.error("A distillation round failed with exit status %s.", process.exitcode)
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
        """Check the log and run due rounds until `stop` is called."""
        while not self._stop.is_set():
            try:
                self.run_once()
            except Exception as error:  # no caller waits on this thread, and the next round may succeed
                self.failures += 1
                logger.error("A distillation round could not run, %s: %s", type(error).__name__, error)
            self._stop.wait(self.poll_seconds)

    def start(self) -> Self:
        """Call `run` in a background thread."""
        self._stop.clear()
        self._thread = threading.Thread(target=self.run, name="datashunt-continual", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop and terminate a running round. The version in service stays in service."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def _round(arguments: dict[str, Any]) -> None:
    """Run one round in the background process, at low priority and on one core."""
    with suppress(OSError, AttributeError):
        os.nice(arguments["nice"])
    require("torch", "torch").set_num_threads(1)
    settings = DistillationSettings(**arguments.pop("settings"))
    gate, check = PromotionGate(**arguments.pop("gate")), TeacherCheck(**arguments.pop("teacher_check"))
    registry, store = arguments.pop("registry"), arguments.pop("store")
    ContinualDistiller(registry, store, settings=settings, gate=gate, teacher_check=check, **arguments).step()
