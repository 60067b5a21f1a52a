"""SubtaskShunt: split a task into sub-tasks, each with its own small model, and defer the rest in one LLM call."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Self
from uuid import UUID, uuid5

from langchain_core.messages.ai import UsageMetadata
from langchain_core.runnables import Runnable, RunnableConfig, RunnableSerializable
from langchain_core.runnables.base import coerce_to_runnable
from langchain_core.runnables.config import run_in_executor
from langchain_core.runnables.graph import Graph
from langchain_core.runnables.utils import AddableDict, ConfigurableFieldSpec, get_unique_config_specs
from pydantic import ConfigDict, Field, PrivateAttr, field_validator
from pydantic_core import to_jsonable_python
from typing_extensions import override

from langchain_datashunt._utils.control_flow import raise_first_error
from langchain_datashunt._utils.settings import Frozen
from langchain_datashunt._utils.short_repr import short_repr
from langchain_datashunt.call_log.finished_call import FinishedCall, now, snapped
from langchain_datashunt.call_log.record import id_bytes
from langchain_datashunt.decision import Latency, ShuntDecision
from langchain_datashunt.exceptions import ConfigurationError, InputError, LocalOnlyError, UnparsableAnswerError
from langchain_datashunt.inputs import DEFAULT_INPUT_KEY, InputReader, ShuntInput, TextReader, text_reader
from langchain_datashunt.large_models.caller import LargeCaller
from langchain_datashunt.large_models.chat_asker import ChatAsker
from langchain_datashunt.large_models.limits import CallLimiter
from langchain_datashunt.large_models.retry import Retry
from langchain_datashunt.large_models.watcher import LargeCallWatcher
from langchain_datashunt.prediction import ANSWER_LABELS, Prediction
from langchain_datashunt.privacy.guard import PrivacyGuard, subject_of
from langchain_datashunt.routing.ask_small import ask_small
from langchain_datashunt.routing.deferred_call import Routed
from langchain_datashunt.routing.plan import Plan
from langchain_datashunt.routing.runs import Runs, aperform_in_runs, perform_in_runs
from langchain_datashunt.routing.settings import policy_for
from langchain_datashunt.routing.subtask_questions import (
    KnownAnswers,
    OpenQuestion,
    OpenQuestions,
    Subtask,
    SubtaskQuestion,
    default_question_prompt,
)
from langchain_datashunt.routing.sync_async import Steps, arun, perform, run

SHOWN = 3
"""Maximum labels of an unconfident prediction that the large prompt lists."""


@dataclass(frozen=True, slots=True)
class SubtaskResult:
    """The answers to one input, with the decision about each sub-task.

    Attributes:
        outputs: Answers by sub-task, or None if the large model failed and the sub-task has no small prediction.
        decisions: Decisions by sub-task.
        usage: Token counts of the large model, by model name.
        cost_usd: Price of `usage` in USD; 0.0 if no sub-task was deferred, None if the price is unknown.
        latency: Wall time of all small models together, and of the large call, in seconds.
        record_id: Id of the run.
        record_ids: Ids in the call log, by sub-task.
    """

    outputs: Mapping[str, Any]
    decisions: Mapping[str, ShuntDecision]
    usage: Mapping[str, UsageMetadata] = field(default_factory=dict)
    cost_usd: float | None = 0.0
    latency: Latency = field(default_factory=Latency)
    record_id: str | None = None
    record_ids: Mapping[str, str] = field(default_factory=dict)

    __repr__ = short_repr

    def to_dict(self) -> dict[str, Any]:
        """Return the result as a JSON-ready dict; an output that JSON cannot hold becomes text."""
        return {
            "outputs": to_jsonable_python(dict(self.outputs), fallback=str),
            "decisions": {name: decision.to_dict() for name, decision in self.decisions.items()},
            "usage": {model: dict(usage) for model, usage in self.usage.items()},
            "cost_usd": self.cost_usd,
            "small_seconds": self.latency.small_seconds,
            "large_seconds": self.latency.large_seconds,
            "record_id": self.record_id,
            "record_ids": dict(self.record_ids),
        }


class SubtaskShunt(Frozen, RunnableSerializable[Any, Any]):
    """Answer sub-tasks with small models if they are confident, and the others with one large-model call.

    ```python
    triage = SubtaskShunt.from_chat_model(
        [
            Subtask(name="language", question="Which language is it in?", small=languages),
            Subtask(name="product", question="Which product is it about?", small=products),
            Subtask(name="reply", question="What do we answer?"),          # no small model: always deferred
        ],
        ChatOpenAI(model="gpt-4o"),
    )
    triage.invoke("Mon colis n'est pas arrivé")     # {"language": "French", "product": ..., "reply": ...}
    ```

    Each sub-task has its own policy, and its own records in the call log (task "<recorder's task>/<name>"). The large
    prompt gets two variables: `known` holds the confident answers, and `open` lists the deferred sub-tasks. If no
    sub-task is open, the large model is not called. A sub-task stays open if its small model fails. Streams yield the
    known answers first, then the others.

    This implements Prompt Transferring, which the DS+ paper only sketches.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    subtasks: tuple[Subtask, ...] = Field(min_length=1)
    """The sub-tasks, in the order of the answers."""

    large: Runnable[Any, Any]
    """Maps the input, `known` and `open` to a mapping that answers every open sub-task by its name."""

    on_large_error: Literal["raise", "small"] = "raise"
    """Whether a large model that has finally failed raises, or gives way to the small models' predictions. Sub-tasks
    without a prediction are then answered with None."""

    return_decision: bool = False
    """Whether to return a `SubtaskResult` instead of the answers."""

    max_concurrency: int | None = Field(default=None, ge=1)
    """Maximum concurrent large calls. None means unlimited."""

    retry: Retry = Retry()
    """How the large call of each input is retried."""

    max_input_characters: int | None = Field(default=100_000, ge=1)
    """Maximum length of an input's text, in characters. Longer ones raise `InputError`. None means unlimited."""

    input_key: str = DEFAULT_INPUT_KEY
    """Name of the input in the mapping that `large` gets."""

    decimals: int = Field(default=2, ge=0, le=6)
    """Decimal places of probabilities in the large prompt."""

    recorder: Any = Field(default=None, exclude=True, repr=False)
    """A `call_log.Recorder` that logs calls. None logs nothing."""

    breaker: Any = Field(default=None, exclude=True, repr=False)
    """A `large_models.CircuitBreaker`, which fails fast while the large model is down."""

    max_pending: int | None = Field(default=None, ge=1)
    """Maximum large calls that wait or run. None means unlimited. A call beyond it fails with `QueueFullError`."""

    guard: PrivacyGuard | None = None
    """Decides which data may be sent to the large model, and in which form. None sends everything. An input that must
    stay local gets its small models' predictions, and None for other sub-tasks. With `on_local="raise"` it raises."""

    _caller: LargeCaller = PrivateAttr()

    @field_validator("large", mode="before")
    @classmethod
    def _runnable(cls, value: Any) -> Any:
        try:
            return coerce_to_runnable(value)
        except TypeError as error:
            raise ConfigurationError(
                f"Expected a Runnable or a function for `large`, got {type(value).__name__}."
            ) from error

    def model_post_init(self, context: Any, /) -> None:
        """Check the names and policies, and build the caller of the large model."""
        super().model_post_init(context)
        names = [subtask.name for subtask in self.subtasks]
        if len(set(names)) < len(names):
            raise ConfigurationError(
                f"Expected unique names for `subtasks`, got {', '.join(names)}. Rename the duplicates."
            )
        for subtask in self.subtasks:
            if subtask.small is not None:
                policy_for(subtask.small, subtask.policy).check(getattr(subtask.small, "labels", None))
        large = self.large if self.guard is None else self.guard.around(self.large)
        limiter = CallLimiter(self.max_concurrency)
        self._caller = LargeCaller(large, self.retry, limiter, self.breaker, self.max_pending)

    @classmethod
    def from_chat_model(
        cls,
        subtasks: Sequence[Subtask],
        chat_model: Runnable[Any, Any],
        *,
        prompt: Runnable[Any, Any] | None = None,
        max_reasks: int = 1,
        **settings: Any,
    ) -> Self:
        """Create a shunt whose large side is a chat model.

        Args:
            subtasks: The sub-tasks.
            chat_model: Any chat model. Its structured output is used if it offers that.
            prompt: Template over the input, `known` and `open`. None uses the default prompt.
            max_reasks: Maximum follow-up calls after an incomplete or invalid answer.
            **settings: Any other field.
        """
        reader = reader_of(subtasks)
        key = settings.get("input_key", DEFAULT_INPUT_KEY)
        asker = ChatAsker(
            prompt=prompt if prompt is not None else default_question_prompt(key, reader),
            chat_model=chat_model,
            question=SubtaskQuestion(),
            max_reasks=max_reasks,
        )
        return cls(subtasks=tuple(subtasks), large=asker, **settings)

    # Calls

    @override
    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        return self.batch([input], config, **kwargs)[0]

    @override
    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        return (await self.abatch([input], config, **kwargs))[0]

    @override
    def batch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """Answer `n` inputs with one call of each small model, and one grouped large call for all open sub-tasks."""
        if not (inputs := list(inputs)):
            return []
        runs = Runs(self, inputs, config)
        outputs = perform_in_runs(runs, self._route(inputs, runs, kwargs))
        return raise_first_error(outputs, return_exceptions)

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
        outputs = await aperform_in_runs(runs, self._route(inputs, runs, kwargs))
        return raise_first_error(outputs, return_exceptions)

    @override
    def stream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[Any]:
        """Yield the confident answers of small models, then the others.

        The chunks add up to one mapping. With `return_decision` there is a single chunk, the `SubtaskResult`.
        """
        runs = Runs(self, [input], config)
        run(runs.start())
        try:
            routed = run(self._decide([input], runs, kwargs))
            (work,) = routed.works
            if work.known and work.open and work.refused is None and not self.return_decision:
                yield AddableDict(work.known)
            (output,) = raise_first_error(run(self._answer(routed)), False)
            yield self._rest(output, work)
        except BaseException as error:
            run(runs.fail_rest(error))
            raise
        run(runs.end({0: output}))

    @override
    async def astream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> AsyncIterator[Any]:
        """Async version of `stream`."""
        runs = Runs(self, [input], config, asynchronous=True)
        await arun(runs.start())
        try:
            routed = await arun(self._decide([input], runs, kwargs))
            (work,) = routed.works
            if work.known and work.open and work.refused is None and not self.return_decision:
                yield AddableDict(work.known)
            (output,) = raise_first_error(await arun(self._answer(routed)), False)
            yield self._rest(output, work)
        except BaseException as error:
            await arun(runs.fail_rest(error))
            raise
        await arun(runs.end({0: output}))

    def _rest(self, output: Any, work: SubtaskWork) -> Any:
        """Return the part of the output that the stream has not yielded yet."""
        if self.return_decision:
            return output
        if not work.open:
            return AddableDict(output)
        return AddableDict({name: answer for name, answer in output.items() if name not in work.known})

    # Steps, written once for sync and async as in `ShuntRunnable`

    def _route(self, values: Sequence[Any], runs: Runs, kwargs: dict[str, Any]) -> Steps[list[Any]]:
        routed = yield from self._decide(values, runs, kwargs)
        return (yield from self._answer(routed))

    def _decide(self, values: Sequence[Any], runs: Runs, kwargs: dict[str, Any]) -> Steps[RoutedSubtasks]:
        """Call each small model once for all inputs."""
        started = time.perf_counter()
        plans: dict[str, Plan] = {}
        refused: dict[int, Exception] = {}
        for i, value in enumerate(values):
            if (refusal := self.reader.refusal(value, self.max_input_characters)) is not None:
                refused[i] = refusal
        for subtask in self.subtasks:
            if subtask.small is None:
                continue
            policy = policy_for(subtask.small, subtask.policy)
            plan = Plan.undecided(len(values), policy)
            plan.refused.update(refused)
            if not (rows := plan.deferred):
                break
            given = [values[i] for i in rows]
            tag, strict = f"shunt:small:{subtask.name}", subtask.labels is not None
            outcome = yield from ask_small(subtask.small, given, rows, tag, runs, subtask.labels, strict=strict)
            plan.add_stage(outcome, policy, rows)
            refused.update(plan.refused)
            policy.observe(len(plan.deferred), plan.n)
            plans[subtask.name] = plan
        works = [self._work(i, plans) for i in range(len(values))]
        for i, error in refused.items():
            works[i].refused = error
        return RoutedSubtasks(values, runs, kwargs, time.perf_counter() - started, plans, works)

    def _work(self, i: int, plans: Mapping[str, Plan]) -> SubtaskWork:
        known: dict[str, Any] = {}
        questions: list[OpenQuestion] = []
        for subtask in self.subtasks:
            plan = plans.get(subtask.name)
            if plan is not None and plan.local[i]:
                known[subtask.name] = answer_of(plan.prediction(i))
            else:
                thought = None if plan is None or not subtask.hint else plan.prediction(i)
                questions.append(OpenQuestion(subtask, self._hint(thought)))
        return SubtaskWork(known, OpenQuestions(questions))

    def _hint(self, thought: Prediction | None) -> tuple[tuple[str, float], ...]:
        if thought is None:
            return ()
        likely = thought.top(SHOWN) if thought.answer is None else [(str(thought.answer), thought.confidence)]
        return tuple((label, round(p, self.decimals)) for label, p in likely)

    def _answer(self, routed: RoutedSubtasks) -> Steps[list[Any]]:
        """Call the large model for the open sub-tasks, and return the outputs of all inputs, errors among them."""
        rows = [i for i, work in enumerate(routed.works) if work.open and work.refused is None]
        started = time.perf_counter()
        if rows:
            yield from self._ask_large(routed, rows)
        latency = Latency(routed.small_seconds, time.perf_counter() - started if rows else 0.0)
        outputs: list[Any] = []
        log: list[FinishedCall] = []
        decisions: list[dict[str, ShuntDecision]] = []
        for i in range(len(routed.values)):
            output, decided, records = self._conclude(routed, i, latency)
            outputs.append(output)
            decisions.append(decided)
            log += records
        accepted = [i for i, work in enumerate(routed.works) if work.refused is None]
        for subtask in self.subtasks:
            yield from routed.runs.send_decisions(accepted, partial(announced, decisions, subtask.name))
        if log:
            if not all(isinstance(call.reader, TextReader) for call in log):
                log = yield from perform(partial(snapped, log), partial(run_in_executor, None, snapped, log))
            yield from perform(partial(self.recorder.record, log), partial(self.recorder.arecord, log))
        return outputs

    def _ask_large(self, routed: RoutedSubtasks, rows: list[int]) -> Steps[None]:
        """Ask the large model about the open sub-tasks of `rows`, and keep its answers with the work."""
        reader, runs = self.reader, routed.runs
        configs: list[RunnableConfig] = []
        asked: list[Any] = []
        limit = self._caller.limiter.bound(runs.max_concurrency())
        for i in rows:
            work = routed.works[i]
            if self.return_decision or self.recorder is not None:
                work.watcher = LargeCallWatcher()
            labelled = [plan.prediction(i) for plan in routed.plans.values()]  # the whole input leaves, also for one
            local_only = None if self.guard is None else self.guard.check_predictions(labelled)
            configs.append(runs.child(i, "shunt:large", handler=work.watcher, max_concurrency=limit))
            try:
                variables = {"known": KnownAnswers(work.known), "open": work.open}
                asked.append(local_only or {**reader.lay_out(routed.values[i]), **variables})
            except InputError as error:
                asked.append(error)
        answers = yield from perform(
            partial(self._caller.batch, asked, configs, routed.kwargs),
            partial(self._caller.abatch, asked, configs, routed.kwargs),
        )
        for i, answer in zip(rows, answers, strict=True):
            work = routed.works[i]
            work.answer = checked_answers(answer, work.open)
            if isinstance(work.answer, LocalOnlyError):  # nothing was sent, so nothing was used
                work.watcher = None

    def _conclude(
        self, routed: RoutedSubtasks, i: int, latency: Latency
    ) -> tuple[Any, dict[str, ShuntDecision], list[FinishedCall]]:
        """Return the output of one input, the decision about each sub-task, and the records for the log."""
        work = routed.works[i]
        if work.refused is not None:
            return work.refused, {}, []
        failed = work.answer if isinstance(work.answer, Exception) else None
        guard = self.guard if isinstance(failed, LocalOnlyError) else None
        falls_back = self.on_large_error == "small" if guard is None else guard.on_local != "raise"
        fell_back = failed is not None and falls_back
        outputs: dict[str, Any] = {}
        decisions: dict[str, ShuntDecision] = {}
        for subtask in self.subtasks:
            plan, name = routed.plans.get(subtask.name), subtask.name
            if name in work.known:
                outputs[name] = work.known[name]
            elif failed is None:
                outputs[name] = work.answer[name]
            else:
                outputs[name] = None if plan is None else answer_of(plan.prediction(i))
            decisions[name] = decision_of(plan, i, None if name in work.known else failed, fell_back)
        record_id = routed.runs.record_id(i)
        ids = {subtask.name: str(uuid5(UUID(bytes=id_bytes(record_id)), subtask.name)) for subtask in self.subtasks}
        log: list[FinishedCall] = []
        for subtask in self.subtasks:
            known = subtask.name in work.known
            if self.recorder is not None and (not known or self.recorder.wants("small")):
                finished = self._finished(routed, i, subtask, decisions[subtask.name], ids[subtask.name], latency)
                if known:
                    finished = finished._replace(weight=self.recorder.weight("small"))
                else:
                    raw_answer = failed or outputs[subtask.name]
                    watcher = watcher_of(work, subtask, raw_answer)
                    finished = finished._replace(answer=raw_answer, watcher=watcher)
                log.append(finished)
        if failed is not None and not fell_back:
            return failed, decisions, log
        if not self.return_decision:
            return outputs, decisions, log
        usage = {} if work.watcher is None else dict(work.watcher.usage_metadata)
        cost = 0.0 if work.watcher is None else work.watcher.cost_usd
        return SubtaskResult(outputs, decisions, usage, cost, latency, record_id, ids), decisions, log

    def _finished(
        self,
        routed: RoutedSubtasks,
        i: int,
        subtask: Subtask,
        decision: ShuntDecision,
        record_id: str,
        latency: Latency,
    ) -> FinishedCall:
        """Return the record of a sub-task that only its small model answered."""
        return FinishedCall(
            task=f"{self.recorder.task}/{subtask.name}",
            record_id=record_id,
            value=routed.values[i],
            decision=decision,
            answer=None,
            watcher=None,
            latency=latency,
            labels=subtask.labels or ANSWER_LABELS,
            subject=subject_of(routed.runs.config(i)),
            reader=reader_of([subtask]) or self.reader,
            ended=now(),
        )

    # Schemas and graph

    @property
    def reader(self) -> InputReader:
        """The reader of inputs for the prompt and the call log: that of the first small model which has one."""
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


