"""ContrastiveClassifier: the encoder itself learns from few labels, by contrast, before heads are put on it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from langchain_datashunt._utils.optional import require
from langchain_datashunt.calibration.temperature import fit_temperature
from langchain_datashunt.exceptions import BundleMismatchError, DataError
from langchain_datashunt.small_models.base import SmallModel
from langchain_datashunt.small_models.bundles.bundle import BundleInfo
from langchain_datashunt.small_models.kinds.embedding import EmbeddingClassifier
from langchain_datashunt.small_models.kinds.encoder import PrecomputedEmbeddings, SentenceEncoder, shared_encoder
from langchain_datashunt.small_models.kinds.ensemble import EnsembleClassifier, log_probabilities
from langchain_datashunt.small_models.kinds.neighbours import NeighbourClassifier
from langchain_datashunt.small_models.scores import softmax
from langchain_datashunt.small_models.training.fitting import Stage, fit_network
from langchain_datashunt.small_models.training.training import (
    MIN_EXAMPLES_FOR_CALIBRATION,
    Examples,
    TrainingReport,
    TrainingSettings,
    lineage_of,
    one_hot,
    split_examples,
    text_hashes,
    write_metrics,
)

if TYPE_CHECKING:
    import torch

LOSS_TEMPERATURE = 0.1
"""By which cosines are divided in the contrastive loss."""

HELD_OUT = 0.2
"""Share of each label's examples on which epochs, weights and temperature are chosen."""

PAIRS_AN_EPOCH = 1_600
"""Pairs of an epoch at the most; small training sets are paired twice over."""

SHARPENING = 0.7
"""By which the temperature of pseudo-labels is multiplied."""

SAMPLE = 256
"""Training pairs that are measured where nothing is held out."""

ENCODER_FOLDER = "encoder"


