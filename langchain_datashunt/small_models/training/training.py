"""Shared parts of all trainers: settings, splits, targets, losses, reports and lineage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from langchain_datashunt._utils.optional import require
from langchain_datashunt._utils.settings import Configured
from langchain_datashunt.exceptions import DataError
from langchain_datashunt.prediction import FloatArray
from langchain_datashunt.small_models.bundles.bundle import repeated

if TYPE_CHECKING:
    import torch

MIN_EXAMPLES_FOR_CALIBRATION = 50
"""Minimum number of validation examples for fitting a temperature, which would be noise with fewer."""


class TrainingSettings(Configured):
    """Settings for training a small model. Each kind fills in its own defaults for fields that are None."""

    epochs: int | None = Field(default=None, ge=1)
    """Maximum number of passes over the training set."""

    batch_size: int | None = Field(default=None, ge=1)
    """Number of examples per step."""

    learning_rate: float | None = Field(default=None, gt=0.0)
    """Peak learning rate of AdamW."""

    weight_decay: float = Field(default=0.01, ge=0.0)
    """Decoupled weight decay of AdamW."""

    validation_fraction: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Fraction of each label's examples held out for early stopping if no validation set is given."""

    patience: int | None = Field(default=None, ge=1)
    """Number of epochs without a better validation loss after which training stops."""

    max_seconds: float | None = Field(default=None, gt=0.0)
    """Time limit for training a network, in seconds, checked after each epoch. None means no limit."""

    seed: int = 0
    """Seed for splits, initial weights and the order of examples."""

    progress: bool = True
    """Whether to show a progress bar."""

    precision: Literal["float32", "bfloat16"] | None = None
    """Precision of a network's matrix products in training. None means that of `accelerate launch`, or float32."""

    checkpoint: Path | None = None
    """Folder for checkpoints of a network's training. None saves none.

    A run that was interrupted resumes from its checkpoint and gives the same result."""

    checkpoint_every: int = Field(default=200, ge=1)
    """Number of steps between checkpoints. Each epoch also ends with one."""

    log: Path | None = None
    """Folder for metrics.json, and for TensorBoard events if tensorboard is installed. None writes neither."""

    def filled(self, **defaults: Any) -> TrainingSettings:
        """Return a copy with the given defaults for fields that are None."""
        return self.model_copy(update={k: v for k, v in defaults.items() if getattr(self, k) is None})

    def what_matters(self) -> dict[str, Any]:
        """Return the settings that identify a training run, as JSON-serializable values."""
        return self.model_dump(exclude={"progress", "checkpoint", "checkpoint_every", "log", "max_seconds"})


@dataclass(frozen=True)
class Examples:
    """Texts with target distributions over the labels.

    Attributes:
        texts: `n` texts.
        targets: Target distributions, shape `[n, k]`. One-hot for gold labels.
    """

    texts: list[str]
    targets: FloatArray

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: NDArray[np.intp]) -> Examples:
        """Return the examples at the given rows."""
        return Examples([self.texts[i] for i in rows.tolist()], self.targets[rows])


@dataclass(frozen=True)
class Split:
    """Data for a trainer: the label set, the training examples and the validation examples."""

    labels: tuple[str, ...]
    train: Examples
    validation: Examples
    validation_given: bool


@dataclass
class TrainingReport:
    """Progress of a training run: validation losses, the best loss and its step, and all metrics by step."""

    history: list[float] = field(default_factory=list)
    best_step: int = 0
    best_loss: float = float("inf")
    seconds: float = 0.0
    points: list[dict[str, float]] = field(default_factory=list)

    def note(self, loss: float, **more: float) -> bool:
        """Record a validation loss, and return whether it is the best so far.

        Args:
            loss: Mean negative log-likelihood in nats.
            **more: Further metrics of this step.
        """
        self.history.append(round(loss, 6))
        self.points.append({**more, "validation_nll": round(loss, 6)})
        if not loss < self.best_loss - 1e-6:  # also true for NaN
            return False
        self.best_loss, self.best_step = loss, len(self.history)
        return True

    def waited(self) -> int:
        """Return the number of steps since the best one."""
        return len(self.history) - self.best_step


