"""2CD for small models that write their answers: both teachers teach text (sequence-level distillation).

Stage A: where S1 was not sure, S2 learns what the large model wrote. Stage B: where S1 was sure, S2 learns what S1
wrote, so that it does not forget. Kim & Rush (2016) show that learning a teacher's whole answers works as well as
learning its distribution over each word, and it needs nothing of the large model but its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from langchain_datashunt.call_log.record import CallRecord
from langchain_datashunt.distillation.prepared import DistillationReport, Prepared
from langchain_datashunt.exceptions import DataError
from langchain_datashunt.prediction import FloatArray, PredictionBatch, answer_text
from langchain_datashunt.small_models.kinds.generating import AnswerExamples, GeneratingModel
from langchain_datashunt.small_models.training.training import TrainingSettings

if TYPE_CHECKING:
    from langchain_datashunt.distillation.distiller import DistillationSettings


def prepare_answers(
    settings: DistillationSettings,
    training: TrainingSettings,
    small: GeneratingModel,
    calls: Sequence[CallRecord],
    labelled: tuple[Sequence[str], Sequence[str]] | None,
    report: DistillationReport,
) -> Prepared[AnswerExamples]:
    """What S2, a copy of S1, learns from records.

    Args:
        settings: Thresholds and accuracies.
        training: How to train.
        small: S1; not changed.
        calls: Records, in a fixed order.
        labelled: Inputs and right answers to learn beside the log.
        report: Filled in.

    Raises:
        DataError: There is too little to learn from.
    """
    gold = AnswerExamples(*(list(part) for part in labelled)) if labelled else AnswerExamples([], [])
    stage_a, stage_b = AnswerExamples([], []), AnswerExamples([], [])
    silent = [call for call in calls if call.gold is None]
    for call in calls:
        if call.gold is not None:
            _add(gold, call.input, call.gold)
    own, sure = _of_small(settings, small, silent)
    for call, answer, kept in zip(silent, own, sure, strict=True):
        said = call.label or call.raw_output
        trusted = settings.large_accuracy if call.large_confidence is None else call.large_confidence
        if kept and answer is not None:
            _add(stage_b, call.input, answer)
        elif not call.large_model or trusted <= settings.large_threshold:
            report.unsure += 1
        elif not said or not said.strip():
            report.unparsable += 1
        else:
            _add(stage_a, call.input, said)
    report.stage_a, report.stage_b, report.gold = len(stage_a), len(stage_b), len(gold)
    if report.stage_a + report.gold == 0 or report.stage_a + report.stage_b + report.gold < settings.min_pairs:
        raise DataError(
            f"There is too little to learn from in {report.records} records: {report.stage_a} where only the large "
            f"model was sure, {report.stage_b} where the small one was, {report.unsure} where neither was, "
            f"{report.unparsable} without an answer, {report.gold} with a true one; at least {settings.min_pairs} are "
            f"needed. Record more, or lower `large_threshold`."
        )
    return Prepared(*_split([stage for stage in (stage_a, stage_b, gold) if len(stage)], training), report)


def _add(examples: AnswerExamples, text: str, answer: str) -> None:
    examples.texts.append(text)
    examples.answers.append(answer)


def _of_small(
    settings: DistillationSettings, small: GeneratingModel, calls: Sequence[CallRecord]
) -> tuple[list[str | None], list[bool]]:
    """What S1 writes to each input, None where it fails, and where it is sure."""
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
    """Where S1 is sure: by the threshold that was set, else its own, else as the newest record had it, else 0.9."""
    if settings.threshold is None and small.policy is not None:
        return np.asarray(small.policy.evaluate(batch).keep)
    told = [call for call in calls if call.threshold is not None and "MaxProbability" in call.policy]
    newest = max(told, key=lambda call: call.time).threshold if told else None
    given = (settings.threshold, small.threshold, newest, 0.9)
    return np.asarray(batch.confidence >= next(one for one in given if one is not None))


def _split(stages: list[AnswerExamples], settings: TrainingSettings) -> tuple[list[AnswerExamples], AnswerExamples]:
    """Hold a random part of each stage out."""
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
