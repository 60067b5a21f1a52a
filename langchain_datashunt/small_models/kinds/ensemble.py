"""EnsembleClassifier: a weighted pool of several small models."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from typing_extensions import override

from langchain_datashunt.calibration.temperature import fit_temperature
from langchain_datashunt.exceptions import BundleMismatchError, ConfigurationError, DataError
from langchain_datashunt.inputs import InputReader
from langchain_datashunt.prediction import FloatArray
from langchain_datashunt.small_models.base import Loss, SmallModel
from langchain_datashunt.small_models.bundles.bundle import BundleInfo
from langchain_datashunt.small_models.kinds.encoder import PrecomputedEmbeddings, embed
from langchain_datashunt.small_models.kinds.on_embeddings import OnEmbeddings
from langchain_datashunt.small_models.scores import Scores, softmax
from langchain_datashunt.small_models.training.training import (
    MIN_EXAMPLES_FOR_CALIBRATION,
    Examples,
    TrainingReport,
    TrainingSettings,
    first_copies,
    lineage_of,
    one_hot,
    seen_in_training,
    split_examples,
    stratified_folds,
    write_metrics,
)

DEFAULT_KINDS = ("embedding", "neighbours")
FOLDS = 5
_TINY = 1e-12


class EnsembleClassifier(SmallModel):
    """A log-linear opinion pool of small models (Genest & Zidek 1986).

    The logits are the weighted sum of the members' calibrated log-probabilities. Members that share an encoder embed
    each text once.
    """

    reads_text: ClassVar[bool] = False  # the reader is that of the members, so it must be looked up

    members: tuple[SmallModel, ...] = Field(min_length=2)
    """Two or more small models with the same labels in the same order."""

    shares: tuple[float, ...] = ()
    """Non-negative weight of each member. Empty gives equal weights."""

    @model_validator(mode="after")
    def _members_fit(self) -> Self:
        if any(member.labels != self.labels for member in self.members):
            raise ConfigurationError(
                "Expected `members` with the labels of the ensemble in the same order, got different labels. Train all "
                "members with the same `label_set`."
            )
        if self.shares and (len(self.shares) != len(self.members) or min(self.shares) < 0 or sum(self.shares) <= 0):
            raise ConfigurationError(
                f"Expected `shares` with one non-negative weight for each of the {len(self.members)} members and a "
                f"positive sum, got {self.shares}."
            )
        return self

    @property
    @override
    def reader(self) -> InputReader:
        return self.members[0].reader.model_copy(update={"input_key": self.input_key})

    @override
    def workers(self) -> int:
        return min(member.workers() for member in self.members)

    @override
    def predict_scores(self, texts: Sequence[str]) -> Scores:
        weights = self.shares or (1.0 / len(self.members),) * len(self.members)
        total, cut = np.zeros((len(texts), len(self.labels))), np.zeros(len(texts), dtype=np.bool_)
        seen: dict[int, Scores] = {}
        errors: dict[int, Exception] = {}
        for weight, member in zip(weights, self.members, strict=True):
            scores = self._scores(member, texts, seen)
            total += weight * np.log(softmax(np.asarray(scores.logits, np.float64), member.temperature) + _TINY)
            if scores.truncated is not None:
                cut |= scores.truncated
            errors = {**scores.errors, **errors}
        return Scores(total, cut, errors=errors)

    @staticmethod
    def _scores(member: SmallModel, texts: Sequence[str], seen: dict[int, Scores]) -> Scores:
        if not isinstance(member, OnEmbeddings):
            return member.predict_scores(texts)
        key = id(member.embeddings)
        if key not in seen:
            seen[key] = Scores(*embed(member.embeddings, texts))
        return Scores(member.scores_of(seen[key].logits), seen[key].truncated)

    @classmethod
    def train(
        cls,
        texts: Sequence[str],
        labels: Sequence[str],
        *,
        validation: tuple[Sequence[str], Sequence[str]] | None = None,
        label_set: Sequence[str] | None = None,
        settings: TrainingSettings | None = None,
        kinds: Sequence[str] = DEFAULT_KINDS,
        model_id: str = "ensemble",
        input_key: str = "input",
        **options: Any,
    ) -> Self:
        """Train the members and choose the weights with the lowest held-out loss of the pool.

        If no validation set is given, the loss is measured by five-fold cross-validation, which trains each member
        five more times.

        Args:
            texts: `n` training texts.
            labels: Labels of the texts.
            validation: Texts and labels to choose weights and temperature. None cross-validates.
            label_set: All labels in order. None uses the labels of the training set, sorted.
            settings: Training settings for every member.
            kinds: Two or more kinds of small models.
            model_id: Name of the model in predictions and logs.
            input_key: Key of the text in mapping inputs.
            **options: Additional arguments for every member's `train`. `embeddings` and `label_texts` are passed only
                to kinds on frozen embeddings.

        Returns:
            A trained ensemble.

        Raises:
            DataError: The training set cannot be used. The message gives the reason.
        """
        chosen, started, report = settings or TrainingSettings(), time.perf_counter(), TrainingReport()
        split = split_examples(texts, labels, validation=validation, settings=chosen, label_set=label_set)
        more = {**options, "settings": chosen, "label_set": split.labels}
        if options.get("embeddings") is not None:
            known = [*texts, *(options.get("label_texts") or {}).values(), *(validation[0] if validation else ())]
            more["embeddings"] = PrecomputedEmbeddings(options["embeddings"], known)
        members = [
            _train(kind, texts, labels, {**more, "validation": validation, "settings": _part(chosen, f"member{i}")})
            for i, kind in enumerate(kinds)
        ]
        if validation is not None:
            logits = [log_probabilities(member, split.validation.texts) for member in members]
            truth = split.validation.targets.argmax(axis=1)
        else:
            logits, truth = _cross_fitted(kinds, texts, labels, split.labels, more, chosen.seed)
        shares, temperature = _weigh(logits, truth, report)
        if options.get("embeddings") is not None:
            members = [m.model_copy(update={"embeddings": options["embeddings"]}) for m in members]
        report.seconds = time.perf_counter() - started
        write_metrics(chosen, report, "ensemble weights")
        return cls(
            labels=split.labels,
            model_id=model_id,
            input_key=input_key,
            temperature=temperature,
            members=tuple(members),
            shares=shares,
            lineage=lineage_of(split, chosen, report, kinds=list(kinds), shares=list(shares)),
        )

    @classmethod
    def from_members(
        cls,
        members: Sequence[SmallModel],
        validation: tuple[Sequence[str], Sequence[str]],
        *,
        model_id: str = "ensemble",
    ) -> Self:
        """Pool trained models with the weights that have the lowest loss on a validation set.

        Args:
            members: Two or more models with the same labels in the same order.
            validation: Texts and labels that no member was trained on.
            model_id: Name of the model in predictions and logs.

        Returns:
            An ensemble of the given models.

        Raises:
            ConfigurationError: The members have different labels.
            DataError: The validation set contains training texts of a member, or unknown labels.
        """
        labels, report = members[0].labels, TrainingReport()
        if any(member.labels != labels for member in members):
            raise ConfigurationError(
                "Expected `members` with the same labels in the same order, got different labels. Train all members "
                "with the same `label_set`."
            )
        for member in members:
            if seen := seen_in_training(member.lineage, validation[0]):
                raise DataError(
                    f"{len(seen)} of {len(validation[0])} validation texts were used to train {member.model_id}, which "
                    f"would overstate its accuracy. Pass texts that no member was trained on."
                )
        held = Examples(list(validation[0]), one_hot(validation[1], labels))
        logits = [log_probabilities(member, held.texts) for member in members]
        shares, temperature = _weigh(logits, held.targets.argmax(axis=1), report)
        lineage = {"members": [member.lineage for member in members], "shares": list(shares)}
        return cls(
            labels=labels,
            model_id=model_id,
            input_key=members[0].input_key,
            temperature=temperature,
            members=tuple(members),
            shares=shares,
            lineage={**lineage, "training_text_hashes": _hashes(members), **_judged(report)},
        )

    @override
    def fit_soft_targets(
        self, stages: Sequence[Examples], held_out: Examples, settings: TrainingSettings, loss: Loss
    ) -> Self:
        members = tuple(
            member.fit_soft_targets(stages, held_out, _part(settings, f"member{i}"), loss)
            for i, member in enumerate(self.members)
        )
        learner = self.model_copy(update={"members": members, "lineage": {"parent": self.lineage}})
        learner._bundle = None
        return learner

    # Bundles: one subfolder with a complete bundle per member

    @classmethod
    @override
    def kind(cls) -> str:
        return "ensemble"

    @override
    def settings(self) -> dict[str, Any]:
        return {"shares": list(self.shares), "members": len(self.members)}

    @override
    def weights(self) -> dict[str, NDArray[Any]]:
        return {}

    @override
    def write_files(self, folder: Path) -> None:
        for i, member in enumerate(self.members):
            member.model_copy().save(folder / f"member{i}")

    @classmethod
    @override
    def from_weights(cls, info: BundleInfo, weights: dict[str, NDArray[Any]], folder: Path, **overrides: Any) -> Self:
        from langchain_datashunt.small_models.bundles.loading import load_small_model

        folders = [folder / f"member{i}" for i in range(int(info.settings["members"]))]
        if missing := [part.name for part in folders if not part.is_dir()]:
            raise BundleMismatchError(
                f"The bundle {folder} of kind 'ensemble' has no {', '.join(missing)}. Copy the complete bundle again."
            )
        each = cls.member_overrides(info, folder, overrides)
        return cls(
            **info.shared(),
            members=tuple(load_small_model(part, **more) for part, more in zip(folders, each, strict=True)),
            shares=tuple(info.settings["shares"]),
        )

    @classmethod
    def member_overrides(cls, info: BundleInfo, folder: Path, overrides: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the loading options of each member, by default those of the ensemble."""
        return [overrides] * int(info.settings["members"])


