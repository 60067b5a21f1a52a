"""ShuntRunnable: answer locally if the small model is confident, and defer to the large model otherwise."""

from __future__ import annotations

import asyncio
import copy
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AsyncExitStack, ExitStack, aclosing, closing
from dataclasses import replace
from functools import partial
from numbers import Real
from typing import Any, TypeVar

import numpy as np
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import get_executor_for_config, run_in_executor
from langchain_core.utils.uuid import uuid7
from typing_extensions import override

from langchain_datashunt._utils.control_flow import raise_first_error, raise_if_control_flow
from langchain_datashunt.call_log.finished_call import FinishedCall, now, snapped
from langchain_datashunt.decision import Latency, ShuntDecision, ShuntResult
from langchain_datashunt.exceptions import (
    ConfigurationError,
    IncompleteAnswerError,
    InputError,
    LocalOnlyError,
    StreamClosedError,
    UnparsableAnswerError,
)
from langchain_datashunt.inputs import TextReader, other_parts, refusal_of_missing
from langchain_datashunt.large_models.caller import END
from langchain_datashunt.large_models.watcher import LargeCallWatcher
from langchain_datashunt.prediction import ANSWER_LABELS, FloatArray, Prediction, answer_text
from langchain_datashunt.privacy.guard import subject_of
from langchain_datashunt.routing.ask_small import ask_small
from langchain_datashunt.routing.audit import Auditor
from langchain_datashunt.routing.deferred_call import DeferredCall, RoutedInputs
from langchain_datashunt.routing.plan import STAGES, Plan
from langchain_datashunt.routing.runs import Runs, aperform_in_runs, perform_in_runs
from langchain_datashunt.routing.settings import ShuntSettings
from langchain_datashunt.routing.sync_async import Steps, arun, perform, run
from langchain_datashunt.telemetry import instrument_if_asked

instrument_if_asked()  # records spans if an environment variable asks for telemetry

T = TypeVar("T")

_LARGE_TAG = "shunt:large"
_SMALL_OUTPUT_TAG = "shunt:small_output"


