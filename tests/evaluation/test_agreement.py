"""Agreement between two computations of one model, and Wilson intervals."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from langchain_datashunt import Threshold
from langchain_datashunt.evaluation import agreement, wilson_interval
from langchain_datashunt.exceptions import ConfigurationError, DataError
from langchain_datashunt.prediction import PredictionBatch


def batch(first: list[float], labels: tuple[str, ...] = ("a", "b")) -> PredictionBatch:
    return PredictionBatch.from_arrays(labels, [[one, 1.0 - one] for one in first])


def test_agreement_differing_rows_counts_labels_routes_and_differences() -> None:
    trusted, found = batch([0.9, 0.75, 0.51, 0.2]), batch([0.9, 0.65, 0.49, 0.21])
    told = agreement(found, trusted, Threshold(0.7))
    assert told.n == 4
    assert told.same_label.value == 0.75, "the third input has another label"
    assert told.same_route is not None
    assert told.same_route.value == 0.75, "the second input has another route"
    assert told.differing.tolist() == [2]
    assert told.largest_difference == pytest.approx(0.1)
    assert told.difference_of_99_in_100 == pytest.approx(np.quantile([0.0, 0.1, 0.02, 0.01], 0.99))
    figures = json.loads(json.dumps(told.to_dict()))
    assert figures["same_route_interval"] == [told.same_route.low, told.same_route.high]
    assert agreement(found, trusted).to_dict()["same_route"] is None


def test_agreement_generated_answers_compares_texts() -> None:
    trusted, found = batch([0.9, 0.8]), batch([0.9, 0.8])
    told = agreement(replace(found, answers=("one", "two")), replace(trusted, answers=("one", "too")))
    assert told.same_label.value == 0.5
    assert told.differing.tolist() == [1]


def test_agreement_mismatched_predictions_raises() -> None:
    with pytest.raises(ConfigurationError, match="in the same order"):
        agreement(batch([0.9]), batch([0.9], ("b", "a")))
    with pytest.raises(DataError, match="got 1 in `found` and 2 in `reference`"):
        agreement(batch([0.9]), batch([0.9, 0.8]))
    with pytest.raises(DataError, match="at least one"):
        agreement(batch([0.9])[:0], batch([0.9])[:0])


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (10, 10), (7, 10), (995, 1000)])
def test_wilson_interval_ends_solve_score_equation(hits: int, n: int) -> None:
    """The observed share is 1.96 standard errors from each end, with the standard error of that end."""
    found = wilson_interval(hits, n)
    assert 0.0 <= found.low <= found.value <= found.high <= 1.0
    for end in (found.low, found.high):
        if 0.0 < end < 1.0:
            assert abs(found.value - end) / (end * (1.0 - end) / n) ** 0.5 == pytest.approx(1.959964, rel=1e-5)
    assert found.high - found.low > 0.0
