"""Routed, RoutedInputs and DeferredCall: the state of one call of a shunt while it is routed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.runnables import RunnableConfig

from langchain_datashunt.large_models.watcher import LargeCallWatcher
from langchain_datashunt.prediction import Prediction
from langchain_datashunt.routing.plan import Plan
from langchain_datashunt.routing.runs import Runs


@dataclass(frozen=True, slots=True)
class Routed:
    """The `n` inputs of one call, about which the small models were asked.

    Attributes:
        values: The inputs as the caller passed them.
        runs: Their callback runs and configs.
        kwargs: Keyword arguments for the large model.
        small_seconds: Wall time of the small models, in seconds.
    """

    values: Sequence[Any]
    runs: Runs
    kwargs: dict[str, Any]
    small_seconds: float


@dataclass(frozen=True, slots=True)
class RoutedInputs(Routed):
    """The inputs of one call of a shunt, with the plan that routes them.

    Attributes:
        plan: Route of each input.
    """

    plan: Plan


@dataclass(frozen=True, slots=True)
class DeferredCall:
    """One deferred input and its large call.

    Attributes:
        routed: The inputs of the shunt's call that it belongs to.
        row: Its position among these inputs.
        large_input: Input of the large model, or the error that prevents the call.
        config: Config of the large call.
        watcher: Records usage and text of the large call, and whether its message is whole. None if nothing needs
            them.
    """

    routed: RoutedInputs
    row: int
    large_input: Any
    config: RunnableConfig
    watcher: LargeCallWatcher | None

    @property
    def prediction(self) -> Prediction | None:
        """The small model's prediction, or None if it failed."""
        return self.routed.plan.prediction(self.row)
