from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from langchain_datashunt.call_log import CallLog, CallRecord
from langchain_datashunt.distillation import DistillationSettings, TwoStageDistiller
from langchain_datashunt.distillation.distiller import _fingerprint as fingerprint
from langchain_datashunt.exceptions import ConfigurationError, DataError
from langchain_datashunt.small_models import EnsembleClassifier, LSTMClassifier, TextCNN, load_small_model
from langchain_datashunt.small_models.training.fitting import Stage, fit_network
from langchain_datashunt.small_models.training.processes import Processes, launched_precision
from langchain_datashunt.small_models.training.training import Examples, TrainingSettings, one_hot, soft_cross_entropy
from tests.support.dying import killed_after

LABELS = ("cancel", "refund", "status")
TEXTS = [f"please {label} number {i} for {word}" for i, word in enumerate("abcdefghij") for label in LABELS]
TRUTH = [label for _ in range(10) for label in LABELS]
SMALL: dict[str, Any] = {"embedding_size": 16, "hidden_size": 8}


def same(one: Any, other: Any) -> bool:
    mine, theirs = one.weights(), other.weights()
    return all(np.array_equal(mine[name], theirs[name]) for name in mine) and one.temperature == other.temperature


@pytest.mark.parametrize("cls", [TextCNN, LSTMClassifier])
@pytest.mark.parametrize("steps", [1, 5, 14])
def test_train_resumed_after_kill_gives_same_weights(cls: Any, steps: int, tmp_path: Path) -> None:
    def train(folder: Path | None, **more: Any) -> Any:
        settings = TrainingSettings(
            epochs=4, batch_size=8, progress=False, checkpoint=folder, checkpoint_every=2, seed=3, **more
        )
        return cls.train(TEXTS, TRUTH, settings=settings, **SMALL)

    whole = train(None)
    with killed_after(steps):
        train(tmp_path)
    saved = tmp_path / "training.pt"
    assert saved.exists() == (steps > 1)
    if saved.exists():
        with pytest.raises(DataError, match="belongs to another training run"):
            train(tmp_path, weight_decay=0.5)
    resumed = train(tmp_path)
    assert same(whole, resumed)
    assert whole.lineage["training"] == resumed.lineage["training"]
    assert not saved.exists()


def test_fit_checkpoint_of_other_initial_weights_raises(tmp_path: Path) -> None:
    """Two models with the same architecture and training data cannot share a checkpoint."""
    plain = TrainingSettings(epochs=1, batch_size=8, progress=False)
    one, other = (TextCNN.train(TEXTS, TRUTH, settings=plain.model_copy(update={"seed": i}), **SMALL) for i in (1, 2))
    targets = one_hot(TRUTH, LABELS)
    given = [Examples(TEXTS, targets)], Examples(TEXTS[:8], targets[:8])
    kept = TrainingSettings(epochs=4, batch_size=8, progress=False, checkpoint=tmp_path, checkpoint_every=2)

    def learn(model: Any, settings: TrainingSettings) -> Any:
        return model.fit_soft_targets(*given, settings, soft_cross_entropy)

    with killed_after(5):
        learn(one, kept)
    assert (tmp_path / "training.pt").exists()
    with pytest.raises(DataError, match="initial weights differ"):
        learn(other, kept)
    assert same(learn(one, kept), learn(one, kept.model_copy(update={"checkpoint": None})))


def test_train_damaged_checkpoint_raises(tmp_path: Path) -> None:
    (tmp_path / "training.pt").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="cannot be read .* Delete it"):
        TextCNN.train(TEXTS, TRUTH, settings=TrainingSettings(checkpoint=tmp_path, progress=False), **SMALL)


def test_train_log_folder_writes_json_and_tensorboard(tmp_path: Path) -> None:
    settings = TrainingSettings(epochs=3, batch_size=8, progress=False, log=tmp_path)
    model = TextCNN.train(TEXTS, TRUTH, settings=settings, **SMALL)
    told = json.loads((tmp_path / "metrics.json").read_text())
    assert told["best_loss"] == pytest.approx(model.lineage["validation_nll"])
    assert [point["epoch"] for point in told["points"]] == [1, 2, 3]
    assert told["points"][-1]["train_loss"] < told["points"][0]["train_loss"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload()
    losses = [event.value for event in events.Scalars("validation_nll")]
    assert losses == pytest.approx([point["validation_nll"] for point in told["points"]], abs=1e-5)


def test_train_without_tensorboard_writes_json_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    settings = TrainingSettings(epochs=1, batch_size=8, progress=False, log=tmp_path)
    TextCNN.train(TEXTS, TRUTH, settings=settings, **SMALL)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]


