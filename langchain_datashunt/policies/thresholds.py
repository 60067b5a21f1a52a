"""When to keep and when to defer: one idea a class, composed with `&` and `|`."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field, field_validator

from langchain_datashunt._utils.settings import Configured, Strategy
from langchain_datashunt.exceptions import ConfigurationError, ThresholdWarning
from langchain_datashunt.policies.fusion import AnswerFusion
from langchain_datashunt.policies.learned_deferral import LearnedDeferral
from langchain_datashunt.policies.scores import (
    ConfidenceScore,
    Entropy,
    LengthNormalizedProbability,
    Margin,
    MaxProbability,
    MeanTokenProbability,
    MinTokenProbability,
    TokenQuantile,
)
from langchain_datashunt.prediction import ANSWER_LABELS, BoolArray, FloatArray, Prediction, PredictionBatch


class PolicyDecision(NamedTuple):
    """What a policy makes of `n` predictions.

    Attributes:
        keep: Shape `[n]`; True keeps the small model's answer, False defers to the large one.
        score: Shape `[n]`; the number that decided, NaN where there was none.
        threshold: Shape `[n]`; what it was compared with, NaN where there was none.
    """

    keep: BoolArray
    score: FloatArray
    threshold: FloatArray


class Policy(Strategy):
    """Decides, for each prediction of a batch, whether the small model's answer is kept."""

    @abstractmethod
    def evaluate(self, batch: PredictionBatch, threshold: FloatArray | None = None) -> PolicyDecision:
        """Decide on a batch.

        Args:
            batch: What the small model predicted, `n` rows.
            threshold: Shape `[n]`: replaces the policy's own threshold where it is not NaN (a threshold given
                with one call). A policy without a threshold does not heed it.
        """

    def evaluate_one(self, prediction: Prediction, threshold: float | None = None) -> tuple[bool, float, float]:
        """Decide on one prediction: keep, score, threshold, as `evaluate` does; may be quicker."""
        given = None if threshold is None else np.array([threshold])
        keep, score, limit = self.evaluate(PredictionBatch.stack([prediction]), given)
        return bool(keep[0]), float(score[0]), float(limit[0])

    def check(self, labels: tuple[str, ...] | None) -> None:
        """Warn or raise where the policy cannot make sense for these labels (None: unknown)."""

    def observe(self, asked: int, total: int) -> None:
        """Learn how many of so many inputs were asked in the end; called once for each call of a shunt."""

    def __and__(self, other: Policy) -> Policy:
        return AllOf(policies=(*_parts(AllOf, self), *_parts(AllOf, other)))

    def __or__(self, other: Policy) -> Policy:
        return AnyOf(policies=(*_parts(AnyOf, self), *_parts(AnyOf, other)))


class Threshold(Policy):
    """Keep where the score reaches the threshold: `score >= threshold` (Data Shunt's rule).

    A threshold of 1.0 still keeps a certainty of 1.0; one above 1 sends everything.

    Args:
        threshold: In the units of `score`.
        score: How sureness is measured.
    """

    threshold: float
    score: ConfidenceScore = Field(default_factory=MaxProbability)

    def __init__(self, threshold: float, *, score: ConfidenceScore | None = None, **settings: Any) -> None:
        """Take the threshold by position or by name."""
        given: dict[str, Any] = {"threshold": threshold, **({} if score is None else {"score": score}), **settings}
        super().__init__(**given)
        low, high = self.score.bounds(None)
        _warn_if_constant(self.threshold, low, high, "")

    @field_validator("threshold")
    @classmethod
    def _number(cls, value: float) -> float:
        return _require_number(value)

    def evaluate(self, batch: PredictionBatch, threshold: FloatArray | None = None) -> PolicyDecision:
        """Compare the score with the threshold, `>=`."""
        score = self.score(batch)
        limit = _with_override(np.full(len(batch), self.threshold), threshold)
        return PolicyDecision(score >= limit, score, limit)

    def evaluate_one(self, prediction: Prediction, threshold: float | None = None) -> tuple[bool, float, float]:
        """Compare one score with the threshold, without arrays where the score allows it."""
        score = self.score.of_one(prediction)
        limit = self.threshold if threshold is None else threshold
        return score >= limit, score, limit

    def check(self, labels: tuple[str, ...] | None) -> None:
        """Warn when every prediction over so many labels reaches the threshold."""
        if labels == ANSWER_LABELS:
            if isinstance(self.score, Margin | Entropy):
                raise ConfigurationError(
                    f"{type(self.score).__name__} compares labels, and this small model writes its answers. Use "
                    f"MaxProbability, or a token score such as MeanTokenProbability."
                )
        elif labels:
            low, _ = self.score.bounds(len(labels))
            if 0.0 < self.threshold <= low:
                _warn_if_constant(self.threshold, low, math.inf, f" over {len(labels)} labels")


