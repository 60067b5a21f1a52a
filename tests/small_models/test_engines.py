"""Tests that routes, answers and records do not depend on the engine, batching or cache."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from langchain_datashunt import EmbeddingClassifier, ShuntRunnable, Threshold
from langchain_datashunt.call_log import CallLog, Recorder
from langchain_datashunt.cli.demo.benchmark_task import load_banking77
from langchain_datashunt.small_models import TrainingSettings
from langchain_datashunt.small_models.engine.devices import cpu_has_bfloat16
from langchain_datashunt.small_models.kinds.encoder import SentenceEncoder, shared_encoder

WHOLE = pytest.param(None, marks=[pytest.mark.slow, pytest.mark.timeout(900)])


@pytest.mark.parametrize("n", [400, WHOLE])
def test_engine_changes_no_route_answer_or_record(banking77: Path, tmp_path: Path, n: int | None) -> None:
    task = load_banking77(banking77)
    texts = list(task.test.texts)[:n]
    answers = dict(zip(task.test.texts, task.test.large, strict=True))
    settings = TrainingSettings(progress=False)
    quick = EmbeddingClassifier.train(
        task.train.texts[::12],
        task.train.labels[::12],
        settings=settings,
        embeddings=shared_encoder(engine="padding-free"),
    )
    plain = quick.model_copy(update={"embeddings": SentenceEncoder(engine="plain"), "dynamic_batching": None})
    assert quick.dynamic_batching is not None
    remembering = quick.model_copy(update={"cache_size": 5_000})

    def routed(small: Any, name: str, *, one_by_one: bool = False) -> tuple[list[Any], list[Any]]:
        file = tmp_path / f"{name}.db"
        with Recorder(file, sample_small=1.0) as recorder:
            shunt = ShuntRunnable(
                small=small, large=answers.get, pruning=None, policy=Threshold(0.7), recorder=recorder,
                return_decision=True,
            )  # fmt: skip

            async def all_at_once() -> list[Any]:
                return await asyncio.gather(*map(shunt.ainvoke, texts))

            results = asyncio.run(all_at_once()) if one_by_one else shunt.batch(texts)
        with CallLog(file) as store:
            records = sorted((call for group in store.iterate() for call in group), key=lambda call: call.input)
        return [(result.output, result.route, result.prediction.label) for result in results], records

    own, kept = routed(plain, "plain")
    assert 0.1 < np.mean([route == "large" for _, route, _ in own]) < 0.9
    ways = [("quick", quick, False), ("joined", quick, True)]
    ways += [("remembered", remembering, True), ("again", remembering, False)]
    for name, small, single in ways:
        found, records = routed(small, name, one_by_one=single)
        assert found == own, name
        assert len(records) == len(kept)
        for one, two in zip(records, kept, strict=True):
            same = ("input", "route", "reason", "answer_label", "answer", "small_label", "threshold")
            assert [getattr(one, field) for field in same] == [getattr(two, field) for field in same], name
            assert one.confidence == pytest.approx(two.confidence, abs=1e-3)  # stored in half precision
    assert remembering.cache is not None


@pytest.mark.parametrize("n", [600, WHOLE])
@pytest.mark.parametrize(("dtype", "furthest", "of_a_hundred"), [("float32", 1e-4, 1e-5), ("bfloat16", 0.01, 0.007)])
def test_padding_free_agrees_with_transformers_on_banking77(
    banking77: Path, n: int | None, dtype: str, furthest: float, of_a_hundred: float
) -> None:
    """Bounds the difference of probabilities, at most and at the 99% quantile, and the share of equal labels."""
    if dtype == "bfloat16" and not cpu_has_bfloat16():
        pytest.skip("this processor has no bfloat16 instructions, and the emulation is too slow")
    task = load_banking77(banking77)
    texts = list(task.test.texts)[:n]
    plain = EmbeddingClassifier.train(
        task.train.texts[::12], task.train.labels[::12], settings=TrainingSettings(progress=False),
        embeddings=SentenceEncoder(engine="plain"),
    )  # fmt: skip
    quick = plain.model_copy(update={"embeddings": SentenceEncoder(engine="padding-free", dtype=dtype)})
    wanted, found = plain.predict_batch(texts), quick.predict_batch(texts)
    far = np.abs(wanted.probabilities - found.probabilities).max(axis=1)
    assert far.max() <= furthest
    assert np.quantile(far, 0.99) <= of_a_hundred
    assert (wanted.best == found.best).mean() >= (1.0 if dtype == "float32" else 0.995)
