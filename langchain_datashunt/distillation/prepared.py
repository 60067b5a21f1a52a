"""What a distillation learns from, made ready, and kept in its checkpoint folder so that a kill changes nothing."""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import numpy as np

from langchain_datashunt.exceptions import DataError
from langchain_datashunt.small_models.kinds.generating import AnswerExamples
from langchain_datashunt.small_models.training.training import Examples

PREPARED_FILE = "examples.npz"


@dataclass
class DistillationReport:
    """What was learnt from.

    Attributes:
        records: Records that were seen.
        stage_a: Pairs that taught the large model's answer.
        stage_b: Pairs that taught S1's own.
        gold: Records with a true label, and labelled examples that were given.
        unsure: Records where neither model was sure; not used.
        unparsable: Records whose large answer was no label; not used.
        unreadable: Records whose input the small model cannot read; not used.
        new_labels: Answers that S1 does not know, with their counts; not used, but worth a look.
        reliability: The large model's accuracy by answered label, where gold labels tell it.
    """

    records: int = 0
    stage_a: int = 0
    stage_b: int = 0
    gold: int = 0
    unsure: int = 0
    unparsable: int = 0
    unreadable: int = 0
    new_labels: dict[str, int] = field(default_factory=dict)
    reliability: dict[str, float] = field(default_factory=dict)


Taught = TypeVar("Taught", Examples, AnswerExamples)
"""Texts with distributions, or with answers."""


@dataclass(frozen=True)
class Prepared(Generic[Taught]):
    """What is learnt.

    Attributes:
        stages: What is taught, by stage.
        held_out: The same, to stop on.
        report: What they were made from.
    """

    stages: list[Taught]
    held_out: Taught
    report: DistillationReport

    @property
    def texts(self) -> list[str]:
        """All inputs."""
        parts: list[Examples | AnswerExamples] = [*self.stages, self.held_out]
        return [text for part in parts for text in part.texts]

    def write(self, folder: Path, about: dict[str, Any]) -> None:
        """Keep them in a folder, with what they depend on."""
        folder.mkdir(parents=True, exist_ok=True)
        parts: list[Examples | AnswerExamples] = [*self.stages, self.held_out]
        told: dict[str, Any] = {
            "about": about,
            "report": vars(self.report),
            "texts": [part.texts for part in parts],
            "answers": [part.answers if isinstance(part, AnswerExamples) else None for part in parts],
        }
        arrays: dict[str, Any] = {
            f"targets_{i}": part.targets for i, part in enumerate(parts) if isinstance(part, Examples)
        }
        partial = folder / f"{PREPARED_FILE}.partial"
        with partial.open("wb") as stream:
            np.savez_compressed(stream, told=np.frombuffer(json.dumps(told).encode(), dtype=np.uint8), **arrays)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(folder / PREPARED_FILE)

    @classmethod
    def read(cls, folder: Path, about: dict[str, Any]) -> Self | None:
        """What is kept in a folder; None where nothing is.

        Raises:
            DataError: It cannot be read, or belongs to another distillation.
        """
        file = folder / PREPARED_FILE
        if not file.exists():
            return None
        try:
            with np.load(file, allow_pickle=False) as kept:
                told = json.loads(kept["told"].tobytes())
                parts: list[Any] = [
                    Examples(texts, kept[f"targets_{i}"]) if answers is None else AnswerExamples(texts, answers)
                    for i, (texts, answers) in enumerate(zip(told["texts"], told["answers"], strict=True))
                ]
                report = DistillationReport(**told["report"])
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise DataError(f"{file} cannot be read ({error}). Delete it to begin anew.") from error
        if told["about"] != json.loads(json.dumps(about)):
            raise DataError(
                f"{file} belongs to a distillation with other settings or another small model. Give the same ones to "
                f"go on, or another checkpoint folder, or delete it to begin anew."
            )
        return cls(parts[:-1], parts[-1], report)

    @staticmethod
    def forget(folder: Path) -> None:
        """Delete what is kept, when the training is done."""
        (folder / PREPARED_FILE).unlink(missing_ok=True)
