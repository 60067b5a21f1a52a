"""Plan: decide on arrays which model answers each input, without calls, callbacks or `await`.

All entry points use it: the shunt, the chat model, LlamaIndex, agents and sub-tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

from langchain_datashunt._utils.control_flow import raise_if_control_flow
from langchain_datashunt.decision import ShuntDecision
from langchain_datashunt.exceptions import (
    BundleError,
    ConfigurationError,
    InputError,
    LocalOnlyError,
    NotAPredictionError,
    PartialInputError,
    PredictionError,
)
from langchain_datashunt.large_models.prompt_pruning import Pruning
from langchain_datashunt.policies.thresholds import Policy
from langchain_datashunt.prediction import (
    BoolArray,
    FloatArray,
    IntArray,
    Prediction,
    PredictionBatch,
    Reason,
    Route,
    prediction_from,
)
from langchain_datashunt.small_models.scores import Outcome

STAGES: tuple[Route, ...] = ("small", "student")


@dataclass
class Plan:
    """The routes of `n` inputs. An input is deferred until the policy finds a stage's prediction confident, or refused.

    Attributes:
        policy: Name of the policy, for decisions.
        batches: Predictions of each stage (0 small, 1 student), or None if the whole stage failed.
        stage: Stage of the prediction that the plan keeps, shape `[n]`: the confident one, else the one with the
            highest score.
        batch_row: Its row in that stage's batch, shape `[n]`, or -1 without a prediction.
        local: Whether a small model answers, shape `[n]`.
        score: Confidence score, shape `[n]`, or NaN without a prediction.
        limit: Threshold that the score was compared with, shape `[n]`.
        errors: Errors of the first small model, by input.
        refused: Errors of the inputs that no model answers, because they are no valid input or because the small
            model cannot work as it is set up.
    """

    policy: str
    stage: IntArray
    batch_row: IntArray
    local: BoolArray
    score: FloatArray
    limit: FloatArray
    batches: list[PredictionBatch | None] = field(default_factory=list)
    errors: dict[int, Exception] = field(default_factory=dict)
    refused: dict[int, Exception] = field(default_factory=dict)

    @classmethod
    def undecided(cls, n: int, policy: Policy | str) -> Plan:
        """Return a plan without predictions, in which every input is deferred."""
        batch_row, score = np.empty(n, dtype=np.intp), np.empty(n)
        batch_row.fill(-1)
        score.fill(np.nan)
        return cls(
            policy=str(policy),
            stage=np.zeros(n, dtype=np.intp),
            batch_row=batch_row,
            local=np.zeros(n, dtype=np.bool_),
            score=score,
            limit=score.copy(),
        )

    @property
    def n(self) -> int:
        """Number of inputs."""
        return len(self.batch_row)

    @property
    def deferred(self) -> list[int]:
        """Inputs that go to the large model."""
        if self.n == 1:  # the usual case, without numpy's overhead
            return [] if self.local[0] or self.refused else [0]
        rows: list[int] = np.flatnonzero(~self.local).tolist()
        return [i for i in rows if i not in self.refused] if self.refused else rows

    @property
    def answered_locally(self) -> list[int]:
        """Inputs that a small model answers."""
        if self.n == 1:
            return [0] if self.local[0] else []
        rows: list[int] = np.flatnonzero(self.local).tolist()
        return rows

    def add_stage(
        self, outcome: Outcome, policy: Policy, rows: Sequence[int], thresholds: FloatArray | None = None
    ) -> None:
        """Decide by the predictions of one more stage.

        An input with a confident prediction is answered locally. Otherwise the plan keeps the prediction with the
        higher score. If the policy cannot score the predictions, the stage counts as failed.

        Args:
            outcome: Predictions for `m` inputs, and errors.
            policy: Decides which predictions are confident.
            rows: Positions of these inputs, shape `[m]`.
            thresholds: Replacements of the policy's threshold, shape `[n]`. NaN and None keep it.
        """
        stage, batch, errors = len(self.batches), outcome.batch, outcome.errors
        where = np.asarray(rows, dtype=np.intp)[outcome.rows]  # `outcome.rows` are positions in `rows`
        found = None
        if batch is not None:
            try:
                found = policy.evaluate(batch, None if thresholds is None else thresholds[where])
            except PredictionError as error:
                batch, errors = None, dict.fromkeys(range(len(rows)), error)
        self.batches.append(batch)
        self.refused.update({rows[i]: error for i, error in errors.items() if is_wiring_error(error)})
        if stage == 0:
            self.errors.update({rows[i]: error for i, error in errors.items()})
        if found is None:
            return
        confident, score, limit = found
        # in shadow mode an earlier stage may have reached its threshold: without the shadow it would have answered
        settled = self.score[where] >= self.limit[where]
        replaces = confident | (self.batch_row[where] < 0) | ((score > self.score[where]) & ~settled)
        chosen = where[replaces]
        self.stage[chosen] = stage
        self.batch_row[chosen] = np.flatnonzero(replaces)
        self.local[chosen] = confident[replaces]
        self.score[chosen] = score[replaces]
        self.limit[chosen] = limit[replaces]

    def count_unconfident(self) -> int:
        """Count inputs without a score at or above the threshold, even if shadow mode or an alarm defers all inputs."""
        return self.n - len(self.refused) - int(np.count_nonzero(self.score >= self.limit))

    def count_answered(self) -> int:
        """Count inputs that the first small model predicted."""
        return self.n - len(self.errors.keys() | self.refused.keys())

    def failures(self) -> dict[int, Exception]:
        """Return the passing errors of inputs that no small model predicted, without those that it cannot read."""
        return {
            i: error
            for i, error in self.errors.items()
            if self.batch_row[i] < 0 and i not in self.refused and not isinstance(error, PartialInputError)
        }

    def prediction(self, i: int) -> Prediction | None:
        """Return the prediction that the plan keeps for input `i`, or None if the small model failed."""
        batch = self.batches[self.stage[i]] if self.batch_row[i] >= 0 else None
        return None if batch is None else batch[int(self.batch_row[i])]

    def predictions(self, rows: Sequence[int]) -> list[Prediction]:
        """Return the predictions of those `rows` that have one."""
        found = [self.prediction(i) for i in rows]
        return [prediction for prediction in found if prediction is not None]

    def local_answers(self, rows: Sequence[int]) -> list[Any]:
        """Return the small models' answers to `rows`, each of which must have a prediction."""
        if len(rows) == 1:
            (prediction,) = self.predictions(rows)
            return [prediction.label if prediction.answer is None else prediction.answer]
        answers = [None if batch is None else batch.outputs() for batch in self.batches]
        found = []
        for i in rows:
            of_stage = answers[self.stage[i]]
            assert of_stage is not None
            found.append(of_stage[self.batch_row[i]])
        return found

    def decision(self, i: int, error: Exception | None = None, *, fell_back: bool = False) -> ShuntDecision:
        """Return the decision about input `i`.

        Args:
            i: Position of the input.
            error: Error of the large model, if it failed.
            fell_back: Whether the small model's answer replaces the large model's because of that.
        """
        stage, prediction = STAGES[self.stage[i]], self.prediction(i)
        route: Route = "large"
        reason: Reason = "deferred"
        if self.local[i]:
            route, reason = stage, "confident"
        elif isinstance(error, LocalOnlyError):
            route, reason = stage, "local_only"
        elif error is not None:
            route, reason = (stage if fell_back else "large"), "large_error"
        elif prediction is None:
            reason = "unreadable" if isinstance(self.errors.get(i), PartialInputError) else "small_error"
        cause = error or (self.errors.get(i) if prediction is None else None)
        return ShuntDecision(
            route,
            reason,
            prediction,
            _number(self.score[i]),
            _number(self.limit[i]),
            self.policy,
            None if cause is None else f"{type(cause).__name__}: {cause}",
        )

    def prompt_variables(
        self,
        pruning: Pruning,
        rows: Sequence[int],
        labels: Sequence[str] | None,
        descriptions: Mapping[str, str] | None,
    ) -> list[dict[str, Any]]:
        """Return the pruning variables of deferred `rows`, in their order."""
        prepared: dict[int, dict[str, Any]] = {}
        for stage, batch in enumerate(self.batches):
            mine = [i for i in rows if self.batch_row[i] >= 0 and self.stage[i] == stage]
            if batch is not None and mine:
                ready = pruning.prepare(batch.take(self.batch_row[mine]), labels, descriptions)
                prepared.update(zip(mine, ready, strict=True))
        if len(prepared) == len(rows):
            return [prepared[i] for i in rows]
        blank = pruning.without_prediction(labels, descriptions)
        return [prepared.get(i, blank) for i in rows]


