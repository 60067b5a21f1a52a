"""Asking small models: one input, or many in one vectorised call, with runs only where somebody sees them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeGuard

from langchain_core.runnables import Runnable
from langchain_core.runnables.config import run_in_executor, set_config_context
from langchain_core.runnables.utils import coro_with_context

from langchain_datashunt._utils.sync_async import Effect, Steps
from langchain_datashunt.routing.plan import in_task_order, outcome_of
from langchain_datashunt.routing.runs import ChildRuns, Runs
from langchain_datashunt.small_models.base import SmallModel
from langchain_datashunt.small_models.scores import Outcome

_SMALL_RUN = "small_model"


def predict_one(model: Runnable[Any, Any], value: Any, tag: str, runs: Runs) -> Steps[Any]:
    """Whatever a small model gives for the one input of some runs.

    Args:
        model: The small model.
        value: The input.
        tag: What its run is to the call.
        runs: The call's.
    """
    if not _is_our_own(model, "invoke", "ainvoke"):
        config = runs.child(0, tag)
        return (yield Effect(partial(model.invoke, value, config), partial(model.ainvoke, value, config)))
    asked = Effect(partial(model.predict, value), partial(model.apredict, value))
    if not runs.traced:
        return (yield asked)
    below = ChildRuns(runs, model, [value], [0], tag, _SMALL_RUN)
    yield from below.start()
    try:
        prediction = yield _within(below, asked)
    except BaseException as error:
        yield from below.fail_rest(error)
        raise
    yield from below.end({0: prediction})
    return prediction


def predict_many(
    model: Runnable[Any, Any],
    values: Sequence[Any],
    rows: list[int],
    tag: str,
    runs: Runs,
    allowed: frozenset[str] | None = None,
    labels: Sequence[str] | None = None,
) -> Steps[Outcome]:
    """One small-model call, vectorised; objects are made only for runs that are to be seen.

    Args:
        model: The small model.
        values: `n` inputs.
        rows: Shape `[n]`: on behalf of which calls.
        tag: What its runs are to them.
        runs: The calls'.
        allowed: The labels of the task; None allows all.
        labels: The order of labels, of a model that is none of this package's.
    """
    if not _is_our_own(model, "batch", "abatch"):
        given, configs = list(values), runs.children(rows, tag)
        batch = partial(model.batch, given, configs, return_exceptions=True)
        abatch = partial(model.abatch, given, configs, return_exceptions=True)
        order = None if isinstance(model, SmallModel) else partial(in_task_order, labels)
        return outcome_of((yield Effect(batch, abatch)), allowed, order)
    predict = partial(model.predict_batch, values, return_errors=True)
    asked = Effect(predict, partial(run_in_executor, None, predict))
    if not runs.traced:
        outcome: Outcome = yield asked
        return outcome
    below = ChildRuns(runs, model, values, rows, tag, _SMALL_RUN)
    yield from below.start()
    try:
        outcome = yield asked
        found: dict[int, Any] = {
            **outcome.errors,
            **dict(zip(outcome.rows.tolist(), outcome.batch or (), strict=True)),
        }
    except BaseException as error:
        yield from below.fail_rest(error)
        raise
    yield from below.end(found)
    return outcome


def _is_our_own(model: Runnable[Any, Any], *names: str) -> TypeGuard[SmallModel]:
    """Whether it is a small model whose calls are as `SmallModel` has them, so that they can be spared."""
    return isinstance(model, SmallModel) and all(getattr(type(model), n) is getattr(SmallModel, n) for n in names)


def _within(below: ChildRuns, asked: Effect) -> Effect:
    """The same inside the first run: what is called there is below it."""

    def call() -> Any:
        with set_config_context(below.within(0)) as context:
            return context.run(asked.sync)

    async def acall() -> Any:
        with set_config_context(below.within(0)) as context:
            return await coro_with_context(asked.asynchronous(), context)

    return Effect(call, acall)
