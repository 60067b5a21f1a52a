"""A small local chat model as the small side: its draft is kept where its own log-probabilities say that it is sure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from langchain_core.messages import AIMessage
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import merge_configs
from typing_extensions import override

from langchain_datashunt.chat.answers import AnswerForm
from langchain_datashunt.exceptions import PredictionError
from langchain_datashunt.logprobs import token_logprobs
from langchain_datashunt.policies.scores import LengthNormalizedProbability, MinTokenProbability, TokenScore
from langchain_datashunt.prediction import ANSWER_LABELS, Prediction

SILENT_TAGS = ["nostream", "langsmith:nostream"]
"""Tags with which LangGraph does not show a model's tokens: a draft is shown only when it is kept."""

DraftConfidence: TypeAlias = Callable[[AIMessage], float | None]
"""From a small chat model's message to how sure it is, in [0, 1]; None where that cannot be told."""


def mean_token_probability(message: AIMessage) -> float | None:
    """Geometric mean of the probabilities of the message's tokens, `exp(mean log p)`; None without log-probabilities.

    Log-probabilities do not cover tool calls, so a message with some cannot be judged: None.
    """
    return _scored(message, LengthNormalizedProbability())


def min_token_probability(message: AIMessage) -> float | None:
    """The smallest of the probabilities of the message's tokens; None without log-probabilities."""
    return _scored(message, MinTokenProbability())


def _scored(message: AIMessage, score: TokenScore) -> float | None:
    tokens = (message.response_metadata.get("logprobs") or {}).get("content") or []
    return None if message.tool_calls or not tokens else score.of_tokens(token_logprobs(tokens))


class DraftingModel(Runnable[Any, Prediction]):
    """From a conversation to a draft: a prediction whose `answer` is a message, or for structured output the object.

    Args:
        chat: A small chat model, or one with structured output and `include_raw=True`.
        confidence: How sure it is of a message.
        model_id: Name of the model in decisions and records.
        form: What the call may be answered with; where it is structured, `chat` gives a mapping with `raw` and
            `parsed`, and the draft is what was parsed.
        give_raw: Whether the draft is the whole mapping, as `include_raw=True` promises.
    """

    labels = ANSWER_LABELS

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

    def _draft(self, said: Any) -> Prediction:
        structured = self.form.structured
        message, answer = (said["raw"], said["parsed"]) if structured else (said, said)
        if structured and answer is None:
            raise PredictionError(f"The draft of {self.model_id} fits no schema: {said['parsing_error']}")
        if not structured and not self.form.allows(message):
            raise PredictionError(f"The draft of {self.model_id} is not of the form that was asked for.")
        sure = self.confidence(message)
        tokens = (message.response_metadata.get("logprobs") or {}).get("content") or []
        if sure is None or not 0.0 <= sure <= 1.0:
            raise PredictionError(
                f"{self.model_id} gave no log-probabilities with its draft, so nobody knows how sure it is. Let it "
                f"give them (ChatOpenAI(logprobs=True)), or give `confidence`, a function from message to [0, 1]."
            )
        return Prediction.from_answer(
            said if self.give_raw else answer, sure, model_id=self.model_id,
            token_logprobs=token_logprobs(tokens) if tokens and not message.tool_calls else None,
        )  # fmt: skip
