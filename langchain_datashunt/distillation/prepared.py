"""Training data of a distillation, saved with its checkpoints so that a resumed run uses the same data."""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, Self, TypeVar

import numpy as np
from pydantic import Field

from langchain_datashunt._utils.settings import Configured
from langchain_datashunt.exceptions import DataError
from langchain_datashunt.small_models.kinds.generating import AnswerExamples
from langchain_datashunt.small_models.training.training import (
    Examples,
    TrainingSettings,
)

PREPARED_FILE = "examples.npz"


@dataclass
class DistillationReport:
    """Counts of the records behind the training data of a distillation.

    Attributes:
        records: Records with an input that the small model can read.
        stage_a: Training pairs with the large model's answer.
        stage_b: Training pairs with S1's own prediction.
        gold: Training pairs with a true label, from the log and from `labelled`.
        unsure: Unused records without a confident answer of either model.
        unparsable: Unused records without a parsable answer of the large model.
        unreadable: Unused records with an input that the small model cannot read.
        new_labels: Labels in the log that S1 lacks, with their counts. They are not trained on.
        reliability: Estimated accuracy of the large model by answered label, if the log has gold labels.
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
"""Texts with target distributions, or with target answers."""


@dataclass(frozen=True)
class Prepared(Generic[Taught]):
    """Training data of a distillation.

    Attributes:
        stages: Training examples, one entry a stage.
        held_out: Validation examples for early stopping.
        report: Counts of the records behind the examples.
    """

    stages: list[Taught]
    held_out: Taught
    report: DistillationReport

    @property
    def texts(self) -> list[str]:
        """Inputs of all examples, training and held-out."""
        parts: list[Examples | AnswerExamples] = [*self.stages, self.held_out]
        return [text for part in parts for text in part.texts]

    def write(self, folder: Path, about: dict[str, Any]) -> None:
        """Save the examples atomically to a checkpoint folder.

        Args:
            folder: Checkpoint folder, created if missing.
            about: JSON-ready settings that the examples depend on, compared by `read`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        parts: list[Examples | AnswerExamples] = [*self.stages, self.held_out]
        state: dict[str, Any] = {
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
            np.savez_compressed(stream, state=np.frombuffer(json.dumps(state).encode(), dtype=np.uint8), **arrays)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(folder / PREPARED_FILE)

    @classmethod
    def read(cls, folder: Path, about: dict[str, Any]) -> Self | None:
        """Return the examples saved in a checkpoint folder, or None if there are none.

        Raises:
            DataError: If the file cannot be read, or belongs to another distillation.
        """
        file = folder / PREPARED_FILE
        if not file.exists():
            return None
        try:
            with np.load(file, allow_pickle=False) as kept:
                state = json.loads(kept["state"].tobytes())
                parts: list[Any] = [
                    Examples(texts, kept[f"targets_{i}"]) if answers is None else AnswerExamples(texts, answers)
                    for i, (texts, answers) in enumerate(zip(state["texts"], state["answers"], strict=True))
                ]
                report = DistillationReport(**state["report"])
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise DataError(
                f"The training data in {file} cannot be read: {error}. Delete the file to start over."
            ) from error
        if state["about"] != json.loads(json.dumps(about)):
            raise DataError(
                f"{file} belongs to a distillation with other settings or another small model. To resume, use the "
                f"same settings and small model. To start over, delete the file or use another checkpoint folder."
            )
        return cls(parts[:-1], parts[-1], report)

    @staticmethod
    def forget(folder: Path) -> None:
        """Delete the saved examples from a checkpoint folder."""
        (folder / PREPARED_FILE).unlink(missing_ok=True)


class DistillationSettings(Configured):
    """Settings for training S2."""

    threshold: float | None = None
    """Confidence from which S1 is confident; None uses S1's policy or threshold, else the newest record's, else 0.9."""

    large_threshold: float = Field(default=0.5, ge=0.0, le=1.0)
    """Confidence that the large model must exceed for its answer to be used in stage A."""

    large_accuracy: float = Field(default=0.85, gt=0.0, lt=1.0)
    """Prior estimate of the large model's accuracy, updated if the log has gold labels."""

    mode: Literal["posterior", "teacher", "paper"] = "posterior"
    """Training target of stage A.

    "teacher": L(y), the large model's logged probabilities, or its answer smoothed by its estimated reliability.
    "posterior": p(y) proportional to p_S1(y) * L(y), so that an answer that S1 finds implausible counts less.
    "paper": one-hot answers in both stages, with the defaults of the authors' code (batches of 64, 7 epochs, learning
    rate 1e-4).
    """

    temperature: float = Field(default=1.0, gt=0.0)
    """Temperature T of the distillation loss T^2 KL(p_teacher^T || p_S2^T)."""

    gce: float | None = Field(default=None, gt=0.0, le=1.0)
    """Exponent of the generalised cross-entropy, which is robust to wrong answers; None uses the KL divergence."""

    min_pairs: int = Field(default=20, ge=2)
    """Minimum number of training pairs from the log."""

    training: TrainingSettings = TrainingSettings()
    """Epochs, learning rate, seed and so on; None in a field uses the small model's default."""
