"""2CD for small models that generate their answers: sequence-level distillation on the teachers' text.

Stage A: if S1 is not confident, S2 learns the large model's answer. Stage B: if S1 is confident, S2 learns S1's answer,
so that it does not forget. Kim & Rush (2016) show that training on a teacher's complete answers works as well as
training on its word-level distributions. It requires only the text of the large model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from langchain_datashunt.call_log.record import CallRecord
from langchain_datashunt.distillation.prepared import DistillationReport, DistillationSettings, Prepared
from langchain_datashunt.exceptions import DataError
from langchain_datashunt.prediction import FloatArray, PredictionBatch, answer_text
from langchain_datashunt.small_models.kinds.generating import AnswerExamples, GeneratingModel
from langchain_datashunt.small_models.training.training import TrainingSettings


def prepare_answers(
    settings: DistillationSettings,
    training: TrainingSettings,
    small: GeneratingModel,
    calls: Sequence[CallRecord],
    labelled: tuple[Sequence[str], Sequence[str]] | None,
    report: DistillationReport,
) -> Prepared[AnswerExamples]:
    """Build the training data of S2, a copy of S1, from call records.

    Args:
        settings: Thresholds, accuracies and the minimum number of pairs.
        training: Seed and validation fraction of the split.
        small: Small model S1, which is not changed.
        calls: Call records in a fixed order.
        labelled: Inputs and correct answers to train on in addition to the log.
        report: Report to write the counts to.

    Raises:
        DataError: If there are too few training pairs.
    """
    gold = AnswerExamples(*(list(part) for part in labelled)) if labelled else AnswerExamples([], [])
    stage_a, stage_b = AnswerExamples([], []), AnswerExamples([], [])
    silent = [call for call in calls if call.gold is None]
    for call in calls:
        if call.gold is not None:
            _add(gold, call.input, call.gold)
    own, sure = _of_small(settings, small, silent)
    for call, answer, kept in zip(silent, own, sure, strict=True):
        given = call.answer_label or call.answer
        trusted = settings.large_accuracy if call.large_confidence is None else call.large_confidence
        if kept and answer is not None:
            _add(stage_b, call.input, answer)
        elif not call.large_model or trusted <= settings.large_threshold:
            report.unsure += 1
        elif not given or not given.strip():
            report.unparsable += 1
        else:
            _add(stage_a, call.input, given)
    report.stage_a, report.stage_b, report.gold = len(stage_a), len(stage_b), len(gold)
    if report.stage_a + report.gold == 0 or report.stage_a + report.stage_b + report.gold < settings.min_pairs:
        raise DataError(
            f"Expected at least {settings.min_pairs} training pairs, including large-model answers or correct "
            f"answers, in {report.records} records. Found {report.stage_a} answered confidently by the large model "
            f"only, {report.stage_b} by the small model, {report.unsure} by neither, {report.unparsable} without an "
            f"answer and {report.gold} correct answers. Log more calls, or lower `large_threshold`."
        )
    return Prepared(*_split([stage for stage in (stage_a, stage_b, gold) if len(stage)], training), report)


def _add(examples: AnswerExamples, text: str, answer: str) -> None:
    examples.texts.append(text)
    examples.answers.append(answer)


def _of_small(
    settings: DistillationSettings, small: GeneratingModel, calls: Sequence[CallRecord]
) -> tuple[list[str | None], list[bool]]:
    """Return S1's answer to each input, None if prediction failed, and whether S1 is confident in it."""
    own: list[str | None] = [None] * len(calls)
    sure = [False] * len(calls)
    if not calls:
        return own, sure
    outcome = small.predict_batch([call.input for call in calls], return_errors=True)
    if outcome.batch is None:
        return own, sure
    kept = _sure(settings, small, outcome.batch, calls)
    for row, answer, one in zip(outcome.rows.tolist(), outcome.batch.outputs(), kept, strict=True):
        own[row], sure[row] = answer_text(answer), bool(one)
    return own, sure


def _sure(
    settings: DistillationSettings, small: GeneratingModel, batch: PredictionBatch, calls: Sequence[CallRecord]
) -> FloatArray:
    """Return whether S1 is confident in each prediction.

    The threshold is the configured one, else S1's policy or threshold, else that of the newest record, else 0.9.
    """
    if settings.threshold is None and small.policy is not None:
        return np.asarray(small.policy.evaluate(batch).keep)
    scored = [call for call in calls if call.threshold is not None and "MaxProbability" in call.policy]
    newest = max(scored, key=lambda call: call.time).threshold if scored else None
    given = (settings.threshold, small.threshold, newest, 0.9)
    return np.asarray(batch.confidence >= next(one for one in given if one is not None))


def _split(stages: list[AnswerExamples], settings: TrainingSettings) -> tuple[list[AnswerExamples], AnswerExamples]:
    """Hold out a random part of each stage for validation."""
    rng = np.random.default_rng(settings.seed)
    learn: list[AnswerExamples] = []
    held = AnswerExamples([], [])
    for stage in stages:
        order = rng.permutation(len(stage)).tolist()
        n = min(len(stage) - 1, max(1, round(len(stage) * settings.validation_fraction)))
        part = stage.take(order[:n])
        held.texts.extend(part.texts)
        held.answers.extend(part.answers)
        learn.append(stage.take(order[n:]))
    return learn, held