def _judged(report: TrainingReport) -> dict[str, float]:
    return {"validation_nll": report.best_loss} if report.history else {}


def _hashes(members: Sequence[SmallModel]) -> list[str]:
    """Return the hashes of all training texts of all members, sorted."""
    return sorted({one for member in members for one in member.lineage.get("training_text_hashes", ())})


def _part(settings: TrainingSettings, name: str) -> TrainingSettings:
    """Return settings with a checkpoint subfolder of their own, so that several trainings can resume."""
    if settings.checkpoint is None:
        return settings
    return settings.model_copy(update={"checkpoint": settings.checkpoint / name})


def _train(kind: str, texts: Sequence[str], labels: Sequence[str], options: Mapping[str, Any]) -> SmallModel:
    from langchain_datashunt.small_models.bundles.loading import small_model_class

    cls: Any = small_model_class(kind)
    only = {"embeddings", "label_texts"} - ({"embeddings", "label_texts"} if issubclass(cls, OnEmbeddings) else set())
    trained: SmallModel = cls.train(texts, labels, **{k: v for k, v in options.items() if k not in only})
    return trained


def log_probabilities(member: SmallModel, texts: Sequence[str]) -> FloatArray:
    """Return a member's calibrated log-probabilities, shape `[n, k]`."""
    scores = np.asarray(member.predict_scores(texts).logits, dtype=np.float64)
    return np.asarray(np.log(softmax(scores, member.temperature) + _TINY))


