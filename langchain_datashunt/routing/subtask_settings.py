"""What a shunt of sub-tasks is made of: its settings, and whether they fit together. It asks nobody."""

from __future__ import annotations

from typing import Any, Literal

from langchain_core.runnables import Runnable, RunnableConfig, RunnableSerializable
from langchain_core.runnables.base import coerce_to_runnable
from langchain_core.runnables.graph import Graph
from langchain_core.runnables.utils import ConfigurableFieldSpec, get_unique_config_specs
from pydantic import ConfigDict, Field, PrivateAttr, field_validator
from typing_extensions import override

from langchain_datashunt._utils.settings import LaidOut
from langchain_datashunt.exceptions import ConfigurationError
from langchain_datashunt.inputs import DEFAULT_INPUT_KEY, InputReader, ShuntInput, text_reader
from langchain_datashunt.large_models.caller import LargeCaller
from langchain_datashunt.large_models.limits import CallLimiter
from langchain_datashunt.large_models.retry import Retry
from langchain_datashunt.privacy.guard import PrivacyGuard
from langchain_datashunt.routing.settings import policy_for
from langchain_datashunt.routing.subtask_questions import (
    Subtask,
)
from langchain_datashunt.routing.subtask_results import (
    SubtaskResult,
    reader_of,
)


class SubtaskSettings(LaidOut, RunnableSerializable[Any, Any]):
    """The settings of a `SubtaskShunt`."""

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    subtasks: tuple[Subtask, ...] = Field(min_length=1)
    """The parts, in the order of the answers."""

    large: Runnable[Any, Any]
    """From the mapping (the input, `known`, `open`) to a mapping of answers to all open questions."""

    on_large_error: Literal["raise", "small"] = "raise"
    """What to do when the large model has failed for good: raise, or take what small models think (None without)."""

    return_decision: bool = False
    """Whether to return a `SubtaskResult` instead of the answers."""

    max_concurrency: int | None = Field(default=None, ge=1)
    """Large calls at once at the most."""

    retry: Retry = Retry()
    """Around each input's large call."""

    input_key: str = DEFAULT_INPUT_KEY
    """The name of the input in the mapping that `large` gets."""

    decimals: int = Field(default=2, ge=0, le=6)
    """Digits of probabilities in prompts."""

    recorder: Any = Field(default=None, exclude=True, repr=False)
    """A `distillation.Recorder`; None records nothing."""

    breaker: Any = Field(default=None, exclude=True, repr=False)
    """A `circuit.CircuitBreaker`, which leaves a large model alone that keeps failing."""

    max_pending: int | None = Field(default=None, ge=1)
    """Large calls that wait or are under way at the most."""

    guard: PrivacyGuard | None = None
    """What may leave for the large model, and how; None lets everything pass. An input that stays has what its small
    models think and None for other parts, or raises (`on_local="raise"`)."""

    _caller: LargeCaller = PrivateAttr()

    @field_validator("large", mode="before")
    @classmethod
    def _runnable(cls, value: Any) -> Any:
        try:
            return coerce_to_runnable(value)
        except TypeError as error:
            raise ConfigurationError(
                f"A {type(value).__name__} is no Runnable. Give a Runnable or a function."
            ) from error

    def model_post_init(self, context: Any, /) -> None:
        """Check the names, and get ready to ask."""
        super().model_post_init(context)
        self._build()

    def _build(self) -> None:
        names = [subtask.name for subtask in self.subtasks]
        if len(set(names)) < len(names):
            raise ConfigurationError(f"Two sub-tasks have one name; their names are {', '.join(names)}. Rename one.")
        for subtask in self.subtasks:
            if subtask.small is not None:
                policy_for(subtask.small, subtask.policy).check(getattr(subtask.small, "labels", None))
        large = self.large if self.guard is None else self.guard.around(self.large)
        limiter = CallLimiter(self.max_concurrency)
        self._caller = LargeCaller(large, self.retry, limiter, self.breaker, self.max_pending)

    def __setattr__(self, name: str, value: Any) -> None:
        """Change a setting; the next call follows it."""
        super().__setattr__(name, value)
        if name in type(self).model_fields:
            self._build()

    @property
    def reader(self) -> InputReader:
        """How inputs are laid out for the prompt and written down: as the first small model reads them."""
        return (reader_of(self.subtasks) or text_reader()).model_copy(update={"input_key": self.input_key})

    @property
    @override
    def config_specs(self) -> list[ConfigurableFieldSpec]:
        smalls = [subtask.small for subtask in self.subtasks if subtask.small is not None]
        return get_unique_config_specs([spec for part in (*smalls, self.large) for spec in part.config_specs])

    @override
    def get_graph(self, config: RunnableConfig | None = None) -> Graph:
        graph = Graph()
        begin, end = graph.add_node(self.get_input_schema(config)), graph.add_node(self.get_output_schema(config))
        large = graph.add_node(self.large, "large")
        for subtask in self.subtasks:
            if subtask.small is None:
                graph.add_edge(begin, large, subtask.name)
                continue
            small = graph.add_node(subtask.small, f"small: {subtask.name}")
            graph.add_edge(begin, small)
            graph.add_edge(small, end, "sure", conditional=True)
            graph.add_edge(small, large, "open", conditional=True)
        graph.add_edge(large, end)
        return graph

    @property
    @override
    def InputType(self) -> Any:
        return ShuntInput

    @property
    @override
    def OutputType(self) -> Any:
        return SubtaskResult if self.return_decision else dict[str, Any]
