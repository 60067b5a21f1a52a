"""`datashunt distill`: from a store of routed calls to a candidate, the gate and the registry."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langchain_datashunt.cli.output import console
from langchain_datashunt.exceptions import DataError


@dataclass(frozen=True)
class DistillTask:
    """What to distil from what, as the command line says it.

    Attributes:
        bundle: Folder of S1.
        store: URL or file of the records.
        holdout: Labelled file for the gate.
        out: Folder of the registry.
        text: Column of the held-out file with the text.
        label: Column with the true label.
        task: Only records of this task.
        mode: What S2 learns in stage A.
        training: Training settings that were given.
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

    def settings(self) -> Any:
        """As `DistillationSettings`."""
        from langchain_datashunt.distillation import DistillationSettings
        from langchain_datashunt.small_models.training import TrainingSettings

        given = {name: value for name, value in self.training.items() if value is not None}
        return DistillationSettings(mode=self.mode, training=TrainingSettings(**given))

    def records(self) -> Iterator[Any]:
        """The records, in batches."""
        from langchain_datashunt.distillation import CallFilter, DistillationStore

        with DistillationStore(self.store) as opened:
            yield from opened.iterate(CallFilter(task=self.task))


def distill_bundle(task: DistillTask) -> dict[str, Any]:
    """Distil, test and keep; returns what happened, JSON-ready.

    OUT is a registry: the bundle becomes its first version in service where it is empty. Of several processes the
    first reads the records, tests and keeps; all of them train.

    Raises:
        ShuntError: The bundle, the store or the held-out file cannot be used, or there is too little to learn from.
    """
    from langchain_datashunt.distillation import ModelRegistry, TwoStageDistiller
    from langchain_datashunt.small_models import load_small_model
    from langchain_datashunt.small_models.processes import processes

    started, small = time.perf_counter(), load_small_model(task.bundle)
    texts, labels = processes().share(lambda: begin(task, small))
    distilled = TwoStageDistiller(task.settings()).distill(small, task.records())

    def consider() -> dict[str, Any]:
        registry, told = ModelRegistry(task.out), vars(distilled.report)
        version, verdict = registry.consider(distilled.model, texts, labels, metrics={"distillation": told})
        return {
            "version": version,
            "promoted": verdict.passed,
            "reason": verdict.reason,
            "n": verdict.n,
            "old_accuracy": round(verdict.old_accuracy, 6),
            "new_accuracy": round(verdict.new_accuracy, 6),
            **told,
            "bundle": str(registry.bundle(version)),
            "processes": processes().count,
            "seconds": round(time.perf_counter() - started, 2),
        }

    return processes().share(consider)


def begin(task: DistillTask, small: Any) -> tuple[list[str], list[str]]:
    """See to it that the registry has a version in service; the gate's examples."""
    from langchain_datashunt.data.reading import labelled_texts
    from langchain_datashunt.distillation import ModelRegistry

    registry = ModelRegistry(task.out)
    texts, labels = labelled_texts(task.holdout, task.text, task.label)
    if strange := sorted(set(labels) - set(small.labels)):
        raise DataError(
            f"{task.holdout} has labels that the small model does not know: {', '.join(strange[:5])}. "
            "Remove these rows, or train S1 with them."
        )
    if registry.current_version() is None:
        registry.promote(registry.add(small), "the model that distillation began with")
    return texts, labels


def watch_store(task: DistillTask, every: int) -> None:
    """Distil in the background whenever enough new answers are there, until interrupted."""
    from langchain_datashunt.distillation import ContinualDistiller
    from langchain_datashunt.small_models import load_small_model

    examples = begin(task, load_small_model(task.bundle))
    watcher = ContinualDistiller(
        task.out, task.store, every=every, holdout=examples, task=task.task, settings=task.settings()
    )
    console.print(f"Watching {task.store}; a round every {every} new answers. Stop with Ctrl-C.", highlight=False)
    try:
        watcher.run()
    except KeyboardInterrupt:
        watcher.stop()
