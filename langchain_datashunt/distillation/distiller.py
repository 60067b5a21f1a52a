"""2-Stage Confidence Distillation: a small model learns from the log of what the large model answered.

Stage A: where S1 was not sure and the large model was, S2 learns the large model's answer. Stage B: where S1 was sure,
S2 learns S1, so that it does not forget. S2 starts as a copy of S1; S1 itself is never changed.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from pydantic import Field

from langchain_datashunt._utils.settings import Configured
from langchain_datashunt.call_log.record import CallRecord
from langchain_datashunt.distillation.answers import prepare_answers
from langchain_datashunt.distillation.prepared import DistillationReport, Prepared
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
"""How many answers the overall accuracy counts for, where a label's own is measured from few."""


class DistillationSettings(Configured):
    """How S2 is taught."""

    threshold: float | None = None
    """Where S1 counts as sure; None for its own shunt threshold, else that of the newest record, else 0.9."""

    large_threshold: float = Field(default=0.5, ge=0.0, le=1.0)
    """The large model's confidence must be above this for stage A."""

    large_accuracy: float = Field(default=0.85, gt=0.0, lt=1.0)
    """The large model's accuracy where no gold label tells it."""

    mode: Literal["posterior", "teacher", "paper"] = "posterior"
    """What S2 learns in stage A.

    "posterior": p(y) proportional to p_S1(y) * P(L says this | y), so that an answer that S1 finds absurd counts less.
    "teacher": the large model's distribution, or its answer smoothed by its measured reliability.
    "paper": the bare answers of both teachers, cross-entropy, batches of 64, 7 epochs, 1e-4, as the authors' code.
    """

    temperature: float = Field(default=1.0, gt=0.0)
    """Distillation temperature T of T^2 KL(p_teacher^T || p_S2^T)."""

    gce: float | None = Field(default=None, gt=0.0, le=1.0)
    """Exponent of the generalised cross-entropy, which wrong answers pull less; None for KL."""

    min_pairs: int = Field(default=20, ge=2)
    """With fewer usable records nothing is learnt."""

    training: TrainingSettings = TrainingSettings()
    """Epochs, steps, seed; what is None is the small model's own default."""


@dataclass(frozen=True)
class DistillationResult:
    """The candidate S2, and what it learnt from."""

    model: SmallModel
    report: DistillationReport


