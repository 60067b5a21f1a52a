"""Training loop for torch networks, with early stopping, checkpoints, metrics and several processes."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from langchain_datashunt._utils.optional import require
from langchain_datashunt.calibration.temperature import fit_temperature
from langchain_datashunt.exceptions import DataError
from langchain_datashunt.prediction import FloatArray
from langchain_datashunt.small_models.training.processes import launched_precision, processes
from langchain_datashunt.small_models.training.training import (
    MIN_EXAMPLES_FOR_CALIBRATION,
    Examples,
    TrainingReport,
    TrainingSettings,
    progress_bar,
    seed_everything,
    soft_cross_entropy,
    write_metrics,
)

if TYPE_CHECKING:
    import torch

LogitsOf: TypeAlias = "Callable[[torch.nn.Module, list[Any]], torch.Tensor]"
"""Function from a network and `n` features to differentiable logits, shape `[n, k]`."""

TensorLoss: TypeAlias = "Callable[[torch.Tensor, torch.Tensor], torch.Tensor]"
"""Function from logits and targets, shape `[n, k]`, to a scalar."""

CHECKPOINT_FILE = "training.pt"


@dataclass(frozen=True)
class Stage:
    """Examples of one training stage, as features.

    Attributes:
        features: `n` features that `logits_of` accepts.
        targets: Target distributions, shape `[n, k]`.
    """

    features: list[Any]
    targets: FloatArray


def fit_network(
    network: torch.nn.Module,
    logits_of: LogitsOf,
    stages: Sequence[Stage],
    validation: Stage,
    settings: TrainingSettings,
    *,
    what: str,
    loss: TensorLoss = soft_cross_entropy,
    validation_loss: TensorLoss = soft_cross_entropy,
    keep: Literal["best", "last"] = "best",
) -> TrainingReport:
    """Fit a network with AdamW and keep the weights with the best validation loss.

    The learning rate rises linearly during warm-up and then decays linearly. Weights in half precision are trained in
    float32 and rounded at the end.

    With several stages, training takes a step on each stage in turn, as in 2CD. An epoch is a pass over the longest
    stage. Under `accelerate launch` or torchrun, each process computes its part of every batch.

    Args:
        network: Network that is trained in place.
        logits_of: Function from the network and features to logits, shape `[n, k]`.
        stages: Training examples.
        validation: Examples for early stopping.
        settings: Training settings, with the defaults of the kind filled in.
        what: Title of the progress bar.
        loss: Training loss, by default soft cross-entropy.
        validation_loss: Loss on the validation examples, by default soft cross-entropy.
        keep: "best" stops early and keeps the best weights. "last" runs all epochs and keeps the last weights, for
            training without held-out examples.

    Raises:
        DataError: If the checkpoint cannot be read or belongs to another training run, or if training diverged.
    """
    return _Fit(network, logits_of, stages, validation, settings, what, loss, validation_loss, keep).run()


class _Fit:
    """One training run: its network, optimizer and position.

    The order of an epoch and the dropout of a step depend only on the seed and on the number of the epoch or step. A
    resumed run therefore takes the same steps, although checkpoints hold no random state.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        logits_of: LogitsOf,
        stages: Sequence[Stage],
        validation: Stage,
        settings: TrainingSettings,
        what: str,
        loss: TensorLoss,
        validation_loss: TensorLoss,
        keep: Literal["best", "last"],
    ) -> None:
        assert settings.epochs and settings.batch_size and settings.learning_rate and settings.patience
        self.torch = require("torch", "torch")
        self.kept = next(network.parameters()).dtype
        if self.kept in (self.torch.bfloat16, self.torch.float16):  # rounds small updates away
            network.float()
        self.network, self.logits_of, self.loss, self.validation_loss = network, logits_of, loss, validation_loss
        self.stages, self.validation, self.settings, self.what = stages, validation, settings, what
        self.epochs, self.patience, self.batch_size = settings.epochs, settings.patience, settings.batch_size
        self.keep = keep
        if keep == "last":
            self.patience = self.epochs + 1
        self.rounds = max(-(-len(stage.features) // self.batch_size) for stage in stages)
        self.steps_an_epoch = self.rounds * len(stages)
        self.steps = self.epochs * self.steps_an_epoch
        self.processes = processes()
        self.home = next(network.parameters()).device
        self.device = self.processes.device(self.home)
        self.precision = settings.precision or launched_precision()
        self.step, self.report = 0, TrainingReport()
        self.learnt: Any = 0.0  # sum of the losses of this epoch's steps
        self.best = copy.deepcopy(network.state_dict())

    def run(self) -> TrainingReport:
        torch, started = self.torch, time.perf_counter()
        self.network.to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, _warm_up_then_decay(self.steps))
        self._resume()
        self.spread = self.processes.spread(self.network)
        self.wanted = [torch.from_numpy(stage.targets).float().to(self.device) for stage in self.stages]
        settings = self.settings.model_copy(update={"progress": self.settings.progress and self.processes.first})
        with progress_bar(self.steps, self.what, settings) as bar, _events(settings, self.processes.first) as events:
            bar.update(self.step)
            while self.step < self.steps and self.report.waited() < self.patience:
                self._epoch(bar)
                self._validate(events)
                bar.set_postfix(validation_nll=self.report.history[-1])
                late = time.perf_counter() - started > (self.settings.max_seconds or math.inf)
                if self.processes.total([float(late)])[0]:  # all processes stop together
                    break
        if self.report.history and not np.isfinite(self.report.history).any():
            raise DataError(
                "Training diverged: no validation loss was finite. Use a lower learning_rate, or check the examples "
                "for errors."
            )
        self.network.load_state_dict(self.best)
        self.network.to(self.home, self.kept).eval()
        self._forget()
        self.report.seconds = time.perf_counter() - started
        return self.report

    def _epoch(self, bar: Any) -> None:
        """Run the remaining steps of this epoch."""
        epoch, done = divmod(self.step, self.steps_an_epoch)
        self.spread.train()
        rng = np.random.default_rng([self.settings.seed, epoch])
        for i, (stage, rows) in enumerate(_in_turn(self.stages, self.rounds, self.batch_size, rng)):
            if i >= done:
                self._step(stage, rows)
                bar.update(1)
                if self.step % self.settings.checkpoint_every == 0 and self.step % self.steps_an_epoch:
                    self._save()

    def _step(self, stage: int, rows: list[int]) -> None:
        seed_everything(hash((self.settings.seed, self.step, self.processes.rank)) % 2**63)
        rows, weight = self.processes.mine(rows)
        with self._precision():
            logits = self.logits_of(self.spread, [self.stages[stage].features[i] for i in rows])
        found = self.loss(logits, self.wanted[stage][rows]) * weight
        self.optimizer.zero_grad(set_to_none=True)
        found.backward()  # type: ignore[no-untyped-call]
        self.torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.learnt = self.learnt + found.detach()
        self.step += 1

    def _precision(self) -> AbstractContextManager[Any]:
        kind: AbstractContextManager[Any] = self.torch.autocast(
            self.device.type, dtype=self.torch.bfloat16, enabled=self.precision == "bfloat16"
        )
        return kind

    def _validate(self, events: Any) -> None:
        """Finish an epoch: compute the validation loss, keep the best weights, write metrics and a checkpoint."""
        self.network.eval()
        total, n = self.processes.total(self._validation_loss())
        (learnt,) = self.processes.total([float(self.learnt) / self.processes.count])
        progress = {
            "step": self.step,
            "epoch": self.step // self.steps_an_epoch,
            "train_loss": round(learnt / self.steps_an_epoch, 6),
            "learning_rate": self.schedule.get_last_lr()[0],
        }
        if self.report.note(total / max(1.0, n), **progress) or self.keep == "last":
            self.best = copy.deepcopy(self.network.state_dict())
        self.learnt = 0.0
        if self.processes.first:
            write_metrics(self.settings, self.report, self.what)
            for name in ("train_loss", "validation_nll", "learning_rate"):
                events.add_scalar(name, self.report.points[-1][name], self.step)
        self._save()

    def _validation_loss(self) -> tuple[float, int]:
        """Return the summed loss of this process's part of the validation set, and the size of the part."""
        mine = list(range(len(self.validation.features)))[self.processes.rank :: self.processes.count]
        total = 0.0
        with self.torch.inference_mode(), self._precision():
            for start in range(0, len(mine), self.batch_size):
                rows = mine[start : start + self.batch_size]
                logits = self.logits_of(self.network, [self.validation.features[i] for i in rows])
                wanted = self.torch.from_numpy(self.validation.targets[rows]).float().to(logits.device)
                total += float(self.validation_loss(logits, wanted)) * len(rows)
        return total, len(mine)

    # Checkpoints

    @property
    def _file(self) -> Path | None:
        return None if self.settings.checkpoint is None else self.settings.checkpoint / CHECKPOINT_FILE

    def _save(self) -> None:
        if self._file is None or not self.processes.first:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_suffix(".partial")
        report = {name: getattr(self.report, name) for name in ("history", "best_step", "best_loss", "points")}
        state = {
            "training": self._fingerprint(),
            "step": self.step,
            "learnt": float(self.learnt),
            "network": self.network.state_dict(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "report": report,
        }
        with partial.open("wb") as stream:
            self.torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(self._file)

    def _resume(self) -> None:
        """Resume from the checkpoint if there is one."""
        file = self._file
        if file is not None:
            self._fingerprint()  # computed now, because it covers the initial weights
        state = self.processes.share(lambda: None if file is None or not file.exists() else self._read(file))
        if state is None:
            return
        self.step, self.learnt, self.best = state["step"], state["learnt"], state["best"]
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.report = TrainingReport(**state["report"])

    def _read(self, file: Path) -> dict[str, Any]:
        try:
            state: dict[str, Any] = self.torch.load(file, map_location="cpu", weights_only=True)
            fits = state["training"] == self._fingerprint()
        except Exception as error:
            what = type(error).__name__  # torch's own message recommends unsafe loading
            raise DataError(f"The checkpoint {file} cannot be read ({what}). Delete it to start over.") from error
        if not fits:
            raise DataError(
                f"The checkpoint {file} belongs to another training run: the examples, settings, network or initial "
                f"weights differ. Use the same ones to resume, choose another folder, or delete it to start over."
            )
        return state

    def _fingerprint(self) -> str:
        """Return a hash of all that the result depends on. Must be called before the first step."""
        if not hasattr(self, "_own_fingerprint"):
            seen = hashlib.sha256(json.dumps(self.settings.what_matters(), sort_keys=True).encode())
            seen.update(re.sub(r" at 0x[0-9a-f]+", "", repr(self.network)).encode())
            for name, weight in self.network.state_dict().items():
                seen.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
                seen.update(weight.detach().cpu().reshape(-1).view(self.torch.uint8).numpy())
            for stage in (*self.stages, self.validation):
                for feature in stage.features:
                    seen.update(_as_bytes(feature))
                seen.update(np.ascontiguousarray(stage.targets).tobytes())
            self._own_fingerprint = seen.hexdigest()
        return self._own_fingerprint

    def _forget(self) -> None:
        if self._file is not None and self.processes.first:
            self._file.unlink(missing_ok=True)


def _as_bytes(feature: Any) -> bytes:
    """Return a feature as bytes: a list of numbers, an array, or a tuple of both."""
    if isinstance(feature, np.ndarray):
        return repr(feature.shape).encode() + np.ascontiguousarray(feature).tobytes()
    if isinstance(feature, tuple):
        return b"".join(_as_bytes(part) for part in feature)
    return repr(feature).encode()


class _NoEvents:
    """Replacement for TensorBoard's SummaryWriter if it is not used or not installed."""

    def add_scalar(self, *_: Any) -> None:
        """Do nothing."""

    def __enter__(self) -> _NoEvents:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _events(settings: TrainingSettings, wanted: bool) -> Any:
    if settings.log is None or not wanted:
        return _NoEvents()
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return _NoEvents()
    return SummaryWriter(str(settings.log))


def _in_turn(
    stages: Sequence[Stage], rounds: int, size: int, rng: np.random.Generator
) -> Iterator[tuple[int, list[int]]]:
    """Yield batches of all stages in turn. Shorter stages repeat until the longest one ends."""
    batches = [list(_shuffled(len(stage.features), size, rng)) for stage in stages]
    for i in range(rounds):
        for stage, mine in enumerate(batches):
            yield stage, mine[i % len(mine)]


def _shuffled(n: int, size: int, rng: np.random.Generator) -> Iterator[list[int]]:
    order = rng.permutation(n).tolist()
    for start in range(0, n, size):
        yield order[start : start + size]


def _warm_up_then_decay(steps: int, warm_up: float = 0.06) -> Callable[[int], float]:
    rising = max(1, int(steps * warm_up))
    return lambda step: min((step + 1) / rising, max(0.0, (steps - step) / max(1, steps - rising)))


def fit_soft_targets_network(
    model: Any, stages: Sequence[Examples], held_out: Examples, settings: TrainingSettings, loss: TensorLoss
) -> Any:
    """Return a copy of a model with a torch network, trained further on soft targets in several stages.

    Args:
        model: Model with `_network`, `logits_of` and `features`. It is not changed.
        stages: Training examples.
        held_out: Examples for early stopping and for fitting the temperature.
        settings: Training settings, with the defaults of the kind filled in.
        loss: Function from logits and targets, shape `[n, k]`, to a scalar.
    """
    learner = model.model_copy()
    learner._network = copy.deepcopy(model._network)
    learner._bundle = None
    report = fit_network(
        learner._network,
        learner.logits_of,
        [Stage(learner.features(stage.texts), stage.targets) for stage in stages],
        Stage(learner.features(held_out.texts), held_out.targets),
        settings,
        what="distillation",
        loss=loss,
    )
    if len(held_out) >= MIN_EXAMPLES_FOR_CALIBRATION:
        read = [learner.reader.read(text) for text in held_out.texts]
        logits = np.asarray(learner.predict_scores(read).logits, dtype=np.float64)
        learner.temperature = fit_temperature(logits, held_out.targets.argmax(axis=1))
    learner.lineage = {"parent": model.lineage, "steps": len(report.history), "held_out_nll": report.best_loss}
    return learner
