"""SubtaskShunt: a task in parts, each with a small model of its own; the large model answers what is left."""

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
from langchain_core.runnables.graph import Graph
from langchain_core.runnables.utils import AddableDict, ConfigurableFieldSpec, get_unique_config_specs
from pydantic import ConfigDict, Field, PrivateAttr, field_validator
from pydantic_core import to_jsonable_python
from typing_extensions import override

from langchain_datashunt._utils.control_flow import raise_first_error
from langchain_datashunt._utils.pricing import cost_usd
from langchain_datashunt._utils.settings import Frozen
from langchain_datashunt._utils.short_repr import short_repr
from langchain_datashunt.call_log.finished_call import FinishedCall, now
from langchain_datashunt.call_log.record import id_bytes
from langchain_datashunt.decision import Latency, ShuntDecision
from langchain_datashunt.exceptions import ConfigurationError, InputError, LocalOnlyError, UnparsableAnswerError
from langchain_datashunt.inputs import DEFAULT_INPUT_KEY, InputReader, ShuntInput, text_reader
from langchain_datashunt.large_models.caller import LargeCaller
from langchain_datashunt.large_models.chat_asker import ChatAsker
from langchain_datashunt.large_models.limits import CallLimiter
from langchain_datashunt.large_models.retry import Retry
from langchain_datashunt.large_models.watcher import LargeCallWatcher
from langchain_datashunt.prediction import ANSWER_LABELS, Prediction
from langchain_datashunt.privacy.guard import SUBJECT_KEY, PrivacyGuard
from langchain_datashunt.routing.ask_small import ask_small
from langchain_datashunt.routing.plan import Plan
from langchain_datashunt.routing.runs import Runs, atrace, trace
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
"""How many labels of an unconfident prediction the large prompt shows."""