def test_train_bfloat16_gives_similar_probabilities() -> None:
    def train(precision: Any) -> Any:
        settings = TrainingSettings(epochs=6, batch_size=8, progress=False, precision=precision)
        return TextCNN.train(TEXTS, TRUTH, settings=settings, **SMALL).predict_batch(TEXTS).probabilities

    full, half = train("float32"), train("bfloat16")
    assert 0 < np.abs(full - half).max() < 0.2


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_fit_network_half_precision_weights_trains_in_float32(half: torch.dtype) -> None:
    """In half precision, small steps would be rounded away, or become infinite because float16 underflows."""
    torch.manual_seed(0)
    start = torch.nn.Linear(8, 3).to(half)
    targets = np.eye(3)[np.arange(60) % 3]
    rows = [torch.randn(8) for _ in range(60)]
    learnt = {}
    for dtype in (torch.float32, half):
        network = copy.deepcopy(start).to(dtype)
        settings = TrainingSettings(epochs=3, batch_size=8, learning_rate=1e-4, patience=5, progress=False)
        fit_network(
            network, lambda net, some: net(torch.stack(some).to(next(net.parameters()).dtype)), [Stage(rows, targets)],
            Stage(rows, targets), settings, what="a layer",
        )  # fmt: skip
        assert next(network.parameters()).dtype == dtype
        learnt[dtype] = network.weight.detach()
    assert torch.equal(learnt[half], learnt[torch.float32].to(half))
    assert not torch.equal(learnt[half], start.weight)


def test_launched_precision_environment_variable_sets_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched_precision() == "float32"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert launched_precision() == "bfloat16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ConfigurationError, match="'fp16' is not supported"):
        launched_precision()


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [1, 4, 7])
def test_processes_weighted_parts_equal_whole_batch(count: int, n: int) -> None:
    values, total = np.arange(1.0, n + 1.0), 0.0
    for rank in range(count):
        here = Processes()
        here.rank, here.count = rank, count
        rows, weight = here.mine(list(range(n)))
        assert rows
        total += values[rows].mean() * weight / count
    assert total == pytest.approx(values.mean())


# Distillation: interrupted runs and several processes


def routed(i: int) -> CallRecord:
    text, label = TEXTS[i % len(TEXTS)] + f" again {i}", TRUTH[i % len(TRUTH)]
    return CallRecord(input=text, labels=LABELS, large_model="gpt", answer_label=label, threshold=0.9)


@pytest.fixture
def log_of_calls(tmp_path: Path) -> Path:
    """Return a folder with a call log, a bundle of S1 trained without dropout, and a held-out file."""
    settings = TrainingSettings(epochs=1, batch_size=8, progress=False)
    small = TextCNN.train(TEXTS, TRUTH, settings=settings, dropout=0.0, **SMALL)
    small.save(tmp_path / "s1")
    with CallLog(tmp_path / "calls.db") as store:
        store.append([routed(i) for i in range(240)])
    rows = "\n".join(f"{text},{label}" for text, label in zip(TEXTS, TRUTH, strict=True))
    (tmp_path / "holdout.csv").write_text(f"text,label\n{rows}\n")
    return tmp_path


def distill(folder: Path, out: str, *more: str, launcher: tuple[str, ...] = ()) -> list[str]:
    return [
        sys.executable, *launcher, "-m", "langchain_datashunt", "distill", "--bundle", str(folder / "s1"),
        "--store", str(folder / "calls.db"), "--holdout", str(folder / "holdout.csv"), "--out", str(folder / out),
        "--json", "--batch-size", "16", *more,
    ]  # fmt: skip


