"""Objectives: criteria for selecting a threshold from labelled calibration data."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from pydantic import Field

from langchain_datashunt._utils.settings import Strategy
from langchain_datashunt._utils.short_repr import short_repr
from langchain_datashunt.calibration.risk import (
    examples_needed,
    examples_to_start,
    first_that_fails,
    grid_of,
    last_of_several_walks,
    risk_p_values,
)
from langchain_datashunt.calibration.smoothing import SMOOTH_FROM, smoothed_right
from langchain_datashunt.evaluation.betting import betting_p_value
from langchain_datashunt.evaluation.curves import SEND_ALL, DeferralCurve, deferral_curve
from langchain_datashunt.exceptions import DataError
from langchain_datashunt.prediction import BoolArray, FloatArray, IntArray

_HALF_UP = 1e-12  # absorbs rounding in comparisons of rates, accuracies and costs


@dataclass(frozen=True)
class CalibrationData:
    """Labelled calibration examples as per-example arrays of shape `[n]`.

    Attributes:
        score: Confidence score of the small model.
        bounds: Lowest and highest possible value of the score.
        predicted: Index of the label predicted by the small model.
        labels: The label set.
        small_right: Whether the small model was right.
        large_right: Whether the answer after deferring (with any fusion) was right, or None without large answers.
        alone_right: Whether the large model alone was right, or None without large answers.
        large_cost: Cost of the LLM call in USD, or None if unknown.
    """

    score: FloatArray
    bounds: tuple[float, float]
    predicted: IntArray
    labels: tuple[str, ...]
    small_right: BoolArray
    large_right: BoolArray | None
    alone_right: BoolArray | None
    large_cost: FloatArray | None

    __repr__ = short_repr

    def __len__(self) -> int:
        return len(self.score)

    @cached_property
    def curve(self) -> DeferralCurve:
        """Deferral curve over all thresholds. Deferred examples count as wrong if there are no large answers."""
        asked = np.zeros(len(self), dtype=np.bool_) if self.large_right is None else self.large_right
        return deferral_curve(self.score, self.small_right, asked, self.large_cost)

    @cached_property
    def expected_curve(self) -> DeferralCurve:
        """Deferral curve with smoothed P(right | score) in place of the observed correctness.

        Equal to `curve` if there are no large answers, fewer than `SMOOTH_FROM` examples, or only one distinct score.
        """
        if self.large_right is None or len(self) < SMOOTH_FROM or self.score.min() == self.score.max():
            return self.curve
        small = smoothed_right(self.score, self.bounds, self.small_right)
        asked = smoothed_right(self.score, self.bounds, self.large_right)
        return deferral_curve(self.score, small, asked, self.large_cost)

    @property
    def large_accuracy(self) -> float:
        """Accuracy of the large model alone."""
        assert self.alone_right is not None
        return float(self.alone_right.mean())


@dataclass(frozen=True)
class Pick:
    """Threshold selected by an objective.

    Attributes:
        threshold: Lowest score that is answered locally.
        guarantee: Guarantee as a sentence that starts with "None" if nothing is guaranteed.
        by_label: Thresholds by label, or None if all labels share `threshold`.
        proven: False if no threshold could be shown to meet the objective.
    """

    threshold: float
    guarantee: str
    by_label: dict[str, float] | None = None
    proven: bool = True


NO_GUARANTEE = "None: the threshold was chosen on the calibration data and may perform worse on new inputs."


class Objective(Strategy):
    """Criterion for selecting a threshold."""

    needs_large: ClassVar[bool] = True
    """Whether the objective requires recorded answers of the large model."""

    @abstractmethod
    def choose(self, data: CalibrationData) -> Pick:
        """Return the threshold that meets the objective best.

        Raises:
            DataError: The data cannot support the objective. The message names the remedy.
        """


class MaxAccuracy(Objective):
    """Select the most accurate threshold, with the lowest deferral rate if several are equally accurate.

    From 200 examples on, accuracy is estimated from a logistic curve of P(right | score) for each model.

    Args:
        max_deferral_rate: Upper bound of the deferral rate, in [0, 1].
        tolerance: Accuracy that may be given up for a lower deferral rate, in [0, 1].
    """

    max_deferral_rate: float = Field(default=1.0, ge=0.0, le=1.0)
    tolerance: float = Field(default=0.0, ge=0.0, le=1.0)

    def choose(self, data: CalibrationData) -> Pick:
        """Return the most accurate threshold within the bound on the deferral rate."""
        curve = data.expected_curve
        accuracy = np.where(curve.deferral_rate <= self.max_deferral_rate + _HALF_UP, curve.accuracy, -np.inf)
        best = np.flatnonzero(accuracy >= accuracy.max() - self.tolerance - _HALF_UP)[-1]
        return Pick(float(curve.thresholds[best]), NO_GUARANTEE)


class MatchLarge(Objective):
    """Match the accuracy of the large model, up to a margin, at the lowest deferral rate.

    Without `confidence`, the accuracies are compared on the calibration data only. With `confidence`, the guarantee
    covers new examples of the same kind. The loss in accuracy is then tested along a fixed grid of thresholds, by a
    betting test that is valid at any sample size.

    Args:
        margin: Accuracy that may be lost against the large model, in [0, 1].
        confidence: Confidence of the guarantee, in (0, 1). None means no guarantee.
    """

    margin: float = Field(default=0.0, ge=0.0, le=1.0)
    confidence: float | None = Field(default=None, gt=0.0, lt=1.0)

    def choose(self, data: CalibrationData) -> Pick:
        """Return the loosest threshold that qualifies, or `SEND_ALL` if none does."""
        assert data.large_right is not None and data.alone_right is not None
        if self.confidence is None:
            curve = data.curve
            good = np.flatnonzero(curve.accuracy >= data.large_accuracy - self.margin - _HALF_UP)
            if not good.size:  # only with fusion: fused answers may be worse than those of the large model alone
                words = (
                    "None: with fusion, no threshold is as accurate as the large model alone on this data, so "
                    "everything is sent to it. Calibrate without fusion, or provide more examples."
                )
                return Pick(SEND_ALL, words, None, False)
            return Pick(float(curve.thresholds[good[-1]]), NO_GUARANTEE)
        grid = grid_of(data.bounds)
        # The betting test requires an order that does not depend on the values, and files are often sorted.
        order = np.random.default_rng(0).permutation(len(data))
        asked = data.large_right[order].astype(np.float64)
        lost, gained = asked - data.small_right[order], asked - data.alone_right[order]
        score, p = data.score[order], []
        mean = min(1.0 - 1e-9, (1.0 + self.margin) / 2.0)  # the margin, mapped from [-1, 1] to [0, 1] like `worse`
        for limit in grid.tolist():
            worse = np.where(score >= limit, lost, 0.0) - gained  # accuracy of the large model minus that of the shunt
            p.append(betting_p_value((np.clip(worse, -1.0, 1.0) + 1.0) / 2.0, mean))
        last = last_of_several_walks(np.array(p), 1.0 - self.confidence)
        if last is None:
            words = _send_everything("that the shunt is as accurate as the large model", self.confidence)
            return Pick(SEND_ALL, words, None, False)
        words = (
            f"With {100 * self.confidence:g}% confidence, the shunt is at most {100 * self.margin:g} percentage points "
            f"less accurate than the large model alone, for new inputs of the same kind as the calibration examples."
        )
        return Pick(float(grid[last]), words)


class MaxDeferralRate(Objective):
    """Select the most accurate threshold within a deferral rate.

    Without recorded large answers, the strictest threshold within the rate is selected.

    Args:
        rate: Upper bound of the deferral rate, in [0, 1].
    """

    needs_large: ClassVar[bool] = False

    rate: float = Field(ge=0.0, le=1.0)

    def choose(self, data: CalibrationData) -> Pick:
        """Return the threshold within the deferral rate."""
        if data.large_right is not None:
            return MaxAccuracy(max_deferral_rate=self.rate).choose(data)
        # The curve runs from strict to loose, so the first point uses as much of the rate as possible.
        within = np.flatnonzero(data.curve.deferral_rate <= self.rate + _HALF_UP)[0]
        return Pick(float(data.curve.thresholds[within]), NO_GUARANTEE)


class MaxCost(Objective):
    """Select the most accurate threshold within a cost.

    Args:
        usd_per_1000: Upper bound of the LLM cost of 1,000 inputs, in USD.
    """

    usd_per_1000: float = Field(ge=0.0)

    def choose(self, data: CalibrationData) -> Pick:
        """Return the most accurate threshold within the cost.

        Raises:
            DataError: The cost of the LLM calls is unknown.
        """
        curve = data.expected_curve
        if curve.cost is None:
            raise DataError(
                "Expected the cost of the LLM calls for `large_cost`, got None. Pass one number in USD, or one for "
                "each example."
            )
        accuracy = np.where(1000.0 * curve.cost <= self.usd_per_1000 + _HALF_UP, curve.accuracy, -np.inf)
        best = np.flatnonzero(accuracy >= accuracy.max() - _HALF_UP)[-1]
        return Pick(float(curve.thresholds[best]), NO_GUARANTEE)


class RiskControl(Objective):
    """Bound the selective risk by `alpha` with a given confidence (Learn-then-Test).

    Thresholds of a fixed grid are tested from strict to loose. Each is tested by the exact binomial test of "the
    selective risk exceeds alpha", and the last one that passes is selected (Angelopoulos, Bates, Candes, Jordan &
    Lei 2021).

    Args:
        alpha: Upper bound of the selective risk, in (0, 1).
        confidence: Confidence of the guarantee, in (0, 1).
        per_label: Whether each of the k labels has its own threshold, tested at (1 - confidence) / k (Bonferroni).
    """

    needs_large: ClassVar[bool] = False

    alpha: float = Field(gt=0.0, lt=1.0)
    confidence: float = Field(default=0.95, gt=0.0, lt=1.0)
    per_label: bool = False

    def choose(self, data: CalibrationData) -> Pick:
        """Return the loosest threshold with a guarantee, or `SEND_ALL` if none has one.

        Raises:
            DataError: There are too few examples for any threshold to pass the test.
        """
        needed = examples_needed(self.alpha, self.confidence)
        if len(data) < needed:
            raise DataError(
                f"Expected at least {needed} calibration examples to bound the selective risk by {self.alpha:g} with "
                f"{100 * self.confidence:g}% confidence, got {len(data)}. Provide more examples, a larger alpha, or a "
                f"lower confidence."
            )
        if self.per_label:
            return self._by_label(data)
        limit = self._proven(data.score, data.small_right, grid_of(data.bounds), 1.0 - self.confidence)
        if limit is None:
            words = _send_everything(f"a selective risk of at most {self.alpha:g}", self.confidence)
            return Pick(SEND_ALL, words, None, False)
        return Pick(
            limit,
            f"With {100 * self.confidence:g}% confidence, at most {100 * self.alpha:g}% of local answers are wrong, "
            f"for new inputs of the same kind as the {len(data)} calibration examples.",
        )

    def _proven(self, score: FloatArray, right: BoolArray, grid: FloatArray, level: float) -> float | None:
        p, kept = risk_p_values(score, right, grid, self.alpha)
        fails = first_that_fails(p, kept, level, examples_to_start(self.alpha, level, len(score)))
        return None if fails is None or fails[0] == fails[1] else float(grid[fails[1] - 1])

    def _by_label(self, data: CalibrationData) -> Pick:
        grid, level = grid_of(data.bounds), (1.0 - self.confidence) / len(data.labels)
        found: dict[str, float] = {}
        for i, label in enumerate(data.labels):
            mine = data.predicted == i
            limit = self._proven(data.score[mine], data.small_right[mine], grid, level)
            if limit is not None:
                found[label] = limit
        if not found:
            words = _send_everything(f"a selective risk of at most {self.alpha:g} for any label", self.confidence)
            return Pick(SEND_ALL, words, {}, False)
        return Pick(
            SEND_ALL,
            f"With {100 * self.confidence:g}% confidence, at most {100 * self.alpha:g}% of local answers are wrong, "
            f"for each of {len(found)} labels at once. The other {len(data.labels) - len(found)} labels have no "
            f"guarantee and are always deferred.",
            found,
        )


def _send_everything(what: str, confidence: float) -> str:
    return (
        f"None: the calibration data does not show {what} with {100 * confidence:g}% confidence at any threshold, so "
        f"everything is sent to the large model. Provide more examples, or relax the objective."
    )
