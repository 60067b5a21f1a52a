"""ShuntSettings: the settings of a shunt, and the checks that they fit together."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

from langchain_core.language_models import BaseLanguageModel
from langchain_core.runnables import Runnable, RunnableConfig, RunnableSerializable
from langchain_core.runnables.base import coerce_to_runnable
from langchain_core.runnables.graph import Graph, Node
from langchain_core.runnables.utils import ConfigurableFieldSpec, get_unique_config_specs
from pydantic import ConfigDict, Field, PrivateAttr, field_validator
from typing_extensions import override

from langchain_datashunt._utils.settings import Frozen
from langchain_datashunt.decision import ShuntResult
from langchain_datashunt.exceptions import ConfigurationError
from langchain_datashunt.inputs import DEFAULT_INPUT_KEY, InputReader, ShuntInput, text_reader
from langchain_datashunt.large_models.caller import LargeCaller
from langchain_datashunt.large_models.chat_asker import ChatAsker
from langchain_datashunt.large_models.limits import CallLimiter
from langchain_datashunt.large_models.prompt_pruning import OPINION_VARIABLES, PRUNING_VARIABLES, Pruning, SoftPruning
from langchain_datashunt.large_models.retry import Retry
from langchain_datashunt.policies.budgets import FailSafe, ShadowOf
from langchain_datashunt.policies.fusion import AnswerFusion
from langchain_datashunt.policies.thresholds import Policy, Threshold, as_policy
from langchain_datashunt.privacy.guard import PrivacyGuard
from langchain_datashunt.routing.audit import Auditor
from langchain_datashunt.routing.small_errors import SmallErrors

DEFAULT_THRESHOLD = 0.9
"""The threshold if neither the caller nor the small model's bundle sets one."""


def policy_for(small: Runnable[Any, Any], policy: Policy | float | None = None) -> Policy:
    """Return `policy` if given, else the small model's own policy, else `Threshold` at its own threshold or 0.9.

    A number is a `Threshold`.
    """
    own, chosen = getattr(small, "threshold", None), getattr(small, "policy", None)
    found: Policy | None = as_policy(policy) if policy is not None else None
    found = found or (chosen if isinstance(chosen, Policy) else None)
    return found or Threshold(own if isinstance(own, float) else DEFAULT_THRESHOLD)


