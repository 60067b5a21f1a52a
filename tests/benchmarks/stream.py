"""Accuracy of one pass over a stream with continual distillation, without any true labels of the stream.

    python -m tests.benchmarks.stream [--json F] [--orders N]

The stream is test.csv of Banking77 in random order. S1 is trained on few_shot.csv (3 examples per label). If the
current model is not confident, GPT-4's recorded answer is used and recorded. After every 75 answers, S2 is distilled
from S1 and the whole log, and replaces the current model. No promotion gate is used, because no labelled data are held
out. Accuracy is measured over the whole stream, including deferred inputs. Their answers are fused with the small
model's probabilities, assuming a large model that is correct for 85% and errs evenly, because no true label is
available to estimate it. Each threshold gives one point of accuracy and deferral rate, averaged over the orders. The
accuracy at deferral rates of 15, 25 and 35% is interpolated linearly.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from langchain_datashunt._utils.table_files import labelled_texts
from langchain_datashunt.call_log import CallRecord
from langchain_datashunt.cli.demo.benchmark_task import BenchmarkTask, banking77_folder, load_banking77
from langchain_datashunt.distillation import DistillationSettings, TwoStageDistiller
from langchain_datashunt.policies.fusion import AnswerFusion
from langchain_datashunt.small_models import EmbeddingClassifier, SmallModel, TrainingSettings
from langchain_datashunt.small_models.kinds.encoder import PrecomputedEmbeddings, shared_encoder

THRESHOLDS = (0.58, 0.75, 0.82, 0.9)
SURE = 0.7
LARGE_ACCURACY = DistillationSettings().large_accuracy
EVERY = 75
BLOCK = 20
QUIET = TrainingSettings(progress=False)


def one_pass(
    task: BenchmarkTask, s1: SmallModel, examples: tuple[list[str], list[str]], threshold: float, order: int
) -> tuple[float, float]:
    """Return the accuracy and the deferral rate of one pass in a random order."""
    distiller = TwoStageDistiller(DistillationSettings(training=QUIET, threshold=SURE))
    fusion = AnswerFusion.uniform(s1.labels, LARGE_ACCURACY)
    rows = np.random.default_rng(order).permutation(len(task.test)).tolist()
    serving, log, right, asked, new = s1, [], 0, 0, 0
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        for i, prediction in zip(block, serving.predict_batch([task.test.texts[i] for i in block]), strict=True):
            sure = prediction.confidence >= threshold
            said = task.test.large[i]
            answer = prediction.label if sure else fusion.fuse(prediction, said)
            told: dict[str, Any] = {"route": "small", "reason": "confident"}
            if not sure:
                told = {"large_model": "gpt-4", "answer_label": said, "answer": said}
            log.append(CallRecord(input=task.test.texts[i], labels=prediction.labels, threshold=threshold, **told))
            right += answer == task.test.labels[i]
            asked += not sure
            new += not sure
        if new >= EVERY:
            serving, new = distiller.distill(s1, log, labelled=examples).model, 0
    return right / len(rows), asked / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--orders", type=int, default=5)
    options = parser.parse_args()
    folder = banking77_folder()
    if folder is None:
        raise SystemExit("DATASHUNT_DATA_DIR does not contain banking77_gpt4. See docs/data.md.")
    task = load_banking77(folder)
    examples = labelled_texts(folder / "few_shot.csv", "text", "label_name")
    encoder = PrecomputedEmbeddings(shared_encoder(), [*task.test.texts, *examples[0]])
    s1 = EmbeddingClassifier.train(*examples, settings=QUIET, embeddings=encoder)
    points = []
    for threshold in THRESHOLDS:
        runs = [one_pass(task, s1, examples, threshold, order) for order in range(options.orders)]
        accuracy, share = np.mean(runs, axis=0)
        spread = np.std([run[0] for run in runs], ddof=1) if len(runs) > 1 else 0.0
        points.append({"threshold": threshold, "accuracy": accuracy, "share": share, "sd": float(spread)})
        print(
            f"threshold {threshold}: accuracy {accuracy:.4f} (sd {spread:.4f}) at {100 * share:.1f}% asked", flush=True
        )
    shares, accuracies = [p["share"] for p in points], [p["accuracy"] for p in points]
    result = {
        **{f"accuracy_at_{at}": float(np.interp(at / 100, shares, accuracies)) for at in (15, 25, 35)},
        "large_alone": float(np.mean([a == b for a, b in zip(task.test.large, task.test.labels, strict=True)])),
        "orders": options.orders,
        "points": points,
        "data": task.source,
    }
    print(json.dumps({key: value for key, value in result.items() if key != "points"}, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