class TwoStageDistiller:
    """Trains S2 from a copy of S1 on the records of routed calls.

    A small model that writes its answers learns whole answers; see `distillation.answers`.

    ```python
    distilled = TwoStageDistiller().distill(small, store.iterate(CallFilter(task="support")))
    ```

    Args:
        settings: How.
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
        """Train S2.

        Args:
            small: S1; not changed.
            records: Records, or batches of them as `CallLog.iterate` gives them.
            labelled: Texts and true labels to learn beside the log, for example what S1 was trained on.

        Raises:
            DataError: There is too little to learn from; the message says what there was.
            ConfigurationError: This kind of small model cannot learn on.
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
        """What is learnt; as it was at first, where a training goes on from its checkpoint."""
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
        """Stages and a held-out part, from the records as they are now; in whatever order they came."""
        calls, unreadable = readable_calls(small, _flat(records))
        report = DistillationReport(records=len(calls), unreadable=unreadable)
        if isinstance(small, GeneratingModel):
            return prepare_answers(self.settings, training, small, calls, labelled, report)
        stages = self._stages(small, calls, labelled, report)
        if report.stage_a + report.gold == 0 or self._pairs(report, labelled) < self.settings.min_pairs:
            raise DataError(
                f"There is too little to learn from in {report.records} records: {report.stage_a} where only the large "
                f"model was sure, {report.stage_b} where the small one was, {report.unsure} where neither was, "
                f"{report.unparsable} unparsable, {report.gold} with a true label; at least "
                f"{self.settings.min_pairs} of these pairs are needed. Record more, or lower `large_threshold`."
            )
        return Prepared(*_split(stages, training), report)

    @staticmethod
    def _pairs(report: DistillationReport, labelled: tuple[Sequence[str], Sequence[str]] | None) -> int:
        """Of the log; what is learnt beside it does not count."""
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
        """Examples of stage A, of stage B and of true labels; empty ones left out."""
        known = set(small.labels)
        texts: list[str] = []
        stages: list[Examples] = []
        gold_texts, gold_labels = (list(part) for part in labelled) if labelled else ([], [])
        silent = [call for call in calls if call.gold is None]  # what is known to be another label is not taught
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
        strange = Counter(call.label for call in calls if call.label is not None and call.label not in known)
        strange.update(call.gold for call in calls if call.gold is not None and call.gold not in known)
        report.new_labels = {str(label): count for label, count in strange.most_common()}
        return [stage for stage in stages if len(stage)]

    def _reliability(self, calls: list[CallRecord], report: DistillationReport) -> dict[str, float]:
        """How often the large model is right when it answers a label, shrunk to its overall accuracy."""
        checked = [call for call in calls if call.gold is not None and call.label is not None]
        right, asked = Counter[str](), Counter[str]()
        for call in checked:
            assert call.label is not None
            asked[call.label] += 1
            right[call.label] += call.label == call.gold
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
        """Stage A and stage B of records without a true label."""
        own = predictions.probabilities
        position = {label: i for i, label in enumerate(predictions.labels)}
        rows: list[int] = []
        answers: list[int] = []
        trust: list[float] = []
        for i, call in enumerate(calls):
            if sure[i] or call.large_model == "":
                report.unsure += not sure[i]
            elif call.label is None or call.label not in position:
                report.unparsable += call.label is None
            else:
                confidence = call.large_confidence
                r = reliability.get(call.label, reliability[""]) if confidence is None else confidence
                if r > self.settings.large_threshold:
                    rows.append(i)
                    answers.append(position[call.label])
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
        """Where S1 is sure: by the threshold that was set, else its own policy, else as records had it."""
        if self.settings.threshold is None and small.policy is not None:
            return small.policy.evaluate(predictions).keep
        return np.asarray(predictions.confidence >= self._threshold(small, calls))

    def _threshold(self, small: SmallModel, calls: list[CallRecord]) -> float:
        """Where S1 counts as sure: as set, else S1's own threshold, else as the newest record had it, else 0.9."""
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
        """The distributions that stage A teaches, shape `[a, k]`."""
        n, k = own.shape if own.ndim == 2 else (0, 0)
        if not n:
            return np.zeros((0, k))
        said: FloatArray = np.eye(k)[answers]
        if self.settings.mode == "paper":
            return said
        likelihood = np.where(said > 0, trust[:, None], (1.0 - trust[:, None]) / max(1, k - 1))
        for i, call in enumerate(calls):
            told = call.large_probabilities
            if told is not None and len(told) == len(call.labels) and set(call.labels) == set(labels):
                likelihood[i] = [told[call.labels.index(label)] for label in labels]
        if self.settings.mode == "posterior":
            likelihood = likelihood * own
        return np.asarray(likelihood / likelihood.sum(axis=1, keepdims=True), dtype=np.float64)

    def _tempered(self, targets: FloatArray) -> FloatArray:
        if self.settings.temperature == 1.0 or not len(targets):
            return targets
        raised = np.asarray(targets ** (1.0 / self.settings.temperature), dtype=np.float64)
        return np.asarray(raised / raised.sum(axis=1, keepdims=True), dtype=np.float64)


def _fingerprint(small: SmallModel) -> str:
    """Stands for a small model: its labels, temperature and weights."""
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
    """Train the first small model of a task from logged large answers alone (true labels where there are).

    Args:
        records: Records of a task where everything went to the large model.
        kind: Kind of small model.
        **options: Passed to its `train`.

    Raises:
        DataError: There are too few labelled answers.
    """
    from langchain_datashunt.small_models.bundles.loading import small_model_class

    calls = [call for call in _flat(records) if call.input.strip()]
    pairs = [(call.input, call.gold or call.label) for call in calls if call.gold or call.label]
    counts = Counter(label for _, label in pairs)
    pairs = [(text, label) for text, label in pairs if counts[label] > 1]
    if len({label for _, label in pairs}) < 2:
        raise DataError(
            f"{len(pairs)} usable answers of {len(counts)} labels are too few for a first small model; two labels "
            f"with two answers each are the least. Collect more."
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
    """Those whose input the small model reads, in a fixed order, and how many others there were."""
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
    """Hold a random part of each stage out, at least one example in all."""
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
