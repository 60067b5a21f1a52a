"""A small local chat model as the small side: its draft is kept where its own log-probabilities say that it is sure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from langchain_core.messages import AIMessage
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import merge_configs
from typing_extensions import override

from langchain_datashunt.answers import AnswerForm
from langchain_datashunt.exceptions import PredictionError
from langchain_datashunt.predictions import Prediction

DRAFT_LABELS = ("draft", "other")
"""What a draft's prediction is over: that the draft is right, or not."""

SILENT_TAGS = ["nostream", "langsmith:nostream"]
"""Tags with which LangGraph does not show a model's tokens: a draft is shown only when it is kept."""

DraftConfidence: TypeAlias = Callable[[AIMessage], float | None]
"""From a small chat model's message to how sure it is, in [0, 1]; None where that cannot be told."""


def mean_token_probability(message: AIMessage) -> float | None:
    """Geometric mean of the probabilities of the message's tokens, `exp(mean log p)`; None without log-probabilities.

    The length-normalised likelihood that Data Shunt uses for generated text (eq. 8). Log-probabilities do not cover
    tool calls, so a message with some cannot be judged: None.
    """
    if message.tool_calls:
        return None
    tokens = (message.response_metadata.get("logprobs") or {}).get("content") or []
    logs = [float(token["logprob"]) for token in tokens]
    return math.exp(sum(logs) / len(logs)) if logs else None


def least_token_probability(message: AIMessage) -> float | None:
    """The smallest of the probabilities of the message's tokens; None without log-probabilities."""
    tokens = (message.response_metadata.get("logprobs") or {}).get("content") or []
    if message.tool_calls:
        return None
    return math.exp(min(float(token["logprob"]) for token in tokens)) if tokens else None


@dataclass(frozen=True, slots=True)
class Draft(Prediction):
    """A prediction that a draft is right.

    Attributes:
        answer: The draft: a message, or for structured output the object.
    """

    answer: Any = None


class DraftingModel(Runnable[Any, Prediction]):
    """From a conversation to a `Draft`.

    Args:
        chat: A small chat model, or one with structured output and `include_raw=True`.
        confidence: How sure it is of a message.
        model_id: Name of the model in decisions and records.
        form: What the call may be answered with; where it is structured, `chat` gives a mapping with `raw` and
            `parsed`, and the draft is what was parsed.
        give_raw: Whether the draft is the whole mapping, as `include_raw=True` promises.
    """

    labels = DRAFT_LABELS

    def __init__(
        self,
        chat: Runnable[Any, Any],
        confidence: DraftConfidence,
        model_id: str,
        *,
        form: AnswerForm,
        give_raw: bool = False,
    ) -> None:
        self.chat, self.confidence, self.model_id = chat, confidence, model_id
        self.form, self.give_raw = form, give_raw

    @override
    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Prediction:
        return self._draft(self.chat.invoke(input, merge_configs(config, {"tags": SILENT_TAGS}), **kwargs))

    @override
    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Prediction:
        return self._draft(await self.chat.ainvoke(input, merge_configs(config, {"tags": SILENT_TAGS}), **kwargs))

    def _draft(self, said: Any) -> Draft:
        structured = self.form.structured
        message, answer = (said["raw"], said["parsed"]) if structured else (said, said)
        if structured and answer is None:
            raise PredictionError(f"The draft of {self.model_id} fits no schema: {said['parsing_error']}")
        if not structured and not self.form.allows(message):
            raise PredictionError(f"The draft of {self.model_id} is not of the form that was asked for.")
        sure = self.confidence(message)
        if sure is None or not 0.0 <= sure <= 1.0:
            raise PredictionError(
                f"{self.model_id} gave no log-probabilities with its draft, so nobody knows how sure it is. Let it "
                f"give them (ChatOpenAI(logprobs=True)), or give `confidence`, a function from message to [0, 1]."
            )
        p = np.array([sure, 1.0 - sure])
        best = int(p.argmax())
        answer = said if self.give_raw else answer
        return Draft(DRAFT_LABELS[best], float(p[best]), p, DRAFT_LABELS, model_id=self.model_id, answer=answer)


def draft_answer(draft: Draft) -> Any:
    """The draft itself."""
    return draft.answer
