"""Around the steps of a call: a threshold that its config gives, and the result that it ends in."""

from __future__ import annotations

from typing import Any

import numpy as np

from langchain_datashunt._utils.pricing import cost_usd
from langchain_datashunt.decision import Latency, ShuntDecision, ShuntResult
from langchain_datashunt.exceptions import ConfigurationError
from langchain_datashunt.large_models.watcher import LargeCallWatcher
from langchain_datashunt.prediction import FloatArray
from langchain_datashunt.routing.runs import Runs


def thresholds_of_calls(runs: Runs, threshold_id: str) -> FloatArray | None:
    """The thresholds given with the calls, shape `[n]`, NaN for none; None where no call gives one."""
    if runs.shared is not None and threshold_id not in runs.shared.get("configurable", {}):
        return None
    given = [runs.config(i).get("configurable", {}).get(threshold_id) for i in range(runs.n)]
    if all(value is None for value in given):
        return None
    for value in given:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
        if value is not None and not number:
            raise ConfigurationError(f"configurable[{threshold_id!r}] is {value!r}; give a number, for example 0.9.")
    return np.array([np.nan if value is None else float(value) for value in given])


def result_of(
    decision: ShuntDecision,
    output: Any,
    record_id: str,
    latency: Latency,
    handler: LargeCallWatcher | None,
) -> Any:
    """What a shunt with `return_decision` gives for one input; an error stays one."""
    if isinstance(output, Exception):
        return output
    inner = output if isinstance(output, ShuntResult) else None
    usage = {} if handler is None else dict(handler.usage_metadata)
    cost: float | None = 0.0
    if handler is not None:
        cost = cost_usd(usage) if usage else (None if inner is None else inner.cost_usd)
    return ShuntResult(output if inner is None else inner.output, decision, usage, cost, latency, record_id, inner)
