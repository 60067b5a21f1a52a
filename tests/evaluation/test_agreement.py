"""Two computations of one model, compared."""

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


def test_labels_routes_and_probabilities_are_compared() -> None:
    trusted, found = batch([0.9, 0.75, 0.51, 0.2]), batch([0.9, 0.65, 0.49, 0.21])
    told = agreement(found, trusted, Threshold(0.7))
    assert told.n == 4
    assert told.same_label.value == 0.75, "the third"
    assert told.same_route is not None
    assert told.same_route.value == 0.75, "the second"
    assert told.differing.tolist() == [2]
    assert told.largest_difference == pytest.approx(0.1)
    assert told.difference_of_99_in_100 == pytest.approx(np.quantile([0.0, 0.1, 0.02, 0.01], 0.99))
    figures = json.loads(json.dumps(told.to_dict()))
    assert figures["same_route_interval"] == [told.same_route.low, told.same_route.high]
    assert agreement(found, trusted).to_dict()["same_route"] is None


def test_written_answers_are_compared_as_they_stand() -> None:
    trusted, found = batch([0.9, 0.8]), batch([0.9, 0.8])
    told = agreement(replace(found, answers=("one", "two")), replace(trusted, answers=("one", "too")))
    assert told.same_label.value == 0.5
    assert told.differing.tolist() == [1]


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="another order"):
        agreement(batch([0.9]), batch([0.9], ("b", "a")))
    with pytest.raises(DataError, match="1 predictions are compared with 2"):
        agreement(batch([0.9]), batch([0.9, 0.8]))
    with pytest.raises(DataError, match="at least one"):
        agreement(batch([0.9])[:0], batch([0.9])[:0])


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (10, 10), (7, 10), (995, 1000)])
def test_an_interval_of_a_share_solves_its_equation(hits: int, n: int) -> None:
    """Its ends are the shares from which what was seen is as far as a normal law allows."""
    found = wilson_interval(hits, n)
    assert 0.0 <= found.low <= found.value <= found.high <= 1.0
    for end in (found.low, found.high):
        if 0.0 < end < 1.0:
            assert abs(found.value - end) / (end * (1.0 - end) / n) ** 0.5 == pytest.approx(1.959964, rel=1e-5)
    assert found.high - found.low > 0.0
