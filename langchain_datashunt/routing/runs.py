"""Runs: start and end the callback runs of a call, and attach routing decisions to them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.callbacks.manager import ahandle_event, handle_event
from langchain_core.runnables import Runnable, RunnableConfig, patch_config
from langchain_core.runnables.config import (
    ensure_config,
    get_async_callback_manager_for_config,
    get_callback_manager_for_config,
    get_config_list,
    set_config_context,
)
from langchain_core.runnables.utils import coro_with_context
from langchain_core.tracers.base import BaseTracer
from langchain_core.utils.uuid import uuid7
from typing_extensions import override

from langchain_datashunt.decision import DECISION_EVENT, ShuntDecision
from langchain_datashunt.routing.sync_async import Effect, Steps, arun, run, to_the_end


class Runs:
    """Configs and callback runs of `n` calls.

    Without a callback handler no run is created, which keeps large batches cheap. `traced` says whether a handler
    observes the calls, and `one_config` whether the caller passed one config for all. `shared` is the config of all
    calls if they differ in nothing, and None otherwise.

    Args:
        owner: Runnable that the runs belong to.
        inputs: Its `n` inputs.
        config: One config for all calls, one for each, or None.
        single: Whether the only input came through `invoke` or `stream`. The models are then called with `invoke`
            instead of `batch`.
        asynchronous: Whether callbacks are awaited.
    """

    def __init__(
        self,
        owner: Runnable[Any, Any],
        inputs: Sequence[Any],
        config: Any,
        *,
        single: bool = False,
        asynchronous: bool = False,
    ) -> None:
        self.n = len(inputs)
        self.single = single
        self.shared: RunnableConfig | None = None
        self.each: list[RunnableConfig] = []
        self._owner = owner
        self._inputs = inputs
        self._asynchronous = asynchronous
        self._manager_for: Callable[[RunnableConfig], Any] = (
            get_async_callback_manager_for_config if asynchronous else get_callback_manager_for_config
        )
        self._managers: list[Any] = []
        self._one_manager: Any = None
        self._pending: set[int] = set()
        self.one_config = config is None or isinstance(config, dict)
        self.traced = self._read_configs(config)

    def _read_configs(self, config: Any) -> bool:
        """Set the configs of all calls, and return whether any callback handler observes them.

        * One config without a handler: `shared` holds it. If it has a `run_id` and there are several calls, `each`
          holds their configs too, because only the first call may have that id.
        * One config with a handler, or a list of configs: `each` holds them, and `shared` is None.
        """
        one_for_all = self.one_config
        if one_for_all:
            self.shared = ensure_config(config)
            self._one_manager = self._manager_for(self.shared)
            traced = bool(self._one_manager.handlers)
            if not traced and (self.n == 1 or self.shared.get("run_id") is None):
                return False
        self.each = get_config_list(config, self.n)
        if not one_for_all:
            traced = any(self._manager_for(each).handlers for each in self.each)
        if traced or not one_for_all:
            self.shared = None
        return traced

    def config(self, i: int) -> RunnableConfig:
        """Return the config of call `i`."""
        return self.shared if self.shared is not None else self.each[i]

    def record_id(self, i: int) -> str:
        """Return the id of call `i`: the id of its run, else the `run_id` of its config, else a new one.

        Use the result instead of calling this twice, because a new id differs each time.
        """
        if self.traced:
            return str(self._managers[i].run_id)
        own = self.each[i] if self.each else self.config(i)
        return str(own.get("run_id") or uuid7())

    def max_concurrency(self) -> int | None:
        """Return the caller's limit on concurrent calls. None means unlimited."""
        return self.config(0).get("max_concurrency")

    # Configs of child calls

    def child(
        self,
        i: int,
        tag: str | None = None,
        *,
        decision: ShuntDecision | None = None,
        handler: BaseCallbackHandler | None = None,
        max_concurrency: int | None = None,
    ) -> RunnableConfig:
        """Return the config of a child call of call `i`.

        Args:
            i: Position of the parent call.
            tag: Tag of the child's run, such as "shunt:small" or "shunt:large". Unused if no handler observes it.
            decision: Decision that the child's run and all runs below it carry as metadata. None adds none. Unused if
                no handler observes it.
            handler: Additional callback handler of the child's run and all runs below it.
            max_concurrency: Limit on concurrent calls of the child. None keeps the caller's.
        """
        base = self.config(i)
        if not self.traced:
            child = base.copy()
            child.pop("run_id", None)
            child.pop("run_name", None)
            if handler is not None:
                child["callbacks"] = [handler]
            if max_concurrency is not None:
                child["max_concurrency"] = max_concurrency
            return child
        manager = self._managers[i].get_child(tag)
        if decision is not None:
            manager.add_metadata({k: v for k, v in decision.to_metadata().items() if v is not None})
        if handler is not None:
            manager.add_handler(handler, inherit=True)
        return patch_config(base, callbacks=manager, max_concurrency=max_concurrency)

    def children(self, rows: Sequence[int], tag: str) -> RunnableConfig | list[RunnableConfig]:
        """Return the configs of one grouped call on behalf of `rows`: a shared config if there are no runs."""
        if not self.traced and self.shared is not None:
            return self.child(0, tag)
        return [self.child(i, tag) for i in rows]

    # Start and end of runs

    def start(self) -> Steps[None]:
        """Start a run for each input, if a callback handler observes them."""
        if not self.traced:
            return
        self._managers = [None] * self.n
        try:
            yield Effect(self._start_all, self._astart_all)
        except BaseException as error:
            yield from self.fail_rest(error)
            raise

    def _begin(self, i: int) -> Any:
        config = self.each[i]
        run_id: UUID | None = config.pop("run_id", None)
        name = config.get("run_name") or self._owner.get_name()
        one = self._one_manager
        manager = self._manager_for(config) if one is None else one.copy()  # each run gets its own tags and metadata
        return manager.on_chain_start(None, self._inputs[i], name=name, run_id=run_id)

    def _started(self, i: int, manager: Any) -> None:
        self._managers[i] = manager
        self._pending.add(i)

    def _start_all(self) -> None:
        for i in range(self.n):
            self._started(i, self._begin(i))

    async def _astart_all(self) -> None:
        async def begin(i: int) -> None:
            self._started(i, await self._begin(i))

        for found in await to_the_end(asyncio.gather(*map(begin, range(self.n)), return_exceptions=True)):
            if isinstance(found, BaseException):  # all have started by now, so `fail_rest` ends every run that did
                raise found

    def attach_decisions(self, rows: Sequence[int], decision_of: Callable[[int], ShuntDecision]) -> Steps[None]:
        """Attach decisions to the runs of `rows` as metadata and tags, and send them as custom events."""

        def data_of(i: int) -> dict[str, Any]:
            metadata = (decision := decision_of(i)).to_metadata()
            _mark(self._managers[i], decision, metadata)
            return metadata

        return self.send_decisions(rows, data_of)

    def send_decisions(self, rows: Sequence[int], data_of: Callable[[int], dict[str, Any]]) -> Steps[None]:
        """Send decisions to all handlers as custom events, without changing the runs."""
        if not self.traced or not rows:
            return

        def send(i: int) -> Any:
            own, data = (
                self._managers[i],
                data_of(i),
            )  # it may add tags and metadata, read below
            identity = {"run_id": own.run_id, "tags": own.tags, "metadata": own.metadata}
            tell = ahandle_event if self._asynchronous else handle_event
            return tell(own.handlers, "on_custom_event", "ignore_custom_event", DECISION_EVENT, data, **identity)

        yield _for_all(send, rows)

    def end(self, outputs: dict[int, Any]) -> Steps[None]:
        """End runs with their outputs, or with an error if an output is an exception."""
        rows = [i for i in outputs if i in self._pending]
        if not rows:
            return
        self._pending.difference_update(rows)

        def finish(i: int) -> Any:
            if isinstance(outputs[i], BaseException):
                return self._managers[i].on_chain_error(outputs[i])
            return self._managers[i].on_chain_end(outputs[i])

        yield _for_all(finish, rows)

    def fail_rest(self, error: BaseException) -> Steps[None]:
        """End all runs that are still open, with an error."""
        yield from self.end(dict.fromkeys(sorted(self._pending), error))


