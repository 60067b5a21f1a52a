"""SmallChatModel: a chat model with log-probabilities as the small model of a shunt."""

from __future__ import annotations

from typing import Any

import numpy as np
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableConfig, RunnableSerializable
from langchain_core.runnables.base import coerce_to_runnable
from langchain_core.runnables.graph import Graph
from langchain_core.runnables.utils import ConfigurableFieldSpec
from pydantic import ConfigDict, Field, PrivateAttr, field_validator
from typing_extensions import override

from langchain_datashunt._utils.settings import Frozen
from langchain_datashunt.chat.draft import SILENT_TAGS
from langchain_datashunt.chat.messages import model_name
from langchain_datashunt.exceptions import ConfigurationError, PredictionError
from langchain_datashunt.inputs import DEFAULT_INPUT_KEY, InputReader, ShuntInput, text_reader
from langchain_datashunt.large_models.chat_asker import default_prompt
from langchain_datashunt.large_models.label_parser import LabelParser
from langchain_datashunt.large_models.messages import incomplete_reason, message_text
from langchain_datashunt.large_models.prompt_pruning import NoPruning, Pruning
from langchain_datashunt.logprobs import label_distribution, token_logprobs
from langchain_datashunt.policies.scores import MeanTokenProbability, TokenScore
from langchain_datashunt.prediction import ANSWER_LABELS, Prediction