def split_examples(
    texts: Sequence[str],
    labels: Sequence[str],
    *,
    validation: tuple[Sequence[str], Sequence[str]] | None,
    settings: TrainingSettings,
    label_set: Sequence[str] | None = None,
) -> Split:
    """Check a training set and hold out a stratified part of it if no validation set is given.

    Raises:
        DataError: If there are no examples or fewer than two labels, if the lengths differ, if a text is empty, or if
            a label is repeated in the label set or not part of it.
    """
    if len(texts) != len(labels):
        raise DataError(f"Expected one label for each text, got {len(texts)} texts and {len(labels)} labels.")
    if not texts:
        raise DataError("There are no training examples. Give at least two labels with one text each.")
    empty = [i for i, text in enumerate(texts) if not isinstance(text, str) or not text.strip()]
    if empty:
        raise DataError(f"Training text {empty[0]} is empty or not a string ({len(empty)} in total). Remove such rows.")
    _check_labels(labels, "training")
    names = tuple(label_set) if label_set is not None else tuple(sorted(set(labels)))
    if twice := repeated(names):
        raise DataError(f"The label set has {', '.join(map(repr, twice[:5]))} more than once. Give each label once.")
    if len(names) < 2:
        raise DataError(f"Expected two labels or more, got {names}. Add examples of another label.")
    everything = Examples(list(texts), one_hot(labels, names))
    if validation is not None:
        if len(validation[0]) != len(validation[1]):
            raise DataError(
                f"Expected one label for each validation text, got {len(validation[0])} texts and "
                f"{len(validation[1])} labels."
            )
        _check_labels(validation[1], "validation")
        if strange := [i for i, text in enumerate(validation[0]) if not isinstance(text, str) or not text.strip()]:
            raise DataError(
                f"Validation text {strange[0]} is empty or not a string ({len(strange)} in total). Remove such rows."
            )
        held_out = Examples(list(validation[0]), one_hot(validation[1], names))
        if not len(held_out):
            raise DataError(
                "The validation set is empty. Give examples, or pass None to hold out a part of the training set."
            )
        return Split(names, everything, held_out, validation_given=True)
    held = _held_out_rows(everything.targets.argmax(axis=1), first_copies(texts), settings)
    rest = np.setdiff1d(np.arange(len(everything)), held)
    return Split(names, everything.take(rest), everything.take(held), validation_given=False)


def _check_labels(labels: Sequence[str], what: str) -> None:
    strange = [i for i, label in enumerate(labels) if not isinstance(label, str)]
    if strange:
        raise DataError(
            f"Expected a string as the label of {what} text {strange[0]}, got {labels[strange[0]]!r} ({len(strange)} "
            f"such labels in total). Convert labels to strings, and remove rows without a label."
        )


def _held_out_rows(truth: NDArray[np.intp], first: NDArray[np.intp], settings: TrainingSettings) -> NDArray[np.intp]:
    """Return the rows to hold out: texts of each label that has two or more, each with all its copies.

    Raises:
        DataError: If each label has only one example.
    """
    rng, first = np.random.default_rng(settings.seed), _if_any_differ(truth, first)
    copies, taken = np.bincount(first, minlength=len(first)), list[int]()
    for label in np.unique(truth):
        wanted = max(1, round(int((truth == label).sum()) * settings.validation_fraction))
        taken += _texts_of(rng.permutation(_distinct(truth == label, first)), copies, wanted)
    held = np.isin(first, taken)
    _leave_some(truth, first, held)
    chosen = np.flatnonzero(held)
    if not chosen.size:
        raise DataError(
            "Each label has only one example, so none can be held out for early stopping. "
            "Give at least two examples per label, or a validation set."
        )
    return chosen


def _texts_of(rows: NDArray[np.intp], copies: NDArray[np.intp], wanted: int) -> list[int]:
    """Return the first of `rows` whose copies add up to at most `wanted`, but never all of `rows`.

    If no row has so few copies, return the row with the fewest. A single row is never returned.
    """
    taken: list[int] = []
    for row in rows.tolist():
        if len(taken) < len(rows) - 1 and copies[row] <= wanted:
            taken.append(row)
            wanted -= copies[row]
    return taken if taken or len(rows) < 2 else [int(rows[copies[rows].argmin()])]