def perform_in_runs(runs: Runs, steps: Steps[list[Any]]) -> list[Any]:
    """Perform the steps of a call within its runs, and return its outputs, errors among them."""
    if not runs.traced:
        return run(steps)
    run(runs.start())
    try:
        if runs.single:  # as `Runnable.invoke` does, for parts that call a Runnable without passing the config on
            with set_config_context(runs.child(0)) as context:
                outputs = context.run(run, steps)
        else:
            outputs = run(steps)
    except BaseException as error:
        run(runs.fail_rest(error))
        raise
    run(runs.end(dict(enumerate(outputs))))
    return outputs


async def aperform_in_runs(runs: Runs, steps: Steps[list[Any]]) -> list[Any]:
    """Async version of `perform_in_runs`."""
    if not runs.traced:
        return await arun(steps)
    await arun(runs.start())
    try:
        if runs.single:
            with set_config_context(runs.child(0)) as context:
                outputs = await coro_with_context(arun(steps), context)
        else:
            outputs = await arun(steps)
    except BaseException as error:
        await arun(runs.fail_rest(error))
        raise
    await arun(runs.end(dict(enumerate(outputs))))
    return outputs


def _for_all(act: Callable[[int], Any], rows: Sequence[int]) -> Effect:
    """Return the effect of calling `act` for each row: in order if sync, concurrently if async.

    All rows are called before the first error is raised.
    """

    def each() -> None:
        first: Exception | None = None
        for i in rows:
            try:
                act(i)
            except Exception as error:
                first = first or error
        if first is not None:
            raise first

    async def act_on(i: int) -> None:
        await act(i)

    async def gathered() -> None:
        for found in await to_the_end(asyncio.gather(*map(act_on, rows), return_exceptions=True)):
            if isinstance(found, BaseException):
                raise found

    return Effect(each, gathered)