class PerLabelThreshold(Policy):
    """Keep where the score reaches the threshold of the predicted label.

    Args:
        thresholds: Threshold by label.
        default: For labels that are not named.
        score: How sureness is measured.
    """

    thresholds: dict[str, float]
    default: float
    score: ConfidenceScore = Field(default_factory=MaxProbability)

    def __init__(
        self,
        thresholds: dict[str, float],
        default: float,
        *,
        score: ConfidenceScore | None = None,
        **settings: Any,
    ) -> None:
        """Take the thresholds by position or by name."""
        given: dict[str, Any] = {"thresholds": thresholds, "default": default, **settings}
        super().__init__(**given, **({} if score is None else {"score": score}))
        low, high = self.score.bounds(None)
        for label, value in self.thresholds.items():
            _warn_if_constant(value, low, high, f" for label {label!r}")
        _warn_if_constant(self.default, low, high, " for all other labels")

    @field_validator("thresholds")
    @classmethod
    def _numbers(cls, value: dict[str, float]) -> dict[str, float]:
        return {label: _require_number(number) for label, number in value.items()}

    @field_validator("default")
    @classmethod
    def _number(cls, value: float) -> float:
        return _require_number(value)

    def evaluate(self, batch: PredictionBatch, threshold: FloatArray | None = None) -> PolicyDecision:
        """Compare each score with its predicted label's threshold, `>=`."""
        score = self.score(batch)
        by_label = np.array([self.thresholds.get(label, self.default) for label in batch.labels])
        limit = _with_override(by_label[batch.best], threshold)
        return PolicyDecision(score >= limit, score, limit)

    def check(self, labels: tuple[str, ...] | None) -> None:
        """Refuse thresholds for labels that the small model does not have."""
        unknown = sorted(set(self.thresholds) - set(labels)) if labels else []
        if unknown:
            msg = (
                f"PerLabelThreshold names labels that the small model does not have: {', '.join(unknown[:5])}. "
                f"Its labels are: {', '.join((labels or ())[:10])}{'...' if len(labels or ()) > 10 else ''}."
            )
            raise ConfigurationError(msg)


class ValueOfInformation(Policy):
    """Ask where the expected gain in accuracy from the fused answer exceeds its price.

    The gain is `AnswerFusion.value_of_asking`; the score that is shown is its negative, and the threshold `-price`.
    A threshold given with a call replaces `-price`.

    Args:
        fusion: What is known of the large model's answers.
        price: Gain in accuracy, in [0, 1], that one call is worth.
    """

    fusion: AnswerFusion
    price: float = Field(default=0.0, ge=0.0, le=1.0)

    def evaluate(self, batch: PredictionBatch, threshold: FloatArray | None = None) -> PolicyDecision:
        """Keep where asking gains no more than it costs."""
        score = -self.fusion.value_of_asking(self.fusion.aligned(batch).probabilities)
        limit = _with_override(np.full(len(batch), -self.price), threshold)
        return PolicyDecision(score >= limit, score, limit)

    def check(self, labels: tuple[str, ...] | None) -> None:
        """Refuse a fusion over other labels."""
        if labels and set(labels) != set(self.fusion.labels):
            raise ConfigurationError(
                f"ValueOfInformation was fitted on {len(self.fusion.labels)} labels that are not the small model's "
                f"{len(labels)}. Fit its fusion with the labels of this model."
            )


class AlwaysSmall(Policy):
    """Keep everything: the small model alone."""

    def evaluate(self, batch: PredictionBatch, threshold: FloatArray | None = None) -> PolicyDecision:
        """Keep all."""
        return _constant(batch, keep=True)


class AlwaysLarge(Policy):
    """Defer everything: the large model alone."""

    def evaluate(self, batch: PredictionBatch, threshold: FloatArray | None = None) -> PolicyDecision:
        """Keep none."""
        return _constant(batch, keep=False)


