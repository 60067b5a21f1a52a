"""2-Stage Confidence Distillation (2CD): train a student on the logged answers of the large model.

Stage A: if S1 is not confident and the large model was, S2 learns the large model's answer. Stage B: if S1 is
confident, S2 learns S1's prediction, so that it does not forget. S2 starts as a copy of S1, which is never changed.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from langchain_datashunt.call_log.record import CallRecord
from langchain_datashunt.distillation.answers import prepare_answers
from langchain_datashunt.distillation.prepared import DistillationReport, DistillationSettings, Prepared
from langchain_datashunt.exceptions import DataError, InputError
from langchain_datashunt.inputs import TextReader
from langchain_datashunt.prediction import BoolArray, FloatArray, PredictionBatch
from langchain_datashunt.small_models.base import SmallModel
from langchain_datashunt.small_models.kinds.generating import GeneratingModel
from langchain_datashunt.small_models.training.processes import processes
from langchain_datashunt.small_models.training.training import (
    Examples,
    TrainingSettings,
    one_hot,
    soft_cross_entropy,
    text_hashes,
)

PRIOR_STRENGTH = 5.0
"""Weight of the prior in each accuracy estimate, in answers: labels with few answers stay close to the overall."""


@dataclass(frozen=True)
class DistillationResult:
    """Result of a distillation.

    Attributes:
        model: The candidate S2.
        report: Counts of the records behind its training data.
    """

    model: SmallModel
    report: DistillationReport


class TwoStageDistiller:
    """Trains a student S2, a copy of S1, on logged calls.

    If S1 generates its answers, S2 learns complete answers (see `distillation.answers`).

    ```python
    distilled = TwoStageDistiller().distill(small, latest_of_each_input(log.iterate(CallFilter(task="support"))))
    ```

    Args:
        settings: Distillation settings; None uses the defaults.
    """

    def __init__(self, settings: DistillationSettings | None = None) -> None:
        self.settings = settings or DistillationSettings()

    def distill(
        self,
        small: SmallModel,
        records: Iterable[CallRecord] | Iterable[Sequence[CallRecord]],
        *,
        labelled: tuple[Sequence[str], Sequence[str]] | None = None,
    ) -> DistillationResult:
        """Train S2 on logged calls.

        Args:
            small: Small model S1, which is not changed.
            records: Call records, or batches of them as from `CallLog.iterate`.
            labelled: Texts and true labels to train on in addition to the log, for example the training data of S1.

        Raises:
            DataError: If there are too few training pairs. The message counts the records of each kind.
            ConfigurationError: If this kind of small model cannot be trained further.
        """
        training = self._training()
        prepared = processes().share(lambda: self._prepared(small, records, labelled, training))
        if isinstance(small, GeneratingModel):
            mode = "answers"
            model: SmallModel = small.learn_answers(prepared.stages, prepared.held_out, training)
        else:
            mode = self.settings.mode
            loss = partial(soft_cross_entropy, temperature=self.settings.temperature, gce=self.settings.gce)
            model = small.fit_soft_targets(prepared.stages, prepared.held_out, training, loss)
        model.lineage = {
            **model.lineage,
            "distillation": {**vars(prepared.report), "mode": mode},
            "training_text_hashes": text_hashes(prepared.texts),
        }
        if training.checkpoint is not None and processes().first:
            Prepared.forget(training.checkpoint)
        return DistillationResult(model, prepared.report)

    def _prepared(
        self,
        small: SmallModel,
        records: Iterable[CallRecord] | Iterable[Sequence[CallRecord]],
        labelled: tuple[Sequence[str], Sequence[str]] | None,
        training: TrainingSettings,
    ) -> Prepared[Any]:
        """Return the training data, read from the checkpoint folder if it has been saved there."""
        if training.checkpoint is None:
            return self._fresh(small, records, labelled, training)
        settings = {**self.settings.model_dump(exclude={"training"}), "training": training.what_matters()}
        about = {
            "settings": settings,
            "small_model": _fingerprint(small),
            "labelled": None if labelled is None else hashlib.sha256(repr(labelled).encode()).hexdigest(),
        }
        if (kept := Prepared.read(training.checkpoint, about)) is not None:
            return kept
        fresh = self._fresh(small, records, labelled, training)
        fresh.write(training.checkpoint, about)
        return fresh

    def _fresh(
        self,
        small: SmallModel,
        records: Iterable[CallRecord] | Iterable[Sequence[CallRecord]],
        labelled: tuple[Sequence[str], Sequence[str]] | None,
        training: TrainingSettings,
    ) -> Prepared[Any]:
        """Build the stages and the held-out part from the records. The order of the records has no effect."""
        calls, unreadable = readable_calls(small, _flat(records))
        report = DistillationReport(records=len(calls), unreadable=unreadable)
        if isinstance(small, GeneratingModel):
            return prepare_answers(self.settings, training, small, calls, labelled, report)
        stages = self._stages(small, calls, labelled, report)
        if report.stage_a + report.gold == 0 or self._pairs(report, labelled) < self.settings.min_pairs:
            raise DataError(
                f"Expected at least {self.settings.min_pairs} training pairs, including large-model answers or true "
                f"labels, in {report.records} records. Found {report.stage_a} answered confidently by the large model "
                f"only, {report.stage_b} by the small model, {report.unsure} by neither, {report.unparsable} without "
                f"a parsable answer and {report.gold} true labels. Log more calls, or lower `large_threshold`."
            )
        return Prepared(*_split(stages, training), report)

    @staticmethod
    def _pairs(report: DistillationReport, labelled: tuple[Sequence[str], Sequence[str]] | None) -> int:
        """Return the number of training pairs from the log, without those from `labelled`."""
        return report.stage_a + report.stage_b + report.gold - (len(labelled[0]) if labelled else 0)

    def _training(self) -> TrainingSettings:
        if self.settings.mode != "paper":
            return self.settings.training
        return self.settings.training.filled(epochs=7, batch_size=64, learning_rate=1e-4, patience=7)

    def _stages(
        self,
        small: SmallModel,
        calls: list[CallRecord],
        labelled: tuple[Sequence[str], Sequence[str]] | None,
        report: DistillationReport,
    ) -> list[Examples]:
        """Return the non-empty stages: stage A, stage B and true labels."""
        known = set(small.labels)
        texts: list[str] = []
        stages: list[Examples] = []
        gold_texts, gold_labels = (list(part) for part in labelled) if labelled else ([], [])
        # Records with a gold label train neither stage. If S1 lacks that label, no target that S1 can learn is right.
        silent = [call for call in calls if call.gold is None]
        for call in calls:
            if call.gold is not None and call.gold in known:
                gold_texts.append(call.input)
                gold_labels.append(call.gold)
        if silent:
            texts = [call.input for call in silent]
            predictions = small.predict_batch(texts)
            reliability = self._reliability(calls, report)
            sure = self._sure(small, predictions, silent)
            stages += self._teachers(silent, predictions, sure, reliability, report)
        report.gold = len(gold_texts)
        if gold_texts:
            stages.append(Examples(gold_texts, one_hot(gold_labels, small.labels)))
        given = (call.answer_label for call in calls)
        strange = Counter(label for label in given if label is not None and label not in known)
        strange.update(call.gold for call in calls if call.gold is not None and call.gold not in known)
        report.new_labels = {str(label): count for label, count in strange.most_common()}
        return [stage for stage in stages if len(stage)]

    def _reliability(self, calls: list[CallRecord], report: DistillationReport) -> dict[str, float]:
        """Return the large model's estimated accuracy by answered label, shrunk towards its overall accuracy.

        The key "" has the overall accuracy.
        """
        checked = [call for call in calls if call.gold is not None and call.answer_label is not None]
        right, asked = Counter[str](), Counter[str]()
        for call in checked:
            assert call.answer_label is not None
            asked[call.answer_label] += 1
            right[call.answer_label] += call.answer_label == call.gold
        prior = self.settings.large_accuracy
        overall = (right.total() + PRIOR_STRENGTH * prior) / (asked.total() + PRIOR_STRENGTH)
        report.reliability = {
            label: (right[label] + PRIOR_STRENGTH * overall) / (n + PRIOR_STRENGTH) for label, n in asked.items()
        }
        return {"": overall, **report.reliability}

    def _teachers(
        self,
        calls: list[CallRecord],
        predictions: PredictionBatch,
        sure: BoolArray,
        reliability: dict[str, float],
        report: DistillationReport,
    ) -> list[Examples]:
        """Return stage A and stage B, from records without a true label."""
        own = predictions.probabilities
        position = {label: i for i, label in enumerate(predictions.labels)}
        rows: list[int] = []
        answers: list[int] = []
        trust: list[float] = []
        for i, call in enumerate(calls):
            if sure[i] or call.large_model == "":
                report.unsure += not sure[i]
            elif call.answer_label is None or call.answer_label not in position:
                report.unparsable += call.answer_label is None
            else:
                confidence = call.large_confidence
                r = reliability.get(call.answer_label, reliability[""]) if confidence is None else confidence
                if r > self.settings.large_threshold:
                    rows.append(i)
                    answers.append(position[call.answer_label])
                    trust.append(r)
                else:
                    report.unsure += 1
        report.stage_a, report.stage_b = len(rows), int(sure.sum())
        taught = self._taught(
            own[rows], predictions.labels, np.array(answers, dtype=np.intp), np.array(trust), [calls[i] for i in rows]
        )
        kept = np.flatnonzero(sure)
        stage_b = own[kept]
        if self.settings.mode == "paper":
            stage_b = np.eye(own.shape[1])[stage_b.argmax(axis=1)]
        texts = [call.input for call in calls]
        return [
            Examples([texts[i] for i in rows], self._tempered(taught)),
            Examples([texts[i] for i in kept.tolist()], self._tempered(stage_b)),
        ]

    def _sure(self, small: SmallModel, predictions: PredictionBatch, calls: list[CallRecord]) -> BoolArray:
        """Return whether S1 is confident, by the configured threshold, else its own policy, else `_threshold`."""
        if self.settings.threshold is None and small.policy is not None:
            return small.policy.evaluate(predictions).keep
        return np.asarray(predictions.confidence >= self._threshold(small, calls))

    def _threshold(self, small: SmallModel, calls: list[CallRecord]) -> float:
        """Return the configured threshold, else S1's own, else that of the newest record, else 0.9."""
        for threshold in (self.settings.threshold, small.threshold):
            if threshold is not None:
                return threshold
        by_probability = [call for call in calls if not call.policy or "MaxProbability" in call.policy]
        given = [call for call in by_probability if call.threshold is not None]
        newest = max(given, key=lambda call: call.time).threshold if given else None
        return 0.9 if newest is None else newest

    def _taught(
        self,
        own: FloatArray,
        labels: tuple[str, ...],
        answers: np.ndarray[Any, np.dtype[np.intp]],
        trust: FloatArray,
        calls: list[CallRecord],
    ) -> FloatArray:
        """Return the target distributions of stage A, shape `[a, k]`."""
        n, k = own.shape if own.ndim == 2 else (0, 0)
        if not n:
            return np.zeros((0, k))
        hard: FloatArray = np.eye(k)[answers]
        if self.settings.mode == "paper":
            return hard
        likelihood = np.where(hard > 0, trust[:, None], (1.0 - trust[:, None]) / max(1, k - 1))
        for i, call in enumerate(calls):
            logged = call.large_probabilities
            if logged is not None and len(logged) == len(call.labels) and set(call.labels) == set(labels):
                likelihood[i] = [logged[call.labels.index(label)] for label in labels]
        if self.settings.mode == "posterior":
            likelihood = likelihood * own
        return np.asarray(likelihood / likelihood.sum(axis=1, keepdims=True), dtype=np.float64)

    def _tempered(self, targets: FloatArray) -> FloatArray:
        if self.settings.temperature == 1.0 or not len(targets):
            return targets
        raised = np.asarray(targets ** (1.0 / self.settings.temperature), dtype=np.float64)
        return np.asarray(raised / raised.sum(axis=1, keepdims=True), dtype=np.float64)


