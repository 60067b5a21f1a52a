"""Public objects are easy to read: short reprs, JSON-ready results, and types that LangGraph can store."""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np
import pytest
from langchain_core.language_models import FakeListChatModel
from pydantic import TypeAdapter

from langchain_datashunt import (
    ConfidenceRouterChain,
    PerLabelThreshold,
    Prediction,
    ShuntChatModel,
    ShuntDecision,
    ShuntResult,
    SubtaskShunt,
    Threshold,
)
from langchain_datashunt.calibration import MaxAccuracy, select_threshold
from langchain_datashunt.call_log import CallRecord
from langchain_datashunt.decision import CHECKPOINT_TYPES, Latency
from langchain_datashunt.evaluation import evaluate
from langchain_datashunt.policies import AnswerFusion
from langchain_datashunt.prediction import PredictionBatch
from langchain_datashunt.routing import Subtask
from langchain_datashunt.small_models import ColdStartModel
from tests.support.models import LABELS, WordModel

MANY = tuple(f"label {i}" for i in range(200))


def batch_over(labels: tuple[str, ...], n: int) -> PredictionBatch:
    rng = np.random.default_rng(0)
    return PredictionBatch.from_arrays(labels, rng.dirichlet(np.ones(len(labels)), n))


def readable_objects() -> dict[str, Any]:
    model = FakeListChatModel(responses=["label 7"])
    batch = batch_over(MANY, 500)
    truth = [MANY[i] for i in batch.best]
    small = ColdStartModel(labels=MANY)
    chain = ConfidenceRouterChain.from_models(small, model, answer_format="text", return_decision=True)
    result = chain.invoke("a text " * 500)
    return {
        "small model": small,
        "prediction": batch[0],
        "batch": batch,
        "chain": chain,
        "chat model": ShuntChatModel(small=small, large=model),
        "sub-tasks": SubtaskShunt.from_chat_model([Subtask(name="a", small=small)], model),
        "result": result,
        "decision": result.decision,
        "record": CallRecord(input="secret " * 500, labels=MANY, probabilities=(1 / 200,) * 200),
        "choice": select_threshold(batch, truth, large=truth, objective=MaxAccuracy()),
        "evaluation": evaluate(batch, truth, Threshold(0.5)),
        "policy": PerLabelThreshold(dict.fromkeys(MANY, 0.5), 0.9),
        "fusion": AnswerFusion.fit(MANY, truth, truth),
    }


def test_repr_of_public_objects_is_short() -> None:
    for name, value in readable_objects().items():
        assert len(repr(value)) <= 1000, name
        assert type(value).__name__ in repr(value)
        assert "secret" not in repr(value)


def test_result_to_dict_is_json_and_complete() -> None:
    prediction = Prediction.from_probabilities({"refund": 0.7, "cancel": 0.3}, model_id="m")
    decision = ShuntDecision("large", "deferred", prediction, 0.7, 0.9, "Threshold(0.9)")
    inner = ShuntResult("refund", decision)
    usage: Any = {"gpt": {"input_tokens": 3, "output_tokens": 1, "total_tokens": 4}}
    result = ShuntResult(object(), decision, usage, 0.5, Latency(0.1, 0.2), "id", inner, "cancel")
    told = json.loads(json.dumps(result.to_dict()))
    assert told["decision"]["prediction"]["probabilities"] == {"refund": 0.7, "cancel": 0.3}
    assert (told["usage"], told["cost_usd"], told["record_id"]) == (usage, 0.5, "id")
    assert (told["small_seconds"], told["large_seconds"]) == (0.1, 0.2)
    assert (told["inner"]["output"], told["large_output"]) == ("refund", "cancel")
    assert "object object" in told["output"]


def test_subtask_result_to_dict_is_json() -> None:
    shunt = SubtaskShunt.from_chat_model(
        [Subtask(name="kind", small=WordModel()), Subtask(name="reply")], FakeListChatModel(responses=["Hello."]),
        return_decision=True,
    )  # fmt: skip
    told = json.loads(json.dumps(shunt.invoke("surely refund").to_dict()))
    assert told["outputs"] == {"kind": "refund", "reply": "Hello."}
    assert told["decisions"]["kind"]["route"] == "small"
    assert set(told["decisions"]["kind"]["prediction"]["probabilities"]) == set(LABELS)


@pytest.mark.parametrize("of", [Prediction, ShuntDecision, ShuntResult], ids=lambda one: one.__name__)
def test_pydantic_serialises_results_and_describes_them(of: Any) -> None:
    prediction = Prediction.from_probabilities({"refund": 0.7, "cancel": 0.3})
    decision = ShuntDecision("small", "confident", prediction, 0.7, 0.5, "p")
    value = {Prediction: prediction, ShuntDecision: decision, ShuntResult: ShuntResult("refund", decision)}[of]
    adapter: TypeAdapter[Any] = TypeAdapter(of)
    text = adapter.dump_json(value)
    assert b'"refund":0.7' in text
    assert "label" in str(adapter.json_schema(mode="serialization"))
    assert adapter.validate_python(value) is value


def test_langgraph_stores_results_without_loss_or_warning(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("langgraph")
    from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

    serializer = JsonPlusSerializer(allowed_msgpack_modules=CHECKPOINT_TYPES)
    prediction = Prediction.from_probabilities({"refund": 0.7, "cancel": 0.3})
    decision = ShuntDecision("large", "deferred", prediction, 0.7, 0.9, "p")
    with caplog.at_level(logging.WARNING):
        for value in (prediction, decision, ShuntResult("cancel", decision, record_id="x")):
            back = serializer.loads_typed(serializer.dumps_typed(value))
            assert back == value
            assert type(back) is type(value)
    assert not caplog.records
