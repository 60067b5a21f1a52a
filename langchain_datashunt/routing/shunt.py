"""ShuntRunnable: answer locally if the small model is confident, and defer to the large model otherwise."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AsyncExitStack, ExitStack, aclosing, closing
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import get_executor_for_config, run_in_executor
from langchain_core.utils.uuid import uuid7
from typing_extensions import override

from langchain_datashunt._utils.control_flow import raise_control_flow, raise_first_error
from langchain_datashunt._utils.pricing import cost_usd
from langchain_datashunt.call_log.finished_call import FinishedCall, now, snapped
from langchain_datashunt.decision import Latency, ShuntDecision, ShuntResult
from langchain_datashunt.exceptions import ConfigurationError, InputError, LocalOnlyError, UnparsableAnswerError
from langchain_datashunt.inputs import TextReader
from langchain_datashunt.large_models.caller import END
from langchain_datashunt.large_models.watcher import LargeCallWatcher
from langchain_datashunt.prediction import FloatArray, Prediction, answer_text
from langchain_datashunt.privacy.guard import SUBJECT_KEY
from langchain_datashunt.routing.ask_small import ask_small
from langchain_datashunt.routing.audit import Auditor
from langchain_datashunt.routing.deferred_call import DeferredCall, RoutedInputs
from langchain_datashunt.routing.plan import Plan
from langchain_datashunt.routing.runs import Runs, atrace, trace
from langchain_datashunt.routing.settings import ShuntSettings
from langchain_datashunt.routing.sync_async import Steps, arun, perform, run
from langchain_datashunt.telemetry import instrument_if_asked

instrument_if_asked()

T = TypeVar("T")

_SMALL_TAGS = ("shunt:small", "shunt:student")
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

    An input is deferred (reason "small_error") if the small model fails. If the large model fails, `retry` decides
    whether its call is repeated. After the last attempt the shunt raises the error. With `on_large_error="small"` it
    returns the small model's answer instead (reason "large_error").

    To change the threshold for one call, pass `config={"configurable": {"shunt_threshold": 0.8}}`.
    """

    # Every call takes the same steps: `_route` decides, answers locally or calls the large model, and concludes. It is
    # written once for sync and async, as a generator of effects that `trace` and `atrace` perform.

    @override
    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        runs = Runs(self, [input], config, single=True)
        return _raised(trace(runs, self._route([input], runs, kwargs))[0])

    @override
    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        runs = Runs(self, [input], config, single=True, asynchronous=True)
        return _raised((await atrace(runs, self._route([input], runs, kwargs)))[0])

    @override
    def batch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """Route `n` inputs with one small-model call, and one grouped large call for all deferred inputs."""
        if not inputs:
            return []
        runs = Runs(self, inputs, config)
        return raise_first_error(trace(runs, self._route(inputs, runs, kwargs)), return_exceptions)

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
        if not inputs:
            return []
        runs = Runs(self, inputs, config, asynchronous=True)
        return raise_first_error(await atrace(runs, self._route(inputs, runs, kwargs)), return_exceptions)

    # Steps of a call

    def _route(self, values: Sequence[Any], runs: Runs, kwargs: dict[str, Any]) -> Steps[list[Any]]:
        """Return the outputs of all inputs, errors among them."""
        inputs = yield from self._decide(values, runs, kwargs)
        local, deferred = inputs.plan.answered_locally, inputs.plan.deferred
        outputs = dict(zip(local, (yield from self._answer_locally(inputs, local)), strict=True))
        outputs.update(zip(deferred, (yield from self._ask_large(inputs, deferred)), strict=True))
        return [outputs[i] for i in range(len(values))]

    def _decide(self, values: Sequence[Any], runs: Runs, kwargs: dict[str, Any]) -> Steps[RoutedInputs]:
        """Call each small model about the inputs that are still deferred, and return the routed inputs."""
        started = time.perf_counter()
        thresholds = self._thresholds_of_calls(runs)
        plan = Plan.undecided(len(values), self._policy_name)
        for stage, model in enumerate(self._stages):
            rows = plan.deferred
            given = values if len(rows) == len(values) else [values[i] for i in rows]
            outcome = yield from ask_small(
                model, given, rows, _SMALL_TAGS[stage], runs, self.task_labels, strict=self.labels is not None
            )
            plan.add_stage(outcome, self._policy, rows, thresholds)
            if stage == 0 and self.monitor is not None and (batch := plan.batches[0]) is not None:
                self.monitor.saw(batch.confidence)
            if plan.local.all():
                break
        self._policy.observe(plan.count_unconfident() if self.shadow else len(plan.deferred), plan.n)
        return RoutedInputs(values, runs, kwargs, plan, time.perf_counter() - started)

    def _thresholds_of_calls(self, runs: Runs) -> FloatArray | None:
        """Return the thresholds that the configs set, shape `[n]`, NaN for none, or None if no config sets one."""
        if runs.shared is not None and self.threshold_id not in runs.shared.get("configurable", {}):
            return None
        given = [runs.config(i).get("configurable", {}).get(self.threshold_id) for i in range(runs.n)]
        if all(value is None for value in given):
            return None
        for value in given:
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
            if value is not None and not number:
                raise ConfigurationError(
                    f"Expected a number for configurable[{self.threshold_id!r}], got {value!r}. Pass one such as 0.9."
                )
        return np.array([np.nan if value is None else float(value) for value in given])

    # Answer locally

    def _answer_locally(self, inputs: RoutedInputs, rows: list[int]) -> Steps[list[Any]]:
        """Return the small models' outputs for `rows`."""
        if not rows:
            return []
        plan, runs, latency = inputs.plan, inputs.runs, Latency(inputs.small_seconds)
        yield from runs.note(rows, plan.decision)
        outputs = yield from self._small_outputs(inputs, rows)
        if self._auditor is not None:
            yield from self._off_the_loop(partial(self._audit, self._auditor, inputs, rows))
        if not self.return_decision and self.recorder is None:
            return outputs
        ids = {i: runs.record_id(i) for i in rows}
        if self.recorder is not None:
            logged = [i for i in rows if self.recorder.wants("small")]
            yield from self._record(
                [self._finished(inputs, i, plan.decision(i), inputs.values[i], None, ids[i], latency) for i in logged]
            )
        if not self.return_decision:
            return outputs
        return [
            _result(plan.decision(i), output, ids[i], latency, None) for i, output in zip(rows, outputs, strict=True)
        ]

    def _small_outputs(self, inputs: RoutedInputs, rows: list[int]) -> Steps[list[Any]]:
        if self.small_output is None:
            return inputs.plan.local_answers(rows)
        predictions, config = inputs.plan.predictions(rows), inputs.runs.children(rows, _SMALL_OUTPUT_TAG)
        outputs: list[Any] = yield from perform(
            partial(self.small_output.batch, predictions, config, return_exceptions=True),
            partial(self.small_output.abatch, predictions, config, return_exceptions=True),
        )
        return outputs

    def _audit(self, auditor: Auditor, inputs: RoutedInputs, rows: list[int]) -> None:
        """Audit a random sample of `rows` in the background, without the predictions in the prompt."""
        for i in auditor.chosen(rows):
            (prediction,) = inputs.plan.predictions([i])
            if self._must_stay(prediction) is not None:
                continue
            asked, finished = inputs.values[i], None
            if self.pruning is not None:
                blank = self.pruning.without_prediction(self.task_labels or prediction.labels, self.label_descriptions)
                try:
                    asked = {**self._reader.lay_out(asked), **blank}
                except InputError as error:
                    asked = error
            if self.recorder is not None:
                decision, snapshot = inputs.plan.decision(i), self._reader.snapshot(inputs.values[i])
                latency = Latency(inputs.small_seconds)
                finished = self._finished(inputs, i, decision, snapshot, None, str(uuid7()), latency)
            label = prediction.label if prediction.answer is None else answer_text(prediction.answer)
            auditor.submit(asked, finished, label, inputs.runs.config(i).get("configurable"))

    # Call the large model

    def _ask_large(self, inputs: RoutedInputs, rows: list[int]) -> Steps[list[Any]]:
        """Return the outputs of deferred `rows`, errors among them. A batch is one grouped call."""
        if not rows:
            return []
        calls = yield from self._defer(inputs, rows)
        started = time.perf_counter()
        if inputs.runs.single:
            answers = [(yield from self._ask_one(calls[0]))]
        else:
            asked = [call.asked for call in calls]
            shared = all(call.config is calls[0].config for call in calls)
            config: Any = calls[0].config if shared else [call.config for call in calls]
            answers = yield from perform(
                partial(self._caller.batch, asked, config, inputs.kwargs),
                partial(self._caller.abatch, asked, config, inputs.kwargs),
            )
        latency = Latency(inputs.small_seconds, time.perf_counter() - started)
        return (yield from self._conclude(calls, answers, latency))

    def _ask_singly(self, inputs: RoutedInputs, i: int) -> Steps[Any]:
        """Return the output of one deferred row of a batch, from a large call of its own."""
        (call,) = yield from self._defer(inputs, [i])
        started = time.perf_counter()
        answer = yield from self._ask_one(call)
        latency = Latency(inputs.small_seconds, time.perf_counter() - started)
        return (yield from self._conclude([call], [answer], latency))[0]

    def _ask_one(self, call: DeferredCall) -> Steps[Any]:
        given = (call.asked, call.config, call.inputs.kwargs)
        return perform(partial(self._caller.invoke, *given), partial(self._caller.ainvoke, *given))

    def _defer(self, inputs: RoutedInputs, rows: list[int]) -> Steps[list[DeferredCall]]:
        """Prepare the large model's input and config for each of `rows`."""
        plan, runs = inputs.plan, inputs.runs
        yield from runs.note(rows, plan.decision)
        asked = yield from self._off_the_loop(partial(self._large_inputs, inputs, rows))
        limit = self._caller.limiter.bound(runs.max_concurrency()) if len(rows) > 1 else None
        watched = self.return_decision or self.recorder is not None
        if not watched and not runs.traced and runs.shared is not None:
            config = runs.child(0, _LARGE_TAG, max_concurrency=limit)
            return [DeferredCall(inputs, i, value, config, None) for i, value in zip(rows, asked, strict=True)]
        calls = []
        for i, value in zip(rows, asked, strict=True):
            watcher = LargeCallWatcher() if watched else None
            decision = plan.decision(i) if runs.traced else None
            config = runs.child(i, _LARGE_TAG, decision=decision, handler=watcher, max_concurrency=limit)
            calls.append(DeferredCall(inputs, i, value, config, watcher))
        return calls

    def _large_inputs(self, inputs: RoutedInputs, rows: list[int]) -> list[Any]:
        """Return the large model's input for each of `rows`, or an error if it is unreadable or must stay local."""
        values = [inputs.values[i] for i in rows]
        if self.guard is not None and self.guard.local_labels:
            stays = [self._must_stay(inputs.plan.prediction(i)) for i in rows]
        else:
            stays = [None] * len(rows)
        if self.pruning is None:
            return [error or value for value, error in zip(values, stays, strict=True)]
        variables = inputs.plan.prompt_variables(self.pruning, rows, self.task_labels, self.label_descriptions)
        asked: list[Any] = []
        for value, more, error in zip(values, variables, stays, strict=True):
            try:
                asked.append(error or {**self._reader.lay_out(value), **more})
            except InputError as unreadable:
                asked.append(unreadable)
        return asked

    def _must_stay(self, prediction: Prediction | None) -> LocalOnlyError | None:
        """Return the error for an input that must stay local because of its prediction, or None if it may be sent."""
        if self.guard is None or not self.guard.local_labels:
            return None
        return self.guard.check_prediction(prediction)

    def _off_the_loop(self, work: Callable[[], T]) -> Steps[T]:
        """Do work that reads inputs. Inputs other than text, such as images, are read in a thread if async."""
        if isinstance(self._reader, TextReader):
            return work()
        return (yield from perform(work, partial(run_in_executor, None, work)))

    # Conclude

    def _conclude(self, calls: list[DeferredCall], answers: Sequence[Any], latency: Latency) -> Steps[list[Any]]:
        """Return the outputs of deferred calls, and log them.

        Args:
            calls: The calls.
            answers: Answer of the large model to each, or its error.
            latency: Wall time of both models, in seconds.
        """
        outputs, log = [], []
        for call, answer in zip(calls, answers, strict=True):
            output, finished = yield from self._conclude_one(call, answer, latency)
            outputs.append(output)
            log += finished
        yield from self._record(log)
        return outputs

    def _conclude_one(
        self, call: DeferredCall, raw_answer: Any, latency: Latency
    ) -> Steps[tuple[Any, list[FinishedCall]]]:
        """Return the output of a deferred call, and its records for the log.

        The output is an error if the large model failed and nothing replaces its answer.
        """
        inputs, i, plan, runs = call.inputs, call.row, call.inputs.plan, call.inputs.runs
        answer = self._fused(call, raw_answer)
        failed = answer if isinstance(answer, Exception) else None
        if failed is None and not self.return_decision and self.recorder is None:
            return answer, []
        stays = failed if isinstance(failed, LocalOnlyError) else None
        replaces = (
            self.on_large_error == "small" if stays is None or self.guard is None else self.guard.on_local == "small"
        )
        fell_back = failed is not None and replaces and call.prediction is not None
        decision, record_id = plan.decision(i, failed, fell_back=fell_back), runs.record_id(i)
        log = []
        if self.recorder is not None:
            watcher = call.watcher if stays is None else None
            value = inputs.values[i]
            finished = self._finished(inputs, i, decision, value, raw_answer, record_id, latency, watcher)
            if self.pruning is not None and watcher is not None and isinstance(call.asked, dict):
                finished = finished._replace(disclosed=partial(self.pruning.disclosed, call.asked, self.task_labels))
            log.append(finished)
        if failed is not None:
            yield from runs.note([i], lambda _: decision)
        if stays is not None and self.guard is not None and not fell_back and self.guard.on_local != "raise":
            answer = self.guard.abstained(stays, decision.prediction)
        elif failed is not None:
            if not fell_back:
                return failed, log
            (answer,) = yield from self._small_outputs(inputs, [i])
            if isinstance(answer, Exception):  # without a small answer, report the error of the large model
                failed.__context__ = answer
                return failed, log
        if not self.return_decision:
            return answer, log
        result = _result(decision, answer, record_id, latency, call.watcher)
        if self.fusion is not None and failed is None:
            unparsed = raw_answer.raw if isinstance(raw_answer, UnparsableAnswerError) else raw_answer
            result = replace(result, large_output=unparsed)
        return result, log

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
        self,
        inputs: RoutedInputs,
        i: int,
        decision: ShuntDecision,
        value: Any,
        answer: Any,
        record_id: str,
        latency: Latency,
        watcher: LargeCallWatcher | None = None,
    ) -> FinishedCall:
        subject = inputs.runs.config(i).get("configurable", {}).get(SUBJECT_KEY)
        return FinishedCall(
            self.recorder.task, record_id, value, decision, answer, watcher, latency, self.task_labels, subject,
            self._reader, now(),
        )  # fmt: skip

    def _record(self, log: list[FinishedCall]) -> Steps[None]:
        """Pass finished calls to the recorder, whose failures never affect the call."""
        if not log:
            return
        if not isinstance(self._reader, TextReader):  # the caller may change a file or a buffer after the call
            log = yield from self._off_the_loop(partial(snapped, log))
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
        if not inputs:
            return
        runs = Runs(self, inputs, config)
        run(runs.start())
        try:
            routed = run(self._decide(list(inputs), runs, kwargs))
            local, deferred = routed.plan.answered_locally, routed.plan.deferred
            for i, output in zip(local, run(self._answer_locally(routed, local)), strict=True):
                run(runs.end({i: output}))
                yield i, _raised(output, return_exceptions)
            limit = self._caller.limiter.bound(runs.max_concurrency())
            with get_executor_for_config(RunnableConfig(max_concurrency=limit)) as executor:
                waiting: dict[Future[Any], int] = {
                    executor.submit(lambda i=i: run(self._ask_singly(routed, i))): i  # type: ignore[misc]
                    for i in deferred
                }
                try:
                    while waiting:
                        for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                            i, output = waiting.pop(future), future.result()
                            run(runs.end({i: output}))
                            yield i, _raised(output, return_exceptions)
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
        if not inputs:
            return
        runs = Runs(self, inputs, config, asynchronous=True)
        waiting: dict[asyncio.Task[Any], int] = {}
        await arun(runs.start())
        try:
            routed = await arun(self._decide(list(inputs), runs, kwargs))
            local, deferred = routed.plan.answered_locally, routed.plan.deferred
            for i, output in zip(local, await arun(self._answer_locally(routed, local)), strict=True):
                await arun(runs.end({i: output}))
                yield i, _raised(output, return_exceptions)
            places = asyncio.Semaphore(self._caller.limiter.bound(runs.max_concurrency()) or max(1, len(deferred)))

            async def ask(i: int) -> Any:
                async with places:
                    return await arun(self._ask_singly(routed, i))

            waiting.update({asyncio.ensure_future(ask(i)): i for i in deferred})
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=FIRST_COMPLETED)
                for task in done:
                    i, output = waiting.pop(task), task.result()
                    await arun(runs.end({i: output}))
                    yield i, _raised(output, return_exceptions)
        except BaseException as error:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            await arun(runs.fail_rest(error))
            raise

    # Streams

    @override
    def stream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[Any]:
        """Decide first, then yield the small model's answer, or the large model's chunks as they arrive."""
        runs, total = Runs(self, [input], config, single=True), _Total()
        run(runs.start())
        try:
            inputs = run(self._decide([input], runs, kwargs))
            if inputs.plan.local[0]:
                yield total.add(_raised(run(self._answer_locally(inputs, [0]))[0]))
            elif self.fusion is not None:
                yield total.add(_raised(run(self._ask_large(inputs, [0]))[0]))
            else:
                (call,) = run(self._defer(inputs, [0]))
                with closing(self._stream_large(call)) as chunks:
                    for chunk in chunks:
                        yield total.add(chunk)
        except BaseException as error:
            run(runs.fail_rest(error))
            raise
        run(runs.end({0: total.value}))

    def _stream_large(self, call: DeferredCall) -> Generator[Any]:
        """Yield the large model's chunks. Retries and fallbacks are possible only before the first chunk."""
        started, total = time.perf_counter(), _Total()
        with ExitStack() as held:
            try:
                held.enter_context(self._caller.place())
                first, chunks = self._caller.open(call.asked, call.config, call.inputs.kwargs)
            except Exception as error:
                raise_control_flow(error)
                yield _raised(run(self._conclude([call], [error], _latency_since(started, call)))[0])
                return
            with closing(chunks):
                if first is not END:
                    yield self._chunk(total.add(first), call)
                    for chunk in chunks:
                        yield self._chunk(total.add(chunk), call)
        (last,) = run(self._conclude([call], [total.value], _latency_since(started, call)))
        if isinstance(last, ShuntResult):
            yield replace(last, output=None, inner=None)

    @override
    async def astream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> AsyncIterator[Any]:
        """Async version of `stream`."""
        runs, total = Runs(self, [input], config, single=True, asynchronous=True), _Total()
        await arun(runs.start())
        try:
            inputs = await arun(self._decide([input], runs, kwargs))
            if inputs.plan.local[0]:
                yield total.add(_raised((await arun(self._answer_locally(inputs, [0])))[0]))
            elif self.fusion is not None:
                yield total.add(_raised((await arun(self._ask_large(inputs, [0])))[0]))
            else:
                (call,) = await arun(self._defer(inputs, [0]))
                async with aclosing(self._astream_large(call)) as chunks:
                    async for chunk in chunks:
                        yield total.add(chunk)
        except BaseException as error:
            await arun(runs.fail_rest(error))
            raise
        await arun(runs.end({0: total.value}))

    async def _astream_large(self, call: DeferredCall) -> AsyncGenerator[Any]:
        started, total = time.perf_counter(), _Total()
        async with AsyncExitStack() as held:
            try:
                await held.enter_async_context(self._caller.aplace())
                first, chunks = await self._caller.aopen(call.asked, call.config, call.inputs.kwargs)
            except Exception as error:
                raise_control_flow(error)
                yield _raised((await arun(self._conclude([call], [error], _latency_since(started, call))))[0])
                return
            async with aclosing(chunks):
                if first is not END:
                    yield self._chunk(total.add(first), call)
                    async for chunk in chunks:
                        yield self._chunk(total.add(chunk), call)
        (last,) = await arun(self._conclude([call], [total.value], _latency_since(started, call)))
        if isinstance(last, ShuntResult):
            yield replace(last, output=None, inner=None)

    def _chunk(self, chunk: Any, call: DeferredCall) -> Any:
        """Return a chunk of the large model as the shunt yields it."""
        if not self.return_decision:
            return chunk
        inner = chunk if isinstance(chunk, ShuntResult) else None
        output = chunk if inner is None else inner.output
        return ShuntResult(output, call.inputs.plan.decision(call.row), cost_usd=None, inner=inner)


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


def _latency_since(started: float, call: DeferredCall) -> Latency:
    return Latency(call.inputs.small_seconds, time.perf_counter() - started)


def _raised(output: Any, return_exceptions: bool = False) -> Any:
    if isinstance(output, Exception) and not return_exceptions:
        raise output
    return output


def _result(
    decision: ShuntDecision, output: Any, record_id: str, latency: Latency, watcher: LargeCallWatcher | None
) -> Any:
    """Return the `ShuntResult` of one input, or its error unchanged."""
    if isinstance(output, Exception):
        return output
    inner = output if isinstance(output, ShuntResult) else None
    usage = {} if watcher is None else dict(watcher.usage_metadata)
    cost: float | None = 0.0
    if watcher is not None:
        cost = cost_usd(usage) if usage else (None if inner is None else inner.cost_usd)
    return ShuntResult(output if inner is None else inner.output, decision, usage, cost, latency, record_id, inner)
