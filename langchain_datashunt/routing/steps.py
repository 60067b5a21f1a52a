"""The steps of a shunted call, written once for sync and async: predict, decide, ask, conclude."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import run_in_executor
from langchain_core.utils.uuid import uuid7

from langchain_datashunt._utils.control_flow import raise_control_flow
from langchain_datashunt._utils.sync_async import Effect, Steps
from langchain_datashunt.call_log.finished_call import FinishedCall, now, snapped
from langchain_datashunt.decision import Latency, ShuntDecision, ShuntResult
from langchain_datashunt.evaluation.monitor import Monitor
from langchain_datashunt.exceptions import (
    ConfigurationError,
    InputError,
    LocalOnlyError,
    PredictionError,
    UnparsableAnswerError,
)
from langchain_datashunt.inputs import InputReader, TextReader, text_reader
from langchain_datashunt.large_models.caller import LargeCaller
from langchain_datashunt.large_models.prompt_pruning import Pruning
from langchain_datashunt.large_models.watcher import LargeCallWatcher
from langchain_datashunt.policies.fusion import AnswerFusion
from langchain_datashunt.policies.thresholds import Policy
from langchain_datashunt.prediction import Prediction, answer_text
from langchain_datashunt.privacy.guard import SUBJECT_KEY, PrivacyGuard
from langchain_datashunt.routing.ask_small import predict_many, predict_one
from langchain_datashunt.routing.audit import Auditor
from langchain_datashunt.routing.call_results import result_of, thresholds_of_calls
from langchain_datashunt.routing.plan import (
    AnyPlan,
    Plan,
    PlanOfOne,
    absorbed,
    checked_prediction,
    failed_outcome,
    in_task_order,
)
from langchain_datashunt.routing.runs import Runs
from langchain_datashunt.small_models.base import SmallModel

_TAGS = ("shunt:small", "shunt:student")
_LARGE = "shunt:large"
_SMALL_OUTPUT = "shunt:small_output"


@dataclass(frozen=True)
class CallSteps:
    """What a shunt is made of, as far as a call needs it. See `ShuntRunnable` for what each part means."""

    stages: tuple[Runnable[Any, Any], ...]
    caller: LargeCaller
    policy: Policy
    policy_in_words: str
    pruning: Pruning | None
    labels: Sequence[str] | None
    allowed: frozenset[str] | None
    descriptions: Mapping[str, str]
    small_output: Runnable[Any, Any] | None
    falls_back: bool
    return_decision: bool
    input_key: str
    threshold_id: str
    recorder: Any = None
    fusion: AnswerFusion | None = None
    auditor: Auditor | None = None
    monitor: Monitor | None = None
    guard: PrivacyGuard | None = None
    in_shadow: bool = False

    @cached_property
    def reader(self) -> InputReader:
        """How inputs are laid out for the prompt, and written down: as the small model reads them."""
        try:
            own = getattr(self.stages[0], "reader", None)
        except Exception:  # a bundle that cannot be read: that is told by the small model's own call
            own = None
        return own.model_copy(update={"input_key": self.input_key}) if own else text_reader(self.input_key)

    # Whole calls

    def one(self, value: Any, runs: Runs, kwargs: dict[str, Any]) -> Steps[Any]:
        """Route one input; its output, or an error raised."""
        plan, seconds = yield from self.plan_one(value, runs)
        if plan.keeps(0):
            output = (yield from self.conclude_kept(plan, [0], [value], runs, seconds))[0]
        else:
            output = yield from self.answer(value, 0, plan, runs, seconds, kwargs)
        if isinstance(output, Exception):
            raise output
        return output

    def many(self, values: Sequence[Any], runs: Runs, kwargs: dict[str, Any]) -> Steps[list[Any]]:
        """Route `n` inputs with one small and one grouped large call; outputs, errors among them."""
        plan, seconds = yield from self.plan(values, runs)
        kept, rows = np.flatnonzero(plan.kept).tolist(), plan.deferred.tolist()
        outputs: list[Any] = [None] * len(values)
        for i, output in zip(kept, (yield from self.conclude_kept(plan, kept, values, runs, seconds)), strict=True):
            outputs[i] = output
        if rows:
            yield from runs.note(rows, plan.decision)
            asked = yield from self._laid_out([values[i] for i in rows], rows, plan)
            handlers, config = self._large_configs(rows, plan, runs)
            started = time.perf_counter()
            answers = yield from self.caller.group(asked, config, kwargs)
            latency = Latency(seconds, time.perf_counter() - started)
            log: list[FinishedCall] = []
            for i, answer, handler in zip(rows, answers, handlers, strict=True):
                outputs[i] = yield from self.conclude(plan, i, values[i], answer, runs, latency, handler, log)
            yield from self._record(log)
        return outputs

    def answer(
        self, value: Any, i: int, plan: AnyPlan, runs: Runs, seconds: float, kwargs: dict[str, Any]
    ) -> Steps[Any]:
        """Ask the large model about one deferred input; its output, or its error as a value."""
        asked, config, handler = yield from self.prepare(value, i, plan, runs)
        started = time.perf_counter()
        answer = asked if isinstance(asked, Exception) else (yield self.caller.one(asked, config, kwargs))
        latency = Latency(seconds, time.perf_counter() - started)
        log: list[FinishedCall] = []
        output = yield from self.conclude(plan, i, value, answer, runs, latency, handler, log)
        yield from self._record(log)
        return output

    # Predict and decide

    def plan(self, values: Sequence[Any], runs: Runs) -> Steps[tuple[Plan, float]]:
        """Ask the small models, each about what is left; where everything goes, and the seconds that took."""
        started = time.perf_counter()
        thresholds = thresholds_of_calls(runs, self.threshold_id)
        plan, rows = Plan.blank(len(values), self.policy_in_words), np.arange(len(values))
        for stage, model in enumerate(self.stages):
            given = values if len(rows) == len(values) else [values[i] for i in rows.tolist()]
            try:
                outcome = yield from predict_many(
                    model, given, rows.tolist(), _TAGS[stage], runs, self.allowed, self.labels
                )
            except Exception as error:
                raise_control_flow(error)
                outcome = failed_outcome(len(rows), error)
            outcome = absorbed(plan, outcome, rows, self.policy, thresholds)
            if stage == 0 and self.monitor is not None and outcome.batch is not None:
                self.monitor.saw(outcome.batch.confidence)
            rows = plan.deferred
            if not rows.size:
                break
        self.policy.observe(plan.would_ask() if self.in_shadow else int(plan.deferred.size), plan.n)
        return plan, time.perf_counter() - started

    def plan_one(self, value: Any, runs: Runs) -> Steps[tuple[PlanOfOne, float]]:
        """As `plan`, for one input."""
        started = time.perf_counter()
        thresholds = thresholds_of_calls(runs, self.threshold_id)
        threshold = None if thresholds is None else float(thresholds[0])
        plan = PlanOfOne(self.policy_in_words)
        for stage, model in enumerate(self.stages):
            try:
                answer = yield from predict_one(model, value, _TAGS[stage], runs)
            except Exception as error:
                raise_control_flow(error)
                answer = error
            checked = checked_prediction(answer, self.allowed)
            if isinstance(checked, Prediction) and not isinstance(model, SmallModel):
                checked = in_task_order(self.labels, checked)
            try:
                plan.absorb(stage, checked, self.policy, threshold)
            except PredictionError as error:  # the score cannot be had of this prediction
                plan.absorb(stage, error, self.policy, threshold)
            if stage == 0 and self.monitor is not None and isinstance(checked, Prediction):
                self.monitor.saw([checked.confidence])
            if plan.keeps(0):
                break
        self.policy.observe(plan.would_ask() if self.in_shadow else int(not plan.keeps(0)), 1)
        return plan, time.perf_counter() - started

    # Ask

    def prepare(
        self, value: Any, i: int, plan: AnyPlan, runs: Runs
    ) -> Steps[tuple[Any, RunnableConfig, LargeCallWatcher | None]]:
        """What one deferred input's large call needs: the input (or an error), the config, the usage handler."""
        yield from runs.note([i], plan.decision)
        handler = self._usage_handler()
        told = plan.decision(i) if runs.traced else None
        config = runs.child(i, _LARGE, decision=told, handler=handler)
        return (yield from self._laid_out([value], [i], plan))[0], config, handler

    def _laid_out(self, values: Sequence[Any], rows: list[int], plan: AnyPlan) -> Steps[list[Any]]:
        """As `large_inputs`; what takes long to read is read beside the event loop."""
        make = partial(self.large_inputs, values, rows, plan)
        if isinstance(self.reader, TextReader):
            return make()
        laid_out: list[Any] = yield Effect(make, partial(run_in_executor, None, make))
        return laid_out

    def large_inputs(self, values: Sequence[Any], rows: list[int], plan: AnyPlan) -> list[Any]:
        """What the large model gets for deferred rows; an error of ours where an input cannot be laid out, or stays."""
        if self.pruning is None:
            return [self._staying(plan, i) or value for value, i in zip(values, rows, strict=True)]
        variables = plan.prompt_variables(self.pruning, rows, self.labels, self.descriptions)
        prepared: list[Any] = []
        for value, more, i in zip(values, variables, rows, strict=True):
            try:
                prepared.append(self._staying(plan, i) or {**self.reader.lay_out(value), **more})
            except InputError as error:
                prepared.append(error)
        return prepared

    def _staying(self, plan: AnyPlan, i: int) -> LocalOnlyError | None:
        """Why a deferred input must not leave because of its label; None where it may."""
        if self.guard is None or not self.guard.local_labels:
            return None
        return self.guard.check_prediction(next(iter(plan.predictions([i])), None))

    def _large_configs(
        self, rows: list[int], plan: Plan, runs: Runs
    ) -> tuple[list[LargeCallWatcher | None], RunnableConfig | list[RunnableConfig]]:
        handlers = [self._usage_handler() for _ in rows]
        limit = self.caller.limiter.bound(runs.max_concurrency())
        if not runs.traced and runs.shared is not None and self._usage_handler() is None:
            return handlers, runs.child(0, _LARGE, max_concurrency=limit)
        told = plan.decision if runs.traced else lambda _: None
        configs = [
            runs.child(i, _LARGE, decision=told(i), handler=handler, max_concurrency=limit)
            for i, handler in zip(rows, handlers, strict=True)
        ]
        return handlers, configs

    def _usage_handler(self) -> LargeCallWatcher | None:
        return LargeCallWatcher() if self.return_decision or self.recorder is not None else None

    # Conclude

    def conclude_kept(
        self, plan: AnyPlan, rows: list[int], values: Sequence[Any], runs: Runs, seconds: float
    ) -> Steps[list[Any]]:
        """The outputs of rows that the small models keep."""
        if not rows:
            return []
        yield from runs.note(rows, plan.decision)
        outputs = yield from self._small_outputs(plan, rows, runs)
        if self.auditor is not None:
            audit = partial(self._audit, self.auditor, plan, rows, values, runs, seconds)
            if isinstance(self.reader, TextReader):
                audit()
            else:
                yield Effect(audit, partial(run_in_executor, None, audit))
        if not self.return_decision and self.recorder is None:
            return outputs
        latency, ids = Latency(seconds), [runs.record_id(i) for i in rows]
        if self.recorder is not None:
            wanted = [(i, record_id) for i, record_id in zip(rows, ids, strict=True) if self.recorder.wants("small")]
            log = [self._finished(plan.decision(i), values[i], None, runs, i, id_, latency, None) for i, id_ in wanted]
            yield from self._record(log)
        if not self.return_decision:
            return outputs
        return [
            result_of(plan.decision(i), output, record_id, latency, None)
            for i, output, record_id in zip(rows, outputs, ids, strict=True)
        ]

    def _audit(
        self, auditor: Auditor, plan: AnyPlan, rows: list[int], values: Sequence[Any], runs: Runs, seconds: float
    ) -> None:
        """Have a random part of the kept rows asked in the background, without the small model's opinion."""
        for i in auditor.chosen(rows):
            asked, finished = values[i], None
            (prediction,) = plan.predictions([i])
            if self._staying(plan, i) is not None:
                continue
            if self.pruning is not None:
                blank = self.pruning.without_prediction(self.labels or prediction.labels, self.descriptions)
                try:
                    asked = {**self.reader.lay_out(values[i]), **blank}
                except InputError as error:
                    asked = error
            if self.recorder is not None:
                latency, own_id = Latency(seconds), str(uuid7())
                snapshot = self.reader.snapshot(values[i])
                finished = self._finished(plan.decision(i), snapshot, None, runs, i, own_id, latency, None)
            said = prediction.label if prediction.answer is None else answer_text(prediction.answer)
            auditor.submit(asked, finished, said, runs.config(i).get("configurable"))

    def conclude(
        self,
        plan: AnyPlan,
        i: int,
        value: Any,
        answer: Any,
        runs: Runs,
        latency: Latency,
        handler: LargeCallWatcher | None,
        log: list[FinishedCall],
    ) -> Steps[Any]:
        """The output of a deferred row; an exception where the large model failed and nothing replaces it.

        What is to be recorded of the call is added to `log`.
        """
        heard, answer = answer, self._fused(plan, i, answer)
        failed = answer if isinstance(answer, Exception) else None
        stays = failed if isinstance(failed, LocalOnlyError) else None
        falls_back = self.falls_back if stays is None or self.guard is None else self.guard.on_local == "small"
        fell_back = failed is not None and falls_back and plan.has_prediction(i)
        if failed is None and not self.return_decision and self.recorder is None:
            return answer
        decision, record_id = plan.decision(i, failed, fell_back=fell_back), runs.record_id(i)
        if self.recorder is not None:
            watcher = handler if stays is None else None
            log.append(self._finished(decision, value, heard, runs, i, record_id, latency, watcher))
        if failed is not None:
            yield from runs.note([i], lambda _: decision)
        if stays is not None and self.guard is not None and not fell_back and self.guard.on_local != "raise":
            answer = self.guard.abstained(stays, decision.prediction)
        elif failed is not None:
            if not fell_back:
                return failed
            answer = (yield from self._small_outputs(plan, [i], runs))[0]
            if isinstance(answer, Exception):  # there is no small answer either: what failed is the large model
                failed.__context__ = answer
                return failed
        if not self.return_decision:
            return answer
        result = result_of(decision, answer, record_id, latency, handler)
        if self.fusion is None or failed is not None:
            return result
        return replace(result, large_output=heard.raw if isinstance(heard, UnparsableAnswerError) else heard)

    def _fused(self, plan: AnyPlan, i: int, answer: Any) -> Any:
        """What both models say together, where there is a fusion and both said something; else the answer itself."""
        silent = isinstance(answer, UnparsableAnswerError)
        if self.fusion is None or not plan.has_prediction(i) or (isinstance(answer, Exception) and not silent):
            return answer
        answer = answer.output if isinstance(answer, ShuntResult) else answer
        if not silent and not isinstance(answer, str):
            return ConfigurationError(
                f"Fusion needs the large model's answer as a label, and it is a {type(answer).__name__}. Let `large` "
                f"end in a parser that gives the label, as ConfidenceRouterChain.from_models does."
            )
        return self.fusion.fuse(plan.predictions([i])[0], None if silent else answer)

    def conclude_one(
        self,
        plan: AnyPlan,
        value: Any,
        answer: Any,
        runs: Runs,
        latency: Latency,
        handler: LargeCallWatcher | None,
    ) -> Steps[Any]:
        """As `conclude`, for a call of one input, with its record handed over."""
        log: list[FinishedCall] = []
        output = yield from self.conclude(plan, 0, value, answer, runs, latency, handler, log)
        yield from self._record(log)
        return output

    def _finished(
        self,
        decision: ShuntDecision,
        value: Any,
        answer: Any,
        runs: Runs,
        i: int,
        record_id: str,
        latency: Latency,
        watcher: LargeCallWatcher | None,
    ) -> FinishedCall:
        subject = runs.config(i).get("configurable", {}).get(SUBJECT_KEY)
        return FinishedCall(
            self.recorder.task, record_id, value, decision, answer, watcher, latency, self.labels, subject,
            self.reader, now(),
        )  # fmt: skip

    def _record(self, log: list[FinishedCall]) -> Steps[None]:
        """Hand records over to the recorder, which never fails the call."""
        if self.recorder is None or not log:
            return
        if not isinstance(self.reader, TextReader):  # a file or a buffer may change when the call has returned
            snap = partial(snapped, log)
            log = yield Effect(snap, partial(run_in_executor, None, snap))
        yield Effect(partial(self.recorder.record, log), partial(self.recorder.arecord, log))

    def chunk(self, chunk: Any, plan: AnyPlan) -> Any:
        """A large model's chunk as the shunt yields it."""
        if not self.return_decision:
            return chunk
        inner = chunk if isinstance(chunk, ShuntResult) else None
        return ShuntResult(chunk if inner is None else inner.output, plan.decision(0), cost_usd=None, inner=inner)

    def _small_outputs(self, plan: AnyPlan, rows: list[int], runs: Runs) -> Steps[list[Any]]:
        if self.small_output is None:
            return plan.outputs_of_kept(rows)
        predictions = plan.predictions(rows)
        config = runs.children(rows, _SMALL_OUTPUT)
        outputs: list[Any] = yield Effect(
            partial(self.small_output.batch, predictions, config, return_exceptions=True),
            partial(self.small_output.abatch, predictions, config, return_exceptions=True),
        )
        return outputs