class SmallChatModel(Frozen, RunnableSerializable[Any, Prediction]):
    """Small chat model that derives its confidence from log-probabilities.

    ```python
    local = ChatOpenAI(base_url="http://localhost:8000/v1", api_key="none", model="small")   # vLLM, llama.cpp, Ollama
    shunt = ShuntRunnable(small=SmallChatModel(chat_model=local), large=prompt | ChatOpenAI() | StrOutputParser())
    ```

    Without `labels` the model writes its answer, and the confidence is the `score` of the answer's tokens. With
    `labels` it is a classifier. Its answer must then be one of the labels, and the probabilities of the others follow
    from the alternatives of its first token.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    chat_model: Runnable[Any, Any]
    """Chat model that returns log-probabilities. They are enabled if it has a `logprobs` setting."""

    labels: tuple[str, ...] = ANSWER_LABELS
    """Labels to choose from. The default lets the model write its own answer."""

    aliases: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Other accepted wordings of each label."""

    prompt: Runnable[Any, Any] | None = None
    """Prompt from the mapping with the input (and `candidates`) to messages. None sends the input unchanged, or uses
    the default prompt if there are labels."""

    score: TokenScore = Field(default_factory=MeanTokenProbability)
    """Confidence score over token probabilities, for written answers."""

    top_logprobs: int = Field(default=10, ge=0, le=20)
    """Number of alternatives requested per token if there are labels."""

    model_id: str = ""
    """Name in predictions and records. Empty uses the chat model's own."""

    input_key: str = DEFAULT_INPUT_KEY
    """Key of the input in mappings."""

    reader: InputReader | None = None
    """Reader that prepares inputs for the prompt. None reads text, and `ImageReader()` reads images."""

    _chain: Runnable[Any, Any] = PrivateAttr()
    _parser: LabelParser | None = PrivateAttr(default=None)

    @field_validator("chat_model", "prompt", mode="before")
    @classmethod
    def _runnable(cls, value: Any) -> Any:
        try:
            return None if value is None else coerce_to_runnable(value)
        except TypeError as error:
            msg = f"Expected a Runnable, got {type(value).__name__}. Pass a chat model or a prompt template."
            raise ConfigurationError(msg) from error

    def model_post_init(self, context: Any, /) -> None:
        """Build the chain of prompt and model."""
        super().model_post_init(context)
        # written past pydantic, so that a copy with another chat model or input key derives both again
        self.__dict__["model_id"] = self.model_id or _name_of(self.chat_model)
        self.__dict__["reader"] = (self.reader or text_reader()).model_copy(update={"input_key": self.input_key})
        prompt = self.prompt
        if self.chooses:
            self._parser = LabelParser(labels=self.labels, aliases=self.aliases)
            prompt = prompt or default_prompt(NoPruning(), self.input_key, self.reader)
        elif prompt is None:
            prompt = ChatPromptTemplate.from_messages([("placeholder", "{history}"), ("placeholder", "{asked}")])
        self._chain = prompt | _with_logprobs(self.chat_model, self.top_logprobs if self.chooses else 0)

    @property
    def chooses(self) -> bool:
        """Whether the model chooses a label instead of writing an answer."""
        return self.labels != ANSWER_LABELS

    # Runnable

    @override
    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Prediction:
        return self._call_with_config(self._one, input, config, run_type="small_model")

    @override
    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Prediction:
        return await self._acall_with_config(self._aone, input, config, run_type="small_model")

    @override
    def batch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Prediction]:
        return self._batch_with_config(
            self._many, inputs, config, return_exceptions=return_exceptions, run_type="small_model"
        )

    @override
    async def abatch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Prediction]:
        return await self._abatch_with_config(
            self._amany, inputs, config, return_exceptions=return_exceptions, run_type="small_model"
        )

    def _one(self, value: Any, run_manager: Any, config: RunnableConfig) -> Prediction:
        return self._prediction(self._chain.invoke(self._laid_out(value), _silent(config)))

    async def _aone(self, value: Any, run_manager: Any, config: RunnableConfig) -> Prediction:
        return self._prediction(await self._chain.ainvoke(self._laid_out(value), _silent(config)))

    def _many(self, values: list[Any], run_manager: Any, config: list[RunnableConfig]) -> list[Prediction | Exception]:
        laid_out, rows, found = self._all_laid_out(values)
        if rows:
            configs = [_silent(config[i]) for i in rows]
            self._sort_in(found, rows, self._chain.batch(laid_out, configs, return_exceptions=True))
        return found

    async def _amany(
        self, values: list[Any], run_manager: Any, config: list[RunnableConfig]
    ) -> list[Prediction | Exception]:
        laid_out, rows, found = self._all_laid_out(values)
        if rows:
            configs = [_silent(config[i]) for i in rows]
            self._sort_in(found, rows, await self._chain.abatch(laid_out, configs, return_exceptions=True))
        return found

    # Inputs to prompts, messages to predictions

    def _laid_out(self, value: Any) -> dict[str, Any]:
        assert self.reader is not None
        laid_out = self.reader.lay_out(value)
        if self.chooses:
            return {**laid_out, **_CANDIDATES.without_prediction(self.labels)}
        if self.prompt is not None:
            return laid_out
        asked = laid_out.get(self.input_key)
        return {
            "history": laid_out.get("history", []),
            "asked": [("human", asked)] if isinstance(asked, str) else asked,
        }

    def _all_laid_out(self, values: list[Any]) -> tuple[list[dict[str, Any]], list[int], list[Any]]:
        found: list[Any] = [None] * len(values)
        laid_out: list[dict[str, Any]] = []
        rows: list[int] = []
        for i, value in enumerate(values):
            try:
                laid_out.append(self._laid_out(value))
                rows.append(i)
            except Exception as error:
                found[i] = error
        return laid_out, rows, found

    def _sort_in(self, found: list[Any], rows: list[int], messages: list[Any]) -> None:
        for i, message in zip(rows, messages, strict=True):
            try:
                found[i] = message if isinstance(message, Exception) else self._prediction(message)
            except Exception as error:
                found[i] = error

    def _prediction(self, message: Any) -> Prediction:
        if not isinstance(message, AIMessage):
            raise PredictionError(
                f"Expected an AIMessage from {self.model_id}, got {type(message).__name__}. Pass a chat model."
            )
        tokens = (message.response_metadata.get("logprobs") or {}).get("content") or []
        text = str(message.text).strip()
        if message.tool_calls or not text:
            what = "tool calls" if message.tool_calls else "an empty answer"
            raise PredictionError(f"{self.model_id} returned {what}, whose confidence is unknown.")
        if (reason := incomplete_reason(message)) is not None:
            raise PredictionError(f"The answer of {self.model_id} is incomplete ({reason}).")
        if not tokens:
            raise PredictionError(
                f"{self.model_id} returned no log-probabilities, so its confidence is unknown. Enable them with "
                f"ChatOpenAI(logprobs=True), or use a server that returns them."
            )
        try:
            logs = token_logprobs(tokens)
        except (KeyError, TypeError, ValueError) as error:
            raise PredictionError(f"{self.model_id} returned invalid log-probabilities: {error}.") from error
        if np.isnan(logs).any():
            raise PredictionError(f"{self.model_id} returned log-probabilities that are NaN.")
        if self._parser is None:
            sure = float(np.clip(self.score.of_tokens(logs), 0.0, 1.0))
            return Prediction.from_answer(text, sure, model_id=self.model_id, token_logprobs=logs)
        label = self._parser.parse(message_text(message))
        found = label_distribution(tokens, self.labels, label)
        if found is None:
            raise PredictionError(f"The log-probabilities of {self.model_id} do not cover its answer {label!r}.")
        return Prediction.from_probabilities(
            dict(zip(self.labels, found[0].tolist(), strict=True)), model_id=self.model_id
        )

    # Runnable metadata

    @property
    @override
    def InputType(self) -> Any:
        return ShuntInput

    @property
    @override
    def OutputType(self) -> type[Prediction]:
        return Prediction

    @property
    @override
    def config_specs(self) -> list[ConfigurableFieldSpec]:
        return self._chain.config_specs

    @override
    def get_graph(self, config: RunnableConfig | None = None) -> Graph:
        return self._chain.get_graph(config)


_CANDIDATES: Pruning = NoPruning()


def _silent(config: RunnableConfig) -> RunnableConfig:
    return {**config, "tags": [*(config.get("tags") or []), *SILENT_TAGS]}


def _name_of(model: Runnable[Any, Any]) -> str:
    inner = getattr(model, "bound", model)
    return model_name(inner) if isinstance(inner, BaseChatModel) else inner.get_name()


def _with_logprobs(model: Runnable[Any, Any], alternatives: int) -> Runnable[Any, Any]:
    """Return the model with log-probabilities enabled, if it has a setting for them that is not set."""
    fields = type(model).model_fields if isinstance(model, BaseChatModel) else {}
    wanted: dict[str, Any] = {}
    if "logprobs" in fields and not getattr(model, "logprobs", None):
        wanted["logprobs"] = True
    if alternatives and "top_logprobs" in fields and getattr(model, "top_logprobs", None) is None:
        wanted["top_logprobs"] = alternatives
    return model.bind(**wanted) if wanted else model
