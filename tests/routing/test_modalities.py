"""Every modality through a ShuntRunnable: all call methods, logging and distillation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from langchain_datashunt import ShuntRunnable, SoftPruning, Threshold, load_small_model
from langchain_datashunt.call_log import CallLog, CallRecord, Recorder
from langchain_datashunt.distillation import DistillationSettings, TwoStageDistiller
from langchain_datashunt.small_models.kinds.generating import GeneratingModel
from tests.support.modalities import MODALITIES, Modality, quiet

WAYS = ("invoke", "ainvoke", "batch", "abatch", "stream", "astream")


@pytest.fixture(scope="module", params=list(MODALITIES))
def modality(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Modality:
    folder: Path = tmp_path_factory.mktemp("model")
    return MODALITIES[request.param](folder)


def middle(modality: Modality) -> float:
    """Return a threshold at which about half of the inputs are answered locally."""
    return float(np.median(modality.small.predict_batch(modality.inputs).confidence))


async def called(shunt: ShuntRunnable, way: str, inputs: list[Any]) -> list[Any]:
    if way == "batch":
        return shunt.batch(inputs)
    if way == "abatch":
        return await shunt.abatch(inputs)
    outputs = []
    for one in inputs:
        if way == "invoke":
            outputs.append(shunt.invoke(one))
        elif way == "ainvoke":
            outputs.append(await shunt.ainvoke(one))
        elif way == "stream":
            outputs.append("".join(shunt.stream(one)))
        else:
            outputs.append("".join([chunk async for chunk in shunt.astream(one)]))
    return outputs


@pytest.mark.parametrize("way", WAYS)
async def test_modality_every_call_method_returns_same_outputs(modality: Modality, way: str) -> None:
    threshold = middle(modality)
    batch = modality.small.predict_batch(modality.inputs)
    shunt = ShuntRunnable(
        small=modality.small, large=modality.large, policy=Threshold(threshold), pruning=SoftPruning()
    )
    found = await called(shunt, way, list(modality.inputs))
    kept = batch.confidence >= threshold
    assert 0 < kept.sum() < len(kept)
    near = np.abs(batch.confidence - threshold) < 1e-5  # rounding may differ between a batch and a single input
    for i, own in enumerate(batch.outputs()):
        if not near[i]:
            assert found[i] == (own if kept[i] else modality.truth(i))


def test_modality_logged_calls_distill_into_better_model(modality: Modality, tmp_path: Path) -> None:
    threshold = middle(modality)
    with CallLog(f"sqlite:///{tmp_path / 'calls.db'}") as store:
        with Recorder(store, task="t", sample_small=1.0) as recorder:
            shunt = ShuntRunnable(
                small=modality.small, large=modality.large, policy=Threshold(threshold), recorder=recorder
            )
            results = shunt.batch(list(modality.inputs))
        records = [call for part in store.iterate() for call in part]
        assert not store.verify()
    reader = modality.small.reader
    by_key = {reader.key(reader.read(call.input)): call for call in records}
    assert len(by_key) == len(modality.inputs)
    predictions = modality.small.predict_batch(modality.inputs)
    for i, value in enumerate(modality.inputs):
        call: CallRecord = by_key[reader.key(reader.read(value))]
        assert call.route == (
            "small" if results[i] == predictions.outputs()[i] and call.answer_label is None else "large"
        )
        assert call.small_label == predictions.outputs()[i]
        assert call.confidence == pytest.approx(predictions.confidence[i], abs=2e-3)
        if call.route == "large":
            assert call.answer_label == results[i] == modality.truth(i)
            assert call.agrees == (call.small_label == call.answer_label)
    settings = DistillationSettings(
        threshold=threshold, large_accuracy=0.95, mode="teacher", training=quiet(30, learning_rate=5e-3, patience=30)
    )
    distilled = TwoStageDistiller(settings).distill(modality.small, records)
    assert distilled.report.stage_a > 5
    assert distilled.report.stage_b > 5
    asked = [i for i in range(len(modality.inputs)) if predictions.confidence[i] < threshold]
    right = np.array([modality.truth(i) for i in asked])

    def score(model: Any) -> float:
        batch = model.predict_batch([modality.inputs[i] for i in asked])
        return float(np.mean(np.array(batch.outputs()) == right))

    assert score(distilled.model) > score(modality.small) + 0.1
    again = load_small_model(distilled.model.save(tmp_path / "s2"))
    assert again.predict_batch(modality.inputs).outputs() == distilled.model.predict_batch(modality.inputs).outputs()


def test_modality_student_answers_after_small_model(modality: Modality) -> None:
    surer = {"intercept": 12.0} if isinstance(modality.small, GeneratingModel) else {"temperature": 0.01}
    shunt = ShuntRunnable(
        small=modality.small, student=modality.small.model_copy(update=surer), large=modality.large,
        policy=Threshold(middle(modality) + 1e-4), return_decision=True,
    )  # fmt: skip
    routes = {result.route for result in shunt.batch(list(modality.inputs))}
    assert {"small", "student"} <= routes