def _fingerprint(small: SmallModel) -> str:
    """Return a hash of a small model's labels, temperature, threshold, policy and weights."""
    seen = hashlib.sha256(repr((small.labels, small.temperature, small.threshold, small.policy)).encode())
    for name, array in sorted(small.weights().items()):
        seen.update(name.encode())
        seen.update(np.ascontiguousarray(array).tobytes())
    for member in getattr(small, "members", ()):
        seen.update(_fingerprint(member).encode())
    return seen.hexdigest()


def cold_start(
    records: Iterable[CallRecord] | Iterable[Sequence[CallRecord]], *, kind: str = "embedding", **options: Any
) -> SmallModel:
    """Train the first small model of a task on the logged answers of the large model.

    If a record has a true label, it is used instead of the answer. Labels with a single example are left out.

    Args:
        records: Call records of a task without a small model.
        kind: Kind of small model.
        **options: Keyword arguments of its `train`.

    Raises:
        DataError: If fewer than two labels have two examples each.
    """
    from langchain_datashunt.small_models.bundles.loading import small_model_class

    calls = [call for call in _flat(records) if call.input.strip()]
    pairs = [(call.input, call.gold or call.answer_label) for call in calls if call.gold or call.answer_label]
    counts = Counter(label for _, label in pairs)
    pairs = [(text, label) for text, label in pairs if counts[label] > 1]
    if len({label for _, label in pairs}) < 2:
        raise DataError(
            f"Expected two labels with at least two answers each to train the first small model, got {len(pairs)} "
            f"usable answers from records with {len(counts)} labels. Log more calls."
        )
    trainable: Any = small_model_class(kind)
    trained: SmallModel = trainable.train([text for text, _ in pairs], [str(label) for _, label in pairs], **options)
    return trained


