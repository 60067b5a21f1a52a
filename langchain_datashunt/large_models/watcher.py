"""LargeCallWatcher: collect the answer, model name, token usage and log-probabilities of large-model calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.callbacks import UsageMetadataCallbackHandler
from langchain_core.outputs import LLMResult
from typing_extensions import override

from langchain_datashunt.large_models.messages import incomplete_reason, message_cost_usd, message_of, message_text
from langchain_datashunt.logprobs import label_distribution, stated_confidence, token_logprobs
from langchain_datashunt.policies.scores import MeanTokenProbability
from langchain_datashunt.prediction import ANSWER_LABELS


class LargeCallWatcher(UsageMetadataCallbackHandler):
    """Collect the usage and cost of all model calls in a run, and the text and log-probabilities of the last one.

    Attributes:
        model: Name of the last model.
        text: Text of the last answer, or None before it.
        incomplete: Why the last answer is not whole, or None if it is whole.
        cost_usd: Cost of all calls in USD, or None if it is unknown. Before the first call, None.
        tokens: Tokens of the last answer, with their log-probabilities.
    """

    def __init__(self) -> None:
        """Create a watcher without any calls."""
        super().__init__()
        self.model = ""
        self.text: str | None = None
        self.incomplete: str | None = None
        self.cost_usd: float | None = None
        self._priced = True
        self.tokens: list[dict[str, Any]] = []

    @override
    def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
        super().on_llm_end(response, **kwargs)
        if (message := message_of(response)) is None:
            return
        self.model = str(message.response_metadata.get("model_name") or self.model)
        self.text = message_text(message)
        self.incomplete = incomplete_reason(message)
        cost = message_cost_usd(message, self.model)
        self._priced = self._priced and cost is not None
        self.cost_usd = (self.cost_usd or 0.0) + cost if self._priced and cost is not None else None
        self.tokens = list((message.response_metadata.get("logprobs") or {}).get("content") or [])

    def repeated(self) -> LargeCallWatcher:
        """Return a watcher for an equal input that shares this answer, and therefore costs nothing."""
        other = LargeCallWatcher()
        other.model, other.text, other.incomplete, other.tokens = self.model, self.text, self.incomplete, self.tokens
        other.cost_usd = 0.0
        return other

    def fields(self) -> dict[str, Any]:
        """Return token counts and cost of all calls, named as in a call record."""
        counts = self.usage_metadata
        return {
            "input_tokens": sum(each["input_tokens"] for each in counts.values()) if counts else None,
            "output_tokens": sum(each["output_tokens"] for each in counts.values()) if counts else None,
            "cost_usd": self.cost_usd,
        }


def mean_probability(tokens: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the arithmetic mean of the token probabilities, in [0, 1], or None if they are invalid."""
    try:
        found = MeanTokenProbability().of_tokens(token_logprobs(tokens))
    except (KeyError, TypeError, ValueError):
        return None
    return min(1.0, found) if found >= 0.0 else None


def large_sureness(
    watcher: LargeCallWatcher, labels: Sequence[str], label: str | None
) -> tuple[tuple[float, ...] | None, float | None]:
    """Return the large model's label distribution and its confidence.

    Both come from log-probabilities if these are available. Otherwise the distribution is None, and the confidence is
    the one stated in the answer, or None.
    """
    if tuple(labels) == ANSWER_LABELS:
        return None, mean_probability(watcher.tokens) if watcher.tokens else stated_confidence(watcher.text)
    found = label_distribution(watcher.tokens, labels, label) if label is not None else None
    if found is None:
        return None, stated_confidence(watcher.text)
    return tuple(found[0].tolist()), found[1]
