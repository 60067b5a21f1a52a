"""Use a local chat model as the small model, with its log-probabilities as the confidence of a draft."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from langchain_core.messages import AIMessage
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import merge_configs
from typing_extensions import override

from langchain_datashunt.chat.answers import AnswerForm
from langchain_datashunt.exceptions import PredictionError
from langchain_datashunt.large_models.messages import incomplete_reason
from langchain_datashunt.logprobs import token_logprobs
from langchain_datashunt.policies.scores import LengthNormalizedProbability, MinTokenProbability, TokenScore
from langchain_datashunt.prediction import ANSWER_LABELS, Prediction

SILENT_TAGS = ["nostream", "langsmith:nostream"]
"""Tags that stop LangGraph from streaming the tokens of a draft, since it may be discarded."""

DraftConfidence: TypeAlias = Callable[[AIMessage], float | None]
"""Function from a chat model's message to a confidence in [0, 1], or None if it is unknown."""


def mean_token_probability(message: AIMessage) -> float | None:
    """Return the geometric mean of the token probabilities, `exp(mean log p)`.

    The result is None if the message has no log-probabilities. It is also None if the message has tool calls, which
    log-probabilities do not cover.
    """
    return _scored(message, LengthNormalizedProbability())


def min_token_probability(message: AIMessage) -> float | None:
    """Return the smallest token probability, or None without log-probabilities or with tool calls."""
    return _scored(message, MinTokenProbability())


def _scored(message: AIMessage, score: TokenScore) -> float | None:
    tokens = (message.response_metadata.get("logprobs") or {}).get("content") or []
    return None if message.tool_calls or not tokens else score.of_tokens(token_logprobs(tokens))


class DraftingModel(Runnable[Any, Prediction]):
    """Draft an answer with a chat model and return it as a prediction.

    The prediction's `answer` is a message, or an object for structured output.

    Args:
        chat: Small chat model, or one with structured output and `include_raw=True`.
        confidence: Function from a message to its confidence.
        model_id: Name of the model in decisions and records.
        form: Form that the answer must have. If it is structured, `chat` returns a mapping with `raw` and `parsed`, and
            the draft is the parsed object.
        give_raw: Whether the draft is the whole mapping, as `include_raw=True` requires.
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

    def _draft(self, reply: Any) -> Prediction:
        structured = self.form.structured
        message, answer = (reply["raw"], reply["parsed"]) if structured else (reply, reply)
        if structured and answer is None:
            error = reply["parsing_error"]
            raise PredictionError(
                f"The draft of {self.model_id} does not fit the schema ({type(error).__name__})."
            ) from error
        if (reason := incomplete_reason(message)) is not None:
            raise PredictionError(f"The draft of {self.model_id} is incomplete ({reason}).")
        if not structured and not self.form.allows(message):
            raise PredictionError(f"The draft of {self.model_id} does not have the requested form.")
        sure = self.confidence(message)
        tokens = (message.response_metadata.get("logprobs") or {}).get("content") or []
        if sure is None or not 0.0 <= sure <= 1.0:
            raise PredictionError(
                f"The draft of {self.model_id} has no valid confidence, usually because it has no "
                f"log-probabilities. Enable them with ChatOpenAI(logprobs=True), or pass `confidence`, a function from "
                f"message to [0, 1]."
            )
        return Prediction.from_answer(
            reply if self.give_raw else answer, sure, model_id=self.model_id,
            token_logprobs=token_logprobs(tokens) if tokens and not message.tool_calls else None,
        )  # fmt: skip