def test_distill_resumed_with_new_calls_keeps_saved_examples(log_of_calls: Path) -> None:
    small, folder = load_small_model(log_of_calls / "s1"), log_of_calls / "checkpoint"
    calls = [routed(i) for i in range(120)]

    def settings(**more: Any) -> DistillationSettings:
        training = TrainingSettings(epochs=3, progress=False, checkpoint=folder, checkpoint_every=2)
        return DistillationSettings(training=training, **more)

    whole = TwoStageDistiller(
        DistillationSettings(training=settings().training.model_copy(update={"checkpoint": None}))
    )
    wanted = whole.distill(small, calls)
    with killed_after(7):
        TwoStageDistiller(settings()).distill(small, calls)
    with pytest.raises(DataError, match="other settings or another small model"):
        TwoStageDistiller(settings(gce=0.5)).distill(small, calls)
    more = [*calls, *(routed(i) for i in range(120, 200))]  # answers logged after the interruption
    resumed = TwoStageDistiller(settings()).distill(small, more)
    assert same(wanted.model, resumed.model)
    assert vars(wanted.report) == vars(resumed.report)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("damage", [b"", b"nonsense", b"PK\x03\x04nothing"])
def test_distill_damaged_examples_file_raises(damage: bytes, log_of_calls: Path) -> None:
    small, folder = load_small_model(log_of_calls / "s1"), log_of_calls / "checkpoint"
    folder.mkdir()
    (folder / "examples.npz").write_bytes(damage)
    settings = DistillationSettings(training=TrainingSettings(progress=False, checkpoint=folder))
    with pytest.raises(DataError, match=re.escape("examples.npz cannot be read")):
        TwoStageDistiller(settings).distill(small, [routed(i) for i in range(60)])


def test_distill_cli_resumed_after_kill_gives_same_weights(log_of_calls: Path) -> None:
    """After a SIGKILL, the same command resumes and gives the weights of an uninterrupted run."""
    more = ("--epochs", "60", "--checkpoint-every", "5")
    whole = subprocess.run(distill(log_of_calls, "whole", *more), capture_output=True, text=True)
    assert whole.returncode in (0, 1), whole.stderr
    kept = log_of_calls / "kept"
    command = distill(log_of_calls, "resumed", *more, "--checkpoint", str(kept), "--log", str(kept / "log"))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (kept / "training.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == whole.returncode, again.stderr
    told, wanted = json.loads(again.stdout), json.loads(whole.stdout)
    assert same(load_small_model(wanted["bundle"]), load_small_model(told["bundle"]))
    assert not (kept / "training.pt").exists()
    points = json.loads((kept / "log" / "metrics.json").read_text())["points"]
    assert [point["epoch"] for point in points] == list(range(1, len(points) + 1))


def test_distill_cli_two_processes_matches_one_process(log_of_calls: Path) -> None:
    """`torchrun` with two processes gives one candidate, with the weights of one process up to rounding."""
    alone = subprocess.run(distill(log_of_calls, "alone", "--epochs", "4"), capture_output=True, text=True)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    both = subprocess.run(
        distill(log_of_calls, "both", "--epochs", "4", launcher=launcher),
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert not {alone.returncode, both.returncode} - {0, 1}, alone.stderr + both.stderr
    wanted, told = json.loads(alone.stdout), json.loads(both.stdout)  # both processes print one summary in total
    assert told["processes"] == 2
    assert told["stage_a"] == wanted["stage_a"]
    one, other = load_small_model(wanted["bundle"]).weights(), load_small_model(told["bundle"]).weights()
    assert max(float(np.abs(one[name] - other[name]).max()) for name in one) < 1e-4


def test_distill_cli_error_in_first_process_ends_all(log_of_calls: Path) -> None:
    (log_of_calls / "holdout.csv").write_text("text,label\nhello,unheard-of\n")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        distill(log_of_calls, "both", launcher=launcher), capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode
    assert "labels that the small model lacks: unheard-of" in done.stderr


def test_ensemble_resumed_after_kill_gives_same_weights(tmp_path: Path) -> None:
    def train(folder: Path | None) -> Any:
        settings = TrainingSettings(epochs=4, batch_size=8, progress=False, checkpoint=folder, checkpoint_every=2)
        return EnsembleClassifier.train(
            TEXTS, TRUTH, validation=(TEXTS, TRUTH), settings=settings, kinds=("textcnn", "lstm"), embedding_size=16
        )

    whole = train(None)
    with killed_after(20):  # while the second member is trained
        train(tmp_path)
    resumed = train(tmp_path)
    assert all(same(one, other) for one, other in zip(whole.members, resumed.members, strict=True))
    assert whole.shares == resumed.shares
    other = whole.model_copy(update={"members": whole.members[::-1]})
    assert fingerprint(whole) == fingerprint(resumed) != fingerprint(other)
