"""Deferral policies: fixed thresholds, constant policies and their combinations with `&` and `|`."""

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
from langchain_datashunt.prediction import ANSWER_LABELS, BoolArray, FloatArray, PredictionBatch


class PolicyDecision(NamedTuple):
    """Decisions of a policy on `n` predictions.

    Attributes:
        keep: Shape `[n]`. True answers locally with the small model. False defers to the large model.
        score: Shape `[n]`. Score that decided, NaN if the policy uses none.
        threshold: Shape `[n]`. Threshold that the score was compared with, NaN if the policy uses none.
    """

    keep: BoolArray
    score: FloatArray
    threshold: FloatArray


class Policy(Strategy):
    """Base class of policies, which decide for each prediction whether to answer locally or defer.

    Policies combine with `&` (answer locally if both do) and `|` (answer locally if at least one does).
    """

    @abstractmethod
    def evaluate(self, batch: PredictionBatch, threshold: FloatArray | None = None) -> PolicyDecision:
        """Decide on a batch of predictions.

        Args:
            batch: Predictions of the small model, `n` rows.
            threshold: Per-call thresholds, shape `[n]`. Each value replaces the policy's own threshold unless it is
                NaN. Policies without a threshold ignore it.
        """

    def check(self, labels: tuple[str, ...] | None) -> None:
        """Warn or raise if the policy does not suit these labels. None means that they are unknown."""

    def observe(self, asked: int, total: int) -> None:
        """Record that `asked` of `total` inputs were deferred. Called once per shunt call."""

    def __and__(self, other: Policy) -> Policy:
        return AllOf(policies=(*_parts(AllOf, self), *_parts(AllOf, other)))

    def __or__(self, other: Policy) -> Policy:
        return AnyOf(policies=(*_parts(AnyOf, self), *_parts(AnyOf, other)))


def as_policy(value: Any) -> Any:
    """Return a number as a `Threshold`, and any other value unchanged. For validators of settings."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return Threshold(float(value)) if number else value


class Threshold(Policy):
    """Answer locally if `score >= threshold`, as in Data Shunt.

    A threshold of 1.0 still answers locally if the score is exactly 1.0. A threshold above the score's maximum defers
    every input.

    Args:
        threshold: Minimum score, in the units of `score`.
        score: Confidence score. Defaults to the probability of the predicted label.
    """

    threshold: float
    score: ConfidenceScore = Field(default_factory=MaxProbability)

    def __init__(self, threshold: float, *, score: ConfidenceScore | None = None, **settings: Any) -> None:
        """Accept the threshold by position or by name."""
        given: dict[str, Any] = {"threshold": threshold, **({} if score is None else {"score": score}), **settings}
        super().__init__(**given)
        low, high = self.score.bounds(None)
        _warn_if_constant(self.threshold, low, high, "")

    @field_validator("threshold")
    @classmethod
    def _number(cls, value: float) -> float:
        return _require_number(value)

    def evaluate(self, batch: PredictionBatch, threshold: FloatArray | None = None) -> PolicyDecision:
        """Answer locally the rows whose score reaches the threshold."""
        score = self.score(batch)
        limit = _with_override(np.full(len(batch), self.threshold), threshold)
        return PolicyDecision(score >= limit, score, limit)

    def check(self, labels: tuple[str, ...] | None) -> None:
        """Warn if every prediction over these labels reaches the threshold.

        Raises:
            ConfigurationError: The score compares labels, but the small model generates its answers.
        """
        if labels == ANSWER_LABELS:
            if isinstance(self.score, Margin | Entropy):
                raise ConfigurationError(
                    f"{type(self.score).__name__} compares labels, but this small model generates its answers. Use "
                    f"MaxProbability or a token score such as MeanTokenProbability."
                )
        elif labels:
            low, _ = self.score.bounds(len(labels))
            if 0.0 < self.threshold <= low:
                _warn_if_constant(self.threshold, low, math.inf, f" over {len(labels)} labels")


class PerLabelThreshold(Policy):
    """Answer locally if the score reaches the threshold of the predicted label.

    Args:
        thresholds: Threshold by label.
        default: Threshold of all other labels.
        score: Confidence score. Defaults to the probability of the predicted label.
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
        """Accept the thresholds by position or by name."""
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
        """Answer locally the rows whose score reaches the threshold of their predicted label."""
        score = self.score(batch)
        by_label = np.array([self.thresholds.get(label, self.default) for label in batch.labels])
        limit = _with_override(by_label[batch.best], threshold)
        return PolicyDecision(score >= limit, score, limit)

    def check(self, labels: tuple[str, ...] | None) -> None:
        """Raise a `ConfigurationError` if a threshold is for a label that the small model does not have."""
        unknown = sorted(set(self.thresholds) - set(labels)) if labels else []
        if unknown:
            msg = (
                f"PerLabelThreshold has thresholds for labels that the small model does not have: "
                f"{', '.join(unknown[:5])}. Remove them, or use the model's labels: "
                f"{', '.join((labels or ())[:10])}{'...' if len(labels or ()) > 10 else ''}."
            )
            raise ConfigurationError(msg)


