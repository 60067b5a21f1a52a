"""`datashunt distill`: distil a candidate from a call log, and promote it if it passes the gate."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langchain_datashunt.cli.log import require_store
from langchain_datashunt.cli.output import console
from langchain_datashunt.exceptions import DataError


@dataclass(frozen=True)
class DistillTask:
    """Options of a distillation on the command line.

    Attributes:
        bundle: Folder of the small model S1.
        store: URL or file of the call log.
        holdout: Labelled file for the gate.
        out: Folder of the registry.
        text: Column of the held-out file with the text.
        label: Column of the held-out file with the true label.
        task: Task whose records are used, or None for all tasks.
        mode: Training target of stage A.
        training: Training settings by name. None uses the default.
        large_label: Column of the held-out file with the large model's answer, or None.
    """

    bundle: Path
    store: str
    holdout: Path
    out: Path
    text: str
    label: str
    task: str | None
    mode: str
    training: dict[str, Any]
    large_label: str | None = None

    def settings(self) -> Any:
        """Return the `DistillationSettings` of these options."""
        from langchain_datashunt.distillation import DistillationSettings
        from langchain_datashunt.small_models.training.training import TrainingSettings

        given = {name: value for name, value in self.training.items() if value is not None}
        return DistillationSettings(mode=self.mode, training=TrainingSettings(**given))

    def records(self, **which: Any) -> list[Any]:
        """Return the newest record of each input, filtered with the arguments of `CallFilter`."""
        from langchain_datashunt.call_log.filters import CallFilter
        from langchain_datashunt.call_log.record import latest_of_each_input
        from langchain_datashunt.call_log.store import CallLog

        with CallLog(self.store) as opened:
            return latest_of_each_input(opened.iterate(CallFilter(task=self.task, **which)))

    def teacher(self, registry: Any, examples: HeldOut) -> Any:
        """Check the answers logged since the version in service was created, or return None without held-out ones."""
        from langchain_datashunt.distillation import TeacherCheck

        if examples.large is None:
            return None
        newer = self.records(asked=True, since=registry.in_service_since())
        return TeacherCheck().test(registry.load(), newer, examples.texts, examples.large)


@dataclass(frozen=True)
class HeldOut:
    """Held-out examples, which are never trained on.

    Attributes:
        texts: `n` inputs.
        labels: Their true labels.
        large: Their answers by the large model, or None without a column for them.
    """

    texts: list[str]
    labels: list[str]
    large: list[str | None] | None


def distill_bundle(task: DistillTask) -> dict[str, Any]:
    """Distil a candidate, test it, and promote or reject it.

    If the registry has no version in service, the bundle becomes the first one. With several processes, the first one
    reads the records, tests and saves, and all of them train.

    Returns:
        Summary of the round, JSON-ready.

    Raises:
        ShuntError: If the bundle, the call log or the held-out file cannot be used, or if there are too few records.
    """
    from langchain_datashunt.distillation import ModelRegistry, TwoStageDistiller
    from langchain_datashunt.small_models import load_small_model
    from langchain_datashunt.small_models.training.processes import processes

    require_store(task.store)
    started, small = time.perf_counter(), load_small_model(task.bundle)
    held = processes().share(lambda: begin(task, small))
    distilled = TwoStageDistiller(task.settings()).distill(small, task.records())

    def consider() -> dict[str, Any]:
        registry, figures = ModelRegistry(task.out), vars(distilled.report)
        version, verdict = registry.consider(
            distilled.model, held.texts, held.labels,
            metrics={"distillation": figures}, teacher=task.teacher(registry, held),
        )  # fmt: skip
        return {
            "version": version,
            "promoted": verdict.passed,
            "reason": verdict.reason,
            "n": verdict.n,
            "old_accuracy": round(verdict.old_accuracy, 6),
            "new_accuracy": round(verdict.new_accuracy, 6),
            **({} if verdict.teacher is None else {"answers": verdict.teacher.reason}),
            **figures,
            "bundle": str(registry.bundle(version)),
            "processes": processes().count,
            "seconds": round(time.perf_counter() - started, 2),
        }

    return processes().share(consider)


def begin(task: DistillTask, small: Any) -> HeldOut:
    """Put the small model into service if the registry is empty, and return the examples for the gate."""
    from langchain_datashunt.cli.calibrate import LabelledFile
    from langchain_datashunt.distillation import ModelRegistry

    registry = ModelRegistry(task.out)
    texts, labels, large, _ = LabelledFile(task.holdout, task.text, task.label, task.large_label).read()
    if strange := sorted(set(labels) - set(small.labels)):
        raise DataError(
            f"{task.holdout} has labels that the small model lacks: {', '.join(strange[:5])}. "
            "Remove these rows, or train the small model with these labels."
        )
    if registry.current_version() is None:
        registry.promote(registry.add(small), "initial version, before distillation")
    return HeldOut(texts, labels, large)


def watch_store(task: DistillTask, every: int) -> None:
    """Distil in the background after every `every` new answers, until interrupted."""
    from langchain_datashunt.distillation import ContinualDistiller
    from langchain_datashunt.small_models import load_small_model

    held = begin(task, load_small_model(task.bundle))
    watcher = ContinualDistiller(
        task.out, task.store, every=every, holdout=(held.texts, held.labels), holdout_large=held.large,
        task=task.task, settings=task.settings(),
    )  # fmt: skip
    console.print(
        f"Watching {task.store}, with a round after every {every} new answers. Press Ctrl-C to stop.", highlight=False
    )
    try:
        watcher.run()
    except KeyboardInterrupt:
        watcher.stop()