@dataclass(frozen=True, slots=True)
class SubtaskResult:
    """The answers to one input with their decisions.

    Attributes:
        outputs: Answer by sub-task; None where the large model failed and no small one had anything to say.
        decisions: Who answered each, and why.
        usage: Tokens that the large model counted, by model name.
        cost_usd: Price of `usage`; 0.0 where it was not asked, None where the price is not known.
        latency: Wall time of all small models together, and of the large call.
        record_id: Id of the run.
        record_ids: Under which each sub-task's call is recorded.
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
    """Prompt Transferring: small models do the sub-tasks that they are sure of; the large model does the rest.

    ```python
    triage = SubtaskShunt.from_chat_model(
        [
            Subtask(name="language", question="Which language is it in?", small=languages),
            Subtask(name="product", question="Which product is it about?", small=products),
            Subtask(name="reply", question="What do we answer?"),          # no small model: always asked
        ],
        ChatOpenAI(model="gpt-4o"),
    )
    triage.invoke("Mon colis n'est pas arrivé")     # {"language": "French", "product": ..., "reply": ...}
    ```

    Each sub-task has its own policy, and its own records (task "<recorder's task>/<name>") to learn from. What a small
    model is sure of is filled into the large prompt as `known`; the prompt is asked for `open`. Where nothing is open,
    the large model is not asked. A small model that fails leaves its question open. Streams give the known answers
    first, then the others. PT is only sketched in the DS+ paper; this is our reading of it.
    """

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
        names = [subtask.name for subtask in self.subtasks]
        if len(set(names)) < len(names):
            raise ConfigurationError(f"Two sub-tasks have one name; their names are {', '.join(names)}. Rename one.")
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
        """Put a shunt together whose large side is a chat model.

        Args:
            subtasks: The parts.
            chat_model: Any chat model; its structured output is used where it offers that.
            prompt: A template over the input, `known` and `open`; None for the default prompt.
            max_reasks: How often a model is asked again whose answer lacks something.
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
        """Answer `n` inputs with one call of each small model and one grouped large call for all that is open."""
        if not inputs:
            return []
        runs = Runs(self, inputs, config)
        outputs = trace(runs, self._many(inputs, runs, kwargs))
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
        """Answer `n` inputs with one call of each small model and one grouped large call for all that is open."""
        if not inputs:
            return []
        runs = Runs(self, inputs, config, asynchronous=True)
        outputs = await atrace(runs, self._many(inputs, runs, kwargs))
        return raise_first_error(outputs, return_exceptions)

    @override
    def stream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[Any]:
        """Yield the answers that small models are sure of, then the others; the chunks add up to one mapping."""
        runs = Runs(self, [input], config)
        run(runs.start())
        try:
            plans, works, seconds = run(self._plan([input], runs))
            if works[0].known and works[0].open and not self.return_decision:
                yield AddableDict(works[0].known)
            output = raise_first_error(run(self._finish([input], plans, works, runs, seconds, kwargs)), False)[0]
            yield self._rest(output, works[0])
        except BaseException as error:
            run(runs.fail_rest(error))
            raise
        run(runs.end({0: output}))

    @override
    async def astream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> AsyncIterator[Any]:
        """Yield the answers that small models are sure of, then the others; the chunks add up to one mapping."""
        runs = Runs(self, [input], config, asynchronous=True)
        await arun(runs.start())
        try:
            plans, works, seconds = await arun(self._plan([input], runs))
            if works[0].known and works[0].open and not self.return_decision:
                yield AddableDict(works[0].known)
            output = raise_first_error(await arun(self._finish([input], plans, works, runs, seconds, kwargs)), False)[0]
            yield self._rest(output, works[0])
        except BaseException as error:
            await arun(runs.fail_rest(error))
            raise
        await arun(runs.end({0: output}))

    def _rest(self, output: Any, work: SubtaskWork) -> Any:
        """What a stream has not yielded yet."""
        if self.return_decision:
            return output
        if not work.open:
            return AddableDict(output)
        return AddableDict({name: answer for name, answer in output.items() if name not in work.known})

    # Steps

    def _many(self, values: Sequence[Any], runs: Runs, kwargs: dict[str, Any]) -> Steps[list[Any]]:
        plans, works, seconds = yield from self._plan(values, runs)
        return (yield from self._finish(values, plans, works, runs, seconds, kwargs))

    def _plan(self, values: Sequence[Any], runs: Runs) -> Steps[tuple[dict[str, Plan], list[SubtaskWork], float]]:
        """Ask each small model about all inputs; where each question goes, and the seconds that took."""
        started, plans = time.perf_counter(), {}
        for subtask in self.subtasks:
            if subtask.small is None:
                continue
            policy = policy_for(subtask.small, subtask.policy)
            plan, rows = Plan.undecided(len(values), policy), list(range(len(values)))
            tag, strict = f"shunt:small:{subtask.name}", subtask.labels is not None
            outcome = yield from ask_small(subtask.small, values, rows, tag, runs, subtask.labels, strict=strict)
            plan.add_stage(outcome, policy, rows)
            policy.observe(len(plan.deferred), plan.n)
            plans[subtask.name] = plan
        works = [self._work(i, plans) for i in range(len(values))]
        return plans, works, time.perf_counter() - started

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

    def _finish(
        self,
        values: Sequence[Any],
        plans: Mapping[str, Plan],
        works: list[SubtaskWork],
        runs: Runs,
        seconds: float,
        kwargs: dict[str, Any],
    ) -> Steps[list[Any]]:
        """Ask the large model for what is open, and put the answers together."""
        rows = [i for i, work in enumerate(works) if work.open]
        started = time.perf_counter()
        if rows:
            yield from self._ask(values, plans, works, rows, runs, kwargs)
        latency = Latency(seconds, time.perf_counter() - started if rows else 0.0)
        outputs: list[Any] = []
        log: list[FinishedCall] = []
        told: dict[int, dict[str, ShuntDecision]] = {}
        for i, work in enumerate(works):
            told[i] = {}
            outputs.append(self._concluded(i, values[i], plans, work, runs, latency, log, told[i]))
        for subtask in self.subtasks:
            name = subtask.name
            yield from runs.announce(list(told), partial(announced, told, name))
        if log:
            log = [call._replace(value=call.reader.snapshot(call.value)) for call in log]
            yield from perform(partial(self.recorder.record, log), partial(self.recorder.arecord, log))
        return outputs

    def _ask(
        self,
        values: Sequence[Any],
        plans: Mapping[str, Plan],
        works: list[SubtaskWork],
        rows: list[int],
        runs: Runs,
        kwargs: dict[str, Any],
    ) -> Steps[None]:
        reader, configs = self.reader, []
        asked: list[Any] = []
        limit = self._caller.limiter.bound(runs.max_concurrency())
        for i in rows:
            work = works[i]
            if self.return_decision or self.recorder is not None:
                work.watcher = LargeCallWatcher()
            labelled = [plans[name].prediction(i) for name in plans if name not in work.known]
            stays = None if self.guard is None else self.guard.check_predictions(labelled)
            configs.append(runs.child(i, "shunt:large", handler=work.watcher, max_concurrency=limit))
            try:
                told = {"known": KnownAnswers(work.known), "open": work.open}
                asked.append(stays or {**reader.lay_out(values[i]), **told})
            except InputError as error:
                asked.append(error)
        answers = yield from perform(
            partial(self._caller.batch, asked, configs, kwargs), partial(self._caller.abatch, asked, configs, kwargs)
        )
        for i, answer in zip(rows, answers, strict=True):
            works[i].answer = checked_answers(answer, works[i].open)

    def _concluded(
        self,
        i: int,
        value: Any,
        plans: Mapping[str, Plan],
        work: SubtaskWork,
        runs: Runs,
        latency: Latency,
        log: list[FinishedCall],
        decisions: dict[str, ShuntDecision],
    ) -> Any:
        failed = work.answer if isinstance(work.answer, Exception) else None
        stays = isinstance(failed, LocalOnlyError) and self.guard is not None
        falls_back = self.guard.on_local != "raise" if stays and self.guard else self.on_large_error == "small"
        fell_back = failed is not None and falls_back
        outputs: dict[str, Any] = {}
        record_id = runs.record_id(i)
        ids = {subtask.name: str(uuid5(UUID(bytes=id_bytes(record_id)), subtask.name)) for subtask in self.subtasks}
        for subtask in self.subtasks:
            plan, name = plans.get(subtask.name), subtask.name
            kept = name in work.known
            if kept:
                outputs[name] = work.known[name]
            elif failed is None:
                outputs[name] = work.answer[name]
            else:
                outputs[name] = None if plan is None else answer_of(plan.prediction(i))
            decisions[name] = decision_of(plan, i, None if kept else failed, fell_back)
            if self.recorder is not None and (not kept or self.recorder.wants("small")):
                said = None if kept else failed or outputs[name]
                first = bool(work.open) and name == work.open[0].subtask.name
                log.append(
                    self._finished(subtask, ids[name], value, decisions[name], said, work, first, runs, i, latency)
                )
        if failed is not None and not fell_back:
            return failed
        if not self.return_decision:
            return outputs
        usage = {} if work.watcher is None else dict(work.watcher.usage_metadata)
        cost = (cost_usd(usage) if usage else None) if work.open else 0.0
        return SubtaskResult(outputs, decisions, usage, cost, latency, record_id, ids)

    def _finished(
        self,
        subtask: Subtask,
        record_id: str,
        value: Any,
        decision: ShuntDecision,
        said: Any,
        work: SubtaskWork,
        first: bool,
        runs: Runs,
        i: int,
        latency: Latency,
    ) -> FinishedCall:
        """What one sub-task leaves behind; a large call's tokens and cost stand in the record of its first question."""
        watcher = None
        if said is not None and work.watcher is not None:
            watcher = LargeCallWatcher()
            watcher.model = work.watcher.model
            watcher.text = work.watcher.text if isinstance(said, Exception) else str(said)
            if first:
                watcher.usage_metadata = work.watcher.usage_metadata
        subject = runs.config(i).get("configurable", {}).get(SUBJECT_KEY)
        return FinishedCall(
            f"{self.recorder.task}/{subtask.name}", record_id, value, decision, said, watcher, latency,
            subtask.labels or ANSWER_LABELS, subject, reader_of([subtask]) or self.reader, now(),
        )  # fmt: skip

    # Schemas and graph

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


