"""Which threshold to use: the whole deferral curve from recorded answers, and objectives that pick a point of it."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from langchain_datashunt.confidence import ConfidenceScore, MaxProbability
from langchain_datashunt.configured import Strategy
from langchain_datashunt.exceptions import DataError, ThresholdWarning
from langchain_datashunt.policies import Threshold
from langchain_datashunt.predictions import BoolArray, FloatArray, PredictionBatch

SEND_ALL = float(np.nextafter(1.0, 2.0))
"""The smallest threshold above certainty: everything is asked."""


@dataclass(frozen=True)
class DeferralCurve:
    """What each threshold would have given on `n` labelled examples with recorded large answers.

    Attributes:
        thresholds: Shape `[m]`, from sending all (the strictest) to keeping all; one for each distinct score.
        accuracy: Shape `[m]`: of the shunt, kept and asked together.
        query_share: Shape `[m]`: share asked, falling from 1 to 0.
    """

    thresholds: FloatArray
    accuracy: FloatArray
    query_share: FloatArray


@dataclass(frozen=True)
class ThresholdChoice:
    """A threshold with what is to be expected of it.

    Attributes:
        policy: The policy to use.
        accuracy: Of the shunt on the data it was chosen on; choosing on it makes this a little too good.
        query_share: Share asked on that data.
        small_accuracy: Of the small model alone.
        large_accuracy: Of the large model alone.
        fitted_on: How many examples it was chosen on.
        guarantee: What is promised, in words.
        curve: All points that were to be had.
    """

    policy: Threshold
    accuracy: float
    query_share: float
    small_accuracy: float
    large_accuracy: float
    fitted_on: int
    guarantee: str
    curve: DeferralCurve


class Objective(Strategy):
    """Picks one point of a deferral curve."""

    @abstractmethod
    def pick(self, curve: DeferralCurve, large_accuracy: float) -> int:
        """Index of the chosen point."""


class MaxAccuracy(Objective):
    """The most accurate point; of several the one that asks least. `max_share` bounds the share asked."""

    max_share: float = Field(default=1.0, ge=0.0, le=1.0)

    def pick(self, curve: DeferralCurve, large_accuracy: float) -> int:
        """Index of the chosen point."""
        accuracy = np.where(curve.query_share <= self.max_share + 1e-12, curve.accuracy, -np.inf)
        return int(np.flatnonzero(accuracy >= accuracy.max() - 1e-12)[-1])


class MatchLarge(Objective):
    """The point that asks least and is no less accurate than the large model, up to a margin."""

    margin: float = Field(default=0.0, ge=0.0, le=1.0)

    def pick(self, curve: DeferralCurve, large_accuracy: float) -> int:
        """Index of the chosen point; asking everything always qualifies."""
        return int(np.flatnonzero(curve.accuracy >= large_accuracy - self.margin - 1e-12)[-1])


class QueryShare(Objective):
    """The most accurate point that asks at most this share."""

    share: float = Field(ge=0.0, le=1.0)

    def pick(self, curve: DeferralCurve, large_accuracy: float) -> int:
        """Index of the chosen point."""
        return MaxAccuracy(max_share=self.share).pick(curve, large_accuracy)


def deferral_curve(score: FloatArray, small_right: BoolArray, large_right: BoolArray) -> DeferralCurve:
    """The shunt's accuracy and share asked at every distinct threshold, in one pass over the sorted scores.

    Args:
        score: Shape `[n]`: confidence of the small model.
        small_right: Shape `[n]`: whether it was right.
        large_right: Shape `[n]`: whether the large model was.
    """
    n = len(score)
    order = np.argsort(-score, kind="stable")
    ranked = score[order]
    gained = np.cumsum(small_right[order].astype(np.float64) - large_right[order])
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    base = float(large_right.mean())
    return DeferralCurve(
        np.concatenate([[max(SEND_ALL, float(np.nextafter(ranked[0], np.inf)))], ranked[last]]),
        np.concatenate([[base], base + gained[last] / n]),
        np.concatenate([[1.0], 1.0 - (last + 1.0) / n]),
    )


def select_threshold(
    predictions: PredictionBatch,
    labels: Sequence[str],
    *,
    large: Sequence[str | None],
    objective: Objective | None = None,
    score: ConfidenceScore | None = None,
) -> ThresholdChoice:
    """Choose the shunt threshold on held-out examples with recorded large answers.

    Args:
        predictions: Of the small model, for `n` examples that it was not trained on.
        labels: Their true labels, `n` names.
        large: The large model's answers, `n` names; None for an unparsable one, which counts as wrong.
        objective: What to aim for; None for `MaxAccuracy()`.
        score: How sureness is measured; None for `MaxProbability()`.

    Raises:
        DataError: Nothing to choose on, or unequal lengths.
    """
    if not len(predictions) or not len(predictions) == len(labels) == len(large):
        raise DataError(
            f"{len(predictions)} predictions, {len(labels)} labels and {len(large)} large answers: "
            f"give one of each for every example, and at least one example."
        )
    measure, aim = score or MaxProbability(), objective or MaxAccuracy()
    small_right = np.array([a == b for a, b in zip(predictions.label_names(), labels, strict=True)])
    large_right = np.array([a == b for a, b in zip(large, labels, strict=True)])
    curve = deferral_curve(measure(predictions), small_right, large_right)
    chosen = aim.pick(curve, float(large_right.mean()))
    return ThresholdChoice(
        policy=_threshold(float(curve.thresholds[chosen]), measure),
        accuracy=float(curve.accuracy[chosen]),
        query_share=float(curve.query_share[chosen]),
        small_accuracy=float(small_right.mean()),
        large_accuracy=float(large_right.mean()),
        fitted_on=len(labels),
        guarantee="None: the best point of the data it was chosen on.",
        curve=curve,
    )


def _threshold(value: float, score: ConfidenceScore) -> Threshold:
    """A threshold that was chosen, not typed in: one that sends everything is a result, not a mistake to warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ThresholdWarning)
        return Threshold(value, score=score)