@dataclass
class SubtaskWork:
    """The state of one input during a call.

    Attributes:
        known: Confident answers of small models, by sub-task.
        open: Sub-tasks that are deferred to the large model.
        answer: Answers of the large model by sub-task, or its error.
        watcher: Records usage and text of the large call, or None if neither a result nor a log needs them.
        refused: Error if no model answers the input, because it is not valid or a small model cannot work as it is set
            up.
    """

    known: dict[str, Any]
    open: OpenQuestions
    answer: Any = None
    watcher: LargeCallWatcher | None = None
    refused: Exception | None = None


@dataclass(frozen=True, slots=True)
class RoutedSubtasks(Routed):
    """The inputs of one call, with the plans that route their sub-tasks.

    Attributes:
        plans: Plan of each sub-task that has a small model, by name.
        works: State of each input.
    """

    plans: Mapping[str, Plan]
    works: list[SubtaskWork]


def watcher_of(work: SubtaskWork, subtask: Subtask, raw_answer: Any) -> LargeCallWatcher | None:
    """Return the part of an input's large call that belongs to the record of one open sub-task.

    Only the record of the first open sub-task has the tokens and cost of the call, so that sums over records count the
    call once.
    """
    if work.watcher is None or raw_answer is None:
        return None
    watcher = LargeCallWatcher()
    watcher.model = work.watcher.model
    watcher.text = work.watcher.text if isinstance(raw_answer, Exception) else str(raw_answer)
    if subtask.name == work.open[0].subtask.name:
        watcher.usage_metadata, watcher.cost_usd = work.watcher.usage_metadata, work.watcher.cost_usd
    return watcher