class ChildRuns(Runs):
    """Runs of a part of several calls, as children of their runs.

    They derive their callback managers from the parents' instead of configuring new ones, which is faster.

    Args:
        parents: Runs of the calls, which must be traced.
        owner: The part, a Runnable.
        inputs: Its `n` inputs.
        rows: Position of each input's call, shape `[n]`.
        tag: Tag of the runs.
        run_type: Kind of run in traces.
    """

    def __init__(
        self,
        parents: Runs,
        owner: Runnable[Any, Any],
        inputs: Sequence[Any],
        rows: Sequence[int],
        tag: str,
        run_type: str,
    ) -> None:
        self.n = len(inputs)
        self.shared, self.each = None, []
        self.traced = True
        self._owner, self._inputs = owner, inputs
        self._asynchronous = parents._asynchronous
        self._managers: list[Any] = []
        self._pending: set[int] = set()
        self._above, self._rows = parents, rows
        self._hooked: list[BaseCallbackHandler] | None = None
        self._about: dict[str, Any] = {"name": owner.get_name(), "run_type": run_type}
        self._tag = tag

    @override
    def _begin(self, i: int) -> Any:
        child = self._above._managers[self._rows[i]].get_child(self._tag)
        if self._hooked is None:  # handlers that `configure` adds from the context, such as a run collector
            configured = type(child).configure(child)
            self._hooked = [one for one in configured.handlers if one not in child.handlers]
        for handler in self._hooked:
            child.add_handler(handler, inherit=False)
        return child.on_chain_start(None, self._inputs[i], **self._about)

    def within(self, i: int) -> RunnableConfig:
        """Return the config of calls made inside run `i`."""
        return patch_config(self._above.config(self._rows[i]), callbacks=self._managers[i].get_child())


def _mark(manager: Any, decision: ShuntDecision, metadata: dict[str, Any]) -> None:
    """Add a decision's metadata and tags to a run that has already started, in every tracer that stores runs."""
    metadata = {key: value for key, value in metadata.items() if value is not None}
    tags = [f"shunt_route:{decision.route}", f"shunt_reason:{decision.reason}"]
    manager.tags = [*_without_decision_tags(manager.tags), *tags]
    manager.metadata = {**manager.metadata, **metadata}
    for handler in manager.handlers:
        if isinstance(handler, BaseTracer) and (run := handler.run_map.get(str(manager.run_id))):
            extra = run.extra or {}
            run.extra = {**extra, "metadata": {**extra.get("metadata", {}), **metadata}}
            run.tags = [*_without_decision_tags(run.tags or []), *tags]


def _without_decision_tags(tags: Sequence[str]) -> list[str]:
    """Return the tags without those of an earlier decision about the same run."""
    return [tag for tag in tags if not tag.startswith(("shunt_route:", "shunt_reason:"))]
