"""What a shunt is made of: its settings, whether they fit together, and the steps that they make. It asks nobody."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from langchain_core.language_models import BaseLanguageModel
from langchain_core.runnables import Runnable, RunnableConfig, RunnableSerializable
from langchain_core.runnables.base import coerce_to_runnable
from langchain_core.runnables.graph import Graph
from langchain_core.runnables.utils import ConfigurableFieldSpec, get_unique_config_specs
from pydantic import ConfigDict, Field, PrivateAttr, ValidationError, field_validator
from typing_extensions import override

from langchain_datashunt._utils.settings import LaidOut, in_words
from langchain_datashunt.decision import ShuntResult
from langchain_datashunt.exceptions import ConfigurationError
from langchain_datashunt.inputs import DEFAULT_INPUT_KEY, ShuntInput
from langchain_datashunt.large_models.caller import LargeCaller
from langchain_datashunt.large_models.limits import CallLimiter
from langchain_datashunt.large_models.prompt_pruning import OPINION_VARIABLES, PRUNING_VARIABLES, Pruning, SoftPruning
from langchain_datashunt.large_models.retry import Retry
from langchain_datashunt.policies.budgets import FailSafe, ShadowOf
from langchain_datashunt.policies.fusion import AnswerFusion
from langchain_datashunt.policies.thresholds import Policy, Threshold
from langchain_datashunt.privacy.guard import PrivacyGuard
from langchain_datashunt.routing.audit import Auditor
from langchain_datashunt.routing.shunt_graph import shunt_graph
from langchain_datashunt.routing.steps import CallSteps

DEFAULT_THRESHOLD = 0.9
"""The threshold where neither the caller nor the small model's bundle gives one."""


def policy_for(small: Runnable[Any, Any], policy: Policy | None = None) -> Policy:
    """The policy in service: the given one, else the small model's own, else `Threshold` at its own or at 0.9."""
    own, chosen = getattr(small, "threshold", None), getattr(small, "policy", None)
    found = policy or (chosen if isinstance(chosen, Policy) else None)
    return found or Threshold(own if isinstance(own, float) else DEFAULT_THRESHOLD)