class ValueOfInformation(Policy):
    """Defer if the expected accuracy gain of the fused answer exceeds its price.

    The gain is `AnswerFusion.value_of_asking`. The reported score is the negative gain, and the threshold is `-price`.
    A per-call threshold replaces `-price`.

    Args:
        fusion: Fusion of both models' answers, fitted over the small model's labels.
        price: Minimum accuracy gain, in [0, 1], that justifies one LLM call.
    """

    fusion: AnswerFusion
    price: float = Field(default=0.0, ge=0.0, le=1.0)

    def evaluate(self, batch: PredictionBatch, threshold: FloatArray | None = None) -> PolicyDecision:
        """Answer locally the rows for which the LLM's answer is worth no more than its price."""
        score = -self.fusion.value_of_asking(self.fusion.aligned(batch).probabilities)
        limit = _with_override(np.full(len(batch), -self.price), threshold)
        return PolicyDecision(score >= limit, score, limit)

    def check(self, labels: tuple[str, ...] | None) -> None:
        """Raise a `ConfigurationError` if the fusion was fitted on other labels."""
        if labels and set(labels) != set(self.fusion.labels):
            raise ConfigurationError(
                f"The fusion of ValueOfInformation was fitted on {len(self.fusion.labels)} labels that are not the "
                f"small model's {len(labels)} labels. Fit it again with the labels of this model."
            )


class AlwaysSmall(Policy):
    """Answer every input locally."""

    def evaluate(self, batch: PredictionBatch, threshold: FloatArray | None = None) -> PolicyDecision:
        """Answer all rows locally."""
        return _constant(batch, keep=True)


class AlwaysLarge(Policy):
    """Defer every input to the large model."""

    def evaluate(self, batch: PredictionBatch, threshold: FloatArray | None = None) -> PolicyDecision:
        """Defer all rows."""
        return _constant(batch, keep=False)


class OnlyLabels(Policy):
    """Answer locally only if the predicted label is one of `labels`.

    Combine it with a threshold: `Threshold(0.9) & OnlyLabels(labels={"cancel", "status"})`.

    Args:
        labels: Labels that may be answered locally.
    """

    labels: frozenset[str]

    def evaluate(self, batch: PredictionBatch, threshold: FloatArray | None = None) -> PolicyDecision:
        """Answer locally the rows whose most probable label is in `labels`."""
        among = np.array([label in self.labels for label in batch.labels], dtype=np.bool_)
        return _constant(batch, keep=True)._replace(keep=among[batch.best])

    def check(self, labels: tuple[str, ...] | None) -> None:
        """Raise a `ConfigurationError` if the small model does not have one of the labels."""
        if labels and (unknown := sorted(self.labels - set(labels))):
            raise ConfigurationError(
                f"OnlyLabels contains labels that the small model does not have: {', '.join(unknown[:5])}. Remove them."
            )


class AllOf(Policy):
    """Answer locally if every policy does, written `a & b`.

    If a policy defers, the first one that does supplies the reported score and threshold. Otherwise the first policy
    supplies them.

    Args:
        policies: Policies to combine, at least one.
    """

    policies: tuple[Policy, ...] = Field(min_length=1)

    def evaluate(self, batch: PredictionBatch, threshold: FloatArray | None = None) -> PolicyDecision:
        """Answer locally the rows that every policy answers locally."""
        return _combine([policy.evaluate(batch, threshold) for policy in self.policies], settles=False)

    def observe(self, asked: int, total: int) -> None:
        """Forward the counts to every policy."""
        for policy in self.policies:
            policy.observe(asked, total)

    def check(self, labels: tuple[str, ...] | None) -> None:
        """Check every policy."""
        for policy in self.policies:
            policy.check(labels)


class AnyOf(Policy):
    """Answer locally if at least one policy does, written `a | b`.

    If a policy answers locally, the first one that does supplies the reported score and threshold. Otherwise the first
    policy supplies them.

    Args:
        policies: Policies to combine, at least one.
    """

    policies: tuple[Policy, ...] = Field(min_length=1)

    def evaluate(self, batch: PredictionBatch, threshold: FloatArray | None = None) -> PolicyDecision:
        """Answer locally the rows that at least one policy answers locally."""
        return _combine([policy.evaluate(batch, threshold) for policy in self.policies], settles=True)

    def observe(self, asked: int, total: int) -> None:
        """Forward the counts to every policy."""
        for policy in self.policies:
            policy.observe(asked, total)

    def check(self, labels: tuple[str, ...] | None) -> None:
        """Check every policy."""
        for policy in self.policies:
            policy.check(labels)


def _parts(kind: type[AllOf] | type[AnyOf], policy: Policy) -> tuple[Policy, ...]:
    return policy.policies if isinstance(policy, kind) else (policy,)


def _constant(batch: PredictionBatch, *, keep: bool) -> PolicyDecision:
    nothing = np.full(len(batch), np.nan)
    return PolicyDecision(np.full(len(batch), keep), nothing, nothing)


def _combine(verdicts: list[PolicyDecision], *, settles: bool) -> PolicyDecision:
    """Combine decisions from left to right. The first one whose `keep` equals `settles` decides a row."""
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
        raise ConfigurationError("Expected a number as threshold, got NaN. Pass a number such as 0.9.")
    return value


def _warn_if_constant(threshold: float, low: float, high: float, where: str) -> None:
    if threshold > high:
        text = (
            f"The threshold {threshold}{where} can never be reached, because the score's maximum is {high}. "
            f"Every input is deferred to the large model. If this is intended, use AlwaysLarge()."
        )
    elif threshold <= low:
        text = (
            f"The threshold {threshold}{where} is always reached, because the score's minimum is {low:.4g}. Every "
            f"input is answered by the small model. If this is intended, use AlwaysSmall()."
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
"""Classes that may appear in the policy and the fusion of a saved bundle, by name."""
