"""Smoke test of an installed package, without test dependencies."""

from __future__ import annotations

import tempfile
from pathlib import Path

import langchain_datashunt
from langchain_datashunt import EmbeddingClassifier, ShuntRunnable, load_small_model
from langchain_datashunt.call_log import CallLog, Recorder
from langchain_datashunt.small_models import TrainingSettings

assert "site-packages" in str(Path(langchain_datashunt.__file__)), "the smoke test must import the installed package"

texts = ["where is my parcel", "has it shipped yet", "I want my money back", "please refund me"]
small = EmbeddingClassifier.train(
    texts, ["status", "status", "refund", "refund"], settings=TrainingSettings(progress=False)
)
with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    small.save(folder / "bundle")
    with Recorder(folder / "calls.db", sample_small=1.0) as recorder:
        shunt = ShuntRunnable(
            small=load_small_model(folder / "bundle"), large=lambda asked: "refund", pruning=None, recorder=recorder,
            return_decision=True,
        )  # fmt: skip
        result = shunt.invoke("has my parcel shipped")
    with CallLog(folder / "calls.db") as store:
        assert store.count() == 1
print(f"{langchain_datashunt.__version__}: {result.output!r} by the {result.route} model")
