"""Who answers which input: pure decisions on arrays, without a call, a callback or an await."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np

from langchain_datashunt._utils.control_flow import raise_control_flow
from langchain_datashunt.decision import ShuntDecision
from langchain_datashunt.exceptions import LocalOnlyError, PredictionError
from langchain_datashunt.large_models.prompt_pruning import Pruning
from langchain_datashunt.policies.thresholds import Policy
from langchain_datashunt.prediction import BoolArray, FloatArray, IntArray, Prediction, PredictionBatch, Reason, Route
from langchain_datashunt.small_models.scores import Outcome

STAGES: tuple[Route, ...] = ("small", "student")


@dataclass
class Plan:
    """Where `n` inputs go.

    Attributes:
        n: How many inputs.
        policy: The policy in words.
        batches: Predictions by stage (0 small, 1 student).
        stage: Shape `[n]`: whose prediction decided.
        row: Shape `[n]`: its row in that stage's batch, -1 where there is none.
        kept: Shape `[n]`: True where a small model answers.
        score: Shape `[n]`, NaN where there was none.
        limit: Shape `[n]`: what the score was compared with.
        errors: Why the small model failed, by position.
    """

    n: int
    policy: str
    batches: list[PredictionBatch | None]
    stage: IntArray
    row: IntArray
    kept: BoolArray
    score: FloatArray
    limit: FloatArray
    errors: dict[int, Exception] = field(default_factory=dict)

    @classmethod
    def blank(cls, n: int, policy: str) -> Plan:
        """Nothing predicted yet: everything deferred."""
        return cls(
            n,
            policy,
            [],
            np.zeros(n, dtype=np.intp),
            np.full(n, -1, dtype=np.intp),
            np.zeros(n, dtype=np.bool_),
            np.full(n, np.nan),
            np.full(n, np.nan),
        )

    def keeps(self, i: int) -> bool:
        """Whether a small model answers input `i`."""
        return bool(self.kept[i])

    def has_prediction(self, i: int) -> bool:
        """Whether a small model had something to say about input `i`."""
        return bool(self.row[i] >= 0)

    @property
    def deferred(self) -> IntArray:
        """Positions that go to the large model."""
        return np.flatnonzero(~self.kept)

    def absorb(self, outcome: Outcome, rows: IntArray, policy: Policy, thresholds: FloatArray | None) -> None:
        """Take one stage's predictions in: rows that it is sure of are kept, others remember the surer stage."""
        stage = len(self.batches)
        self.batches.append(outcome.batch)
        if stage == 0:
            self.errors.update(outcome.errors)
        if outcome.batch is None:
            return
        where = rows[outcome.rows]
        keep, score, limit = policy.evaluate(outcome.batch, None if thresholds is None else thresholds[where])
        better = keep | (self.row[where] < 0) | (score > self.score[where])
        chosen = where[better]
        self.stage[chosen] = stage
        self.row[chosen] = np.flatnonzero(better)
        self.kept[chosen] = keep[better]
        self.score[chosen] = score[better]
        self.limit[chosen] = limit[better]

    def would_ask(self) -> int:
        """How many inputs no small model's score is sure enough of, whatever was made of that: as in shadow mode."""
        return self.n - int(np.count_nonzero(self.score >= self.limit))

    def prediction(self, i: int) -> Prediction | None:
        """What the deciding small model thought of input `i`; None if it failed."""
        batch = self.batches[self.stage[i]] if self.row[i] >= 0 else None
        return None if batch is None else batch[int(self.row[i])]

    def predictions(self, rows: Sequence[int]) -> list[Prediction]:
        """The predictions of rows that have one."""
        found = [self.prediction(i) for i in rows]
        return [prediction for prediction in found if prediction is not None]

    def outputs_of_kept(self, rows: Sequence[int]) -> list[Any]:
        """The small models' answers to rows that have a prediction, without making `Prediction` objects."""
        names = [None if batch is None else batch.outputs() for batch in self.batches]
        found = []
        for i in rows:
            stage_names = names[self.stage[i]]
            assert stage_names is not None
            found.append(stage_names[self.row[i]])
        return found

    def decision(self, i: int, error: Exception | None = None, *, fell_back: bool = False) -> ShuntDecision:
        """The decision on input `i` in words.

        Args:
            i: Which input.
            error: What the large model failed with, if it did.
            fell_back: Whether the small model's answer was used because of that.
        """
        return _decision(
            STAGES[self.stage[i]],
            bool(self.kept[i]),
            self.prediction(i),
            (float(self.score[i]), float(self.limit[i]), self.policy),
            self.errors.get(i),
            error,
            fell_back,
        )

    def prompt_variables(
        self,
        pruning: Pruning,
        rows: Sequence[int],
        labels: Sequence[str] | None,
        descriptions: Mapping[str, str] | None,
    ) -> list[dict[str, Any]]:
        """The pruning variables for deferred rows, in their order."""
        prepared: dict[int, dict[str, Any]] = {}
        for stage, batch in enumerate(self.batches):
            mine = [i for i in rows if self.row[i] >= 0 and self.stage[i] == stage]
            if batch is not None and mine:
                ready = pruning.prepare(batch.take(self.row[mine]), labels, descriptions)
                prepared.update(zip(mine, ready, strict=True))
        blank = pruning.without_prediction(labels, descriptions)
        return [prepared.get(i, blank) for i in rows]


