from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_datashunt import Prediction, ShuntDecision, ShuntResult
from langchain_datashunt.exceptions import PredictionError
from langchain_datashunt.prediction import PredictionBatch

rows = st.lists(st.lists(st.floats(0.01, 1.0), min_size=3, max_size=3), min_size=1, max_size=20)


def batch(values: list[list[float]]) -> PredictionBatch:
    p = np.array(values)
    return PredictionBatch.from_arrays(("a", "b", "c"), p / p.sum(axis=1, keepdims=True), model_id="m")


def test_prediction_from_probabilities_takes_most_probable_label() -> None:
    prediction = Prediction.from_probabilities({"yes": 0.8, "no": 0.2}, model_id="m")
    assert (prediction.label, prediction.confidence, prediction.labels) == ("yes", 0.8, ("yes", "no"))
    assert prediction.probability("no") == 0.2
    assert prediction.probability("maybe") == 0.0
    assert prediction.top(1) == [("yes", 0.8)]


def test_prediction_is_immutable_and_picklable() -> None:
    prediction = Prediction.from_probabilities({"yes": 0.8, "no": 0.2})
    with pytest.raises(AttributeError):
        prediction.label = "no"  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(prediction)) == prediction
    assert hash(prediction) == hash(Prediction.from_probabilities({"yes": 0.8, "no": 0.2}))
    assert prediction != Prediction.from_probabilities({"yes": 0.7, "no": 0.3})
    assert prediction != "yes"


@given(rows)
def test_prediction_batch_stack_restores_batch(values: list[list[float]]) -> None:
    whole = batch(values)
    again = PredictionBatch.stack(list(whole))
    assert np.array_equal(again.probabilities, whole.probabilities)
    assert again.label_names() == whole.label_names() == [p.label for p in whole]
    assert [p.confidence for p in whole] == whole.confidence.tolist()


def test_prediction_batch_slice_keeps_logits_and_truncated() -> None:
    whole = PredictionBatch.from_arrays(
        ("a", "b"), [[0.9, 0.1], [0.2, 0.8]], logits=[[2.0, 0.0], [0.0, 1.0]], truncated=[False, True]
    )
    second = whole[1:]
    assert len(second) == 1
    assert second[0].label == "b"
    assert second[0].truncated
    assert second[0].logits is not None
    assert second[0].logits.tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([[0.5, 0.2]], "sums to 0.7"),
        ([[np.nan, 1.0]], "not a distribution"),
        ([[1.5, -0.5]], "not a distribution"),
        ([[0.2, 0.3, 0.5]], r"shape \[1, 3\] for 2 labels"),
    ],
)
def test_prediction_batch_invalid_distribution_raises(values: list[list[float]], words: str) -> None:
    with pytest.raises(PredictionError, match=words):
        PredictionBatch.from_arrays(("a", "b"), values)


def test_prediction_batch_stack_empty_or_mixed_labels_raises() -> None:
    with pytest.raises(PredictionError, match="at least one"):
        PredictionBatch.stack([])
    with pytest.raises(PredictionError, match="different label sets"):
        PredictionBatch.stack([Prediction.from_probabilities({"a": 1.0}), Prediction.from_probabilities({"b": 1.0})])


def test_decision_metadata_has_no_probabilities() -> None:
    decision = ShuntDecision(
        "large", "deferred", Prediction.from_probabilities({"a": 0.6, "b": 0.4}), 0.6, 0.9, "Threshold"
    )
    metadata = decision.to_metadata()
    assert metadata["shunt_route"] == "large"
    assert metadata["shunt_confidence"] == 0.6
    assert "probabilities" not in str(metadata)


def test_result_add_joins_streamed_chunks() -> None:
    decision = ShuntDecision("large", "deferred")
    first = ShuntResult("Hel", decision, cost_usd=None)
    last = ShuntResult(None, decision, cost_usd=0.5, record_id="r")
    total = first + ShuntResult("lo", decision, cost_usd=None) + last
    assert (total.output, total.cost_usd, total.record_id) == ("Hello", 0.5, "r")
    assert total.decisions == (decision,)
    assert total.prediction is None
    assert total.threshold is None
    assert total.latency.total_seconds == 0.0


def test_prediction_to_dict_is_json_ready() -> None:
    form = Prediction.from_probabilities({"a": 0.75, "b": 0.25}, model_id="m").to_dict()
    assert form == {
        "label": "a",
        "confidence": 0.75,
        "probabilities": {"a": 0.75, "b": 0.25},
        "model_id": "m",
        "truncated": False,
    }
