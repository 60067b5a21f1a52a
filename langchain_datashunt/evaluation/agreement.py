"""How alike two ways to compute one small model answer: what another number format or engine changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from langchain_datashunt.evaluation.intervals import Interval, wilson_interval
from langchain_datashunt.exceptions import ConfigurationError, DataError
from langchain_datashunt.policies.thresholds import Policy
from langchain_datashunt.prediction import PredictionBatch


@dataclass(frozen=True)
class Agreement:
    """Two computations of the same inputs, compared.

    Attributes:
        n: Inputs.
        same_label: Share of inputs with the same label (the same text, where the model writes), with a 95% interval.
        same_route: Share that a policy keeps, or asks, under both; None without a policy.
        largest_difference: Of one probability of any input.
        difference_of_99_in_100: What each input's largest difference of a probability is below, for 99 of 100.
        differing: Inputs with another label, by their place.
    """

    n: int
    same_label: Interval
    same_route: Interval | None
    largest_difference: float
    difference_of_99_in_100: float
    differing: NDArray[np.intp]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; a share's interval stands beside it."""
        shares = {"same_label": self.same_label, "same_route": self.same_route}
        found: dict[str, Any] = {"n": self.n}
        for name, share in shares.items():
            found[name] = None if share is None else share.value
            found[f"{name}_interval"] = None if share is None else [share.low, share.high]
        found["largest_difference"] = self.largest_difference
        found["difference_of_99_in_100"] = self.difference_of_99_in_100
        found["differing"] = self.differing.tolist()
        return found


def agreement(found: PredictionBatch, reference: PredictionBatch, policy: Policy | None = None) -> Agreement:
    """Compare what was predicted of `n` inputs in one way with what was in another.

    Args:
        found: Predictions by the engine or the number format that is in question.
        reference: Those of the same inputs, in their order, by the one that is trusted.
        policy: Decides what is kept; a threshold lies between few inputs, so that routes tell more than labels.

    Raises:
        ConfigurationError: They are of different label sets.
        DataError: They are of no input, or of differently many.
    """
    if found.labels != reference.labels:
        raise ConfigurationError(
            f"Predictions over {len(found.labels)} labels are compared with others over {len(reference.labels)}, or "
            f"these stand in another order. Compare two computations of one model."
        )
    if len(found) != len(reference) or not len(found):
        raise DataError(
            f"{len(found)} predictions are compared with {len(reference)}. Give both the same inputs, at least one."
        )
    far = np.abs(found.probabilities - reference.probabilities).max(axis=1)
    if found.answers is not None and reference.answers is not None:
        same = np.array([one == other for one, other in zip(found.answers, reference.answers, strict=True)])
    else:
        same = found.best == reference.best
    routes = None
    if policy is not None:
        routes = policy.evaluate(found).keep == policy.evaluate(reference).keep
    return Agreement(
        n=len(found),
        same_label=wilson_interval(int(same.sum()), len(same)),
        same_route=None if routes is None else wilson_interval(int(routes.sum()), len(routes)),
        largest_difference=float(far.max()),
        difference_of_99_in_100=float(np.quantile(far, 0.99)),
        differing=np.flatnonzero(~same),
    )
