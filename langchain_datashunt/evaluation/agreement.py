"""Agreement between two computations of one small model, such as two precisions or two engines."""

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
    """Comparison of two computations of the same inputs.

    Attributes:
        n: Number of inputs.
        same_label: Share of inputs with the same label (or text, if the model generates text), with a 95% interval.
        same_route: Share of inputs with the same route under a policy, with a 95% interval, or None without a policy.
        largest_difference: Largest difference in a probability over all inputs and labels.
        difference_of_99_in_100: 99th percentile, over the inputs, of the largest difference in a probability.
        differing: Indices of the inputs with different labels.
    """

    n: int
    same_label: Interval
    same_route: Interval | None
    largest_difference: float
    difference_of_99_in_100: float
    differing: NDArray[np.intp]

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as a JSON-serialisable dictionary, with intervals as `<name>_interval`."""
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
    """Compare two sets of predictions for the same inputs.

    Args:
        found: Predictions by the engine or precision under test.
        reference: Predictions by the trusted engine or precision, for the same inputs in the same order.
        policy: Policy that routes the inputs. None skips the comparison of routes.

    Raises:
        ConfigurationError: The label sets or their order differ.
        DataError: There are no predictions, or their numbers differ.
    """
    if found.labels != reference.labels:
        raise ConfigurationError(
            f"Expected the same labels in the same order, got {len(found.labels)} labels in `found` and "
            f"{len(reference.labels)} in `reference`. Compare two computations of one model."
        )
    if len(found) != len(reference) or not len(found):
        raise DataError(
            f"Expected the same number of predictions, at least one, got {len(found)} in `found` and {len(reference)} "
            f"in `reference`. Predict the same inputs with both."
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
