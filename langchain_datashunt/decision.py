"""Routing results: the decision for one input, its latency, and the answer with its cost."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from langchain_core.messages.ai import UsageMetadata
from pydantic_core import to_jsonable_python

from langchain_datashunt.prediction import Prediction, Reason, Route


@dataclass(frozen=True, slots=True)
class ShuntDecision:
    """Routing decision for one input.

    Attributes:
        route: Model that answered.
        reason: Reason for the route.
        prediction: Prediction of the deciding small model, or None if it failed.
        score: Confidence score that was compared with the threshold, or None if the policy uses none.
        threshold: Threshold, or None if the policy uses none.
        policy: Text form of the policy.
        error: Message of the failure that changed the route, or None.
    """

    route: Route
    reason: Reason
    prediction: Prediction | None = None
    score: float | None = None
    threshold: float | None = None
    policy: str = ""
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the decision as a JSON-ready dict, with the whole prediction."""
        prediction = None if self.prediction is None else self.prediction.to_dict()
        return {**{one.name: getattr(self, one.name) for one in fields(self)}, "prediction": prediction}

    def explain(self) -> str:
        """Return one line that says who answered and why, such as "deferred to large: refund, score 0.92 < 0.99"."""
        lead = {
            "confident": f"answered locally by {self.route}",
            "deferred": "deferred to large",
            "unreadable": "deferred to large, because the small model cannot read all of the input",
            "small_error": "deferred to large, because the small model failed",
            "large_error": "the large model failed" + ("" if self.route == "large" else f", so {self.route} answered"),
            "local_only": "kept on this machine",
        }[self.reason]
        parts = [] if self.prediction is None else [self.prediction.label]
        if self.score is not None and self.threshold is not None:
            sign = ">=" if self.score >= self.threshold else "<"
            parts.append(f"score {self.score:.4g} {sign} {self.threshold:.4g}")
        if self.error is not None:
            parts.append(self.error)
        return f"{lead}: {', '.join(parts)}" if parts else lead

    def to_metadata(self) -> dict[str, Any]:
        """Return flat, JSON-ready trace metadata, without the input and without the full distribution."""
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
"""Errors whose messages never quote an input or an answer."""


def _without_texts(error: str) -> str:
    """Return the error message if it cannot quote an input or an answer, or else the error's type alone."""
    kind = error.partition(":")[0]
    return error if kind in _WITHOUT_TEXTS else kind


@dataclass(frozen=True, slots=True)
class Latency:
    """Wall time of the two models in seconds. In a batch, it is that of the whole grouped call."""

    small_seconds: float = 0.0
    large_seconds: float = 0.0

    @property
    def total_seconds(self) -> float:
        """Sum of both, in seconds."""
        return self.small_seconds + self.large_seconds


@dataclass(frozen=True, slots=True, repr=False)
class ShuntResult:
    """Answer with its routing decision, token usage, cost and latency.

    Attributes:
        output: Answer, of the type that the shunt returns without `return_decision`.
        decision: Routing decision.
        usage: Token usage of the large model by model name. Empty if the input was answered locally.
        cost_usd: Price of `usage` in USD. 0.0 if the input was answered locally, None if the price is unknown.
        latency: Wall time of the small and the large model.
        record_id: Run id under which the call is logged.
        inner: Result of the next tier, if the large side is itself a shunt.
        large_output: Output of the large model alone, if `output` is fused from both models' answers.
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
        """Model that answered."""
        return self.decision.route

    @property
    def reason(self) -> Reason:
        """Reason for the route."""
        return self.decision.reason

    @property
    def prediction(self) -> Prediction | None:
        """Prediction of the deciding small model, or None if it failed."""
        return self.decision.prediction

    @property
    def threshold(self) -> float | None:
        """Threshold that the score was compared with, or None if the policy uses none."""
        return self.decision.threshold

    @property
    def decisions(self) -> tuple[ShuntDecision, ...]:
        """Decisions of all tiers, outermost first."""
        return (self.decision, *(self.inner.decisions if self.inner else ()))

    def to_dict(self) -> dict[str, Any]:
        """Return the result as a JSON-ready dict; an output that JSON cannot hold becomes text."""
        return {
            "output": to_jsonable_python(self.output, fallback=str),
            "decision": self.decision.to_dict(),
            "usage": {model: dict(usage) for model, usage in self.usage.items()},
            "cost_usd": self.cost_usd,
            "small_seconds": self.latency.small_seconds,
            "large_seconds": self.latency.large_seconds,
            "record_id": self.record_id,
            "inner": None if self.inner is None else self.inner.to_dict(),
            "large_output": to_jsonable_python(self.large_output, fallback=str),
        }

    def __repr__(self) -> str:
        cost = "unknown" if self.cost_usd is None else f"{self.cost_usd:.6g} USD"
        return (
            f"ShuntResult({reprlib.repr(self.output)}, route={self.route!r}, reason={self.reason!r}, cost={cost}, "
            f"record_id={self.record_id!r})"
        )

    def __add__(self, other: ShuntResult) -> ShuntResult:
        """Join two chunks of one streamed result. The later chunk supplies cost, latency and, if it has any, usage."""
        inner = self.inner + other.inner if self.inner and other.inner else other.inner or self.inner
        return replace(other, output=_joined(self.output, other.output), inner=inner, usage=other.usage or self.usage)


def _joined(first: Any, second: Any) -> Any:
    """Return the sum of two chunks' outputs, or the later one if they cannot be added, as with parsed JSON."""
    if first is None or second is None:
        return second if first is None else first
    try:
        return first + second
    except TypeError:
        return second


DECISION_EVENT = "shunt_decision"
"""Name of the custom event that carries `ShuntDecision.to_metadata()`."""

CHECKPOINT_TYPES = (
    ("langchain_datashunt.decision", "Latency"),
    ("langchain_datashunt.decision", "ShuntDecision"),
    ("langchain_datashunt.decision", "ShuntResult"),
    ("langchain_datashunt.prediction", "Prediction"),
)
"""Types that may be part of a LangGraph state, for `JsonPlusSerializer(allowed_msgpack_modules=...)`."""
