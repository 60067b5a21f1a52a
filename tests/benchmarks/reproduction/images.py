"""Tables 2 and 4: long-tailed images with the shunt, its recorder and distillation."""

from __future__ import annotations

import io
import sys
import tempfile
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from langchain_datashunt import NoPruning, ShuntRunnable, SoftPruning, Threshold
from langchain_datashunt.calibration import select_threshold
from langchain_datashunt.calibration.objectives import MaxAccuracy
from langchain_datashunt.call_log import CallFilter, CallLog, Recorder
from langchain_datashunt.distillation import DistillationSettings, TwoStageDistiller
from langchain_datashunt.exceptions import DataError
from langchain_datashunt.prediction import PredictionBatch
from langchain_datashunt.small_models import ImageClassifier, SmallModel, TrainingSettings
from tests.benchmarks.reproduction.image_text import ImageTextModel
from tests.benchmarks.reproduction.local_large import LocalLargeModel
from tests.benchmarks.reproduction.output import Found, percent, table

IMBALANCE = 100
PARTS = ("all", "head", "medium", "tail")


@dataclass
class Material:
    """Images and labels of each split, with the labels of the parts head, medium and tail."""

    small: tuple[list[Any], list[str]]
    large: tuple[list[Any], list[str]]
    held_out: tuple[list[Any], list[str]]
    stream: tuple[list[Any], list[str]]
    test: tuple[list[Any], list[str]]
    parts: dict[str, set[str]]
    counts: dict[str, int]


