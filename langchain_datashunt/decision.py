"""ShuntDecision and ShuntResult: where an input went, why, and what came of it. Nothing is decided here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from langchain_core.messages.ai import UsageMetadata

from langchain_datashunt.prediction import Prediction, Reason, Route


@dataclass(frozen=True, slots=True)
class ShuntDecision:
    """Where one input went, and why.

    Attributes:
        route: Who answered.
        reason: Why.
        prediction: What the deciding small model thought; None if it failed.
        score: The confidence score that was compared, None where there was none.
        threshold: What it was compared with, None for policies without one.
        policy: The policy in words.
        error: The failure that changed the route, in words; None for none.
    """

    route: Route
    reason: Reason
    prediction: Prediction | None = None
    score: float | None = None
    threshold: float | None = None
    policy: str = ""
    error: str | None = None

    def to_metadata(self) -> dict[str, Any]:
        """Flat, JSON-ready values for traces: never the input, never all probabilities."""
        return {
            "shunt_route": self.route,
            "shunt_reason": self.reason,
            "shunt_label": None if self.prediction is None else self.prediction.label,
            "shunt_confidence": None if self.prediction is None else self.prediction.confidence,
            "shunt_score": self.score,
            "shunt_threshold": self.threshold,
            "shunt_policy": self.policy,
            "shunt_model": None if self.prediction is None else self.prediction.model_id,
            "shunt_error": None if self.error is None else _without_texts(self.error),
        }


_WITHOUT_TEXTS = frozenset(
    {"CircuitOpenError", "LargeTimeoutError", "PredictionError", "QueueFullError", "LocalOnlyError"}
)
"""Errors whose messages quote no text."""


def _without_texts(error: str) -> str:
    """An error in words, where those cannot quote an input or an answer; else its kind alone."""
    kind = error.partition(":")[0]
    return error if kind in _WITHOUT_TEXTS else kind


@dataclass(frozen=True, slots=True)
class Latency:
    """Wall time of one call's parts, in seconds; in a batch, of the grouped call that the input was part of."""

    small_seconds: float = 0.0
    large_seconds: float = 0.0

    @property
    def total_seconds(self) -> float:
        """Both together, in seconds."""
        return self.small_seconds + self.large_seconds


@dataclass(frozen=True, slots=True)
class ShuntResult:
    """An answer with its decision.

    Attributes:
        output: The answer, of the type that the shunt returns without `return_decision`.
        decision: Where the input went, and why.
        usage: Tokens that the large model counted, by model name; empty for the small routes.
        cost_usd: Price of `usage` in USD; 0.0 for the small routes, None where the price is not known.
        latency: Wall time of the parts.
        record_id: Id of the run, under which the call is recorded.
        inner: The result of the next tier, where the large side is a shunt itself.
        large_output: What the large model itself answered, where `output` is fused of both models' answers.
    """

    output: Any
    decision: ShuntDecision
    usage: Mapping[str, UsageMetadata] = field(default_factory=dict)
    cost_usd: float | None = 0.0
    latency: Latency = field(default_factory=Latency)
    record_id: str | None = None
    inner: ShuntResult | None = None
    large_output: Any = None

    @property
    def route(self) -> Route:
        """Who answered."""
        return self.decision.route

    @property
    def reason(self) -> Reason:
        """Why."""
        return self.decision.reason

    @property
    def prediction(self) -> Prediction | None:
        """What the deciding small model thought."""
        return self.decision.prediction

    @property
    def threshold(self) -> float | None:
        """What the score was compared with."""
        return self.decision.threshold

    @property
    def decisions(self) -> tuple[ShuntDecision, ...]:
        """The decisions of all tiers, the outermost first."""
        return (self.decision, *(self.inner.decisions if self.inner else ()))

    def __add__(self, other: ShuntResult) -> ShuntResult:
        """Join two chunks of one streamed result; the later one knows usage, cost and latency."""
        inner = self.inner + other.inner if self.inner and other.inner else other.inner or self.inner
        return replace(other, output=_joined(self.output, other.output), inner=inner, usage=other.usage or self.usage)


def _joined(first: Any, second: Any) -> Any:
    """The sum of two chunks' outputs; the later one where they cannot be added, as with parsed JSON."""
    if first is None or second is None:
        return second if first is None else first
    try:
        return first + second
    except TypeError:
        return second


DECISION_EVENT = "shunt_decision"
"""Name of the custom event that carries `ShuntDecision.to_metadata()`."""
