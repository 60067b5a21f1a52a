"""What a shunted chat model is made of: its settings, and the shunts that they make. It asks nobody."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage, HumanMessage
from langchain_core.runnables import Runnable, RunnableBinding, RunnableConfig, RunnableLambda
from langchain_core.runnables.base import coerce_to_runnable
from langchain_core.runnables.config import ensure_config, merge_configs
from langchain_core.runnables.utils import ConfigurableFieldSpec
from pydantic import ConfigDict, Field, PrivateAttr, field_validator, model_validator
from typing_extensions import override

from langchain_datashunt._utils.settings import Frozen
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


class BoundSides(NamedTuple):
    """Both sides of a chat shunt, with what was bound to them.

    Attributes:
        small: The small model, or the chat model that drafts.
        large: The large chat model.
        form: The form of answers that was asked for.
    """

    small: Runnable[Any, Any]
    large: Runnable[Any, Any]
    form: AnswerForm


class ShuntChatSettings(Frozen, BaseChatModel):
    """The settings of a `ShuntChatModel`."""

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

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

    limiter: CallLimiter | None = Field(default=None, exclude=True, repr=False)
    """See `ShuntRunnable.limiter`."""

    bound: BoundSides | None = Field(default=None, exclude=True, repr=False)
    """Both sides with tools bound to them, as `bind_tools` sets it; None uses `small` and `large` as they are."""

    _sides: BoundSides = PrivateAttr()
    _limiter: CallLimiter = PrivateAttr()
    _shunt: ShuntRunnable = PrivateAttr()
    _direct: LargeCaller = PrivateAttr()
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
        """Build the shunt from the settings."""
        super().model_post_init(context)
        self._limiter = self.limiter or CallLimiter(self.max_concurrency)
        self._sides = self.bound or BoundSides(self.small, self.large, AnswerForm())
        self._shunt = self._shunt_over(self._sides, name="ShuntChatModel")
        self._direct = self._caller_of(self._sides.large)

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

    @override
    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with other settings; another model on either side loses tools that were bound."""
        changed = dict(update or {})
        if changed.keys() & {"small", "large"}:
            changed.setdefault("bound", None)
        changed.setdefault("limiter", None if "max_concurrency" in changed else self._limiter)
        return super().model_copy(update=changed, deep=deep)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Return a copy with its own answers; the models hold connections and are shared."""
        return self.model_copy(update={"answers": copy.deepcopy(self.answers, memo)})

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave out the limiter, which belongs to this process."""
        make, (cls, settings) = super().__reduce__()
        return make, (cls, {name: value for name, value in settings.items() if name != "limiter"})

    @property
    @override
    def config_specs(self) -> list[ConfigurableFieldSpec]:
        return self._shunt.config_specs

    # The shunt underneath

    @property
    def drafts(self) -> bool:
        """Whether the small side is a chat model."""
        return isinstance(self.small, BaseChatModel)

    def _caller_of(self, large: Runnable[Any, Any]) -> LargeCaller:
        """What asks the large model where there is no question for the small side; it passes the same guard."""
        gated = large if self.guard is None else self.guard.around(large)
        return LargeCaller(gated, self.retry, self._limiter, self.breaker, self.max_pending)

    def _shunt_over(self, sides: BoundSides, *, name: str, raw: bool = False) -> ShuntRunnable:
        """Return a shunt both of whose sides answer in one form.

        Args:
            sides: The models, and the form of their answers.
            name: Name of its runs.
            raw: Whether structured answers come with their raw message.
        """
        settings = {field: getattr(self, field) for field in _SETTINGS}
        settings |= {"name": name, "return_decision": True, "limiter": self._limiter}
        policy = policy_for(self.small, self.policy)
        if self.drafts:
            draft = DraftingModel(sides.small, self.confidence, model_name(self.small), form=sides.form, give_raw=raw)
            return ShuntRunnable(small=draft, large=sides.large, pruning=None, policy=policy, **settings)
        answers = SmallAnswers(answers=self.answers, model_id=getattr(self.small, "model_id", "") or "small")
        if self.answers is not None or sides.form != AnswerForm():
            policy = policy & Answerable(answers=answers, form=sides.form)
        large = sides.large if self.pruning is None else HintedModel(sides.large, self.pruning, self.hint)
        output = RunnableLambda(Answering(answers, sides.form, raw), name="small answer")
        return ShuntRunnable(
            small=self.small, large=large, policy=policy, pruning=self.pruning, small_output=output, **settings
        )

    def _shunt_for(self, settings: dict[str, Any]) -> ShuntRunnable:
        """Return the shunt of one call; another one if the call binds tools, or if the small side drafts."""
        sides = self._sides
        if settings.keys() & {"tools", "tool_choice", "response_format"}:
            sides = sides._replace(form=sides.form.with_call(settings))
        if self.drafts and settings:
            sides = sides._replace(small=sides.small.bind(**settings))
        return self._shunt if sides is self._sides else self._shunt_over(sides, name="ShuntChatModel")

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
