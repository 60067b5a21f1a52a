"""What all trainers share: settings, splits, targets, and the loop that fits a torch network with early stopping."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from langchain_datashunt._extras import require
from langchain_datashunt.calibration.temperature import fit_temperature
from langchain_datashunt.configured import Configured
from langchain_datashunt.exceptions import DataError
from langchain_datashunt.predictions import FloatArray

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

    seed: int = 0
    """Of splits, initial weights and the order of examples."""

    progress: bool = True
    """Whether a progress bar is shown."""

    def filled(self, **defaults: Any) -> TrainingSettings:
        """A copy with a kind's defaults where nothing was set."""
        return self.model_copy(update={k: v for k, v in defaults.items() if getattr(self, k) is None})


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
    """What training did: validation loss by step, and the best of them."""

    history: list[float] = field(default_factory=list)
    best_step: int = 0
    best_loss: float = float("inf")
    seconds: float = 0.0

    def note(self, loss: float) -> bool:
        """Take a validation loss (mean negative log-likelihood in nats) in; True where it is the best so far."""
        self.history.append(round(loss, 6))
        if loss >= self.best_loss - 1e-6:
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
    names = tuple(label_set) if label_set is not None else tuple(sorted(set(labels)))
    if len(names) < 2:
        raise DataError(f"A classifier needs two labels or more; the training set has only {names}.")
    everything = Examples(list(texts), one_hot(labels, names))
    if validation is not None:
        held_out = Examples(list(validation[0]), one_hot(validation[1], names))
        if not len(held_out):
            raise DataError("The validation set is empty; give examples, or none so that a part is held out.")
        return Split(names, everything, held_out, validation_given=True)
    held = _held_out_rows(everything.targets.argmax(axis=1), settings)
    rest = np.setdiff1d(np.arange(len(everything)), held)
    return Split(names, everything.take(rest), everything.take(held), validation_given=False)


def _held_out_rows(truth: NDArray[np.intp], settings: TrainingSettings) -> NDArray[np.intp]:
    """At least one example of each label that has two or more, and at least one example in all."""
    rng = np.random.default_rng(settings.seed)
    held: list[NDArray[np.intp]] = []
    for label in np.unique(truth):
        rows = rng.permutation(np.flatnonzero(truth == label))
        n = min(len(rows) - 1, max(1, round(len(rows) * settings.validation_fraction)))
        held.append(rows[:n])
    chosen = np.sort(np.concatenate(held))
    if not chosen.size:
        raise DataError(
            "Each label has only one example, so none can be held out to stop training in time. "
            "Give two examples a label, or a validation set."
        )
    return chosen


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
    return sorted({hashlib.sha256(text.strip().lower().encode()).hexdigest()[:16] for text in texts})