@dataclass
class SubtaskWork:
    """One input on its way: what is known, what is open, and how the large model's part went."""

    known: dict[str, Any]
    open: OpenQuestions
    answer: Any = None
    watcher: LargeCallWatcher | None = None


def announced(decisions: Mapping[int, Mapping[str, ShuntDecision]], name: str, i: int) -> dict[str, Any]:
    """What a sub-task's decision is announced as."""
    return {"shunt_subtask": name, **decisions[i][name].to_metadata()}


def reader_of(subtasks: Sequence[Subtask]) -> InputReader | None:
    """The reader of the first small model that has one."""
    found = (getattr(subtask.small, "reader", None) for subtask in subtasks)
    return next((reader for reader in found if reader is not None), None)


def answer_of(prediction: Prediction | None) -> Any:
    """What a small model answers; None where it said nothing."""
    if prediction is None:
        return None
    return prediction.label if prediction.answer is None else prediction.answer


def decision_of(plan: Plan | None, i: int, failed: Exception | None, fell_back: bool) -> ShuntDecision:
    """Who answers one sub-task of one input, and why."""
    if plan is not None:
        return plan.decision(i, failed, fell_back=fell_back and plan.prediction(i) is not None)
    if failed is None:
        return ShuntDecision("large", "deferred", policy="no small model")
    if isinstance(failed, LocalOnlyError):
        return ShuntDecision("small", "local_only", policy="no small model", error=str(failed))
    return ShuntDecision("large", "large_error", policy="no small model", error=f"{type(failed).__name__}: {failed}")


def checked_answers(answer: Any, questions: OpenQuestions) -> Any:
    """The large model's answers, or an error where one is missing."""
    if isinstance(answer, Exception):
        return answer
    names = [question.subtask.name for question in questions]
    if not isinstance(answer, Mapping):
        return ConfigurationError(
            f"`large` gave a {type(answer).__name__}; a mapping with {', '.join(names)} is needed."
        )
    missing = [name for name in names if answer.get(name) is None]
    for question in questions:
        labels, name = question.subtask.labels, question.subtask.name
        if labels is not None and name not in missing and answer[name] not in labels:
            return UnparsableAnswerError(str(answer[name]), labels)
    return UnparsableAnswerError(str(dict(answer)), missing) if missing else answer
