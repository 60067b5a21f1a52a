"""Table 3: BLEU of a small captioner, a larger one and the shunt between them, on drawn scenes."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import numpy as np

from langchain_datashunt import NoPruning, ShuntRunnable, Threshold
from langchain_datashunt.evaluation.figures import Chart, Line, Point
from langchain_datashunt.small_models import TrainingSettings
from tests.benchmarks.reproduction.caption_model import CaptionModel
from tests.benchmarks.reproduction.local_large import LocalLargeModel
from tests.benchmarks.reproduction.output import Found, percent, table
from tests.benchmarks.reproduction.scenes import Scene, draw_scenes

NOISE = 0.45
ORDERS = (1, 2, 3, 4)


def bleu(captions: list[str], scenes: list[Scene]) -> dict[str, float]:
    """Return BLEU-1 to BLEU-4 of a corpus against all five captions of each scene, in [0, 1]."""
    from sacrebleu.metrics import BLEU

    references = [list(one) for one in zip(*(scene.captions() for scene in scenes), strict=True)]
    return {
        f"bleu{n}": BLEU(max_ngram_order=n, tokenize="none").corpus_score(captions, references).score / 100
        for n in ORDERS
    }


def train(scenes: list[Scene], seed: int, quick: bool, *, large: bool) -> CaptionModel:
    """Train a captioner on the first caption of each scene. The larger one has a wider image network and LSTM."""
    settings = TrainingSettings(
        progress=False, seed=seed, epochs=2 if quick else 40, patience=12, learning_rate=3e-3, batch_size=32
    )
    return CaptionModel.train(
        [scene.pixels for scene in scenes],
        [scene.captions()[0] for scene in scenes],
        settings=settings,
        size=(24, 24),
        depth=8,
        width=20 if large else 10,
        embedding_size=64,
        hidden_size=128 if large else 64,
        dropout=0.1,
        evenness=0.0,
        max_words=16,
        model_id="larger captioner" if large else "small captioner",
    )


def one_seed(options: Namespace, seed: int) -> dict[str, Any]:
    quick = options.small_run
    sizes = (60, 60, 40, 40) if quick else (500, 500, 200, 600)
    starts = [10_000 * seed + 1000 * i for i in range(4)]
    drawn = [draw_scenes(n, seed=start, noise=NOISE) for n, start in zip(sizes, starts, strict=True)]
    few, many, held_out, test = drawn
    small, large = train(few, seed, quick, large=False), train([*few, *many], seed, quick, large=True)
    held = small.predict_batch([scene.pixels for scene in held_out])
    said = said_by(large, held_out)
    grid = np.unique(np.quantile(held.confidence, np.linspace(0.0, 1.0, 41)))
    mixed = [(score(mix(held, said, float(t)), held_out), float(t)) for t in grid]
    best = max(value for value, _ in mixed)
    threshold = min(
        t for value, t in mixed if value >= best - 0.002
    )  # the fewest LLM calls within 0.002 of the best score
    shunt = ShuntRunnable(
        small=small, large=LocalLargeModel(model=large), pruning=NoPruning(), policy=Threshold(threshold),
        return_decision=True,
    )  # fmt: skip
    results = shunt.batch([scene.pixels for scene in test])
    asked = float(np.mean([result.route == "large" for result in results]))
    alone = small.predict_batch([scene.pixels for scene in test])
    answers = said_by(large, test)
    sweep = []
    for t in np.quantile(alone.confidence, np.linspace(0.0, 1.0, 21)):
        sweep.append(
            {
                "threshold": float(t),
                "asked": float(np.mean(alone.confidence < t)),
                "bleu4": bleu(mix(alone, answers, float(t)), test)["bleu4"],
            }
        )
    return {
        "small": {**bleu([str(one) for one in alone.outputs()], test), "asked": 0.0},
        "large": {**bleu(answers, test), "asked": 1.0},
        "DS": {**bleu([str(result.output) for result in results], test), "asked": asked},
        "threshold": threshold,
        "sweep": sweep,
    }


def said_by(model: CaptionModel, scenes: list[Scene]) -> list[str]:
    return [str(one) for one in model.predict_batch([scene.pixels for scene in scenes]).outputs()]


def mix(batch: Any, answers: list[str], threshold: float) -> list[str]:
    own = [str(one) for one in batch.outputs()]
    return [a if c >= threshold else b for a, b, c in zip(own, answers, batch.confidence.tolist(), strict=True)]


def score(captions: list[str], scenes: list[Scene]) -> float:
    return bleu(captions, scenes)["bleu4"]


def table_3(options: Namespace) -> Found:
    """Return the table of small model, large model and shunt, with a plot by threshold."""
    seeds = options.seeds or (1 if options.small_run else 3)
    each = [one_seed(options, seed) for seed in range(seeds)]
    names, keys = ("small", "large", "DS"), (*(f"bleu{n}" for n in ORDERS), "asked")
    rows = [[name, *(percent([one[name][key] for one in each]) for key in keys)] for name in names]
    sweep = each[0]["sweep"]
    line = Line("shunt", [one["asked"] for one in sweep], [one["bleu4"] for one in sweep], "--a")
    mean = {name: {key: float(np.mean([one[name][key] for one in each])) for key in keys} for name in names}
    first = each[0]
    ends = [Point("small", 0.0, first["small"]["bleu4"], "--b"), Point("large", 1.0, first["large"]["bleu4"], "--d")]
    chosen = Point("DS", first["DS"]["asked"], first["DS"]["bleu4"], "--c")
    chart = Chart("Captions: BLEU-4 and share asked", "Share asked", "BLEU-4", [line], [*ends, chosen])
    return Found({**mean, "seeds": each}, table(["", *keys], rows), {"captions.svg": chart})
