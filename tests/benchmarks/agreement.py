"""Agreement of the padding-free engine with transformers on real texts, with trained classification heads.

    python -m tests.benchmarks.agreement [--json F]

The data are 3,080 questions of Banking77 with a head of 77 labels (few examples each), and 3,000 headlines with a head
of four labels (4,000 examples). The second head is more confident, so an equal change of an embedding changes its
probabilities more. Reported per text is the largest difference of a probability: its maximum, its 99% quantile, and the
share of texts above 0.01. Also reported are the shares of equal labels, and of equal routes at a threshold of 0.7.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np

from langchain_datashunt import EmbeddingClassifier
from langchain_datashunt.cli.demo.benchmark_task import DATA_DIR_VARIABLE, Labelled, load_banking77
from langchain_datashunt.small_models import SentenceEncoder
from langchain_datashunt.small_models.training.training import TrainingSettings
from tests.benchmarks.headlines import load_headlines


def compared(train: Labelled, texts: list[str]) -> dict[str, dict[str, float]]:
    """Return the agreement figures by dtype."""
    settings = TrainingSettings(progress=False)
    own = EmbeddingClassifier.train(
        train.texts, train.labels, settings=settings, embeddings=SentenceEncoder(engine="plain")
    )
    wanted, found = own.predict_batch(texts), {}
    for dtype in ("float32", "bfloat16"):
        quick = own.model_copy(update={"embeddings": SentenceEncoder(engine="padding-free", dtype=dtype)})
        given = quick.predict_batch(texts)
        far = np.abs(wanted.probabilities - given.probabilities).max(axis=1)
        found[dtype] = {
            "largest": float(far.max()),
            "of_99_in_100": float(np.quantile(far, 0.99)),
            "share_above_0.01": float((far > 0.01).mean()),
            "same_label": float((wanted.best == given.best).mean()),
            "same_route_at_0.7": float(((wanted.confidence >= 0.7) == (given.confidence >= 0.7)).mean()),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    folder = Path(os.environ.get(DATA_DIR_VARIABLE, ""))
    if not (folder / "headlines" / "train.csv").is_file():
        raise SystemExit(f"{DATA_DIR_VARIABLE} does not contain headlines/train.csv. See docs/data.md.")
    questions = load_banking77(folder / "banking77_gpt4")
    headlines, others = (load_headlines(folder / "headlines" / name) for name in ("train.csv", "test.csv"))
    result = {
        "banking77": compared(
            Labelled(questions.train.texts[::12], questions.train.labels[::12]), list(questions.test.texts)
        ),
        "headlines": compared(headlines.head(4000), list(others.texts[:3000])),
    }
    print(json.dumps(result, indent=2))
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