def _cross_fitted(
    kinds: Sequence[str], texts: Sequence[str], labels: Sequence[str], names: tuple[str, ...],
    options: Mapping[str, Any], seed: int,
) -> tuple[list[FloatArray], NDArray[np.intp]]:  # fmt: skip
    """Compute held-out log-probabilities of each kind by cross-validation.

    A label's only text is never held out, so the result has `m <= n` rows.

    Returns:
        Log-probabilities of each kind, shape `[m, k]`, and the true labels, shape `[m]`.
    """
    truth = np.array([names.index(label) for label in labels])
    held = stratified_folds(truth, first_copies(texts), FOLDS, seed)
    logits = []
    for i, kind in enumerate(kinds):
        parts = []
        for j, rows in enumerate(held):
            own = {**options, "settings": _part(options["settings"], f"member{i}-fold{j}")}
            rest = np.setdiff1d(np.arange(len(truth)), rows).tolist()
            member = _train(kind, [texts[i] for i in rest], [labels[i] for i in rest], own)
            parts.append(log_probabilities(member, [texts[i] for i in rows.tolist()]))
        logits.append(np.concatenate(parts))
    return logits, truth[np.concatenate(held)]


def _weigh(
    logits: list[FloatArray], truth: NDArray[np.intp], report: TrainingReport
) -> tuple[tuple[float, ...], float]:
    """Choose weights and temperature with the lowest held-out loss.

    One pass of coordinate search, starting at equal weights: each member's weight is set in turn to the best value of
    a grid, and the other weights are rescaled. With fewer than 50 examples, the weights stay equal and the temperature
    is 1.
    """
    n = len(logits)
    weights, temperature = np.full(n, 1.0 / n), 1.0
    if len(truth) < MIN_EXAMPLES_FOR_CALIBRATION:
        return tuple(weights.tolist()), temperature
    for i in (None, *range(n)):
        for part in (0.0, 0.15, 0.3, 0.5, 0.7, 0.85) if i is not None else (0.0,):
            tried = weights.copy()
            if i is not None:
                rest = np.delete(tried, i).sum()
                tried *= (1.0 - part) / rest if rest > 0 else 0.0
                tried[i] = part
            if tried.sum() <= 0:
                continue
            pooled = np.tensordot(tried, np.stack(logits), axes=1)
            t = fit_temperature(pooled, truth)
            scaled = pooled / t
            scaled -= scaled.max(axis=1, keepdims=True)
            loss = float((np.log(np.exp(scaled).sum(axis=1)) - scaled[np.arange(len(truth)), truth]).mean())
            if report.note(loss):
                weights, temperature = tried, t
    return tuple(weights.tolist()), temperature
