"""What all trainers share: settings, splits, targets, the loss, and what is told of a training."""

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
"""With fewer validation examples a temperature is noise; none is fitted."""


class TrainingSettings(Configured):
    """How a small model is trained. A kind fills in its own defaults for what is None."""

    epochs: int | None = Field(default=None, ge=1)
    """Passes over the training set at the most."""

    batch_size: int | None = Field(default=None, ge=1)
    """Examples a step."""

    learning_rate: float | None = Field(default=None, gt=0.0)
    """Peak step size of AdamW."""

    weight_decay: float = Field(default=0.01, ge=0.0)
    """AdamW's decoupled decay."""

    validation_fraction: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Share of each label's examples that is held out for early stopping, where no validation set is given."""

    patience: int | None = Field(default=None, ge=1)
    """Epochs without a better validation loss after which training stops."""

    max_seconds: float | None = Field(default=None, gt=0.0)
    """A network's training ends with the epoch in which so much time has passed; None for no limit."""

    seed: int = 0
    """Of splits, initial weights and the order of examples."""

    progress: bool = True
    """Whether a progress bar is shown."""

    precision: Literal["float32", "bfloat16"] | None = None
    """Number format of a network's products in training; None for float32, or as `accelerate launch` was told."""

    checkpoint: Path | None = None
    """Folder where a network's training is saved, and from where it goes on after a kill, to the same result."""

    checkpoint_every: int = Field(default=200, ge=1)
    """Steps from one checkpoint to the next."""

    log: Path | None = None
    """Folder for metrics.json, and TensorBoard's events where tensorboard is installed."""

    def filled(self, **defaults: Any) -> TrainingSettings:
        """A copy with a kind's defaults where nothing was set."""
        return self.model_copy(update={k: v for k, v in defaults.items() if getattr(self, k) is None})

    def what_matters(self) -> dict[str, Any]:
        """The settings on which the result depends, JSON-ready."""
        return self.model_dump(exclude={"progress", "checkpoint", "checkpoint_every", "log", "max_seconds"})


@dataclass(frozen=True)
class Examples:
    """Texts with target distributions over the labels.

    Attributes:
        texts: `n` texts.
        targets: Shape `[n, k]`; one-hot for gold labels.
    """

    texts: list[str]
    targets: FloatArray

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: NDArray[np.intp]) -> Examples:
        """Some of them, by index."""
        return Examples([self.texts[i] for i in rows.tolist()], self.targets[rows])


@dataclass(frozen=True)
class Split:
    """What a trainer works on: the label set, the training and the validation examples."""

    labels: tuple[str, ...]
    train: Examples
    validation: Examples
    validation_given: bool


@dataclass
class TrainingReport:
    """What training did: validation loss by step, the best of them, and all metrics of each."""

    history: list[float] = field(default_factory=list)
    best_step: int = 0
    best_loss: float = float("inf")
    seconds: float = 0.0
    points: list[dict[str, float]] = field(default_factory=list)

    def note(self, loss: float, **more: float) -> bool:
        """Take a validation loss (mean negative log-likelihood in nats) in; True where it is the best so far.

        What else is known of this step goes into the metrics.
        """
        self.history.append(round(loss, 6))
        self.points.append({**more, "validation_nll": round(loss, 6)})
        if not loss < self.best_loss - 1e-6:  # nor where it is NaN
            return False
        self.best_loss, self.best_step = loss, len(self.history)
        return True

    def waited(self) -> int:
        """Steps since the best one."""
        return len(self.history) - self.best_step