def digits_with_a_long_tail(seed: int) -> Material:
    """Return scikit-learn's 8x8 digits, with 100, 60, 36, ... 1 training images per label for the small model."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = np.asarray(found.images * 15.9375, dtype=np.uint8)
    return split_long_tail(images, np.asarray(found.target), seed, most=100, large=10, held_out=10, stream=60, test=40)


def cifar_with_a_long_tail(folder: Path, seed: int) -> Material:
    """Return CIFAR-100 from its Parquet files, with 400 to 4 training images per label for the small model."""
    import pyarrow.parquet as parquet
    from PIL import Image

    files = sorted(folder.rglob("*.parquet"))
    if not files:
        raise SystemExit(f"{folder} contains no Parquet file. Run: hf download --repo-type dataset uoft-cs/cifar100")
    rows = [row for file in files for row in parquet.read_table(file, columns=["img", "fine_label"]).to_pylist()]
    images = np.stack([np.asarray(Image.open(io.BytesIO(row["img"]["bytes"])).convert("RGB")) for row in rows])
    labels = np.array([row["fine_label"] for row in rows])
    most = len(labels) // len(set(labels.tolist()))  # 600 per label in the published data
    sizes = {"most": 400, "large": 50, "held_out": 10, "stream": 40, "test": 100}
    return split_long_tail(images, labels, seed, **{use: max(1, n * most // 600) for use, n in sizes.items()})


def split_long_tail(
    images: NDArray[Any], target: NDArray[Any], seed: int, *, most: int, large: int, held_out: int, stream: int,
    test: int,
) -> Material:  # fmt: skip
    """Split the images of each label. The seed determines which labels are frequent."""
    rng = np.random.default_rng(seed)
    names = rng.permutation(np.unique(target))
    counts = {str(name): max(1, round(most * IMBALANCE ** (-i / (len(names) - 1)))) for i, name in enumerate(names)}
    chosen: dict[str, list[int]] = {use: [] for use in ("test", "held_out", "large", "small", "stream")}
    for name in names:
        rows = rng.permutation(np.flatnonzero(target == name)).tolist()
        sizes = {"test": test, "held_out": held_out, "large": large, "small": counts[str(name)], "stream": stream}
        for use, n in sizes.items():
            chosen[use] += rows[:n]
            rows = rows[n:]
    many = [name for name in counts if counts[name] >= 0.3 * most]
    few = [name for name in counts if counts[name] < 0.08 * most]
    parts = {"all": set(counts), "head": set(many), "tail": set(few)}
    parts["medium"] = parts["all"] - parts["head"] - parts["tail"]
    taken = {use: ([images[i] for i in rows], [str(target[i]) for i in rows]) for use, rows in chosen.items()}
    return Material(**taken, parts=parts, counts=counts)


def train(material: Material, seed: int, quick: bool, big: bool) -> tuple[ImageClassifier, ImageClassifier]:
    """Train a small ResNet on the long-tailed images, and a larger one on balanced images."""
    high = material.small[0][0].shape[0]
    quiet = TrainingSettings(progress=False, seed=seed, epochs=3 if quick else 80, patience=20)
    depth = 32 if big else 8
    small = ImageClassifier.train(*material.small, depth=depth, width=16, size=(high, high), settings=quiet)
    large = ImageClassifier.train(
        *material.large, depth=depth if big else 14, width=32, size=(high, high), settings=quiet, model_id="large"
    )
    return small, large


def by_part(answers: list[str], material: Material) -> dict[str, float]:
    truth = material.test[1]
    right = np.array([a == b for a, b in zip(answers, truth, strict=True)])
    return {part: float(right[[label in material.parts[part] for label in truth]].mean()) for part in PARTS}


def one_seed(options: Namespace, seed: int) -> dict[str, dict[str, float]]:
    """Return all rows of both tables for one split."""
    material = cifar_with_a_long_tail(options.cifar, seed) if options.cifar else digits_with_a_long_tail(seed)
    small, large_model = train(material, seed, options.small_run, bool(options.cifar))
    larges: dict[str, Any] = {"": LocalLargeModel(model=large_model, opinion="heed")}
    if options.clip:
        larges[" (image-text model)"] = ImageTextModel(model=options.clip, labels=small.labels)
    alone = by_part(labels_of(small, material.test[0]), material)
    rows: dict[str, dict[str, float]] = {"small": {**alone, "asked": 0.0}}
    for name, large in larges.items():
        rows[f"large{name}"] = {**by_part(asked_alone(large, small, material.test[0]), material), "asked": 1.0}
        held = small.predict_batch(material.held_out[0])
        said = asked_alone(large, small, material.held_out[0])
        threshold = chosen(held, material.held_out[1], said)
        s1 = small.model_copy(update={"threshold": threshold})
        s2 = distilled(s1, large, material, threshold, seed, options.small_run)
        told: list[tuple[str, SmallModel | None, Any]] = [
            ("DS", None, NoPruning()), ("DS-2CD", s2, NoPruning()), ("DS-PP-2CD", s2, SoftPruning(top_k=None)),
        ]  # fmt: skip
        for row, student, pruning in told:
            shunt = ShuntRunnable(
                small=s1, student=student, large=large, pruning=pruning, policy=Threshold(threshold),
                return_decision=True,
            )  # fmt: skip
            results = shunt.batch(material.test[0])
            asked = float(np.mean([result.route == "large" for result in results]))
            rows[row + name] = {**by_part([result.output for result in results], material), "asked": asked}
    return rows


def chosen(held: PredictionBatch, labels: list[str], said: list[str]) -> float:
    """Return the threshold with the highest held-out accuracy, or 0.9 if the selection fails."""
    try:
        return select_threshold(held, labels, large=said, objective=MaxAccuracy()).threshold
    except DataError as error:
        print(f"The threshold is 0.9: {error}", file=sys.stderr)
        return 0.9


def labels_of(model: SmallModel, images: list[Any]) -> list[str]:
    return model.predict_batch(images).label_names()


def asked_alone(large: Any, small: SmallModel, images: list[Any]) -> list[str]:
    """Return the large model's answers without the small model's probabilities."""
    return [str(answer) for answer in large.batch([small.reader.lay_out(image) for image in images])]


def distilled(s1: SmallModel, large: Any, material: Material, threshold: float, seed: int, quick: bool) -> SmallModel:
    """Return S2, distilled from a recorded stream of inputs without true labels."""
    with tempfile.TemporaryDirectory() as folder, CallLog(f"sqlite:///{folder}/calls.db") as store:
        with Recorder(store, task="images", sample_small=1.0) as recorder:
            ShuntRunnable(small=s1, large=large, pruning=NoPruning(), recorder=recorder).batch(material.stream[0])
        records = [call for batch in store.iterate(CallFilter(task="images")) for call in batch]
    settings = DistillationSettings(
        threshold=threshold, large_accuracy=0.9,
        training=TrainingSettings(progress=False, seed=seed, epochs=2 if quick else 30, patience=10),
    )  # fmt: skip
    try:
        return TwoStageDistiller(settings).distill(s1, records).model
    except DataError as error:
        print(f"S2 stays S1: {error}", file=sys.stderr)
        return s1


def measured(options: Namespace) -> dict[str, dict[str, list[float]]]:
    seeds = options.seeds or (1 if options.small_run else 5)
    each = [one_seed(options, seed) for seed in range(seeds)]
    return {row: {key: [one[row][key] for one in each] for key in each[0][row]} for row in each[0]}


def _figures(rows: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    return {
        row: {key: {"mean": float(np.mean(v)), "seeds": v} for key, v in keys.items()} for row, keys in rows.items()
    }


def _table(rows: dict[str, dict[str, list[float]]], names: list[str]) -> str:
    head = ["", *PARTS, "asked"]
    return table(head, [[name, *(percent(rows[name][key]) for key in (*PARTS, "asked"))] for name in names])


def table_2(options: Namespace) -> Found:
    """Return the table of small model, large model and shunt, by label frequency."""
    rows = measured(options)
    names = [name for name in rows if name.split(" (")[0] in ("small", "large", "DS", "DS-2CD", "DS-PP-2CD")]
    beats = {
        name: float(np.mean(np.array(rows[name]["all"]) - np.maximum(rows["small"]["all"], rows["large"]["all"])))
        for name in ("DS", "DS-2CD", "DS-PP-2CD")
    }
    return Found({**_figures(rows), "gain_over_the_better_part": beats}, _table(rows, names))


def table_4(options: Namespace) -> Found:
    """Return the table of the ablation."""
    rows = measured(options)
    names = [name for name in rows if name.startswith("DS")]
    return Found(_figures(rows), _table(rows, names))