class PlanOfOne:
    """A `Plan` for one input, without arrays: what a single call pays is what it takes."""

    def __init__(self, policy: str) -> None:
        self._policy = policy
        self._stage = 0
        self._prediction: Prediction | None = None
        self._kept = False
        self._score = self._limit = math.nan
        self._failure: Exception | None = None

    def absorb(self, stage: int, answer: Prediction | Exception, policy: Policy, threshold: float | None) -> None:
        """Take one stage's answer in; the surer stage's prediction is remembered."""
        if not isinstance(answer, Prediction):
            self._failure = self._failure or answer
            return
        keep, score, limit = policy.evaluate_one(answer, threshold)
        if keep or self._prediction is None or score > self._score:
            self._stage, self._prediction, self._kept = stage, answer, keep
            self._score, self._limit = score, limit

    def keeps(self, i: int) -> bool:
        """Whether a small model answers."""
        return self._kept

    def would_ask(self) -> int:
        """1 where no small model's score is sure enough, whatever was made of that; else 0."""
        return 0 if self._prediction is not None and self._score >= self._limit else 1

    def has_prediction(self, i: int) -> bool:
        """Whether a small model had something to say."""
        return self._prediction is not None

    def prediction(self, i: int) -> Prediction | None:
        """What the deciding small model thought; None if it failed."""
        return self._prediction

    def predictions(self, rows: Sequence[int]) -> list[Prediction]:
        """The prediction, in a list."""
        return [] if self._prediction is None else [self._prediction]

    def outputs_of_kept(self, rows: Sequence[int]) -> list[Any]:
        """The small model's answer, in a list."""
        return [one.label if one.answer is None else one.answer for one in self.predictions(rows)]

    def decision(self, i: int, error: Exception | None = None, *, fell_back: bool = False) -> ShuntDecision:
        """The decision in words; see `Plan.decision`."""
        numbers = (self._score, self._limit, self._policy)
        return _decision(STAGES[self._stage], self._kept, self._prediction, numbers, self._failure, error, fell_back)

    def prompt_variables(
        self,
        pruning: Pruning,
        rows: Sequence[int],
        labels: Sequence[str] | None,
        descriptions: Mapping[str, str] | None,
    ) -> list[dict[str, Any]]:
        """The pruning variables, in a list."""
        if self._prediction is None:
            return [pruning.without_prediction(labels, descriptions)]
        return pruning.prepare(PredictionBatch.stack([self._prediction]), labels, descriptions)


AnyPlan: TypeAlias = Plan | PlanOfOne
"""Where inputs go: many, or one."""


def _decision(
    stage: Route,
    kept: bool,
    prediction: Prediction | None,
    numbers: tuple[float, float, str],
    small_error: Exception | None,
    large_error: Exception | None,
    fell_back: bool,
) -> ShuntDecision:
    route: Route = "large"
    reason: Reason = "deferred"
    if kept:
        route, reason = stage, "confident"
    elif isinstance(large_error, LocalOnlyError):
        route, reason = stage, "local_only"
    elif large_error is not None:
        route, reason = (stage if fell_back else "large"), "large_error"
    elif prediction is None:
        reason = "small_error"
    score, limit, policy = numbers
    cause = large_error or (small_error if prediction is None else None)
    error = None if cause is None else f"{type(cause).__name__}: {cause}"
    return ShuntDecision(route, reason, prediction, _number(score), _number(limit), policy, error)


def outcome_of(
    answers: Sequence[Any],
    allowed: frozenset[str] | None = None,
    order: Callable[[Prediction], Prediction] | None = None,
) -> Outcome:
    """Sort what any Runnable gave for `n` inputs into predictions over one label order, and errors.

    Args:
        answers: `n` of anything.
        allowed: The labels of the task, where they are set; None allows all.
        order: Brings a prediction's labels into the order that they have for all; None for that of the first.
    """
    errors: dict[int, Exception] = {}
    good: list[Prediction] = []
    rows: list[int] = []
    for i, answer in enumerate(answers):
        checked = checked_prediction(answer, allowed)
        if isinstance(checked, Prediction) and order is not None:
            checked = order(checked)
        if isinstance(checked, Prediction) and good:
            checked = _in_order_of(good[0].labels, checked)
        if isinstance(checked, Prediction):
            good.append(checked)
            rows.append(i)
        else:
            errors[i] = checked
    return Outcome(PredictionBatch.stack(good) if good else None, np.array(rows, dtype=np.intp), errors)