def split_examples(
    texts: Sequence[str],
    labels: Sequence[str],
    *,
    validation: tuple[Sequence[str], Sequence[str]] | None,
    settings: TrainingSettings,
    label_set: Sequence[str] | None = None,
) -> Split:
    """Check a training set and hold a stratified part of it out, unless a validation set is given.

    Raises:
        DataError: No examples, unequal lengths, fewer than two labels, an empty text, or an unknown label.
    """
    if len(texts) != len(labels):
        raise DataError(f"{len(texts)} texts and {len(labels)} labels: give one label for each text.")
    if not texts:
        raise DataError("There are no training examples; give at least two labels with one text each.")
    empty = [i for i, text in enumerate(texts) if not isinstance(text, str) or not text.strip()]
    if empty:
        raise DataError(f"Training text {empty[0]} is empty ({len(empty)} in all); remove such rows.")
    _check_labels(labels, "training")
    names = tuple(label_set) if label_set is not None else tuple(sorted(set(labels)))
    if twice := repeated(names):
        raise DataError(f"The label set names {', '.join(map(repr, twice[:5]))} more than once; name each label once.")
    if len(names) < 2:
        raise DataError(f"A classifier needs two labels or more; the training set has only {names}.")
    everything = Examples(list(texts), one_hot(labels, names))
    if validation is not None:
        if len(validation[0]) != len(validation[1]):
            raise DataError(
                f"{len(validation[0])} validation texts and {len(validation[1])} labels: give one label for each text."
            )
        _check_labels(validation[1], "validation")
        if strange := [i for i, text in enumerate(validation[0]) if not isinstance(text, str) or not text.strip()]:
            raise DataError(f"Validation text {strange[0]} is empty ({len(strange)} in all); remove such rows.")
        held_out = Examples(list(validation[0]), one_hot(validation[1], names))
        if not len(held_out):
            raise DataError("The validation set is empty; give examples, or none so that a part is held out.")
        return Split(names, everything, held_out, validation_given=True)
    held = _held_out_rows(everything.targets.argmax(axis=1), first_copies(texts), settings)
    rest = np.setdiff1d(np.arange(len(everything)), held)
    return Split(names, everything.take(rest), everything.take(held), validation_given=False)


def _check_labels(labels: Sequence[str], what: str) -> None:
    strange = [i for i, label in enumerate(labels) if not isinstance(label, str)]
    if strange:
        raise DataError(
            f"The label of {what} text {strange[0]} is {labels[strange[0]]!r}, and no text ({len(strange)} in all). "
            f"Give labels as strings, and remove rows without one."
        )


def _held_out_rows(truth: NDArray[np.intp], first: NDArray[np.intp], settings: TrainingSettings) -> NDArray[np.intp]:
    """At least one text of each label that has two or more, and at least one in all; a text with all its copies."""
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
            "Each label has only one example, so none can be held out to stop training in time. "
            "Give two examples a label, or a validation set."
        )
    return chosen


def _texts_of(rows: NDArray[np.intp], copies: NDArray[np.intp], wanted: int) -> list[int]:
    """Of these texts, in their order, such as have so many copies together, or else the one with the fewest.

    Never all of them.
    """
    taken: list[int] = []
    for row in rows.tolist():
        if len(taken) < len(rows) - 1 and copies[row] <= wanted:
            taken.append(row)
            wanted -= copies[row]
    return taken if taken or len(rows) < 2 else [int(rows[copies[rows].argmin()])]


def _leave_some(truth: NDArray[np.intp], first: NDArray[np.intp], held: NDArray[np.bool_]) -> None:
    """See to it that each label has a row that is not held out: its texts may all be copies of other labels'."""
    for label in np.unique(truth):
        rows = np.flatnonzero(truth == label)
        if held[rows].all():
            held[first == first[rows[0]]] = False


def first_copies(texts: Sequence[str]) -> NDArray[np.intp]:
    """Where each text stood first, shape `[n]`: a text and its copies belong on one side of a split.

    Texts that differ in case or in space around them alone are copies, as for `text_hashes`.
    """
    seen: dict[str, int] = {}
    return np.array([seen.setdefault(text.strip().lower(), i) for i, text in enumerate(texts)], dtype=np.intp)


def _if_any_differ(truth: NDArray[np.intp], first: NDArray[np.intp]) -> NDArray[np.intp]:
    """`first`, or where no label has two texts that differ, each row as its own: copies are all that can be split."""
    if any(len(_distinct(truth == label, first)) > 1 for label in np.unique(truth)):
        return first
    return np.arange(len(first))


def _distinct(among: NDArray[np.bool_], first: NDArray[np.intp]) -> NDArray[np.intp]:
    """Those of some rows that are no copy of an earlier one."""
    return np.flatnonzero(among & (first == np.arange(len(first))))