def _flat(records: Iterable[Any]) -> list[CallRecord]:
    found: list[CallRecord] = []
    for item in records:
        found += [item] if isinstance(item, CallRecord) else item
    return [call for call in found if call.readable]


def readable_calls(small: SmallModel, calls: list[CallRecord]) -> tuple[list[CallRecord], int]:
    """Return the calls whose input the small model can read, in a fixed order, and the number of other calls."""
    found = sorted(calls, key=lambda call: (call.input_hash, call.id))
    reader = small.reader
    if isinstance(reader, TextReader):
        return found, 0
    good: list[CallRecord] = []
    for call in found:
        with suppress(InputError):
            reader.read(call.input)
            good.append(call)
    return good, len(found) - len(good)


def _split(stages: list[Examples], settings: TrainingSettings) -> tuple[list[Examples], Examples]:
    """Hold out a random part of each stage for validation. Every stage keeps at least one training example."""
    rng = np.random.default_rng(settings.seed)
    learn, texts, targets = [], [], []
    for stage in stages:
        order = rng.permutation(len(stage))
        n = min(len(stage) - 1, max(1, round(len(stage) * settings.validation_fraction)))
        held = stage.take(order[:n])
        texts += held.texts
        targets.append(held.targets)
        learn.append(stage.take(order[n:]))
    return learn, Examples(texts, np.concatenate(targets))
