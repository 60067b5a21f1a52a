"""Table 1 and Figure 3: text classification with three of the paper's small models."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from langchain_datashunt._utils.table_files import labelled_texts, sample_per_label
from langchain_datashunt.calibration import select_threshold
from langchain_datashunt.calibration.objectives import MaxAccuracy
from langchain_datashunt.cli.demo.benchmark_task import DATA_DIR_VARIABLE, Labelled, banking77_folder, load_banking77
from langchain_datashunt.evaluation.figures import Chart, Line
from langchain_datashunt.prediction import PredictionBatch
from langchain_datashunt.small_models import CachedEmbeddings, EmbeddingClassifier, TrainingSettings
from langchain_datashunt.small_models.bundles.loading import small_model_class
from langchain_datashunt.small_models.kinds.encoder import shared_encoder
from tests.benchmarks.headlines import load_headlines
from tests.benchmarks.reproduction.output import Found, percent, table

KINDS = {"TextCNN": "textcnn", "LSTM": "lstm", "fine-tuned encoder": "transformers"}
BANKING_PER_LABEL = 10
HEADLINES_SMALL = 500
SCORED = 2500
"""Maximum number of test headlines or reviews."""
GRID = np.linspace(0.0, 1.0, 41)


@dataclass
class Task:
    """Training, held-out and test texts, with the large model's answers.

    Attributes:
        name: Name in tables.
        large: Description of the large model.
        train: Training texts and labels of one seed.
        held_out: Texts and labels for selecting the threshold.
        held_out_said: Answers of the large model to `held_out`.
        test: Texts and labels for the final score.
        test_said: Answers of the large model to `test`.
    """

    name: str
    large: str
    train: tuple[list[str], list[str]]
    held_out: Labelled
    held_out_said: list[str | None]
    test: Labelled
    test_said: list[str | None]


def banking(seed: int, quick: bool) -> Task:
    folder = banking77_folder()
    if folder is None:
        raise SystemExit(f"{DATA_DIR_VARIABLE} does not contain banking77_gpt4. See docs/data.md.")
    task = load_banking77(folder)
    train = sample_per_label(task.train.texts, task.train.labels, 3 if quick else BANKING_PER_LABEL, seed)
    dev = Labelled(task.dev.texts, task.dev.labels)
    test = Labelled(task.test.texts, task.test.labels)
    said = (task.dev.large, task.test.large)
    return Task("Banking77", "GPT-4, recorded", train, dev, list(said[0]), test, list(said[1]))


def headlines(seed: int, quick: bool) -> Task:
    """Return the headlines, with a classifier trained on nine tenths of the training set as the large model."""
    folder = Path(os.environ.get(DATA_DIR_VARIABLE, "")) / "headlines"
    if not (folder / "train.csv").is_file():
        raise SystemExit(f"{DATA_DIR_VARIABLE} does not contain headlines/train.csv. See docs/data.md.")
    return with_stand_in(
        "headlines", load_headlines(folder / "train.csv"), load_headlines(folder / "test.csv"), seed, quick
    )


def amazon(file: Path, seed: int, quick: bool) -> Task:
    """Return Amazon reviews, positive above 3 stars and negative below, half for training and half for testing."""
    if file.suffix == ".csv":
        texts, labels = labelled_texts(file, "text", "label")
    else:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        stars = [(row["reviewText"], float(row["overall"])) for row in rows if row.get("reviewText")]
        texts = [text for text, star in stars if star != 3.0]
        labels = ["positive" if star > 3.0 else "negative" for _, star in stars if star != 3.0]
    order = np.random.default_rng(0).permutation(len(texts)).tolist()
    half = len(order) // 2
    parts = [Labelled([texts[i] for i in rows], [labels[i] for i in rows]) for rows in (order[:half], order[half:])]
    return with_stand_in("Amazon", parts[0], parts[1], seed, quick)


def with_stand_in(name: str, train: Labelled, test: Labelled, seed: int, quick: bool) -> Task:
    order = np.random.default_rng(seed).permutation(len(train)).tolist()
    held = order[: len(order) // 10]
    rest = order[len(order) // 10 :]
    rest, test = (rest[:300], test.head(200)) if quick else (rest, test.head(SCORED))
    few = rest[:HEADLINES_SMALL]

    def some(rows: list[int]) -> tuple[list[str], list[str]]:
        return [train.texts[i] for i in rows], [train.labels[i] for i in rows]

    settings = TrainingSettings(progress=False, seed=seed)
    large = EmbeddingClassifier.train(*some(rest), settings=settings, embeddings=_encoder())
    dev = Labelled(*some(held))
    said = [list(large.predict_batch(part.texts).label_names()) for part in (dev, test)]
    return Task(name, "a classifier that learnt all", some(few), dev, list(said[0]), test, list(said[1]))


@lru_cache
def _encoder() -> CachedEmbeddings:
    """Return MiniLM with a cache, because the seeds embed nearly the same texts."""
    return CachedEmbeddings(shared_encoder(), 50_000)


def trained(kind: str, task: Task, seed: int, quick: bool) -> Any:
    cls: Any = small_model_class(kind)
    epochs = 1 if quick else 8 if kind == "transformers" else None  # about 15 minutes on two cores
    settings = TrainingSettings(progress=False, seed=seed, epochs=epochs)
    return cls.train(*task.train, settings=settings)


@dataclass
class Scored:
    """Table row and threshold sweep of one small model on one task and seed."""

    row: dict[str, float]
    sweep: list[list[float]]


def scored(model: Any, task: Task) -> Scored:
    held: PredictionBatch = model.predict_batch(task.held_out.texts)
    known = set(held.labels)
    rows = [i for i, label in enumerate(task.held_out.labels) if label in known]
    choice = select_threshold(
        held.take(np.array(rows)), [task.held_out.labels[i] for i in rows],
        large=[task.held_out_said[i] for i in rows], objective=MaxAccuracy(),
    )  # fmt: skip
    batch: PredictionBatch = model.predict_batch(task.test.texts)
    right = np.array([a == b for a, b in zip(batch.label_names(), task.test.labels, strict=True)])
    large = np.array([a == b for a, b in zip(task.test_said, task.test.labels, strict=True)])
    keep = choice.policy.evaluate(batch).keep
    row = {
        "small": float(right.mean()), "large": float(large.mean()),
        "DS": float(np.where(keep, right, large).mean()), "asked": float((~keep).mean()),
    }  # fmt: skip
    sweep = []
    for threshold in GRID:
        kept = batch.confidence >= threshold
        sweep.append([float(threshold), float(np.where(kept, right, large).mean()), float((~kept).mean())])
    return Scored(row, sweep)


def measured(options: Namespace) -> dict[str, dict[str, list[Scored]]]:
    """Return the results by task and small model, one per seed, or those of an earlier run if given."""
    if options.reuse:
        told = json.loads(options.reuse.read_text(encoding="utf-8"))["runs"]
        return {
            task: {name: [Scored(**one) for one in each] for name, each in models.items()}
            for task, models in told.items()
        }
    quick = options.small_run
    seeds = options.seeds or (1 if quick else 3)
    found: dict[str, dict[str, list[Scored]]] = {}
    for seed in range(seeds):
        other = amazon(options.amazon, seed, quick) if options.amazon else headlines(seed, quick)
        for task in (banking(seed, quick), other):
            for name, kind in KINDS.items():
                one = scored(trained(kind, task, seed, quick), task)
                found.setdefault(f"{task.name} (large: {task.large})", {}).setdefault(name, []).append(one)
    return found


def table_1(options: Namespace) -> Found:
    """Return the table of small model, large model, shunt and deferral rate, by small model."""
    found = measured(options)
    keys = ("small", "large", "DS", "asked")
    rows = [
        [task, name, *(percent([one.row[key] for one in each]) for key in keys)]
        for task, models in found.items()
        for name, each in models.items()
    ]
    figures: dict[str, Any] = {}
    for task, models in found.items():
        figures[task] = {}
        for name, each in models.items():
            values = {key: [one.row[key] for one in each] for key in keys}
            figures[task][name] = {key: {"mean": float(np.mean(v)), "seeds": v} for key, v in values.items()}
    figures["runs"] = {
        task: {name: [vars(one) for one in each] for name, each in models.items()} for task, models in found.items()
    }
    return Found(figures, table(["task", "small model", *keys], rows))


def figure_3(options: Namespace) -> Found:
    """Plot accuracy and deferral rate by threshold, averaged over the seeds."""
    found = measured(options)
    colours = ("--a", "--b", "--d")
    plots: dict[str, Chart] = {}
    figures: dict[str, Any] = {}
    rows = []
    for task, models in found.items():
        lines = []
        figures[task] = {}
        for (name, each), colour in zip(models.items(), colours, strict=True):
            mean = np.mean([one.sweep for one in each], axis=0)
            figures[task][name] = [
                dict(zip(("threshold", "accuracy", "asked"), map(float, p), strict=True)) for p in mean
            ]
            lines.append(Line(name, mean[:, 0].tolist(), mean[:, 1].tolist(), colour))
            lines.append(Line(f"{name}: asked", mean[:, 0].tolist(), mean[:, 2].tolist(), colour, dashed=True))
            best = mean[mean[:, 1].argmax()]
            rows.append([task, name, f"{best[0]:.3f}", f"{100 * best[1]:.1f}", f"{100 * best[2]:.1f}"])
        title = f"{task.split(' (')[0]}: accuracy and share asked by threshold"
        plots[f"figure3-{task.split(' (')[0].lower()}.svg"] = Chart(
            title, "Threshold", "Accuracy; share asked (dashed)", lines, square=True
        )
    return Found(figures, table(["task", "small model", "best threshold", "accuracy", "asked"], rows), plots)