class ContrastiveClassifier(EnsembleClassifier):
    """Heads on an encoder that was fine-tuned until texts of one label lie together, pooled with heads on the original.

    SetFit's method (Tunstall et al. 2022) with the supervised contrastive loss (Khosla et al. 2020): pairs of texts of
    one label are drawn together and away from all others of the batch; then a linear head and kernel neighbours are
    trained on the fine-tuned and, pooled with them, on the original embeddings. Strong from a few labels per class, at
    twice the work of an `EmbeddingClassifier` for each text. The first half of the members reads the original encoder,
    the second half the fine-tuned one, which the bundle holds.
    """

    @classmethod
    @override
    def train(  # type: ignore[override]
        cls,
        texts: Sequence[str],
        labels: Sequence[str],
        *,
        validation: tuple[Sequence[str], Sequence[str]] | None = None,
        label_set: Sequence[str] | None = None,
        settings: TrainingSettings | None = None,
        base: str | None = None,
        device: str | None = None,
        model_id: str = "contrastive",
        input_key: str = "input",
        label_texts: Mapping[str, str] | None = None,
        unlabelled: Sequence[str] = (),
    ) -> Self:
        """Fine-tune the encoder, train the members, and pool them with equal weights.

        Held out is the validation set where one is given, else a fifth of each label's examples: it stops the tuning
        and calibrates members and pool. Without a validation set, encoder and members are then trained once more on
        all examples, for as many epochs as were best.

        Unlabelled texts are given labels by the pool, sharpened, and the members are trained once more on both
        (self-training with soft pseudo-labels; Lee 2013, sharpened as by Berthelot et al. 2019).

        Args:
            texts: `n` training texts.
            labels: Their labels.
            validation: Texts and labels to stop and calibrate on.
            label_set: All labels and their order; None for those that occur, sorted.
            settings: How the encoder is tuned; None for this kind's defaults (2 epochs, 32 pairs a step, 5e-5).
            base: Folder or hub id of the encoder; None for the bundled package.
            device: cuda, mps or cpu; None chooses.
            model_id: Name of the model in predictions and records.
            input_key: Where mappings hold the text.
            label_texts: What labels mean, in words: each is learnt as one more example of its label.
            unlabelled: Texts of the same kind without labels; the neighbours remember each. They count as trained on:
                nothing can be calibrated on them.

        Raises:
            DataError: The training set cannot be used; the message says why.
        """
        chosen = (settings or TrainingSettings()).filled(epochs=2, batch_size=32, learning_rate=5e-5, patience=1)
        started = time.perf_counter()
        held = chosen.model_copy(update={"validation_fraction": HELD_OUT})
        split = split_examples(texts, labels, validation=validation, settings=held, label_set=label_set)
        one_hot(list(label_texts or {}), split.labels)  # a name of no label is refused before hours of training
        own = [*split.train.texts, *split.validation.texts]
        others, names = _without_labels(unlabelled, own), dict(label_texts or {})
        original = shared_encoder(base, device)
        frozen = PrecomputedEmbeddings(original, [*own, *names.values(), *others])
        first = _Trial(split.train, split.validation, split.labels, names, others)
        tuned, report = first.tune(SentenceEncoder(base, device=device), chosen, "held-out")
        pool = first.pool(frozen, tuned)
        if not split.validation_given:
            everything = Examples(list(texts), one_hot(labels, split.labels))
            second = _Trial(everything, None, split.labels, names, others)
            epochs = max(1, report.best_step)
            again = chosen.model_copy(update={"epochs": epochs, "log": None})
            tuned, _ = second.tune(SentenceEncoder(base, device=device), again, "all")
            pool = second.pool(frozen, tuned, like=pool)
        report.seconds = time.perf_counter() - started
        write_metrics(chosen, report, "contrastive fine-tuning")
        lineage = lineage_of(split, chosen, report, base=original.name, unlabelled=len(others))
        hashes = sorted({*lineage["training_text_hashes"], *text_hashes(others)})
        return cls(
            labels=split.labels,
            model_id=model_id,
            input_key=input_key,
            temperature=pool.temperature,
            members=pool.reading(original, tuned),
            lineage={**lineage, "training_text_hashes": hashes},
        )

    @property
    def encoder(self) -> SentenceEncoder:
        """The fine-tuned encoder."""
        found: SentenceEncoder = self.members[-1].embeddings  # type: ignore[attr-defined]
        return found

    # Bundles: the members' own, and the fine-tuned encoder once for all

    @classmethod
    @override
    def kind(cls) -> str:
        return "contrastive"

    @override
    def write_files(self, folder: Path) -> None:
        super().write_files(folder)
        self.encoder.save(folder / ENCODER_FOLDER)

    @classmethod
    @override
    def member_overrides(cls, info: BundleInfo, folder: Path, overrides: dict[str, Any]) -> list[dict[str, Any]]:
        if not (folder / ENCODER_FOLDER / "config.json").is_file():
            raise BundleMismatchError(
                f"The bundle {folder} of kind 'contrastive' has no {ENCODER_FOLDER}/config.json. Copy it again."
            )
        given = {name: overrides[name] for name in ("device", "dtype", "engine") if overrides.get(name) is not None}
        tuned = SentenceEncoder(str(folder / ENCODER_FOLDER), **given)
        n = int(info.settings["members"])
        return [overrides] * (n // 2) + [{**overrides, "embeddings": tuned}] * (n - n // 2)


@dataclass(frozen=True)
class _Pool:
    """Members of which the first half reads the original encoder, and their common temperature."""

    members: tuple[SmallModel, ...]
    temperature: float
    teacher: _Pool | None = None
    """What gave unlabelled texts the labels that these learnt."""

    def pseudo_labelled(self, texts: list[str]) -> Examples:
        """Texts with what the pool makes of them, sharpened."""
        pooled = np.mean([log_probabilities(member, texts) for member in self.members], axis=0)
        return Examples(texts, np.asarray(softmax(pooled, self.temperature * SHARPENING), dtype=np.float64))

    def reading(self, original: SentenceEncoder, tuned: SentenceEncoder) -> tuple[SmallModel, ...]:
        """The members with the encoders themselves, not with what those said of the training texts."""
        half = len(self.members) // 2
        encoders = [original] * half + [tuned] * half
        pairs = zip(self.members, encoders, strict=True)
        return tuple(member.model_copy(update={"embeddings": encoder}) for member, encoder in pairs)


@dataclass(frozen=True)
class _Trial:
    """What encoder and heads are trained on, and what judges them."""

    train: Examples
    validation: Examples | None
    labels: tuple[str, ...]
    label_texts: dict[str, str]
    unlabelled: list[str]

    def tune(
        self, encoder: SentenceEncoder, settings: TrainingSettings, what: str
    ) -> tuple[SentenceEncoder, TrainingReport]:
        """Fine-tune an encoder in place, with early stopping where something is held out."""
        rng = np.random.default_rng(settings.seed)
        own = [*self.train.texts, *self.label_texts.values()]
        truth = np.array([*self.train.targets.argmax(axis=1), *map(self.labels.index, self.label_texts)])
        ids = encoder.tokenizer(own)[0]
        pairs = _pairs(truth, max(1, PAIRS_AN_EPOCH // len(own)), rng)
        stage = Stage([(ids[i], ids[j]) for i, j in pairs], np.eye(len(self.labels))[truth[[i for i, _ in pairs]]])
        if self.validation is None:
            some = rng.permutation(len(pairs))[:SAMPLE]
            judged = Stage([stage.features[i] for i in some.tolist()], stage.targets[some])
        else:
            wanted = self.validation.targets.argmax(axis=1)
            order = rng.permutation(len(wanted))
            held = encoder.tokenizer(self.validation.texts)[0]
            partners = {label: np.flatnonzero(truth == label) for label in np.unique(wanted)}
            features = [
                (held[i], ids[rng.choice(partners[wanted[i]])] if partners[wanted[i]].size else held[i]) for i in order
            ]
            judged = Stage(features, self.validation.targets[order])
        folder = None if settings.checkpoint is None else settings.checkpoint / what
        report = fit_network(
            encoder.network,
            lambda network, batch: _embedded_pairs(encoder, network, batch),
            [stage],
            judged,
            settings.model_copy(update={"checkpoint": folder}),
            what=f"contrastive fine-tuning ({what})",
            loss=contrastive_loss,
            validation_loss=contrastive_loss,
            keep="last" if self.validation is None else "best",
        )
        encoder.name = f"fine-tuned {encoder.name}"
        return encoder, report

    def pool(self, frozen: PrecomputedEmbeddings, tuned: SentenceEncoder, like: _Pool | None = None) -> _Pool:
        """A linear head and neighbours on each encoder; on unlabelled texts, too, once such a pool has labelled them.

        What the tuned encoder has seen cannot show how sure a head on it may be: without held-out texts, strengths,
        widths and temperatures are those of `like`, chosen when there were some.
        """
        judges = [] if self.validation is None else self.validation.texts
        known = [*self.train.texts, *judges, *self.label_texts.values(), *self.unlabelled]
        encoders = (frozen, PrecomputedEmbeddings(tuned, known))
        teacher = self._pool(encoders, None, like if like is None else like.teacher or like)
        if not self.unlabelled:
            return teacher
        found = self._pool(encoders, teacher.pseudo_labelled(self.unlabelled), like)
        return replace(found, teacher=teacher)

    def _pool(
        self, encoders: Sequence[PrecomputedEmbeddings], pseudo_labelled: Examples | None, like: _Pool | None
    ) -> _Pool:
        texts, names = self.train.texts, [self.labels[i] for i in self.train.targets.argmax(axis=1)]
        judged: Any = None
        if self.validation is not None:
            judged = (self.validation.texts, [self.labels[i] for i in self.validation.targets.argmax(axis=1)])
        trained: list[SmallModel] = []
        for encoder in encoders:
            more: dict[str, Any] = {
                "embeddings": encoder,
                "validation": judged,
                "label_set": self.labels,
                "label_texts": self.label_texts,
                "pseudo_labelled": pseudo_labelled,
                "settings": TrainingSettings(progress=False),
            }
            for kind, option, chosen in _HEADS:
                model = None if like is None else like.members[len(trained)]
                fixed = {} if model is None else {option: (model.lineage[chosen],)}
                head: SmallModel = kind.train(texts, names, **more, **fixed)
                trained.append(head if model is None else head.model_copy(update={"temperature": model.temperature}))
        return _Pool(tuple(trained), self._temperature(trained) if like is None else like.temperature)

    def _temperature(self, members: Sequence[SmallModel]) -> float:
        if self.validation is None or len(self.validation) < MIN_EXAMPLES_FOR_CALIBRATION:
            return 1.0
        pooled = np.mean([log_probabilities(member, self.validation.texts) for member in members], axis=0)
        return fit_temperature(pooled, self.validation.targets.argmax(axis=1))


_HEADS: tuple[tuple[Any, str, str], ...] = (
    (EmbeddingClassifier, "strengths", "regularisation"),
    (NeighbourClassifier, "widths", "width"),
)
"""Kinds of member, the argument of `train` that fixes what they choose, and where the lineage tells what it was."""


def _without_labels(texts: Sequence[str], labelled: Sequence[str]) -> list[str]:
    """The texts once each, without those that have a label.

    Raises:
        DataError: One is empty.
    """
    if empty := [i for i, text in enumerate(texts) if not isinstance(text, str) or not text.strip()]:
        raise DataError(f"Unlabelled text {empty[0]} is empty ({len(empty)} in all); remove such rows.")
    known = set(labelled)
    return [text for text in dict.fromkeys(texts) if text not in known]


def contrastive_loss(pairs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Supervised contrastive loss (Khosla et al. 2020, eq. 2, the sum over positives outside the logarithm), nats.

    Args:
        pairs: Unit vectors of `n` pairs of texts of one label, shape `[n, 2, d]`.
        targets: Their labels, one-hot, shape `[n, k]`.
    """
    own_torch: Any = require("torch", "torch")
    vectors, labels = pairs.flatten(0, 1), targets.argmax(dim=1).repeat_interleave(2)
    own = own_torch.eye(len(vectors), dtype=own_torch.bool, device=vectors.device)
    likeness = (vectors @ vectors.T / LOSS_TEMPERATURE).masked_fill(own, -1e9)
    log_p = likeness - likeness.logsumexp(dim=1, keepdim=True)
    positive = ((labels[:, None] == labels) & ~own).float()
    loss: torch.Tensor = -((log_p * positive).sum(1) / positive.sum(1)).mean()
    return loss


def _embedded_pairs(encoder: SentenceEncoder, network: torch.nn.Module, pairs: list[Any]) -> torch.Tensor:
    """Unit vectors of pairs of token ids, shape `[n, 2, d]`."""
    vectors = encoder.embed_ids(network, [ids for pair in pairs for ids in pair])
    return vectors.view(len(pairs), 2, -1)


def _pairs(truth: NDArray[np.intp], rounds: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Each text with another of its label, so many times; with itself where there is no other."""
    found: list[tuple[int, int]] = []
    for label in np.unique(truth):
        rows = np.flatnonzero(truth == label)
        for _ in range(rounds):
            order = rng.permutation(rows)
            found.extend(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
    return found
