"""What a shunted chat model is made of: its settings, and the shunts that they make. It asks nobody."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage, HumanMessage
from langchain_core.runnables import Runnable, RunnableBinding, RunnableConfig, RunnableLambda
from langchain_core.runnables.base import coerce_to_runnable
from langchain_core.runnables.config import ensure_config, merge_configs
from langchain_core.runnables.utils import ConfigurableFieldSpec
from pydantic import ConfigDict, Field, PrivateAttr, field_validator, model_validator
from typing_extensions import override

from langchain_datashunt._utils.settings import Configured
from langchain_datashunt.chat.answers import Answerable, AnswerForm, Answering, SmallAnswers
from langchain_datashunt.chat.draft import DraftConfidence, DraftingModel, mean_token_probability
from langchain_datashunt.chat.hint import HintedModel
from langchain_datashunt.chat.messages import model_name, text_alone
from langchain_datashunt.decision import ShuntDecision
from langchain_datashunt.exceptions import ConfigurationError
from langchain_datashunt.large_models.caller import LargeCaller
from langchain_datashunt.large_models.limits import CallLimiter
from langchain_datashunt.large_models.prompt_pruning import Pruning, SoftPruning
from langchain_datashunt.large_models.retry import Retry
from langchain_datashunt.policies.thresholds import Policy
from langchain_datashunt.prediction import ANSWER_LABELS
from langchain_datashunt.privacy.guard import PrivacyGuard
from langchain_datashunt.routing.settings import policy_for
from langchain_datashunt.routing.shunt import ShuntRunnable

NO_QUESTION = ShuntDecision("large", "deferred", policy="the conversation does not end with a human message")
"""The decision where a classifier has nothing to read, as after a tool's result."""

_SETTINGS = (
    "on_large_error", "max_concurrency", "retry", "threshold_id", "monitor", "fail_safe", "shadow", "recorder",
    "guard", "breaker", "max_pending",
)  # fmt: skip
"""Fields that are handed on to the shunt as they are."""

STANDARD = ("temperature", "max_tokens", "stop")
"""Fields that are handed on with each large call, where they are set."""