class ShuntSettings(Frozen, RunnableSerializable[Any, Any]):
    """The settings of a `ShuntRunnable`. They are frozen. To change one, use `shunt.model_copy(update={...})`."""

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    small: Runnable[Any, Any]
    """Local classifier: any `Runnable[Input, Prediction]`, or a function. The paper calls it the specific small
    model."""

    large: Runnable[Any, Any]
    """The large model, usually `prompt | chat_model | parser`. It may be a shunt itself."""

    student: Runnable[Any, Any] | None = None
    """A second small model, called for inputs that `small` defers. The paper calls it the learnable small model
    (S2)."""

    policy: Policy | None = None
    """Decides which predictions are confident. A number is a `Threshold`. None uses the policy of the small model's
    bundle, then its threshold, then `Threshold(0.9)`."""

    pruning: Pruning | None = SoftPruning()
    """Prompt variables that the large prompt gets from the small model's probabilities. None passes the caller's
    input on unchanged."""

    labels: tuple[str, ...] | None = None
    """All labels of the task. None uses the small model's."""

    label_descriptions: dict[str, str] = Field(default_factory=dict)
    """Descriptions by label, listed with the candidates in the prompt."""

    small_output: Runnable[Any, Any] | None = None
    """Maps a `Prediction` to the output of a local answer. None returns its label."""

    on_large_error: Literal["raise", "small"] = "raise"
    """Whether a large model that has finally failed raises, or gives way to the small model's answer."""

    return_decision: bool = False
    """Whether to return a `ShuntResult` instead of the plain output."""

    max_concurrency: int | None = Field(default=None, ge=1)
    """Maximum concurrent large calls. None means unlimited."""

    retry: Retry = Retry()
    """How the large call of each deferred input is retried."""

    on_small_error: Literal["large", "raise"] = "large"
    """Whether an input on which the small model fails is deferred, or raises the error. A small model that cannot work
    as it is set up, for example because its output is not a prediction, always raises."""

    max_small_errors: int | None = Field(default=100, ge=1)
    """Inputs in a row on which the small model may fail. Further ones raise `SmallModelError`. None means
    unlimited."""

    max_input_characters: int | None = Field(default=100_000, ge=1)
    """Maximum length of an input's text, in characters. Longer ones raise `InputError`. None means unlimited."""

    deduplicate: bool = True
    """Whether equal deferred inputs of one batch share one large call."""

    input_key: str = DEFAULT_INPUT_KEY
    """Name of the input in mappings: in those of the caller, and in those that `large` gets. The default is the small
    model's."""

    threshold_id: str = "shunt_threshold"
    """Key of `config["configurable"]` that replaces the threshold for one call."""

    fusion: AnswerFusion | None = None
    """Combines both models' answers for deferred inputs. The large prompt must not carry the small model's
    probabilities then, because they would count twice. A stream yields the fused answer in one piece."""

    audit_rate: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of locally answered inputs, in [0, 1], that the large model answers again in the background. Its prompt
    carries no small-model probabilities. `monitor` compares the answers, and `recorder` logs them."""

    monitor: Any = Field(default=None, exclude=True, repr=False)
    """An `evaluation.monitor.Monitor` that watches errors and drift. None watches nothing."""

    fail_safe: Literal["none", "large"] = "none"
    """"large" defers every input after the monitor has raised an alarm."""

    shadow: bool = False
    """Whether every input is deferred although the policy runs. Decisions still hold the score and the threshold, for
    evaluation of the policy."""

    recorder: Any = Field(default=None, exclude=True, repr=False)
    """A `call_log.Recorder` that logs calls. None logs nothing."""

    breaker: Any = Field(default=None, exclude=True, repr=False)
    """A `large_models.CircuitBreaker`, which fails fast while the large model is down. Shunts may share one."""

    max_pending: int | None = Field(default=None, ge=1)
    """Maximum large calls that wait or run. None means unlimited. A call beyond it fails with `QueueFullError`, like
    any other error of the large model."""

    guard: PrivacyGuard | None = None
    """Decides which data may be sent to the large model, and in which form. None sends everything."""

    limiter: CallLimiter | None = Field(default=None, exclude=True, repr=False)
    """Shares one limit on concurrent large calls with other shunts. None makes a limiter from `max_concurrency`."""

    _stages: tuple[Runnable[Any, Any], ...] = PrivateAttr()
    _unwrapped: tuple[bool, ...] = PrivateAttr()
    _reads_anything: bool = PrivateAttr()
    _policy: Policy = PrivateAttr()
    _policy_name: str = PrivateAttr()
    _caller: LargeCaller = PrivateAttr()
    _auditor: Auditor | None = PrivateAttr(default=None)
    _small_errors: SmallErrors = PrivateAttr()

    _number_as_policy = field_validator("policy", mode="before")(as_policy)

    @field_validator("small", "large", "student", "small_output", mode="before")
    @classmethod
    def _runnable(cls, value: Any) -> Any:
        try:
            return None if value is None else coerce_to_runnable(value)
        except TypeError as error:
            msg = f"Expected a Runnable or a function, got {type(value).__name__}. Pass a loaded model or a chain."
            raise ConfigurationError(msg) from error

    def model_post_init(self, context: Any, /) -> None:
        """Build the call pipeline from the settings, and check that the parts fit together."""
        super().model_post_init(context)
        if "input_key" not in self.model_fields_set:  # written past pydantic, so that copies derive it again
            self.__dict__["input_key"] = getattr(self.small, "input_key", DEFAULT_INPUT_KEY)
        self._small_errors = SmallErrors(self.on_small_error, self.max_small_errors)
        self._stages = (self.small,) if self.student is None else (self.small, self.student)
        # without a reader of its own, the small model may take inputs of any form
        self._reads_anything = getattr(type(self.small), "reader", None) is None and not hasattr(self.small, "reader")
        self._unwrapped = tuple(getattr(one, "input_key", self.input_key) != self.input_key for one in self._stages)
        self._policy, self._policy_name = self._build_policy()
        large = self.large
        if self.return_decision and isinstance(large, ShuntSettings):
            large = large.model_copy(update={"return_decision": True})
        if self.guard is not None:
            large = self.guard.around(large, self.small)
        limiter = self.limiter or CallLimiter(self.max_concurrency)
        self._caller = LargeCaller(large, self.retry, limiter, self.breaker, self.max_pending)
        if self.audit_rate > 0:
            self._auditor = Auditor(self.audit_rate, self._caller, self.monitor, self.recorder)
        self._check()

    def _build_policy(self) -> tuple[Policy, str]:
        policy = policy_for(self.small, self.policy)
        name = str(policy)
        if self.fail_safe == "large":
            if self.monitor is None:
                raise ConfigurationError("fail_safe='large' requires a monitor. Pass monitor=Monitor(...).")
            policy = FailSafe(policy=policy, monitor=self.monitor)
        if self.shadow:
            policy, name = ShadowOf(policy=policy), f"shadow of {name}"
        return policy, name

    def _check_call(self, kwargs: Mapping[str, Any]) -> None:
        """Check the keyword arguments of a call, which go to the large model.

        Raises:
            ConfigurationError: One of them is a setting of the shunt, which a call cannot change.
        """
        if ours := sorted(kwargs.keys() & type(self).model_fields.keys()):
            raise ConfigurationError(
                f"{', '.join(ours)}: a setting of {type(self).__name__}, which a call cannot change. Use "
                f"model_copy(update={{{ours[0]!r}: ...}})."
            )

    def _check(self) -> None:
        self._policy.check(getattr(self.small, "labels", None) or self.labels)
        for part in self._stages if self.labels else ():
            if strange := sorted(set(getattr(part, "labels", ())) - set(self.labels or ())):
                raise ConfigurationError(
                    f"The small model {part.get_name()} can predict labels that are not in `labels`: "
                    f"{', '.join(strange[:5])}. Add them there."
                )
        if self.pruning is not None:
            self.pruning.check(self.task_labels)
            self._check_prompt(self.pruning)
        if self.fusion is not None:
            self._check_fusion(self.fusion)

    def _check_fusion(self, fusion: AnswerFusion) -> None:
        for part in self._stages:
            labels = getattr(part, "labels", None)
            if labels and set(labels) != set(fusion.labels):
                raise ConfigurationError(
                    f"`fusion` was fitted on {len(fusion.labels)} labels, which differ from the {len(labels)} "
                    f"labels of {part.get_name()}. Fit it again with the labels of this model."
                )
        prompts = self.large.get_prompts()
        used = {name for prompt in prompts for name in (*prompt.input_variables, *prompt.optional_variables)}
        disclosed = frozenset[str]()
        if self.pruning is not None:
            disclosed = self.pruning.variables if self.pruning.narrows else self.pruning.variables - {"candidates"}
        if self.pruning is not None and self.pruning.variables:
            disclosed |= used & OPINION_VARIABLES
        if disclosed:
            raise ConfigurationError(
                f"The large prompt carries the small model's probabilities ({', '.join(sorted(disclosed))}), which "
                f"`fusion` would count a second time. Pass pruning=NoPruning(), or no fusion."
            )

    @property
    def policy_in_service(self) -> Policy:
        """The policy in use, wrapped in the shadow mode and the fail-safe if these are set."""
        return self._policy

    @property
    def auditor(self) -> Auditor | None:
        """The background audits, with counters and `flush()`, or None if `audit_rate` is 0."""
        return self._auditor

    def reload(self) -> None:
        """Check registries for newly promoted small models now."""
        for part in self._stages:
            if callable(again := getattr(part, "reload", None)):
                again()

    @property
    def task_labels(self) -> tuple[str, ...] | None:
        """All labels of the task, or None if they are not known before the first call."""
        return self.labels or getattr(self.small, "labels", None)

    def _check_prompt(self, pruning: Pruning) -> None:
        if isinstance(self.large, BaseLanguageModel):
            raise ConfigurationError(
                f"Expected a Runnable that takes a mapping for `large`, got {type(self.large).__name__}. Pass "
                f"prompt | model | parser, use ConfidenceRouterChain.from_models(small, model), or set "
                f"pruning=None to pass the input on unchanged."
            )
        prompts = self.large.get_prompts()
        used = {name for prompt in prompts for name in (*prompt.input_variables, *prompt.optional_variables)}
        if prompts and pruning.variables and not used & pruning.variables:
            raise ConfigurationError(
                f"The prompt of `large` uses {sorted(used)}, but none of the variables that "
                f"{type(pruning).__name__} fills: {sorted(pruning.variables)}. Use one of them in the "
                f"template (all pruning variables: {', '.join(PRUNING_VARIABLES)}), or set pruning=NoPruning() or None."
            )

    @cached_property
    def _reader(self) -> InputReader:
        """Reader of inputs for prompts and records: the small model's own, or a text reader."""
        try:
            own = getattr(self.small, "reader", None)
        except Exception:  # an unreadable bundle: the call of the small model reports that error
            own = None
        return own.model_copy(update={"input_key": self.input_key}) if own else text_reader(self.input_key)

    @cached_property
    def _keeps_messages(self) -> bool:
        """Whether the large model gets all parts of a message, such as images, and not its text alone."""
        if self.pruning is None or isinstance(self.large, ChatAsker):
            return True
        prompts = self.large.get_prompts()
        used = {name for prompt in prompts for name in (*prompt.input_variables, *prompt.optional_variables)}
        return not prompts or "messages" in used

    # Schemas and graph

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
        parts = (*self._stages, self.large)
        return get_unique_config_specs([own, *(spec for part in parts for spec in part.config_specs)])

    @override
    def get_graph(self, config: RunnableConfig | None = None) -> Graph:
        return shunt_graph(self, self._stages, self.large, config)


def shunt_graph(
    shunt: Runnable[Any, Any],
    stages: tuple[Runnable[Any, Any], ...],
    large: Runnable[Any, Any],
    config: RunnableConfig | None,
) -> Graph:
    """Return the graph of a shunt: input, each small model, the large model's own graph, output."""
    graph = Graph()
    before = graph.add_node(shunt.get_input_schema(config))
    end = graph.add_node(shunt.get_output_schema(config))
    label: str | None = None
    for stage in stages:
        node = graph.add_node(stage)
        graph.add_edge(before, node, data=label, conditional=label is not None)
        graph.add_edge(node, end, data="confident", conditional=True)
        before, label = node, "deferred"
    first, last = _extend(graph, large, config)
    graph.add_edge(before, first, data="deferred", conditional=True)
    graph.add_edge(last, end)
    return graph


def _extend(graph: Graph, large: Runnable[Any, Any], config: RunnableConfig | None) -> tuple[Node, Node]:
    inner = large.get_graph(config)
    inner.trim_first_node()
    inner.trim_last_node()
    first, last = inner.first_node(), inner.last_node()
    if not inner.nodes or first is None or last is None:
        node = graph.add_node(large)
        return node, node
    graph.extend(inner)
    return first, last