def lineage_of(split: Split, settings: TrainingSettings, report: TrainingReport, **more: Any) -> dict[str, Any]:
    """What a bundle says of its training; JSON-ready."""
    return {
        "training": settings.model_dump(exclude={"progress"}),
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


@dataclass(frozen=True)
class Stage:
    """Examples of one stage of training, as features.

    Attributes:
        features: `n` of whatever the network's `logits_of` takes.
        targets: Shape `[n, k]`.
    """

    features: list[Any]
    targets: FloatArray


def fit_network(
    network: torch.nn.Module,
    logits_of: Callable[[list[Any]], torch.Tensor],
    stages: Sequence[Stage],
    validation: Stage,
    settings: TrainingSettings,
    *,
    what: str,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = soft_cross_entropy,
) -> TrainingReport:
    """Fit a network with AdamW (linear warm-up and decay), keep the weights of the best validation loss.

    With several stages a step on each is taken in turn, as 2CD does; an epoch is a pass over the longest.

    Args:
        network: Trained in place.
        logits_of: From a list of features to logits `[n, k]`, with gradients.
        stages: What is learnt from.
        validation: What training stops on, by cross-entropy.
        settings: All fields filled.
        what: Title of the progress bar.
        loss: From logits and targets `[n, k]` to a number.
    """
    torch = require("torch", "torch")
    assert settings.epochs and settings.batch_size and settings.learning_rate and settings.patience
    started, report = time.perf_counter(), TrainingReport()
    device = next(network.parameters()).device
    wanted = [torch.from_numpy(stage.targets).float().to(device) for stage in stages]
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    rounds = max(-(-len(stage.features) // settings.batch_size) for stage in stages)
    steps = settings.epochs * rounds * len(stages)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_up_then_decay(steps))
    rng, best = np.random.default_rng(settings.seed), copy.deepcopy(network.state_dict())
    with progress_bar(steps, what, settings) as bar:
        for _ in range(settings.epochs):
            network.train()
            for stage, rows in _in_turn(stages, rounds, settings.batch_size, rng):
                found = loss(logits_of([stages[stage].features[i] for i in rows]), wanted[stage][rows])
                optimizer.zero_grad(set_to_none=True)
                found.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                bar.update(1)
            network.eval()
            if report.note(_mean_loss(logits_of, validation.features, validation.targets, settings.batch_size)):
                best = copy.deepcopy(network.state_dict())
            bar.set_postfix(validation_nll=report.history[-1])
            if report.waited() >= settings.patience:
                break
    network.load_state_dict(best)
    network.eval()
    report.seconds = time.perf_counter() - started
    return report


def _in_turn(
    stages: Sequence[Stage], rounds: int, size: int, rng: np.random.Generator
) -> Iterator[tuple[int, list[int]]]:
    """Batches of all stages in turn; a shorter stage begins anew until the longest is through."""
    batches = [list(_shuffled(len(stage.features), size, rng)) for stage in stages]
    for i in range(rounds):
        for stage, mine in enumerate(batches):
            yield stage, mine[i % len(mine)]


def _warm_up_then_decay(steps: int, warm_up: float = 0.06) -> Callable[[int], float]:
    rising = max(1, int(steps * warm_up))
    return lambda step: min((step + 1) / rising, max(0.0, (steps - step) / max(1, steps - rising)))


def _shuffled(n: int, size: int, rng: np.random.Generator) -> Iterator[list[int]]:
    order = rng.permutation(n).tolist()
    for start in range(0, n, size):
        yield order[start : start + size]


def _mean_loss(
    logits_of: Callable[[list[Any]], torch.Tensor], features: list[Any], targets: FloatArray, size: int
) -> float:
    torch = require("torch", "torch")
    total = 0.0
    with torch.inference_mode():
        for start in range(0, len(features), size):
            logits = logits_of(features[start : start + size])
            wanted = torch.from_numpy(targets[start : start + size]).float().to(logits.device)
            total += float(soft_cross_entropy(logits, wanted)) * len(wanted)
    return total / max(1, len(features))


def relearn_network(
    model: Any,
    stages: Sequence[Examples],
    held_out: Examples,
    settings: TrainingSettings,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Any:
    """A copy of a model with a torch network, trained on soft targets of several stages in turn.

    Args:
        model: Has `_network`, `_logits` and `features`; it is not changed.
        stages: What is learnt from.
        held_out: What training stops on, and the temperature is fitted on.
        settings: All fields filled.
        loss: From logits and targets to a number.
    """
    seed_everything(settings.seed)
    learner = model.model_copy()
    learner._network = copy.deepcopy(model._network)
    learner._bundle = None
    report = fit_network(
        learner._network,
        learner._logits,
        [Stage(learner.features(stage.texts), stage.targets) for stage in stages],
        Stage(learner.features(held_out.texts), held_out.targets),
        settings,
        what="distillation",
        loss=loss,
    )
    if len(held_out) >= MIN_EXAMPLES_FOR_CALIBRATION:
        logits = np.asarray(learner.predict_scores(held_out.texts).logits, dtype=np.float64)
        learner.temperature = fit_temperature(logits, held_out.targets.argmax(axis=1))
    learner.lineage = {"parent": model.lineage, "steps": len(report.history), "held_out_nll": report.best_loss}
    return learner
