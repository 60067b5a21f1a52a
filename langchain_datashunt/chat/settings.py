"""ShuntChatSettings: the settings of a `ShuntChatModel`, and the shunts built from them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage
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
from langchain_datashunt.inputs import is_question
from langchain_datashunt.large_models.caller import LargeCaller
from langchain_datashunt.large_models.limits import CallLimiter
from langchain_datashunt.large_models.prompt_pruning import Pruning, SoftPruning
from langchain_datashunt.large_models.retry import Retry
from langchain_datashunt.policies.thresholds import Policy, as_policy
from langchain_datashunt.prediction import ANSWER_LABELS
from langchain_datashunt.privacy.guard import PrivacyGuard
from langchain_datashunt.routing.settings import policy_for
from langchain_datashunt.routing.shunt import ShuntRunnable

NO_QUESTION = ShuntDecision("large", "deferred", policy="the conversation does not end with a human message")
"""Decision about a conversation that a classifier cannot read, for example after the result of a tool."""

_SETTINGS = (
    "on_large_error", "max_concurrency", "retry", "threshold_id", "monitor", "fail_safe", "shadow", "recorder",
    "guard", "breaker", "max_pending",
)  # fmt: skip
"""Fields that are passed to the shunt unchanged."""

STANDARD = ("temperature", "max_tokens", "stop")
"""Fields that are passed with each large call if they are set."""


class BoundSides(NamedTuple):
    """Both models of a chat shunt, with bound tools or structured output.

    Attributes:
        small: Classifier or small chat model.
        large: Large chat model.
        form: Form that the answers must have.
    """

    small: Runnable[Any, Any]
    large: Runnable[Any, Any]
    form: AnswerForm


class ShuntChatSettings(Frozen, BaseChatModel):
    """The settings of a `ShuntChatModel`."""

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    small: Runnable[Any, Any]
    """Classifier (any `Runnable` that returns a `Prediction`), or a small chat model."""

    large: BaseChatModel
    """The large chat model."""

    answers: dict[str, Any] | None = None
    """Local answers by label, or by text if the small model writes its answers. Each answer is text, an `AIMessage`, a
    `ToolAnswer`, or an object (or its fields) for structured output. For a list, the first answer that fits the call is
    used. Labels without an answer are deferred. None answers with the label itself. Ignored if the small side is a chat
    model."""

    confidence: DraftConfidence = Field(default=mean_token_probability, exclude=True, repr=False)
    """Computes the confidence of a small chat model in its message, in [0, 1]."""

    policy: Policy | None = None
    """See `ShuntRunnable.policy`."""

    pruning: Pruning | None = SoftPruning()
    """Strategy that adds the classifier's probabilities to the system message of the large model. None adds nothing."""

    hint: str | None = None
    """Template of that addition, over the variables of `pruning`. None uses the strategy's own paragraph."""

    on_large_error: Literal["raise", "small"] = "raise"
    """See `ShuntRunnable.on_large_error`."""

    max_concurrency: int | None = Field(default=None, ge=1)
    """Maximum concurrent large calls. None means unlimited."""

    retry: Retry = Retry(attempts=1)
    """How each large call is retried. The default never retries, because chat models retry by themselves."""

    threshold_id: str = "shunt_threshold"
    """Key of `config["configurable"]` that replaces the threshold for one call."""

    monitor: Any = Field(default=None, exclude=True, repr=False)
    """See `ShuntRunnable.monitor`."""

    fail_safe: Literal["none", "large"] = "none"
    """See `ShuntRunnable.fail_safe`."""

    shadow: bool = False
    """See `ShuntRunnable.shadow`."""

    recorder: Any = Field(default=None, exclude=True, repr=False)
    """See `ShuntRunnable.recorder`."""

    guard: PrivacyGuard | None = None
    """See `ShuntRunnable.guard`. An input that must stay local raises `LocalOnlyError` if it has no local answer. Turns
    that skip the small side pass through the guard too."""

    breaker: Any = Field(default=None, exclude=True, repr=False)
    """See `ShuntRunnable.breaker`."""

    max_pending: int | None = Field(default=None, ge=1)
    """See `ShuntRunnable.max_pending`."""

    temperature: float | None = None
    """Temperature of each large call. None uses the large model's."""

    max_tokens: int | None = Field(default=None, ge=1)
    """Maximum output tokens of each large call. None uses the large model's."""

    stop: list[str] | None = None
    """Stop sequences of each large call. None uses the large model's."""

    streaming: bool | None = None
    """Whether `stream` yields chunks. False yields each answer in one piece."""

    limiter: CallLimiter | None = Field(default=None, exclude=True, repr=False)
    """See `ShuntRunnable.limiter`."""

    bound: BoundSides | None = Field(default=None, exclude=True, repr=False)
    """Both models with bound tools, set by `bind_tools`. None uses `small` and `large` unchanged."""

    _sides: BoundSides = PrivateAttr()
    _limiter: CallLimiter = PrivateAttr()
    _shunt: ShuntRunnable = PrivateAttr()
    _direct: LargeCaller = PrivateAttr()
    _carried: dict[str, Any] = PrivateAttr(default_factory=dict)

    _number_as_policy = field_validator("policy", mode="before")(as_policy)

    @field_validator("small", mode="before")
    @classmethod
    def _runnable(cls, value: Any) -> Any:
        try:
            return coerce_to_runnable(value)
        except TypeError as error:
            raise ConfigurationError(
                f"Expected a Runnable for `small`, got {type(value).__name__}. Pass a small model."
            ) from error

    @field_validator("rate_limiter", "cache", check_fields=False)
    @classmethod
    def _of_the_large(cls, value: Any) -> Any:
        if value not in (None, False):
            raise ConfigurationError(
                "`cache` and `rate_limiter` belong to the large model, whose calls are the costly ones. Set them there."
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
                "Expected a chat model for `small`, got one with bound settings, to which tools cannot be bound. Pass "
                "the settings to the chat model itself, for example ChatOpenAI(..., logprobs=True)."
            )
        labels = getattr(self.small, "labels", None)
        writes = labels is not None and tuple(labels) == ANSWER_LABELS  # `answers` then refers to its written text
        if labels and not writes and (unknown := sorted(set(self.answers or ()) - set(labels))):
            raise ConfigurationError(
                f"`answers` contains labels that the small model does not have: {', '.join(unknown[:5])}. Use its "
                f"labels: {', '.join(labels[:10])}."
            )
        return self

    @override
    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with other settings. Replacing `small` or `large` drops bound tools."""
        changed = dict(update or {})
        if changed.keys() & {"small", "large"}:
            changed.setdefault("bound", None)
        changed.setdefault("limiter", None if "max_concurrency" in changed else self._limiter)
        return super().model_copy(update=changed, deep=deep)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Return a copy with its own answers. The models are shared, because they hold connections."""
        return self.model_copy(update={"answers": copy.deepcopy(self.answers, memo)})

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings without the limiter, which belongs to this process."""
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
        """Return a caller of the large model for turns that skip the small side, behind the same guard."""
        gated = large if self.guard is None else self.guard.around(large, self.small)
        return LargeCaller(gated, self.retry, self._limiter, self.breaker, self.max_pending)

    def _shunt_over(self, sides: BoundSides, *, name: str, raw: bool = False) -> ShuntRunnable:
        """Return a shunt in which both sides answer in the same form.

        Args:
            sides: The models, and the form of their answers.
            name: Name of the shunt's runs.
            raw: Whether structured answers include the raw message.
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
        """Return the shunt for one call, a new one if the call's settings bind tools or affect a small chat model."""
        sides = self._sides
        if settings.keys() & {"tools", "tool_choice", "response_format"}:
            sides = sides._replace(form=sides.form.with_call(settings))
        if self.drafts and settings:
            sides = sides._replace(small=sides.small.bind(**settings))
        return self._shunt if sides is self._sides else self._shunt_over(sides, name="ShuntChatModel")

    def _has_question(self, messages: Sequence[BaseMessage]) -> bool:
        """Return whether the small side can read the conversation. A classifier needs a final human message of text."""
        return self.drafts or (bool(messages) and is_question(messages[-1]) and text_alone(messages[-1]))

    def _config(self, config: RunnableConfig | None) -> RunnableConfig:
        own = RunnableConfig(tags=self.tags or [], metadata=self.metadata or {})
        if self.callbacks is not None:
            own["callbacks"] = self.callbacks
        return merge_configs(ensure_config(config), own)

    def _settings(self, stop: list[str] | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        standard = {name: getattr(self, name) for name in STANDARD if getattr(self, name) is not None}
        return {**standard, **({} if stop is None else {"stop": stop}), **kwargs}

    # One conversation
