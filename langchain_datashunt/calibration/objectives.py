"""Objectives: what a threshold is to achieve, and how that is picked from labelled calibration data."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from pydantic import Field

from langchain_datashunt._utils.settings import Strategy
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

_HALF_UP = 1e-12


@dataclass(frozen=True)
class CalibrationData:
    """Labelled examples as the objectives see them; per-example arrays of shape `[n]`.

    Attributes:
        score: Confidence of the small model.
        bounds: The lowest and highest value that the score can take.
        predicted: Index of the small model's label.
        labels: The label set.
        small_right: Whether the small model was right.
        large_right: Whether the answer after asking was, fused where there is a fusion; None where none is recorded.
        alone_right: Whether the large model alone was.
        large_cost: USD of asking; None where it is not known.
    """

    score: FloatArray
    bounds: tuple[float, float]
    predicted: IntArray
    labels: tuple[str, ...]
    small_right: BoolArray
    large_right: BoolArray | None
    alone_right: BoolArray | None
    large_cost: FloatArray | None

    def __len__(self) -> int:
        return len(self.score)

    @cached_property
    def curve(self) -> DeferralCurve:
        """Every threshold; where no large answers are recorded, `accuracy` counts asked examples as wrong."""
        asked = np.zeros(len(self), dtype=np.bool_) if self.large_right is None else self.large_right
        return deferral_curve(self.score, self.small_right, asked, self.large_cost)

    @cached_property
    def expected_curve(self) -> DeferralCurve:
        """The same with P(right | score) in place of who was right, from `SMOOTH_FROM` examples on."""
        if self.large_right is None or len(self) < SMOOTH_FROM or self.score.min() == self.score.max():
            return self.curve
        small = smoothed_right(self.score, self.bounds, self.small_right)
        asked = smoothed_right(self.score, self.bounds, self.large_right)
        return deferral_curve(self.score, small, asked, self.large_cost)

    @property
    def large_accuracy(self) -> float:
        """Of the large model alone."""
        assert self.alone_right is not None
        return float(self.alone_right.mean())


@dataclass(frozen=True)
class Pick:
    """What an objective chose.

    Attributes:
        threshold: The threshold.
        guarantee: What is promised, in words.
        by_label: Thresholds by label, where each label has its own.
        proven: Whether the promise could be shown to hold.
    """

    threshold: float
    guarantee: str
    by_label: dict[str, float] | None = None
    proven: bool = True


NO_GUARANTEE = "None: the best point to be expected from the data it was chosen on."


class Objective(Strategy):
    """Picks a threshold."""

    needs_large: ClassVar[bool] = True
    """Whether recorded answers of the large model are needed."""

    @abstractmethod
    def choose(self, data: CalibrationData) -> Pick:
        """The threshold that serves the objective best.

        Raises:
            DataError: The data cannot show what is asked for; the message says what would.
        """


class MaxAccuracy(Objective):
    """The most accurate point; of several the one that asks least. `max_deferral_rate` bounds the share asked.

    From 200 examples on, accuracy is what a logistic curve of each side's P(right | score) expects. `tolerance` is
    what may be given up of it to ask less.
    """

    max_deferral_rate: float = Field(default=1.0, ge=0.0, le=1.0)
    tolerance: float = Field(default=0.0, ge=0.0, le=1.0)

    def choose(self, data: CalibrationData) -> Pick:
        """The point with the highest accuracy within the bound."""
        curve = data.expected_curve
        accuracy = np.where(curve.deferral_rate <= self.max_deferral_rate + _HALF_UP, curve.accuracy, -np.inf)
        best = np.flatnonzero(accuracy >= accuracy.max() - self.tolerance - _HALF_UP)[-1]
        return Pick(float(curve.thresholds[best]), NO_GUARANTEE)


class MatchLarge(Objective):
    """The point that asks least and is no less accurate than the large model, up to a margin.

    Without `confidence` that is so on the calibration data. With it, it is so with that confidence for new examples of
    the same kind: by a betting test, valid at any sample size, of how much less accurate the shunt is than the large
    model, along a fixed grid of thresholds.
    """

    margin: float = Field(default=0.0, ge=0.0, le=1.0)
    confidence: float | None = Field(default=None, gt=0.0, lt=1.0)

    def choose(self, data: CalibrationData) -> Pick:
        """The loosest threshold that qualifies; without fusion asking everything always does."""
        assert data.large_right is not None and data.alone_right is not None
        if self.confidence is None:
            curve = data.curve
            good = np.flatnonzero(curve.accuracy >= data.large_accuracy - self.margin - _HALF_UP)
            if not good.size:  # fused answers may be worse than the large model's own
                words = (
                    "None: with fusion no threshold is as accurate as the large model alone on this data; everything "
                    "is sent. Calibrate without fusion, or on more examples."
                )
                return Pick(SEND_ALL, words, None, False)
            return Pick(float(curve.thresholds[good[-1]]), NO_GUARANTEE)
        grid = grid_of(data.bounds)
        order = np.random.default_rng(0).permutation(len(data))
        asked = data.large_right[order].astype(np.float64)
        lost, gained = asked - data.small_right[order], asked - data.alone_right[order]
        score, p = data.score[order], []
        mean = min(1.0 - 1e-9, (1.0 + self.margin) / 2.0)
        for limit in grid.tolist():
            worse = np.where(score >= limit, lost, 0.0) - gained  # the large model's accuracy less the shunt's
            p.append(betting_p_value((np.clip(worse, -1.0, 1.0) + 1.0) / 2.0, mean))
        last = last_of_several_walks(np.array(p), 1.0 - self.confidence)
        if last is None:
            words = _send_everything("that it is not worse than the large model", self.confidence)
            return Pick(SEND_ALL, words, None, False)
        words = (
            f"With {100 * self.confidence:g}% confidence the shunt is at most {100 * self.margin:g} points less "
            f"accurate than the large model alone."
        )
        return Pick(float(grid[last]), words)


class MaxDeferralRate(Objective):
    """The most accurate point that asks at most this share; without recorded answers the loosest that does."""

    needs_large: ClassVar[bool] = False

    rate: float = Field(ge=0.0, le=1.0)

    def choose(self, data: CalibrationData) -> Pick:
        """The point within the share."""
        if data.large_right is not None:
            return MaxAccuracy(max_deferral_rate=self.rate).choose(data)
        within = np.flatnonzero(data.curve.deferral_rate <= self.rate + _HALF_UP)[0]
        return Pick(float(data.curve.thresholds[within]), NO_GUARANTEE)


class MaxCost(Objective):
    """The most accurate point that costs at most so many USD for 1,000 inputs."""

    usd_per_1000: float = Field(ge=0.0)

    def choose(self, data: CalibrationData) -> Pick:
        """The point within the cost."""
        curve = data.expected_curve
        if curve.cost is None:
            raise DataError("A bound on cost needs the cost of asking each example; give `large_cost` in USD.")
        accuracy = np.where(1000.0 * curve.cost <= self.usd_per_1000 + _HALF_UP, curve.accuracy, -np.inf)
        best = np.flatnonzero(accuracy >= accuracy.max() - _HALF_UP)[-1]
        return Pick(float(curve.thresholds[best]), NO_GUARANTEE)


class RiskControl(Objective):
    """At most `alpha` wrong among what the small model answers, with `confidence` (Learn-then-Test).

    Thresholds of a fixed grid are tested from strict to loose, each by the exact binomial test of "the error among
    the kept exceeds alpha"; the last that passes is chosen (Angelopoulos, Bates, Candes, Jordan & Lei 2021). With
    `per_label` each label has a threshold of its own, tested at (1 - confidence) / k (Bonferroni).
    """

    needs_large: ClassVar[bool] = False

    alpha: float = Field(gt=0.0, lt=1.0)
    confidence: float = Field(default=0.95, gt=0.0, lt=1.0)
    per_label: bool = False

    def choose(self, data: CalibrationData) -> Pick:
        """The loosest threshold that is proven, or sending everything."""
        needed = examples_needed(self.alpha, self.confidence)
        if len(data) < needed:
            raise DataError(
                f"{len(data)} calibration examples cannot show an error of at most {self.alpha:g} with "
                f"{100 * self.confidence:g}% confidence: {needed} kept examples without an error are the least. "
                f"Give more examples, a larger alpha, or a lower confidence."
            )
        if self.per_label:
            return self._by_label(data)
        limit = self._proven(data.score, data.small_right, grid_of(data.bounds), 1.0 - self.confidence)
        if limit is None:
            words = _send_everything(f"an error of at most {self.alpha:g} among what it answers", self.confidence)
            return Pick(SEND_ALL, words, None, False)
        return Pick(
            limit,
            f"With {100 * self.confidence:g}% confidence at most {100 * self.alpha:g}% of what the small model answers "
            f"is wrong, for new inputs of the same kind as the {len(data)} calibration examples.",
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
            words = _send_everything(f"an error of at most {self.alpha:g} for any label", self.confidence)
            return Pick(SEND_ALL, words, {}, False)
        return Pick(
            SEND_ALL,
            f"With {100 * self.confidence:g}% confidence at most {100 * self.alpha:g}% of what the small model answers "
            f"is wrong, for each of {len(found)} labels at once; the other {len(data.labels) - len(found)} could not "
            f"be shown and are always asked.",
            found,
        )


def _send_everything(what: str, confidence: float) -> str:
    return (
        f"None: the calibration data does not show {what} with {100 * confidence:g}% confidence at any threshold, so "
        f"everything is sent to the large model. Give more examples, or ask for less."
    )
