"""Accuracy and calibration of each kind of small model on a task with many labelled examples.

    python -m tests.benchmarks.headlines [--json F] [--limit N] [--kinds KIND ...]

The data are gold-price headlines (4 labels, as published with FrugalGPT). Models are trained on train.csv, holding out
a tenth for early stopping and for the temperature, and scored once on test.csv. There are no recorded LLM answers.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from langchain_datashunt.cli.demo.benchmark_task import DATA_DIR_VARIABLE, Labelled
from langchain_datashunt.evaluation import mean_interval, metrics
from langchain_datashunt.small_models import TrainingSettings
from langchain_datashunt.small_models.bundles.loading import small_model_class
from langchain_datashunt.small_models.kinds.encoder import PrecomputedEmbeddings, shared_encoder
from langchain_datashunt.small_models.kinds.on_embeddings import OnEmbeddings

KINDS = ("embedding", "neighbours", "ensemble", "textcnn", "lstm", "transformers")
ERROR_BOUND = 0.05


def load_headlines(file: Path) -> Labelled:
    """Return texts without the "Q:" and "A:" of the published prompt, and their labels."""
    with file.open(encoding="utf-8", newline="") as stream:
        rows = [(row[0], row[1]) for row in csv.reader(stream)]
    texts = [text.removeprefix("Q:").removesuffix("A:").strip() for text, _ in rows]
    return Labelled(texts, [label for _, label in rows])


def measure(kind: str, train: Labelled, test: Labelled, encoder: PrecomputedEmbeddings) -> dict[str, Any]:
    cls: Any = small_model_class(kind)
    options = {"embeddings": encoder} if issubclass(cls, OnEmbeddings) or kind == "ensemble" else {}
    started = time.perf_counter()
    model = cls.train(train.texts, train.labels, settings=TrainingSettings(progress=False), **options)
    seconds = time.perf_counter() - started
    batch = model.predict_batch(test.texts)
    truth = np.array([batch.labels.index(label) for label in test.labels])
    right = batch.best == truth
    kept = np.argsort(-batch.confidence)
    wrong_so_far = np.cumsum(~right[kept]) / np.arange(1, len(kept) + 1)
    within = np.flatnonzero(wrong_so_far <= ERROR_BOUND)
    return {
        "accuracy": list(mean_interval(right)),
        "nll": metrics.negative_log_likelihood(batch.probabilities, truth),
        "ece": metrics.expected_calibration_error(batch.confidence, right),
        "aurc": metrics.aurc(batch.confidence, right),
        "kept_at_5_percent_error": float(within[-1] + 1) / len(kept) if within.size else 0.0,
        "train_seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--limit", type=int, help="maximum rows per file")
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    options = parser.parse_args()
    folder = Path(os.environ.get(DATA_DIR_VARIABLE, "")) / "headlines"
    if not (folder / "train.csv").is_file():
        raise SystemExit(f"{DATA_DIR_VARIABLE} does not contain headlines/train.csv. See docs/data.md.")
    train, test = (load_headlines(folder / name) for name in ("train.csv", "test.csv"))
    if options.limit:
        train, test = train.head(options.limit), test.head(options.limit)
    started = time.perf_counter()
    encoder = PrecomputedEmbeddings(shared_encoder(), [*train.texts, *test.texts])
    print(f"embedded {len(train) + len(test)} texts in {time.perf_counter() - started:.1f} s", file=sys.stderr)
    most = max(test.labels.count(label) for label in set(test.labels)) / len(test)
    result: dict[str, Any] = {"train": len(train), "test": len(test), "most_frequent_label": most}
    for kind in options.kinds:
        result[kind] = measure(kind, train, test, encoder)
        print(f"{kind}: {json.dumps(result[kind])}", file=sys.stderr, flush=True)
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
