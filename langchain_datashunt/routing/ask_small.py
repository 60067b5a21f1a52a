"""Call a small model for the inputs of a shunt, with callback runs only if a handler observes them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeGuard

from langchain_core.runnables import Runnable
from langchain_core.runnables.config import run_in_executor, set_config_context
from langchain_core.runnables.utils import coro_with_context

from langchain_datashunt._utils.control_flow import raise_if_control_flow
from langchain_datashunt.routing.plan import failed_outcome, in_task_order, outcome_of
from langchain_datashunt.routing.runs import ChildRuns, Runs
from langchain_datashunt.routing.sync_async import Effect, Steps, perform
from langchain_datashunt.small_models.base import SmallModel
from langchain_datashunt.small_models.scores import Outcome

_SMALL_RUN = "small_model"


def ask_small(
    model: Runnable[Any, Any],
    values: Sequence[Any],
    rows: Sequence[int],
    tag: str,
    runs: Runs,
    labels: Sequence[str] | None = None,
    *,
    strict: bool = False,
) -> Steps[Outcome]:
    """Return the predictions of a small model, and the errors of its inputs.

    If the runs come from `invoke`, the small model is invoked too. Otherwise all inputs are one grouped call. An error
    that the call raises becomes the error of every input.

    Args:
        model: The small model.
        values: `n` inputs.
        rows: Position of each input in `runs`, shape `[n]`.
        tag: Tag of the small model's runs.
        runs: Callback runs of the calls.
        labels: Labels of the task, in order, or None if they are not known.
        strict: Whether a prediction over other labels is an error.
    """
    try:
        if runs.single:
            answers = [(yield from _one(model, values[0], tag, runs))]
        elif _is_our_own(model, "batch", "abatch"):
            return (yield from _vectorized(model, values, rows, tag, runs))
        else:
            given, configs = list(values), runs.children(rows, tag)
            answers = yield from perform(
                partial(model.batch, given, configs, return_exceptions=True),
                partial(model.abatch, given, configs, return_exceptions=True),
            )
    except Exception as error:
        raise_if_control_flow(error)
        return failed_outcome(len(values), error)
    order = None if isinstance(model, SmallModel) else partial(in_task_order, labels)
    return outcome_of(answers, labels, order, strict=strict)


def _one(model: Runnable[Any, Any], value: Any, tag: str, runs: Runs) -> Steps[Any]:
    if not _is_our_own(model, "invoke", "ainvoke"):
        config = runs.child(0, tag)
        return (yield from perform(partial(model.invoke, value, config), partial(model.ainvoke, value, config)))
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


def _vectorized(model: SmallModel, values: Sequence[Any], rows: Sequence[int], tag: str, runs: Runs) -> Steps[Outcome]:
    """Call `predict_batch` instead of `batch`, which would create objects for each input.

    Such objects are created only if a handler observes the runs.
    """

    def predict() -> Outcome:
        return model.predict_batch(values, return_errors=True)

    asked = perform(predict, partial(run_in_executor, None, predict))
    if not runs.traced:
        return (yield from asked)
    below = ChildRuns(runs, model, values, rows, tag, _SMALL_RUN)
    yield from below.start()
    try:
        outcome = yield from asked
        predictions = dict(zip(outcome.rows.tolist(), outcome.batch or (), strict=True))
    except BaseException as error:
        yield from below.fail_rest(error)
        raise
    yield from below.end({**outcome.errors, **predictions})
    return outcome


def _is_our_own(model: Runnable[Any, Any], *names: str) -> TypeGuard[SmallModel]:
    """Return whether `model` uses `SmallModel`'s own methods, so that its Runnable wrappers can be skipped."""
    return isinstance(model, SmallModel) and all(getattr(type(model), n) is getattr(SmallModel, n) for n in names)


def _within(below: ChildRuns, asked: Effect) -> Effect:
    """Perform an action inside its run, so that runs of calls that it makes are children of that run."""

    def call() -> Any:
        with set_config_context(below.within(0)) as context:
            return context.run(asked.sync)

    async def acall() -> Any:
        with set_config_context(below.within(0)) as context:
            return await coro_with_context(asked.asynchronous(), context)

    return Effect(call, acall)