class ShuntRunnable(ShuntSettings):
    """Answer with a small model if it is confident, and defer to a large model otherwise.

    ```python
    shunt = ShuntRunnable(small=load_small_model("bundle"), large=prompt | ChatOpenAI() | StrOutputParser())
    shunt.invoke("Where is my card?")
    ```

    `large` gets the caller's input as a mapping (`input`, and `history` for conversations) plus the variables
    `candidates`, `candidate_probabilities`, `small_label` and `small_confidence`. Its prompt must use at least one
    variable that the pruning strategy fills. With `pruning=None` it gets the caller's input unchanged.

    An input is deferred (reason "small_error") if no small model predicts it, unless the error shows a mistake in the
    set-up, which is raised. Blank, missing and too long inputs are refused with an `InputError`.

    If the large model fails, `retry` decides whether its call is repeated. After the last attempt the shunt raises the
    error. With `on_large_error="small"` it returns the small model's answer instead (reason "large_error").

    To change the threshold for one call, pass `config={"configurable": {"shunt_threshold": 0.8}}`. Other keyword
    arguments of a call go to the large model.
    """

    # How a call runs: `_route` asks the small models (`_decide`), answers the confident inputs (`_answer_locally`) and
    # asks the large model about the others (`_ask_large`). Inputs that are refused get an error instead. `invoke` and
    # `batch` perform it whole. `stream` and `batch_as_completed` perform its parts, because they yield in between.
    #
    # A method that returns `Steps[T]` is written once for sync and async: a generator of effects, each with a sync and
    # an async form. `yield from` returns its T. `run` and `arun` perform the effects, and `perform_in_runs` also starts
    # and ends the callback runs.
    #
    # `rows` are positions among the caller's inputs. Errors of single inputs are values in the lists of outputs, until
    # `_raise_or_return` or `raise_first_error` raises them. `ShuntSettings` has the fields, and derives `_stages` (the
    # small models in order), `_policy`, `_caller` (of the large model), `_auditor` and `_reader` from them.

    @override
    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        runs = Runs(self, [input], config, single=True)
        return _raise_or_return(perform_in_runs(runs, self._route([input], runs, kwargs))[0])

    @override
    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        runs = Runs(self, [input], config, single=True, asynchronous=True)
        return _raise_or_return((await aperform_in_runs(runs, self._route([input], runs, kwargs)))[0])

    @override
    def batch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """Route `n` inputs with one call of each small model, and one grouped large call for all deferred inputs."""
        if not (inputs := list(inputs)):
            return []
        runs = Runs(self, inputs, config)
        return raise_first_error(perform_in_runs(runs, self._route(inputs, runs, kwargs)), return_exceptions)

    @override
    async def abatch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """Async version of `batch`."""
        if not (inputs := list(inputs)):
            return []
        runs = Runs(self, inputs, config, asynchronous=True)
        return raise_first_error(await aperform_in_runs(runs, self._route(inputs, runs, kwargs)), return_exceptions)

    def _route(self, values: Sequence[Any], runs: Runs, kwargs: dict[str, Any]) -> Steps[list[Any]]:
        """Return the outputs of all inputs, errors among them."""
        routed = yield from self._decide(values, runs, kwargs)
        local, deferred = routed.plan.answered_locally, routed.plan.deferred
        small_outputs = yield from self._answer_locally(routed, local)
        large_outputs = yield from self._ask_large(routed, deferred)
        outputs: dict[int, Any] = dict(routed.plan.refused)
        outputs.update(zip([*local, *deferred], [*small_outputs, *large_outputs], strict=True))
        return [outputs[i] for i in range(len(values))]

    def _decide(self, values: Sequence[Any], runs: Runs, kwargs: dict[str, Any]) -> Steps[RoutedInputs]:
        """Call each small model about the inputs that are still deferred, and return the routed inputs."""
        started = time.perf_counter()
        if kwargs:
            self._check_call(kwargs)
        thresholds = self._thresholds_of_calls(runs)
        plan = Plan.undecided(len(values), self._policy_name)
        plan.refused.update(self._refusals(values))
        for stage, model in enumerate(self._stages):
            if not (rows := plan.deferred):
                break
            undecided = values if len(rows) == len(values) else [values[i] for i in rows]
            if self._unwrapped[stage]:
                undecided = [self._content(value) for value in undecided]
            outcome = yield from ask_small(
                model, undecided, rows, f"shunt:{STAGES[stage]}", runs, self.task_labels, strict=self.labels is not None
            )
            plan.add_stage(outcome, self._policy, rows, thresholds)
            if stage == 0 and self.monitor is not None and (batch := plan.batches[0]) is not None:
                self.monitor.saw(batch.confidence)
        if plan.errors or self._small_errors.in_a_row:
            plan.refused.update(self._small_errors.note(plan.failures(), answered=plan.count_answered()))
        # A budget adjusts its threshold to the deferral rate. Shadow mode and an alarm defer everything, so count by
        # the scores then.
        held_back = self.shadow or self.fail_safe == "large"
        deferred = plan.count_unconfident() if held_back else len(plan.deferred)
        self._policy.observe(deferred, plan.n - len(plan.refused))
        return RoutedInputs(values, runs, kwargs, time.perf_counter() - started, plan)

    def _content(self, value: Any) -> Any:
        """Return the input without its mapping, for a small model that would look for it under another key."""
        return value[self.input_key] if isinstance(value, Mapping) and self.input_key in value else value

    def _refusals(self, values: Sequence[Any]) -> dict[int, InputError]:
        """Return the errors of values that no model is to answer: blank, missing, of the wrong form, or too long."""
        limit, found = self.max_input_characters, dict[int, InputError]()
        for i, value in enumerate(values):
            if type(value) is str and value[:1].isalnum() and (limit is None or len(value) <= limit):
                continue  # the usual case
            if self._reads_anything and type(value) is not str:  # the small model may read values of any form
                refusal = refusal_of_missing(value, self.input_key)
            else:
                refusal = self._reader.refusal(value, limit)
            if refusal is not None:
                found[i] = refusal
        return found

    def _thresholds_of_calls(self, runs: Runs) -> FloatArray | None:
        """Return the thresholds that the configs set, shape `[n]`, NaN for none, or None if no config sets one."""
        if runs.shared is not None and self.threshold_id not in runs.shared.get("configurable", {}):
            return None
        thresholds = [runs.config(i).get("configurable", {}).get(self.threshold_id) for i in range(runs.n)]
        if all(value is None for value in thresholds):
            return None
        for value in thresholds:
            number = isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)
            if value is not None and not number:
                raise ConfigurationError(
                    f"Expected a number for configurable[{self.threshold_id!r}], got {value!r}. Pass one such as 0.9."
                )
        return np.array([np.nan if value is None else float(value) for value in thresholds])

    # Answer locally

    def _answer_locally(self, routed: RoutedInputs, rows: list[int]) -> Steps[list[Any]]:
        """Return the outputs of confident `rows`, audit a sample of them, and log a sample of them."""
        if not rows:
            return []
        plan, runs, latency = routed.plan, routed.runs, Latency(routed.small_seconds)
        yield from runs.attach_decisions(rows, plan.decision)
        outputs = yield from self._small_outputs(routed, rows)
        if self._auditor is not None:
            yield from self._reading_inputs(partial(self._audit, self._auditor, routed, rows))
        if not self._observed:
            return outputs
        ids = {i: runs.record_id(i) for i in rows}
        if self.recorder is not None:
            sampled = [i for i in rows if self.recorder.wants("small")]  # `wants` draws at random, for each input
            log = [self._finished(routed, i, plan.decision(i), ids[i], latency) for i in sampled]
            weight = self.recorder.weight("small")  # 1 / sampling rate
            yield from self._record([finished._replace(weight=weight) for finished in log])
        if not self.return_decision:
            return outputs
        return [
            _result(plan.decision(i), output, ids[i], latency, None) for i, output in zip(rows, outputs, strict=True)
        ]

    def _small_outputs(self, routed: RoutedInputs, rows: list[int]) -> Steps[list[Any]]:
        """Return the small models' outputs for `rows`, errors of `small_output` among them."""
        if self.small_output is None:
            return routed.plan.local_answers(rows)
        predictions, config = routed.plan.predictions(rows), routed.runs.children(rows, _SMALL_OUTPUT_TAG)
        outputs: list[Any] = yield from perform(
            partial(self.small_output.batch, predictions, config, return_exceptions=True),
            partial(self.small_output.abatch, predictions, config, return_exceptions=True),
        )
        return outputs

    def _audit(self, auditor: Auditor, routed: RoutedInputs, rows: list[int]) -> None:
        """Audit a random sample of `rows` in the background, without the predictions in the prompt.

        An audit gets a record of its own, in addition to that of the local answer.
        """
        for i in auditor.chosen(rows):
            prediction = routed.plan.prediction(i)
            if prediction is None or self._local_only(prediction) is not None:
                continue
            large_input = routed.values[i]
            if self.pruning is not None:
                blank = self.pruning.without_prediction(self.task_labels or prediction.labels, self.label_descriptions)
                try:
                    large_input = {**self._laid_out(large_input), **blank}
                except InputError as error:
                    large_input = error
            finished = None
            if self.recorder is not None:
                latency = Latency(routed.small_seconds)
                finished = self._finished(routed, i, routed.plan.decision(i), str(uuid7()), latency)
                finished = finished._replace(value=self._reader.snapshot(routed.values[i]))
            label = prediction.label if prediction.answer is None else answer_text(prediction.answer)
            auditor.submit(large_input, finished, label, routed.runs.config(i).get("configurable"))

    # Ask the large model

    def _ask_large(self, routed: RoutedInputs, rows: list[int]) -> Steps[list[Any]]:
        """Return the outputs of deferred `rows`, errors among them, and log them. A batch is one grouped call."""
        if not rows:
            return []
        calls = yield from self._prepare_large(routed, rows)
        started = time.perf_counter()
        if routed.runs.single:
            answers = [(yield from self._ask_one(calls[0]))]
        else:
            groups = self._equal_calls(calls)
            asked = [group[0] for group in groups]
            large_inputs = [call.large_input for call in asked]
            one_config = all(call.config is asked[0].config for call in asked)
            config: Any = asked[0].config if one_config else [call.config for call in asked]
            answers = yield from perform(
                partial(self._caller.batch, large_inputs, config, routed.kwargs),
                partial(self._caller.abatch, large_inputs, config, routed.kwargs),
            )
            calls, answers = _shared(groups, answers)
        outputs = yield from self._conclude(calls, answers, _latency_since(started, routed))
        by_row = {call.row: output for call, output in zip(calls, outputs, strict=True)}
        return [by_row[i] for i in rows]

    def _ask_alone(self, routed: RoutedInputs, rows: list[int]) -> Steps[dict[int, Any]]:
        """Return the outputs of equal deferred rows of a batch, from one large call of their own."""
        calls = yield from self._prepare_large(routed, rows)
        started = time.perf_counter()
        answer = yield from self._ask_one(calls[0])
        calls, answers = _shared([calls], [answer])
        outputs = yield from self._conclude(calls, answers, _latency_since(started, routed))
        return dict(zip(rows, outputs, strict=True))

    def _equal_rows(self, routed: RoutedInputs, rows: Sequence[int]) -> list[list[int]]:
        """Return `rows` in groups of equal inputs, each of which takes one large call.

        Texts and mappings of texts are compared. Calls with a config of their own are never grouped.
        """
        if not self.deduplicate or not routed.runs.one_config:
            return [[i] for i in rows]
        groups: dict[Any, list[int]] = {}
        for i in rows:
            value = routed.values[i]
            key: Any = i
            if isinstance(value, str):
                key = value
            elif isinstance(value, Mapping) and all(isinstance(one, str) for one in value.values()):
                key = tuple(sorted(value.items(), key=str))
            groups.setdefault(key, []).append(i)
        return list(groups.values())

    def _equal_calls(self, calls: Sequence[DeferredCall]) -> list[list[DeferredCall]]:
        by_row = {call.row: call for call in calls}
        return [[by_row[i] for i in rows] for rows in self._equal_rows(calls[0].routed, list(by_row))]

    def _ask_one(self, call: DeferredCall) -> Steps[Any]:
        """Return the large model's answer, or its error. An error as `large_input` is returned without a call."""
        given = (call.large_input, call.config, call.routed.kwargs)
        return perform(partial(self._caller.invoke, *given), partial(self._caller.ainvoke, *given))

    def _prepare_large(self, routed: RoutedInputs, rows: list[int]) -> Steps[list[DeferredCall]]:
        """Attach the decisions about `rows` to their runs, and prepare the large model's input and config for each."""
        plan, runs = routed.plan, routed.runs
        yield from runs.attach_decisions(rows, plan.decision)
        large_inputs = yield from self._reading_inputs(partial(self._large_inputs, routed, rows))
        limit = self._caller.limiter.bound(runs.max_concurrency()) if len(rows) > 1 else None
        watched = self._observed or self.task_labels is not None  # for `_whole`
        if not watched and not runs.traced and runs.shared is not None:
            # the configs would all be equal, and one config for all is cheaper in large batches
            config = runs.child(0, _LARGE_TAG, max_concurrency=limit)
            return [DeferredCall(routed, i, value, config, None) for i, value in zip(rows, large_inputs, strict=True)]
        calls = []
        for i, value in zip(rows, large_inputs, strict=True):
            watcher = LargeCallWatcher() if watched else None
            decision = plan.decision(i) if runs.traced else None
            config = runs.child(i, _LARGE_TAG, decision=decision, handler=watcher, max_concurrency=limit)
            calls.append(DeferredCall(routed, i, value, config, watcher))
        return calls

    def _large_inputs(self, routed: RoutedInputs, rows: list[int]) -> list[Any]:
        """Return the large model's input for each of `rows`, or an error if it is unreadable or must stay local."""
        values = [routed.values[i] for i in rows]
        errors: list[LocalOnlyError | None] = [None] * len(rows)
        if self.guard is not None and self.guard.local_labels:
            errors = [self._local_only(routed.plan.prediction(i)) for i in rows]
        if self.pruning is None:
            return [error or value for value, error in zip(values, errors, strict=True)]
        prompts = routed.plan.prompt_variables(self.pruning, rows, self.task_labels, self.label_descriptions)
        large_inputs: list[Any] = []
        for value, variables, error in zip(values, prompts, errors, strict=True):
            try:
                large_inputs.append(error or {**self._laid_out(value), **variables})
            except InputError as unreadable:
                large_inputs.append(unreadable)
        return large_inputs

    def _laid_out(self, value: Any) -> dict[str, Any]:
        """Return the prompt variables of an input, unless the prompt would leave out a part of its message."""
        laid_out = self._reader.lay_out(value)
        if not self._keeps_messages and isinstance(self._reader, TextReader) and other_parts(value, self.input_key):
            raise InputError(
                "The message has parts other than text, such as an image, which the prompt of `large` would leave out. "
                "Use MessagesPlaceholder('messages') in the prompt, or ConfidenceRouterChain.from_models."
            )
        return laid_out

    def _local_only(self, prediction: Prediction | None) -> LocalOnlyError | None:
        """Return the error for an input whose predicted label must stay local, or None if it may be sent."""
        return None if self.guard is None else self.guard.check_prediction(prediction)

    def _reading_inputs(self, work: Callable[[], T]) -> Steps[T]:
        """Do work that reads inputs. Text is read at once, and other inputs, such as images, in a thread if async."""
        if isinstance(self._reader, TextReader):
            return work()
        return (yield from perform(work, partial(run_in_executor, None, work)))

    # Conclude

    @property
    def _observed(self) -> bool:
        """Whether ids, usage and latencies of calls are needed, for results or records."""
        return self.return_decision or self.recorder is not None

    def _conclude(
        self, calls: list[DeferredCall], answers: Sequence[Any], latency: Latency, *, shown: bool = False
    ) -> Steps[list[Any]]:
        """Return the outputs of deferred calls, errors among them, and log the calls.

        Args:
            calls: The calls.
            answers: Answer of the large model to each, or its error.
            latency: Wall time of both models, in seconds.
            shown: Whether the caller has seen a part of the answer, so that nothing may replace it.
        """
        outputs, log = [], []
        for call, answer in zip(calls, answers, strict=True):
            output, finished = yield from self._conclude_one(call, self._whole(call, answer), latency, shown)
            outputs.append(output)
            log += finished
        yield from self._record(log)
        return outputs

    def _conclude_one(
        self, call: DeferredCall, large_answer: Any, latency: Latency, shown: bool
    ) -> Steps[tuple[Any, list[FinishedCall]]]:
        """Return the output of a deferred call, and its records for the log."""
        answer = self._fused(call, large_answer)
        if isinstance(answer, Exception):
            answer, decision = yield from self._replaced(call, answer, shown)
        elif not self._observed:
            return answer, []
        else:
            decision = call.routed.plan.decision(call.row)
        record_id = call.routed.runs.record_id(call.row)
        watcher = call.watcher
        if decision.reason == "local_only" and watcher is not None and not watcher.usage_metadata:
            watcher = None  # nothing was sent, so the cost is 0 and not unknown
        log = []
        if self.recorder is not None:
            finished = self._finished(call.routed, call.row, decision, record_id, latency)
            finished = finished._replace(answer=large_answer, watcher=watcher)
            if self.pruning is not None and watcher is not None and isinstance(call.large_input, dict):
                disclosed = partial(self.pruning.disclosed, call.large_input, self.task_labels)
                finished = finished._replace(disclosed=disclosed)
            log.append(finished)
        if not self.return_decision or isinstance(answer, Exception):
            return answer, log
        inner = large_answer if isinstance(large_answer, ShuntResult) else None
        result = _result(decision, answer, record_id, latency, watcher, inner)
        if self.fusion is not None and decision.reason not in ("large_error", "local_only"):
            unparsed = large_answer.raw if isinstance(large_answer, UnparsableAnswerError) else large_answer
            result = replace(result, large_output=unparsed)
        return result, log

    def _whole(self, call: DeferredCall, answer: Any) -> Any:
        """Return the large model's answer, or an error if labels are expected and its message was cut or filtered."""
        reason = None if call.watcher is None else call.watcher.incomplete
        label = answer.output if isinstance(answer, ShuntResult) else answer
        if reason is None or not isinstance(label, str) or self.task_labels in (None, ANSWER_LABELS):
            return answer
        assert self.task_labels is not None
        return IncompleteAnswerError(label, self.task_labels, reason=reason)

    def _replaced(self, call: DeferredCall, error: Exception, shown: bool) -> Steps[tuple[Any, ShuntDecision]]:
        """Return the output that replaces the large model's, or the error if nothing does, and the decision.

        The small model's answer replaces it if the settings allow that and there is one. A privacy guard may abstain
        from answering an input that must stay local.
        """
        plan, i = call.routed.plan, call.row
        # without a guard here, a LocalOnlyError comes from a shunt inside `large`, and `on_large_error` applies
        local_guard = self.guard if isinstance(error, LocalOnlyError) else None
        allowed = self.on_large_error == "small" if local_guard is None else local_guard.on_local == "small"
        if shown or isinstance(error, ConfigurationError):  # parts that do not fit together would be hidden forever
            allowed = False
        output: Any = error
        if allowed and call.prediction is not None:
            (output,) = yield from self._small_outputs(call.routed, [i])
            if isinstance(output, Exception):  # `small_output` failed too: report the error of the large model
                error.__context__, output = output, error
        decision = plan.decision(i, error, fell_back=output is not error)
        yield from call.routed.runs.attach_decisions([i], lambda _: decision)  # replaces "deferred"
        if output is error and not shown and local_guard is not None and local_guard.on_local != "raise":
            output = local_guard.abstained(error, decision.prediction)  # also "small" without a small answer
        return output, decision

    def _fused(self, call: DeferredCall, answer: Any) -> Any:
        """Return the fusion of both answers, or the large model's own answer if one of them is missing."""
        unparsable = isinstance(answer, UnparsableAnswerError)
        if self.fusion is None or call.prediction is None or (isinstance(answer, Exception) and not unparsable):
            return answer
        answer = answer.output if isinstance(answer, ShuntResult) else answer
        if not unparsable and not isinstance(answer, str):
            return ConfigurationError(
                f"Expected a label from `large`, because `fusion` is set, got {type(answer).__name__}. End "
                f"`large` with a parser that returns a label, as ConfidenceRouterChain.from_models does."
            )
        return self.fusion.fuse(call.prediction, None if unparsable else answer)

    def _finished(
        self, routed: RoutedInputs, i: int, decision: ShuntDecision, record_id: str, latency: Latency
    ) -> FinishedCall:
        """Return the record of a call, without the large model's part."""
        return FinishedCall(
            task=self.recorder.task,
            record_id=record_id,
            value=routed.values[i],
            decision=decision,
            answer=None,
            watcher=None,
            latency=latency,
            labels=self.task_labels,
            subject=subject_of(routed.runs.config(i)),
            reader=self._reader,
            ended=now(),
        )

    def _record(self, log: list[FinishedCall]) -> Steps[None]:
        """Pass finished calls to the recorder, whose failures never affect the call."""
        if not log:
            return
        log = yield from self._reading_inputs(partial(snapped, log))  # the caller may change an input after the call
        yield from perform(partial(self.recorder.record, log), partial(self.recorder.arecord, log))

    # As completed

    @override
    def batch_as_completed(
        self,
        inputs: Sequence[Any],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> Iterator[tuple[int, Any]]:
        """Yield (position, output) pairs: local answers first, then the large model's as they arrive."""
        if not (inputs := list(inputs)):
            return
        runs = Runs(self, inputs, config)
        run(runs.start())
        try:
            routed = run(self._decide(inputs, runs, kwargs))
            local, deferred = routed.plan.answered_locally, routed.plan.deferred
            limit = self._caller.limiter.bound(runs.max_concurrency())
            with get_executor_for_config(RunnableConfig(max_concurrency=limit)) as executor:
                waiting: set[Future[dict[int, Any]]] = {
                    executor.submit(lambda rows=rows: run(self._ask_alone(routed, rows)))  # type: ignore[misc]
                    for rows in self._equal_rows(routed, deferred)
                }
                try:
                    local_outputs = zip(local, run(self._answer_locally(routed, local)), strict=True)
                    for i, output in (*routed.plan.refused.items(), *local_outputs):
                        run(runs.end({i: output}))
                        yield i, _raise_or_return(output, return_exceptions)
                    while waiting:
                        for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                            waiting.discard(future)
                            for i, output in future.result().items():
                                run(runs.end({i: output}))
                                yield i, _raise_or_return(output, return_exceptions)
                finally:
                    for future in waiting:
                        future.cancel()
        except BaseException as error:
            run(runs.fail_rest(error))
            raise

    @override
    async def abatch_as_completed(
        self,
        inputs: Sequence[Any],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> AsyncIterator[tuple[int, Any]]:
        """Async version of `batch_as_completed`."""
        if not (inputs := list(inputs)):
            return
        runs = Runs(self, inputs, config, asynchronous=True)
        waiting: set[asyncio.Task[dict[int, Any]]] = set()
        await arun(runs.start())
        try:
            routed = await arun(self._decide(inputs, runs, kwargs))
            local, deferred = routed.plan.answered_locally, routed.plan.deferred
            places = asyncio.Semaphore(self._caller.limiter.bound(runs.max_concurrency()) or max(1, len(deferred)))

            async def ask(rows: list[int]) -> dict[int, Any]:
                async with places:
                    return await arun(self._ask_alone(routed, rows))

            waiting.update(asyncio.ensure_future(ask(rows)) for rows in self._equal_rows(routed, deferred))
            local_outputs = zip(local, await arun(self._answer_locally(routed, local)), strict=True)
            for i, output in (*routed.plan.refused.items(), *local_outputs):
                await arun(runs.end({i: output}))
                yield i, _raise_or_return(output, return_exceptions)
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=FIRST_COMPLETED)
                for task in done:
                    waiting.discard(task)
                    for i, output in task.result().items():
                        await arun(runs.end({i: output}))
                        yield i, _raise_or_return(output, return_exceptions)
        except BaseException as error:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            await arun(runs.fail_rest(error))
            raise

    # Streams

    @override
    def stream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[Any]:
        """Decide first, then yield the small model's answer, or the large model's chunks as they arrive.

        With `fusion`, the fused answer is one chunk.
        """
        runs, total = Runs(self, [input], config, single=True), _Total()
        run(runs.start())
        try:
            routed = run(self._decide([input], runs, kwargs))
            if routed.plan.refused:
                raise routed.plan.refused[0]
            if routed.plan.local[0]:
                yield total.add(_raise_or_return(run(self._answer_locally(routed, [0]))[0]))
            elif self.fusion is not None:
                yield total.add(_raise_or_return(run(self._ask_large(routed, [0]))[0]))
            else:
                (call,) = run(self._prepare_large(routed, [0]))
                with closing(self._stream_large(call)) as chunks:
                    for chunk in chunks:
                        yield total.add(chunk)
        except GeneratorExit:  # the caller has read enough
            run(runs.end({0: total.value}))
            raise
        except BaseException as error:
            run(runs.fail_rest(error))
            raise
        run(runs.end({0: total.value}))

    def _stream_large(self, call: DeferredCall) -> Generator[Any]:
        """Yield the large model's chunks. Retries and fallbacks are possible only before the first chunk."""
        started, answer, shown = time.perf_counter(), _Total(), False
        failure: Exception | None = None
        with ExitStack() as held:
            try:
                held.enter_context(self._caller.place())  # held for the whole stream, as one concurrent call
                first, chunks = self._caller.open(call.large_input, call.config, call.routed.kwargs)
            except Exception as error:
                raise_if_control_flow(error)
                failure = error
            else:
                with closing(chunks):
                    try:
                        if first is not END:
                            shown = True
                            yield self._chunk(answer.add(first), call)
                        for chunk in chunks:
                            yield self._chunk(answer.add(chunk), call)
                    except Exception as error:
                        raise_if_control_flow(error)
                        failure = error
                    except GeneratorExit:
                        closed, latency = StreamClosedError(), _latency_since(started, call.routed)
                        run(self._conclude([call], [closed], latency, shown=True))
                        raise
        latency = _latency_since(started, call.routed)
        (last,) = run(self._conclude([call], [failure or answer.value], latency, shown=shown))
        if failure is not None or isinstance(last, Exception):
            yield _raise_or_return(last)
        elif isinstance(last, ShuntResult):  # the chunks had the output, and this one adds the id, usage and cost
            yield replace(last, output=None, inner=None)

    @override
    async def astream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> AsyncIterator[Any]:
        """Async version of `stream`."""
        runs, total = Runs(self, [input], config, single=True, asynchronous=True), _Total()
        await arun(runs.start())
        try:
            routed = await arun(self._decide([input], runs, kwargs))
            if routed.plan.refused:
                raise routed.plan.refused[0]
            if routed.plan.local[0]:
                yield total.add(_raise_or_return((await arun(self._answer_locally(routed, [0])))[0]))
            elif self.fusion is not None:
                yield total.add(_raise_or_return((await arun(self._ask_large(routed, [0])))[0]))
            else:
                (call,) = await arun(self._prepare_large(routed, [0]))
                async with aclosing(self._astream_large(call)) as chunks:
                    async for chunk in chunks:
                        yield total.add(chunk)
        except GeneratorExit:  # the caller has read enough
            await arun(runs.end({0: total.value}))
            raise
        except BaseException as error:
            await arun(runs.fail_rest(error))
            raise
        await arun(runs.end({0: total.value}))

    async def _astream_large(self, call: DeferredCall) -> AsyncGenerator[Any]:
        """Async version of `_stream_large`."""
        started, answer, shown = time.perf_counter(), _Total(), False
        failure: Exception | None = None
        async with AsyncExitStack() as held:
            try:
                await held.enter_async_context(self._caller.aplace())
                first, chunks = await self._caller.aopen(call.large_input, call.config, call.routed.kwargs)
            except Exception as error:
                raise_if_control_flow(error)
                failure = error
            else:
                async with aclosing(chunks):
                    try:
                        if first is not END:
                            shown = True
                            yield self._chunk(answer.add(first), call)
                        async for chunk in chunks:
                            yield self._chunk(answer.add(chunk), call)
                    except Exception as error:
                        raise_if_control_flow(error)
                        failure = error
                    except GeneratorExit:
                        closed, latency = StreamClosedError(), _latency_since(started, call.routed)
                        await arun(self._conclude([call], [closed], latency, shown=True))
                        raise
        latency = _latency_since(started, call.routed)
        (last,) = await arun(self._conclude([call], [failure or answer.value], latency, shown=shown))
        if failure is not None or isinstance(last, Exception):
            yield _raise_or_return(last)
        elif isinstance(last, ShuntResult):
            yield replace(last, output=None, inner=None)

    def _chunk(self, chunk: Any, call: DeferredCall) -> Any:
        """Return a chunk of the large model as the shunt yields it."""
        if not self.return_decision:
            return chunk
        inner = chunk if isinstance(chunk, ShuntResult) else None
        output = chunk if inner is None else inner.output
        # the cost is known only at the end, and the sum of all chunks has it
        return ShuntResult(output, call.routed.plan.decision(call.row), cost_usd=None, inner=inner)


class _Total:
    """The sum of a stream's chunks, as the output of its run, or the last chunk if they cannot be added."""

    def __init__(self) -> None:
        self.value: Any = None
        self._addable = True

    def add(self, chunk: Any) -> Any:
        """Add a chunk, and return it."""
        if self.value is None or not self._addable:
            self.value = chunk
        else:
            try:
                self.value = self.value + chunk
            except TypeError:
                self.value, self._addable = chunk, False
        return chunk


def _shared(groups: Sequence[list[DeferredCall]], answers: Sequence[Any]) -> tuple[list[DeferredCall], list[Any]]:
    """Return the calls of all groups with the answer of their group, whose cost belongs to the first call."""
    calls: list[DeferredCall] = []
    given: list[Any] = []
    for (first, *others), answer in zip(groups, answers, strict=True):
        calls.append(first)
        given.append(answer)
        for call in others:
            watcher = None if first.watcher is None else first.watcher.repeated()
            calls.append(replace(call, watcher=watcher))
            given.append(_copied(answer))
    return calls, given


def _copied(answer: Any) -> Any:
    try:
        return answer if isinstance(answer, (str, Exception)) else copy.deepcopy(answer)
    except Exception:  # an answer that holds a lock, for example
        return answer


def _latency_since(started: float, routed: RoutedInputs) -> Latency:
    return Latency(routed.small_seconds, time.perf_counter() - started)


def _raise_or_return(output: Any, return_exceptions: bool = False) -> Any:
    if isinstance(output, Exception) and not return_exceptions:
        raise output
    return output


def _result(
    decision: ShuntDecision,
    output: Any,
    record_id: str,
    latency: Latency,
    watcher: LargeCallWatcher | None,
    inner: ShuntResult | None = None,
) -> Any:
    """Return the `ShuntResult` of one input, or its error unchanged.

    Args:
        decision: Routing decision.
        output: Output, or an error.
        record_id: Id of the call.
        latency: Wall time of the models.
        watcher: Observed usage of the large model, or None if it was not called.
        inner: Result of the large model if it is a shunt itself.
    """
    if isinstance(output, Exception):
        return output
    usage = {} if watcher is None else dict(watcher.usage_metadata)
    cost: float | None = 0.0
    if watcher is not None:
        cost = watcher.cost_usd if usage or inner is None else inner.cost_usd
    return ShuntResult(
        output.output if isinstance(output, ShuntResult) else output, decision, usage, cost, latency, record_id, inner
    )