def decide_one(answer: Any, policy: Policy) -> ShuntDecision:
    """Return the decision about one input.

    Args:
        answer: Return value of the small model, or the exception that it raised.
        policy: Decides whether the prediction is confident.

    Raises:
        Exception: The error of a small model that cannot work as it is set up.
    """
    plan = Plan.undecided(1, policy)
    plan.add_stage(outcome_of([answer]), policy, [0])
    if plan.refused:
        raise plan.refused[0]
    return plan.decision(0)


_WIRING_ERRORS = (
    ConfigurationError, InputError, BundleError, NotAPredictionError, TypeError, AttributeError, NameError, KeyError,
    ImportError, NotImplementedError,
)  # fmt: skip


WIRING_ERRORS = frozenset({kind.__name__ for kind in _WIRING_ERRORS} | {"MissingExtraError", "BundleTruncatedError"})
"""Names of these errors, for predictions from another process."""


def is_wiring_error(error: Exception) -> bool:
    """Return whether an error shows a mistake in the set-up of a small model, rather than a failure that may pass."""
    if isinstance(error, PartialInputError):
        return False
    cause = error.__cause__ if type(error) is PredictionError else None  # a worker thread wraps what it raises
    return isinstance(error, _WIRING_ERRORS) or isinstance(cause, _WIRING_ERRORS)