class ShuntChatSettings(Configured, BaseChatModel):
    """The settings of a `ShuntChatModel`."""

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", validate_assignment=False)

    small: Runnable[Any, Any]
    """A small model (`Runnable` to a `Prediction`), or a chat model that drafts."""

    large: BaseChatModel
    """The large chat model."""

    answers: dict[str, Any] | None = None
    """By label what the small side says: text, `AIMessage`, `ToolAnswer`, an object or its fields for structured
    output, or a list of them of which the first is taken that fits the call. A label without an answer is left to the
    large model. None answers with the label itself. Of no use with a chat model as small side."""

    confidence: DraftConfidence = Field(default=mean_token_probability, exclude=True, repr=False)
    """How sure a chat model as small side is of its message."""

    policy: Policy | None = None
    """When to keep; see `ShuntRunnable.policy`."""

    pruning: Pruning | None = SoftPruning()
    """What the large model is told of a small model's opinion, in the system message; None tells it nothing."""

    hint: str | None = None
    """A template of what it is told, over the variables of `pruning`; None for the strategy's own words."""

    on_large_error: Literal["raise", "small"] = "raise"
    """See `ShuntRunnable.on_large_error`."""

    max_concurrency: int | None = Field(default=None, ge=1)
    """Large calls at once at the most."""

    retry: Retry = Retry(attempts=1)
    """Around each large call; once by default, since chat models retry by themselves."""

    threshold_id: str = "shunt_threshold"
    """The key of `config["configurable"]` that replaces the threshold for one call."""

    monitor: Any = Field(default=None, exclude=True, repr=False)
    """See `ShuntRunnable.monitor`."""

    fail_safe: Literal["none", "large"] = "none"
    """See `ShuntRunnable.fail_safe`."""

    shadow: bool = False
    """See `ShuntRunnable.shadow`."""

    recorder: Any = Field(default=None, exclude=True, repr=False)
    """See `ShuntRunnable.recorder`."""

    guard: PrivacyGuard | None = None
    """See `ShuntRunnable.guard`. An input that stays and has no small answer raises `LocalOnlyError`. Turns without a
    question for the small side pass the guard too."""

    breaker: Any = Field(default=None, exclude=True, repr=False)
    """See `ShuntRunnable.breaker`."""

    max_pending: int | None = Field(default=None, ge=1)
    """See `ShuntRunnable.max_pending`."""

    temperature: float | None = None
    """Handed on with each large call; None leaves it to the large model."""

    max_tokens: int | None = Field(default=None, ge=1)
    """Likewise."""

    stop: list[str] | None = None
    """Likewise."""

    streaming: bool | None = None
    """False has `stream` give whole answers."""

    _form: AnswerForm = PrivateAttr(default=AnswerForm())
    _asked: Runnable[Any, Any] = PrivateAttr()
    _drafter: Runnable[Any, Any] = PrivateAttr()
    _shunt: ShuntRunnable = PrivateAttr()
    _direct: LargeCaller = PrivateAttr()
    _limiter: CallLimiter = PrivateAttr()
    _carried: dict[str, Any] = PrivateAttr(default_factory=dict)

    @field_validator("small", mode="before")
    @classmethod
    def _runnable(cls, value: Any) -> Any:
        try:
            return coerce_to_runnable(value)
        except TypeError as error:
            raise ConfigurationError(f"A {type(value).__name__} is no small model: give a Runnable.") from error

    @field_validator("rate_limiter", "cache", check_fields=False)
    @classmethod
    def _of_the_large(cls, value: Any) -> Any:
        if value not in (None, False):
            raise ConfigurationError(
                "Give `cache` and `rate_limiter` to the large model: only its calls cost something."
            )
        return value

    def model_post_init(self, context: Any, /) -> None:
        """Lay the shunt out."""
        super().model_post_init(context)
        self._limiter = CallLimiter(self.max_concurrency)
        self._build(self.large, self.small, AnswerForm())

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if isinstance(self.small, RunnableBinding) and isinstance(self.small.bound, BaseChatModel):
            raise ConfigurationError(
                "`small` is a chat model with bound settings, whose tools could not be bound; give the chat model "
                "itself with these settings, for example ChatOpenAI(..., logprobs=True)."
            )
        labels = getattr(self.small, "labels", None)
        writes = labels is not None and tuple(labels) == ANSWER_LABELS  # answers are then by what it writes
        if labels and not writes and (unknown := sorted(set(self.answers or ()) - set(labels))):
            raise ConfigurationError(
                f"There are answers for labels that the small model does not have: {', '.join(unknown[:5])}. Its "
                f"labels are: {', '.join(labels[:10])}."
            )
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        """Change a setting; the next call follows it."""
        super().__setattr__(name, value)
        if name in type(self).model_fields and "_shunt" in (self.__pydantic_private__ or {}):
            self._again({name})

    @override
    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        copied = super().model_copy(update=update, deep=deep)
        if update:
            copied._again(set(update))
        return copied

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """A copy with answers of its own; models hold connections and are shared."""
        return self.model_copy(update={"answers": copy.deepcopy(self.answers, memo)})

    def __getstate__(self) -> dict[Any, Any]:
        """Without what holds locks; it is laid out again where the model is unpickled."""
        state = super().__getstate__()
        kept = {
            name: (state["__pydantic_private__"] or {})[name] for name in ("_form", "_asked", "_drafter", "_carried")
        }
        return {**state, "__pydantic_private__": kept}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        super().__setstate__(state)
        self._limiter = CallLimiter(self.max_concurrency)
        self._build(self._asked, self._drafter, self._form)

    def _again(self, changed: set[str]) -> None:
        """Lay out anew after settings have changed."""
        if "max_concurrency" in changed:
            self._limiter = CallLimiter(self.max_concurrency)
        if changed & {"small", "large"}:
            self._build(self.large, self.small, AnswerForm())
        else:
            self._build(self._asked, self._drafter, self._form)

    @property
    @override
    def config_specs(self) -> list[ConfigurableFieldSpec]:
        return self._shunt.config_specs

    # The shunt underneath

    @property
    def drafts(self) -> bool:
        """Whether the small side is a chat model."""
        return isinstance(self.small, BaseChatModel)

    def _build(self, large: Runnable[Any, Any], drafter: Runnable[Any, Any], form: AnswerForm) -> None:
        self._form, self._asked, self._drafter = form, large, drafter
        self._shunt = self._shunt_over(large, drafter, form, name="ShuntChatModel")
        self._direct = self._caller_of(large)

    def _caller_of(self, large: Runnable[Any, Any]) -> LargeCaller:
        """What asks the large model where there is no question for the small side; it passes the same guard."""
        gated = large if self.guard is None else self.guard.around(large)
        return LargeCaller(gated, self.retry, self._limiter, self.breaker, self.max_pending)

    def _shunt_over(
        self, large: Runnable[Any, Any], drafter: Runnable[Any, Any], form: AnswerForm, *, name: str, raw: bool = False
    ) -> ShuntRunnable:
        """A shunt whose both sides answer in one form."""
        settings = {field: getattr(self, field) for field in _SETTINGS}
        if self.drafts:
            told = model_name(self.small)
            small: Runnable[Any, Any] = DraftingModel(drafter, self.confidence, told, form=form, give_raw=raw)
            return ShuntRunnable(
                name=name, small=small, large=large, pruning=None, return_decision=True,
                policy=policy_for(self.small, self.policy), **settings,
            ).sharing(self._limiter)  # fmt: skip
        answers = SmallAnswers(answers=self.answers, model_id=getattr(self.small, "model_id", "") or "small")
        policy = policy_for(self.small, self.policy)
        if self.answers is not None or form != AnswerForm():
            policy = policy & Answerable(answers=answers, form=form)
        asked = large if self.pruning is None else HintedModel(large, self.pruning, self.hint)
        return ShuntRunnable(
            name=name, small=self.small, large=asked, policy=policy, pruning=self.pruning, return_decision=True,
            small_output=RunnableLambda(Answering(answers, form, raw), name="small answer"), **settings,
        ).sharing(self._limiter)  # fmt: skip

    def _shunt_for(self, settings: dict[str, Any]) -> ShuntRunnable:
        """The shunt of one call: another one where the call itself binds tools or a format, or there is a drafter."""
        form = self._form
        if settings.keys() & {"tools", "tool_choice", "response_format"}:
            form = form.with_call(settings)
        if self.drafts and settings:
            return self._shunt_over(self._asked, self._drafter.bind(**settings), form, name="ShuntChatModel")
        if form != self._form:
            return self._shunt_over(self._asked, self._drafter, form, name="ShuntChatModel")
        return self._shunt

    def _has_question(self, messages: Sequence[BaseMessage]) -> bool:
        """Whether the small side can read what is asked: a classifier reads a human message of text alone."""
        return self.drafts or (bool(messages) and isinstance(messages[-1], HumanMessage) and text_alone(messages[-1]))

    def _config(self, config: RunnableConfig | None) -> RunnableConfig:
        own = RunnableConfig(tags=self.tags or [], metadata=self.metadata or {})
        if self.callbacks is not None:
            own["callbacks"] = self.callbacks
        return merge_configs(ensure_config(config), own)

    def _settings(self, stop: list[str] | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        standard = {name: getattr(self, name) for name in STANDARD if getattr(self, name) is not None}
        return {**standard, **({} if stop is None else {"stop": stop}), **kwargs}

    # One conversation