def _leave_some(truth: NDArray[np.intp], first: NDArray[np.intp], held: NDArray[np.bool_]) -> None:
    """Change `held` so that each label has a row that is not held out.

    All rows of a label may be held out if its texts are copies of other labels' texts.
    """
    for label in np.unique(truth):
        rows = np.flatnonzero(truth == label)
        if held[rows].all():
            held[first == first[rows[0]]] = False


def first_copies(texts: Sequence[str]) -> NDArray[np.intp]:
    """Return the position of each text's first copy, shape `[n]`.

    A text and its copies belong on one side of a split. Texts are copies if they differ only in case or in surrounding
    whitespace, as in `text_hashes`.
    """
    seen: dict[str, int] = {}
    return np.array([seen.setdefault(text.strip().lower(), i) for i, text in enumerate(texts)], dtype=np.intp)


def _if_any_differ(truth: NDArray[np.intp], first: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return `first`, or treat each row as its own text if no label has two different texts.

    In that case, only copies can be split.
    """
    if any(len(_distinct(truth == label, first)) > 1 for label in np.unique(truth)):
        return first
    return np.arange(len(first))


def _distinct(among: NDArray[np.bool_], first: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return the rows in the mask `among` that are not copies of an earlier row."""
    return np.flatnonzero(among & (first == np.arange(len(first))))


def stratified_folds(truth: NDArray[np.intp], first: NDArray[np.intp], folds: int, seed: int) -> list[NDArray[np.intp]]:
    """Return the rows to hold out in each fold, with each label's texts spread over the folds.

    All copies of a text are in one fold. The only text of a label is in no fold, so that it is always trained on.
    Empty folds are omitted. If each label has only one text, its copies are spread over the folds.

    Args:
        truth: Label index of each row, shape `[n]`.
        first: Position of each row's first copy, shape `[n]`, see `first_copies`.
        folds: Maximum number of folds.
        seed: Seed for the order of the texts.
    """
    first = _if_any_differ(truth, first)
    rng, fold_of = np.random.default_rng(seed), np.full(len(truth), -1)
    for label in np.unique(truth):
        rows = rng.permutation(_distinct(truth == label, first))
        if len(rows) > 1:
            fold_of[rows] = np.arange(len(rows)) % folds
    fold_of = fold_of[first]
    for fold in range(folds):
        held = fold_of == fold
        _leave_some(truth, first, held)
        fold_of[(fold_of == fold) & ~held] = -1
    return [np.flatnonzero(fold_of == fold) for fold in range(folds) if (fold_of == fold).any()]


def random_folds(first: NDArray[np.intp], folds: int, seed: int) -> list[NDArray[np.intp]]:
    """Return the rows to hold out in each fold, independently of their labels.

    All copies of a text are in one fold. If all rows are copies of one text, they are spread over the folds.
    """
    everything = np.arange(len(first))
    if not first.any():
        first = everything
    fold_of = np.empty(len(first), dtype=np.intp)
    order = np.random.default_rng(seed).permutation(np.flatnonzero(first == everything))
    for i, rows in enumerate(np.array_split(order, folds)):
        fold_of[rows] = i
    fold_of = fold_of[first]
    return [np.flatnonzero(fold_of == fold) for fold in np.unique(fold_of)]


def pseudo_labels(given: Examples | None, names: Sequence[str]) -> Examples:
    """Check and return examples that another model labelled, or no examples if `given` is None.

    Raises:
        DataError: If the targets are not one distribution over the labels for each text.
    """
    found = given or Examples([], np.zeros((0, len(names))))
    if found.targets.shape != (len(found), len(names)) or not np.allclose(found.targets.sum(axis=1), 1.0, atol=1e-3):
        raise DataError(
            f"Expected one distribution over the {len(names)} labels for each of {len(found)} pseudo-labelled texts, "
            f"got targets of shape {list(found.targets.shape)}. Each row must sum to 1, in label set order."
        )
    return found


def one_hot(labels: Sequence[str], names: Sequence[str]) -> FloatArray:
    """Return the one-hot target distributions of gold labels, shape `[n, k]`.

    Raises:
        DataError: If a label is not in `names`.
    """
    position = {name: i for i, name in enumerate(names)}
    if unknown := sorted({str(label) for label in labels if label not in position}):
        raise DataError(
            f"Found labels outside the label set: {', '.join(unknown[:5])}. Add them to the label set or remove their "
            f"rows. Labels must be strings."
        )
    targets = np.zeros((len(labels), len(names)))
    targets[np.arange(len(labels)), [position[label] for label in labels]] = 1.0
    return targets


def text_hashes(texts: Sequence[str]) -> list[str]:
    """Return short hashes of texts, by which later data can be checked for overlap without storing the texts."""
    return sorted(
        {hashlib.sha256(text.strip().lower().encode(errors="surrogatepass")).hexdigest()[:16] for text in texts}
    )


def seen_in_training(lineage: Mapping[str, Any], texts: Sequence[str]) -> list[int]:
    """Return the positions of texts on which a model or one of its parents was trained.

    Args:
        lineage: Lineage of the model, with the hashes of its training texts.
        texts: Texts to look up.
    """
    hashes: set[str] = set()
    part: Any = lineage
    while isinstance(part, Mapping):
        hashes.update(part.get("training_text_hashes", ()))
        part = part.get("parent")
    return [i for i, text in enumerate(texts) if text_hashes([text])[0] in hashes] if hashes else []


def lineage_of(split: Split, settings: TrainingSettings, report: TrainingReport, **more: Any) -> dict[str, Any]:
    """Return the training data, settings and results that a bundle stores, as JSON-serializable values."""
    return {
        "training": settings.what_matters(),
        "examples": len(split.train),
        "validation_examples": len(split.validation),
        "validation_given": split.validation_given,
        "validation_nll": report.best_loss,
        "best_step": report.best_step,
        "steps": len(report.history),
        "seconds": round(report.seconds, 3),
        "training_text_hashes": text_hashes(
            split.train.texts + ([] if split.validation_given else split.validation.texts)
        ),
        **more,
    }


def write_metrics(settings: TrainingSettings, report: TrainingReport, what: str) -> None:
    """Replace metrics.json in the log folder, if there is one, with the metrics recorded so far."""
    if settings.log is None:
        return
    settings.log.mkdir(parents=True, exist_ok=True)
    progress = {"what": what, "points": report.points, "best_step": report.best_step, "best_loss": report.best_loss}
    partial = settings.log / "metrics.json.partial"
    partial.write_text(json.dumps(progress, indent=2) + "\n", encoding="utf-8")
    partial.replace(settings.log / "metrics.json")


def seed_everything(seed: int) -> None:
    """Seed torch's random generators. Numpy code in this package uses separate generators."""
    require("torch", "torch").manual_seed(seed)


def soft_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0, gce: float | None = None
) -> torch.Tensor:
    """Return the mean loss of a batch of soft targets.

    Without `gce`, the loss is T^2 * -sum_y q(y) log p(y) with p = softmax(logits / T), which is T^2 KL(q || p) up to a
    constant. With `gce`, it is T^2 times the generalized cross-entropy sum_y q(y) (1 - p(y)^g) / g (Zhang & Sabuncu
    2018), which is more robust to wrong targets.

    Args:
        logits: Logits of the student, shape `[n, k]`.
        targets: Distributions q of the teacher, already at this temperature, shape `[n, k]`.
        temperature: Distillation temperature T.
        gce: Exponent g in (0, 1] of the generalized cross-entropy. None uses the cross-entropy.
    """
    log_p = (logits.float() / temperature).log_softmax(dim=-1)
    losses = -log_p if gce is None else (1.0 - (gce * log_p).exp()) / gce
    return (targets * losses).sum(-1).mean() * temperature**2


def progress_bar(total: int, what: str, settings: TrainingSettings) -> Any:
    """Return a tqdm progress bar, silent if `settings.progress` is False."""
    return require("tqdm.auto", "torch").tqdm(total=total, desc=what, disable=not settings.progress, leave=False)