class ShuntSettings(LaidOut, RunnableSerializable[Any, Any]):
    """The settings of a `ShuntRunnable`."""

    kept_privates: ClassVar[dict[str, Any]] = {"_limiter": None}

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", validate_assignment=True)

    small: Runnable[Any, Any]
    """The specific small model: any `Runnable[Input, Prediction]`."""

    large: Runnable[Any, Any]
    """The large model, usually `prompt | chat_model | parser`. May be a shunt itself."""

    student: Runnable[Any, Any] | None = None
    """The student (S2 of 2CD): asked where `small` is not sure, before `large`."""

    policy: Policy | None = None
    """When to keep; None is the small model's own policy, or `Threshold` at its own threshold, or at 0.9."""

    pruning: Pruning | None = SoftPruning()
    """What the large prompt gets of the small model's opinion; None hands the caller's input on untouched."""

    labels: tuple[str, ...] | None = None
    """All labels of the task; None takes the small model's."""

    label_descriptions: dict[str, str] = Field(default_factory=dict)
    """What labels mean; stands beside the candidates in the prompt."""

    small_output: Runnable[Any, Any] | None = None
    """From a `Prediction` to what the small route returns; None returns its label."""

    on_large_error: Literal["raise", "small"] = "raise"
    """What to do when the large model has failed for good."""

    return_decision: bool = False
    """Whether to return a `ShuntResult` instead of the plain output."""

    max_concurrency: int | None = Field(default=None, ge=1)
    """Large calls at once at the most."""

    retry: Retry = Retry()
    """Around each deferred input's large call."""

    input_key: str = DEFAULT_INPUT_KEY
    """The name of the input in the mapping that `large` gets."""

    threshold_id: str = "shunt_threshold"
    """The key of `config["configurable"]` that replaces the threshold for one call."""

    fusion: AnswerFusion | None = None
    """Answers with what both models say together, where the large one was asked; its prompt must not carry the small
    model's opinion then. A stream gives the answer in one piece."""

    audit_rate: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of what the small model answers that is asked of the large one too, in the background, without the small
    model's opinion in the prompt: `monitor` learns from it, `recorder` keeps it."""

    monitor: Any = Field(default=None, exclude=True, repr=False)
    """A `monitoring.Monitor` that watches error and drift; None watches nothing."""

    fail_safe: Literal["none", "large"] = "none"
    """"large" sends everything to the large model once the monitor has given an alarm."""

    shadow: bool = False
    """Whether everything goes to the large model, and what the policy would have done is only noted: the decision has
    its score and threshold."""

    recorder: Any = Field(default=None, exclude=True, repr=False)
    """A `distillation.Recorder` that keeps what is asked and answered, to learn from; None records nothing."""

    breaker: Any = Field(default=None, exclude=True, repr=False)
    """A `circuit.CircuitBreaker`, which leaves a large model alone that keeps failing; several shunts may share it."""

    max_pending: int | None = Field(default=None, ge=1)
    """Large calls that wait or are under way at the most; more end at once with a `QueueFullError`, as a failure of the
    large model."""

    guard: PrivacyGuard | None = None
    """What may leave for the large model, and how; None lets everything pass."""

    _steps: CallSteps = PrivateAttr()
    _limiter: CallLimiter | None = PrivateAttr(default=None)

    @field_validator("small", "large", "student", "small_output", mode="before")
    @classmethod
    def _runnable(cls, value: Any) -> Any:
        try:
            return None if value is None else coerce_to_runnable(value)
        except TypeError as error:
            msg = f"A {type(value).__name__} is no Runnable. Give a Runnable or a function."
            raise ConfigurationError(msg) from error

    def model_post_init(self, context: Any, /) -> None:
        """Check that the parts fit together, and lay out the steps of a call."""
        super().model_post_init(context)
        self._build()
        self._check()

    def _check(self) -> None:
        self._steps.policy.check(getattr(self.small, "labels", None))
        for part in self._steps.stages if self.labels else ():
            if strange := sorted(set(getattr(part, "labels", ())) - set(self.labels or ())):
                raise ConfigurationError(
                    f"The small model {part.get_name()} can answer with labels that are not in `labels`: "
                    f"{', '.join(strange[:5])}. Add them."
                )
        if self.pruning is not None:
            self.pruning.check(self.task_labels)
            self._check_prompt(self.pruning)
        if self.fusion is not None:
            self._check_fusion(self.fusion)

    def _check_fusion(self, fusion: AnswerFusion) -> None:
        for part in self._steps.stages:
            labels = getattr(part, "labels", None)
            if labels and set(labels) != set(fusion.labels):
                raise ConfigurationError(
                    f"The fusion was fitted on {len(fusion.labels)} labels that are not the {len(labels)} of "
                    f"{part.get_name()}. Fit it again with the labels of this model."
                )
        prompts = self.large.get_prompts()
        used = {name for prompt in prompts for name in (*prompt.input_variables, *prompt.optional_variables)}
        told = frozenset[str]()
        if self.pruning is not None:
            told = self.pruning.variables if self.pruning.narrows else self.pruning.variables - {"candidates"}
        if self.pruning is not None and self.pruning.variables:
            told |= used & OPINION_VARIABLES
        if told:
            raise ConfigurationError(
                f"The large prompt carries the small model's opinion ({', '.join(sorted(told))}), and fusion would "
                f"count it a second time. Use pruning=NoPruning() with fusion, or no fusion."
            )

    def __setattr__(self, name: str, value: Any) -> None:
        """Change a setting; the next call follows it. One that is refused leaves the shunt as it was."""
        before = getattr(self, name, None)
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            raise ConfigurationError(in_words(type(self).__name__, error)) from error
        if name in type(self).model_fields:
            try:
                self._build()
                self._check()
            except Exception:
                super().__setattr__(name, before)
                self._build()
                raise

    def _build(self) -> None:
        policy = policy_for(self.small, self.policy)
        words = str(policy)
        if self.fail_safe == "large":
            if self.monitor is None:
                raise ConfigurationError(
                    "fail_safe='large' needs a monitor that can give alarm; give monitor=Monitor()."
                )
            policy = FailSafe(policy=policy, monitor=self.monitor)
        if self.shadow:
            policy, words = ShadowOf(policy=policy), f"shadow of {words}"
        large = self.large
        if self.return_decision and isinstance(large, ShuntSettings):
            large = large.model_copy(update={"return_decision": True})
        if self.guard is not None:
            large = self.guard.around(large)
        self._steps = CallSteps(
            stages=(self.small,) if self.student is None else (self.small, self.student),
            caller=(caller := self._caller_of(large)),
            policy=policy,
            policy_in_words=words,
            pruning=self.pruning,
            labels=self.task_labels,
            allowed=None if self.labels is None else frozenset(self.labels),
            descriptions=self.label_descriptions,
            small_output=self.small_output,
            falls_back=self.on_large_error == "small",
            return_decision=self.return_decision,
            input_key=self.input_key,
            threshold_id=self.threshold_id,
            recorder=self.recorder,
            fusion=self.fusion,
            auditor=Auditor(self.audit_rate, caller, self.monitor, self.recorder) if self.audit_rate > 0 else None,
            monitor=self.monitor,
            guard=self.guard,
            in_shadow=self.shadow,
        )

    def _caller_of(self, large: Runnable[Any, Any]) -> LargeCaller:
        limiter = self._limiter or CallLimiter(self.max_concurrency)
        return LargeCaller(large, self.retry, limiter, self.breaker, self.max_pending)

    def sharing(self, limiter: CallLimiter) -> Self:
        """This shunt, whose large calls share a bound with others'."""
        self._limiter = limiter
        self._build()
        return self

    @property
    def auditor(self) -> Auditor | None:
        """What asks in the background, with its counters and `flush()`; None without audits."""
        return self._steps.auditor

    def reload(self) -> None:
        """Have small models that follow a registry look for a newly promoted version now."""
        for part in self._steps.stages:
            if callable(again := getattr(part, "reload", None)):
                again()

    @property
    def task_labels(self) -> tuple[str, ...] | None:
        """All labels of the task, where they are known before the first call."""
        return self.labels or getattr(self.small, "labels", None)

    def _check_prompt(self, pruning: Pruning) -> None:
        if isinstance(self.large, BaseLanguageModel):
            raise ConfigurationError(
                f"`large` is a bare {type(self.large).__name__}, which takes no mapping. Give prompt | model | "
                f"parser, use ConfidenceRouterChain.from_models(small, model), or set pruning=None to hand the "
                f"input on as it is."
            )
        prompts = self.large.get_prompts()
        used = {name for prompt in prompts for name in (*prompt.input_variables, *prompt.optional_variables)}
        if prompts and pruning.variables and not used & pruning.variables:
            raise ConfigurationError(
                f"The prompt of `large` uses {sorted(used)} and none of what {type(pruning).__name__} fills: "
                f"{sorted(pruning.variables)}. Use one of these in the template (all there are: "
                f"{', '.join(PRUNING_VARIABLES)}), or set pruning=NoPruning() or None."
            )

    # What a Runnable says of itself

    @property
    @override
    def InputType(self) -> Any:
        try:
            return self.small.InputType
        except TypeError:
            return ShuntInput

    @property
    @override
    def OutputType(self) -> Any:
        if self.return_decision:
            return ShuntResult
        try:
            return self.large.OutputType
        except TypeError:
            return Any

    @property
    @override
    def config_specs(self) -> list[ConfigurableFieldSpec]:
        own = ConfigurableFieldSpec(
            id=self.threshold_id,
            annotation=float | None,
            name="Shunt threshold",
            description="Replaces the policy's threshold for this call.",
            default=None,
        )
        parts = (*self._steps.stages, self.large)
        return get_unique_config_specs([own, *(spec for part in parts for spec in part.config_specs)])

    @override
    def get_graph(self, config: RunnableConfig | None = None) -> Graph:
        return shunt_graph(self, self._steps.stages, self.large, config)