def announced(decisions: Sequence[Mapping[str, ShuntDecision]], name: str, i: int) -> dict[str, Any]:
    """Return the data of the decision event of one sub-task."""
    return {"shunt_subtask": name, **decisions[i][name].to_metadata()}


def reader_of(subtasks: Sequence[Subtask]) -> InputReader | None:
    """Return the reader of the first small model that has one, or None if none has."""
    found = (getattr(subtask.small, "reader", None) for subtask in subtasks)
    return next((reader for reader in found if reader is not None), None)


def answer_of(prediction: Prediction | None) -> Any:
    """Return the answer, or else the label, of a prediction, or None without a prediction."""
    if prediction is None:
        return None
    return prediction.label if prediction.answer is None else prediction.answer


def decision_of(plan: Plan | None, i: int, failed: Exception | None, fell_back: bool) -> ShuntDecision:
    """Return the decision about one sub-task of one input.

    Args:
        plan: The plan of the sub-task, or None if it has no small model.
        i: Position of the input.
        failed: Error of the large model, if it failed.
        fell_back: Whether small predictions replace the large model's answers because of that.
    """
    if plan is not None:
        return plan.decision(i, failed, fell_back=fell_back and plan.prediction(i) is not None)
    if failed is None:
        return ShuntDecision("large", "deferred", policy="no small model")
    if isinstance(failed, LocalOnlyError):
        return ShuntDecision("small", "local_only", policy="no small model", error=str(failed))
    return ShuntDecision("large", "large_error", policy="no small model", error=f"{type(failed).__name__}: {failed}")


def checked_answers(answer: Any, questions: OpenQuestions) -> Any:
    """Return the large model's answers, or an error if an answer is missing or not among the labels."""
    if isinstance(answer, Exception):
        return answer
    names = [question.subtask.name for question in questions]
    if not isinstance(answer, Mapping):
        return ConfigurationError(
            f"Expected a mapping with {', '.join(names)} from `large`, got {type(answer).__name__}. Parse its output."
        )
    missing = [name for name in names if answer.get(name) is None]
    for question in questions:
        labels, name = question.subtask.labels, question.subtask.name
        if labels is not None and name not in missing and answer[name] not in labels:
            return UnparsableAnswerError(str(answer[name]), labels)
    return UnparsableAnswerError(str(dict(answer)), missing) if missing else answer
