"""Figure of the README: accuracy by deferral rate on Banking77 with GPT-4's answers.

    python -m tests.benchmarks.figure [--out docs/figures/banking77.svg]

The small model is that of the demo (10 examples per label, seed 0), with temperature and threshold from dev.csv. The
curve is measured on test.csv.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np

from langchain_datashunt import EmbeddingClassifier
from langchain_datashunt._utils.table_files import sample_per_label
from langchain_datashunt.calibration import MaxAccuracy, select_threshold
from langchain_datashunt.cli.demo.benchmark_task import banking77_folder, load_banking77
from langchain_datashunt.evaluation import deferral_curve
from langchain_datashunt.evaluation.figures import Chart, Line, Point
from langchain_datashunt.small_models import TrainingSettings
from tests.benchmarks.reproduction.output import standalone
from tests.benchmarks.thresholds import calibrated


def plain_colours(svg: str) -> str:
    """Return an SVG with plain colours instead of CSS variables, which some viewers do not support."""
    colours: dict[str, str] = {}
    for name, colour in re.findall(r"(--[\w-]+):\s*(#[0-9a-fA-F]{3,8})", svg):
        colours.setdefault(name, colour)
    return re.sub(r"var\((--[\w-]+)\)", lambda match: colours.get(match[1], match[0]), svg)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/figures/banking77.svg"))
    options = parser.parse_args()
    folder = banking77_folder()
    if folder is None:
        raise SystemExit("DATASHUNT_DATA_DIR does not contain banking77_gpt4. See docs/data.md.")
    task = load_banking77(folder)
    texts, labels = sample_per_label(task.train.texts, task.train.labels, 10, seed=0)
    small = EmbeddingClassifier.train(texts, labels, settings=TrainingSettings(progress=False))
    small = calibrated(small, list(task.dev.texts), list(task.dev.labels))
    dev, test = small.predict_batch(task.dev.texts), small.predict_batch(task.test.texts)
    choice = select_threshold(dev, task.dev.labels, large=task.dev.large, objective=MaxAccuracy())
    right = np.array([a == b for a, b in zip(test.label_names(), task.test.labels, strict=True)])
    large = np.array([a == b for a, b in zip(task.test.large, task.test.labels, strict=True)])
    curve = deferral_curve(test.confidence, right, large)
    keep = choice.policy.evaluate(test).keep
    chosen = float(np.where(keep, right, large).mean())
    chart = Chart(
        "Banking77: accuracy by share asked",
        "share of questions that GPT-4 is asked",
        "accuracy",
        [
            Line("small where it is sure", curve.deferral_rate.tolist(), curve.accuracy.tolist()),
            Line("a random part asked", [0.0, 1.0], [float(right.mean()), float(large.mean())], "--d", dashed=True),
        ],
        [
            Point(f"small alone: {100 * right.mean():.1f}%", 0.0, float(right.mean()), "--d"),
            Point(f"GPT-4 alone {100 * large.mean():.1f}%", 1.0, float(large.mean()), "--d"),
            Point(f"shunt {100 * chosen:.1f}% at {100 * (~keep).mean():.0f}% asked", float((~keep).mean()), chosen),
        ],
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(plain_colours(standalone(chart)) + "\n", encoding="utf-8")
    print(f"{options.out}: shunt {chosen:.4f} at {(~keep).mean():.4f}")


if __name__ == "__main__":
    main()