def stratified_folds(truth: NDArray[np.intp], first: NDArray[np.intp], folds: int, seed: int) -> list[NDArray[np.intp]]:
    """Rows to hold out in turn, each label's texts spread over the folds, a text with all its copies in one.

    A label's only text is in none, so that it is always trained on; nor is a fold empty. Where each label has only
    one text, its copies are spread.

    Args:
        truth: Each row's label, shape `[n]`.
        first: As `first_copies` has it, shape `[n]`.
        folds: At the most.
        seed: Of the order.
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
    """Rows to hold out in turn, whatever their labels, a text with all its copies in one fold; as `stratified_folds`.

    One text alone, again and again, is spread.
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
    """Examples that another model labelled, none where there are none.

    Raises:
        DataError: They are not one distribution over these labels for each text.
    """
    found = given or Examples([], np.zeros((0, len(names))))
    if found.targets.shape != (len(found), len(names)) or not np.allclose(found.targets.sum(axis=1), 1.0, atol=1e-3):
        raise DataError(
            f"{len(found)} pseudo-labelled texts with targets of shape {list(found.targets.shape)}: give one "
            f"distribution over the {len(names)} labels for each text, in the order of the label set."
        )
    return found


def one_hot(labels: Sequence[str], names: Sequence[str]) -> FloatArray:
    """Target distributions of gold labels, shape `[n, k]`.

    Raises:
        DataError: A label is not among the names.
    """
    position = {name: i for i, name in enumerate(names)}
    if unknown := sorted({str(label) for label in labels if label not in position}):
        raise DataError(
            f"Labels outside the label set: {', '.join(unknown[:5])}. Labels are strings; add these to the "
            f"label set or remove their rows."
        )
    targets = np.zeros((len(labels), len(names)))
    targets[np.arange(len(labels)), [position[label] for label in labels]] = 1.0
    return targets


def text_hashes(texts: Sequence[str]) -> list[str]:
    """Short hashes by which later calibration data can be checked for overlap, without keeping the texts."""
    return sorted(
        {hashlib.sha256(text.strip().lower().encode(errors="surrogatepass")).hexdigest()[:16] for text in texts}
    )


def seen_in_training(lineage: Mapping[str, Any], texts: Sequence[str]) -> list[int]:
    """Which texts a model, or one that it was made from, was trained on; positions in `texts`.

    Args:
        lineage: The model's, with the hashes of its training texts.
        texts: To look for.
    """
    hashes: set[str] = set()
    part: Any = lineage
    while isinstance(part, Mapping):
        hashes.update(part.get("training_text_hashes", ()))
        part = part.get("parent")
    return [i for i, text in enumerate(texts) if text_hashes([text])[0] in hashes] if hashes else []


def lineage_of(split: Split, settings: TrainingSettings, report: TrainingReport, **more: Any) -> dict[str, Any]:
    """What a bundle says of its training; JSON-ready."""
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
    """Write the metrics so far to the log folder, where there is one: metrics.json, replaced at once."""
    if settings.log is None:
        return
    settings.log.mkdir(parents=True, exist_ok=True)
    told = {"what": what, "points": report.points, "best_step": report.best_step, "best_loss": report.best_loss}
    partial = settings.log / "metrics.json.partial"
    partial.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    partial.replace(settings.log / "metrics.json")


def seed_everything(seed: int) -> None:
    """Seed torch's generators; numpy code here takes generators of its own."""
    require("torch", "torch").manual_seed(seed)


def soft_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0, gce: float | None = None
) -> torch.Tensor:
    """Mean loss of a batch of distributions; logits and targets `[n, k]`.

    Without `gce`, T^2 * -sum_y q(y) log p(y) with p = softmax(logits / T): up to a constant T^2 KL(q || p). With it,
    the generalised cross-entropy sum_y q(y) (1 - p(y)^g) / g (Zhang & Sabuncu 2018), which wrong targets pull less.

    Args:
        logits: Of the student.
        targets: The teacher's distributions, already at this temperature.
        temperature: T.
        gce: g in (0, 1], or None.
    """
    log_p = (logits.float() / temperature).log_softmax(dim=-1)
    losses = -log_p if gce is None else (1.0 - (gce * log_p).exp()) / gce
    return (targets * losses).sum(-1).mean() * temperature**2


def progress_bar(total: int, what: str, settings: TrainingSettings) -> Any:
    """A tqdm bar, or a silent one."""
    return require("tqdm.auto", "torch").tqdm(total=total, desc=what, disable=not settings.progress, leave=False)