def outcome_of(
    answers: Sequence[Any],
    labels: Sequence[str] | None = None,
    order: Callable[[Prediction], Prediction] | None = None,
    *,
    strict: bool = False,
) -> Outcome:
    """Separate the return values of a small model into predictions, in one label order, and errors.

    Args:
        answers: Return values for `n` inputs. Exceptions stand for inputs that failed.
        labels: Labels of the task, in order, or None if they are not known.
        order: Reorders the labels of a prediction. None keeps the order of the first prediction.
        strict: Whether a prediction over other labels is an error.
    """
    allowed = frozenset(labels) if strict and labels is not None else None
    errors: dict[int, Exception] = {}
    good: list[Prediction] = []
    rows: list[int] = []
    for i, answer in enumerate(answers):
        checked = checked_prediction(answer, allowed, labels)
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


def checked_prediction(
    answer: Any, allowed: frozenset[str] | None = None, labels: Sequence[str] | None = None
) -> Prediction | Exception:
    """Return the prediction if it is a distribution over its labels, or else an error.

    Args:
        answer: Return value of the small model, or the exception that it raised. See `prediction_from` for the values
            that are accepted in place of a `Prediction`.
        allowed: Labels that a prediction may have. None allows all.
        labels: Labels of the task, in order, or None if they are not known.
    """
    if isinstance(answer, Exception):
        raise_if_control_flow(answer)
        return answer
    if not isinstance(answer, Prediction):
        try:
            answer = prediction_from(answer, labels)
        except PredictionError as error:
            return error
    p = None
    try:
        p = np.asarray(answer.probabilities, dtype=np.float64)
        sound = _holds_together(answer, p)
    except (TypeError, ValueError, AttributeError):
        sound = False
    if not sound:
        transient = p is not None and bool(np.isnan(p).any())
        return (PredictionError if transient else NotAPredictionError)(
            f"The prediction of the small model {answer.model_id or 'without a name'!r} is not a distribution over its "
            f"labels with the matching label and confidence: {_shown(answer)}. "
            f"Make predictions with Prediction.from_probabilities(...)."
        )
    if allowed is not None and not allowed.issuperset(answer.labels):
        strange = sorted(set(answer.labels) - allowed)
        return NotAPredictionError(
            f"The small model predicted labels that are not in `labels`: {', '.join(strange[:5])}. Add them there."
        )
    checked: Prediction = answer if p is answer.probabilities else replace(answer, probabilities=p)
    return checked


def _holds_together(answer: Prediction, p: FloatArray) -> bool:
    """Return whether `p` is a distribution over the labels that agrees with the label and the confidence."""
    if p.shape != (len(answer.labels),):
        return False
    if len(p) <= 64:  # plain numbers are faster than three numpy reductions over a few labels
        values = p.tolist()
        total, least, most = sum(values), min(values), max(values)
    else:
        total, least, most = float(p.sum()), float(p.min()), float(p.max())
    if answer.answer is not None:  # the prediction is about this answer, even if another answer is likelier
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
    """Return the prediction with its labels in the task's order, or alphabetically if the task has none.

    Some models sort their labels by score. The order of the candidates in the prompt would then disclose the
    prediction, and ties would be broken differently in a batch than for a single input.
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
    """Return labels in the task's order, and the old position of each, or None if the order is right already."""
    place = {label: i for i, label in enumerate(labels or ())}
    wanted = tuple(sorted(own, key=lambda label: (place.get(label, len(place)), label)))
    return wanted, None if wanted == own else [own.index(label) for label in wanted]


def _in_order_of(labels: tuple[str, ...], prediction: Prediction) -> Prediction | Exception:
    """Return the prediction with its labels in the order of the batch's first prediction."""
    if prediction.labels is labels or prediction.labels == labels:
        return prediction
    if sorted(prediction.labels) != sorted(labels):
        return PredictionError(
            "Expected one label set for all predictions of a batch, but this one differs from the first. "
            "Use one label set."
        )
    order = [prediction.labels.index(label) for label in labels]
    logits = None if prediction.logits is None else prediction.logits[order]
    return replace(prediction, labels=labels, probabilities=prediction.probabilities[order], logits=logits)


def failed_outcome(n: int, error: Exception) -> Outcome:
    """Return the outcome of `n` inputs that all failed with one error."""
    return Outcome(None, np.array([], dtype=np.intp), dict.fromkeys(range(n), error))


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