class OnlyLabels(Policy):
    """Keep only predictions of some labels; combine it with a threshold: `Threshold(0.9) & OnlyLabels(labels=...)`."""

    labels: frozenset[str]

    def evaluate(self, batch: PredictionBatch, threshold: FloatArray | None = None) -> PolicyDecision:
        """Keep where the most probable label is one of them."""
        among = np.array([label in self.labels for label in batch.labels], dtype=np.bool_)
        return _constant(batch, keep=True)._replace(keep=among[batch.best])

    def check(self, labels: tuple[str, ...] | None) -> None:
        """Refuse labels that the small model does not have."""
        if labels and (unknown := sorted(self.labels - set(labels))):
            raise ConfigurationError(
                f"OnlyLabels names labels that the small model does not have: {', '.join(unknown[:5])}. Leave them out."
            )


class AllOf(Policy):
    """Keep where every policy keeps; the first that refuses gives score and threshold. Written `a & b`."""

    policies: tuple[Policy, ...] = Field(min_length=1)

    def evaluate(self, batch: PredictionBatch, threshold: FloatArray | None = None) -> PolicyDecision:
        """Keep where all keep."""
        return _combine([policy.evaluate(batch, threshold) for policy in self.policies], settles=False)

    def observe(self, asked: int, total: int) -> None:
        """Tell every part."""
        for policy in self.policies:
            policy.observe(asked, total)

    def check(self, labels: tuple[str, ...] | None) -> None:
        """Check every part."""
        for policy in self.policies:
            policy.check(labels)


class AnyOf(Policy):
    """Keep where at least one policy keeps; the first that does gives score and threshold. Written `a | b`."""

    policies: tuple[Policy, ...] = Field(min_length=1)

    def evaluate(self, batch: PredictionBatch, threshold: FloatArray | None = None) -> PolicyDecision:
        """Keep where any keeps."""
        return _combine([policy.evaluate(batch, threshold) for policy in self.policies], settles=True)

    def observe(self, asked: int, total: int) -> None:
        """Tell every part."""
        for policy in self.policies:
            policy.observe(asked, total)

    def check(self, labels: tuple[str, ...] | None) -> None:
        """Check every part."""
        for policy in self.policies:
            policy.check(labels)


def _parts(kind: type[AllOf] | type[AnyOf], policy: Policy) -> tuple[Policy, ...]:
    return policy.policies if isinstance(policy, kind) else (policy,)


def _constant(batch: PredictionBatch, *, keep: bool) -> PolicyDecision:
    nothing = np.full(len(batch), np.nan)
    return PolicyDecision(np.full(len(batch), keep), nothing, nothing)


def _combine(verdicts: list[PolicyDecision], *, settles: bool) -> PolicyDecision:
    """Fold verdicts from left to right; the first whose `keep` equals `settles` decides a row."""
    keep, score, limit = verdicts[0]
    for verdict in verdicts[1:]:
        turned = (keep != settles) & (verdict.keep == settles)
        keep = np.where(turned, settles, keep)
        score = np.where(turned, verdict.score, score)
        limit = np.where(turned, verdict.threshold, limit)
    return PolicyDecision(keep, score, limit)


def _with_override(own: FloatArray, threshold: FloatArray | None) -> FloatArray:
    return own if threshold is None else np.where(np.isnan(threshold), own, threshold)


def _require_number(value: float) -> float:
    if math.isnan(value):
        raise ConfigurationError("A threshold is NaN; give a number, for example 0.9.")
    return value


def _warn_if_constant(threshold: float, low: float, high: float, where: str) -> None:
    if threshold > high:
        text = (
            f"The threshold {threshold}{where} can never be reached (the score's highest value is {high}): "
            f"everything goes to the large model. If that is meant, say AlwaysLarge()."
        )
    elif threshold <= low:
        text = (
            f"The threshold {threshold}{where} is always reached (the score's lowest value is {low:.4g}): "
            f"nothing goes to the large model. If that is meant, say AlwaysSmall()."
        )
    else:
        return
    warnings.warn(text, ThresholdWarning, stacklevel=4)


PLAIN_CLASSES: dict[str, type[Configured]] = {
    kind.__name__: kind
    for kind in (
        AllOf, AlwaysLarge, AlwaysSmall, AnswerFusion, AnyOf, Entropy, LearnedDeferral, MinTokenProbability,
        LengthNormalizedProbability, Margin, MaxProbability, MeanTokenProbability, OnlyLabels, PerLabelThreshold,
        Threshold, TokenQuantile, ValueOfInformation,
    )
}  # fmt: skip
"""What a bundle's policy and fusion may be made of."""