def checked_prediction(answer: Any, allowed: frozenset[str] | None = None) -> Prediction | Exception:
    """What a small model gave, where it is a prediction that holds together; else the error that it is.

    Args:
        answer: Anything.
        allowed: The labels of the task, where they are set; None allows all.
    """
    if isinstance(answer, Exception):
        raise_control_flow(answer)
        return answer
    if not isinstance(answer, Prediction):
        return PredictionError(
            f"The small model gave a {type(answer).__name__} where a Prediction is needed. "
            f"Return Prediction.from_probabilities({{label: probability, ...}})."
        )
    try:
        p = np.asarray(answer.probabilities, dtype=np.float64)
        sound = _holds_together(answer, p)
    except (TypeError, ValueError, AttributeError):
        sound = False
    if not sound:
        return PredictionError(
            f"The small model {answer.model_id or 'without a name'!r} gave something that is no distribution over its "
            f"labels with its label and confidence: {_shown(answer)}. "
            f"Make predictions with Prediction.from_probabilities(...)."
        )
    if allowed is not None and not allowed.issuperset(answer.labels):
        strange = sorted(set(answer.labels) - allowed)
        return PredictionError(f"The small model knows labels that are not the task's: {', '.join(strange[:5])}.")
    return answer if p is answer.probabilities else replace(answer, probabilities=p)


def _holds_together(answer: Prediction, p: FloatArray) -> bool:
    """Whether `p` is a distribution over the labels, with its label and confidence where they belong."""
    if p.shape != (len(answer.labels),):
        return False
    if len(p) <= 64:  # plain numbers are quicker than three numpy reductions over a few labels
        values = p.tolist()
        total, least, most = sum(values), min(values), max(values)
    else:
        total, least, most = float(p.sum()), float(p.min()), float(p.max())
    if answer.answer is not None:  # the prediction is of that answer, also where another is likelier
        most = float(p[0])
    return bool(
        abs(total - 1.0) <= 1e-3
        and least >= 0.0
        and abs(most - answer.confidence) <= 1e-6
        and p[answer.labels.index(answer.label)] >= most - 1e-6
    )


def _shown(answer: Prediction) -> str:
    text = repr(answer)
    return text if len(text) <= 200 else text[:197] + "..."


def in_task_order(labels: Sequence[str] | None, prediction: Prediction) -> Prediction:
    """A Runnable's prediction with its labels in the task's order, in that of the alphabet where there is none.

    Some models sort their labels by score: then an input's prompt would say what the model thinks of it by the order of
    its candidates alone, and of equally likely labels another would be first in a batch than alone.
    """
    if prediction.answer is not None:
        return prediction
    wanted, order = _task_order(None if labels is None else tuple(labels), prediction.labels)
    p, logits = prediction.probabilities, prediction.logits
    if order is not None:
        p, logits = p[order], None if logits is None else logits[order]
    best = wanted[int(p.argmax())]
    if order is None and best == prediction.label:
        return prediction
    return replace(prediction, label=best, labels=wanted, probabilities=p, logits=logits)


@lru_cache(maxsize=256)
def _task_order(labels: tuple[str, ...] | None, own: tuple[str, ...]) -> tuple[tuple[str, ...], list[int] | None]:
    """A prediction's labels in the task's order, and where each stood; None where they have that order."""
    place = {label: i for i, label in enumerate(labels or ())}
    wanted = tuple(sorted(own, key=lambda label: (place.get(label, len(place)), label)))
    return wanted, None if wanted == own else [own.index(label) for label in wanted]


def _in_order_of(labels: tuple[str, ...], prediction: Prediction) -> Prediction | Exception:
    """The same prediction with its labels in the order of the batch's first; some models sort them by score."""
    if prediction.labels is labels or prediction.labels == labels:
        return prediction
    if sorted(prediction.labels) != sorted(labels):
        return PredictionError(
            "This prediction has another label set than the first of its batch. Give probabilities over one label set."
        )
    order = [prediction.labels.index(label) for label in labels]
    logits = None if prediction.logits is None else prediction.logits[order]
    return replace(prediction, labels=labels, probabilities=prediction.probabilities[order], logits=logits)


def absorbed(
    plan: Plan, outcome: Outcome, rows: IntArray, policy: Policy, thresholds: FloatArray | None = None
) -> Outcome:
    """Have a plan take one stage's predictions in; where the policy cannot score them, they count as failed."""
    try:
        plan.absorb(outcome, rows, policy, thresholds)
    except PredictionError as error:
        plan.batches.pop()
        outcome = failed_outcome(len(rows), error)
        plan.absorb(outcome, rows, policy, thresholds)
    return outcome


def failed_outcome(n: int, error: Exception) -> Outcome:
    """All `n` inputs failed with one error."""
    return Outcome(None, np.array([], dtype=np.intp), dict.fromkeys(range(n), error))


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
