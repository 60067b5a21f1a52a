"""ContrastiveClassifier: fine-tunes the encoder contrastively on few labels, then trains heads on it."""

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
"""Divisor of the cosine similarities in the contrastive loss."""

HELD_OUT = 0.2
"""Fraction of each label's examples held out to choose the number of epochs, the heads and the temperature."""

PAIRS_AN_EPOCH = 1_600
"""Approximate number of pairs per epoch. Each text is paired `PAIRS_AN_EPOCH // n` times, and at least once."""

SHARPENING = 0.7
"""Factor on the temperature of pseudo-labels. Values below 1 make them more confident."""

SAMPLE = 256
"""Number of training pairs used to report the loss if no examples are held out."""

ENCODER_FOLDER = "encoder"


class ContrastiveClassifier(EnsembleClassifier):
    """An ensemble of heads on the original encoder and on a contrastively fine-tuned copy.

    This is SetFit's method (Tunstall et al. 2022) with the supervised contrastive loss (Khosla et al. 2020).
    Fine-tuning pulls pairs of texts with the same label together and pushes texts of other labels apart. A linear head
    and a kernel-neighbours head are then trained on each encoder, and the four members are pooled.

    Accurate with a few labels per class. Each text is embedded twice, so a prediction costs twice as much as with an
    `EmbeddingClassifier`. The first half of the members uses the original encoder. The second half uses the fine-tuned
    encoder, which is saved in the bundle.
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

        The held-out set is `validation` if given, and otherwise a fifth of each label's examples. It is used for early
        stopping of the fine-tuning and to calibrate the members and the pool. If no validation set is given, the
        encoder and the members are then trained again on all examples, for the best number of epochs.

        Unlabelled texts receive sharpened soft pseudo-labels from the pool (Lee 2013, sharpened as in Berthelot et al.
        2019). The members are then trained again on both labelled and pseudo-labelled texts.

        Args:
            texts: `n` training texts.
            labels: Labels of the texts.
            validation: Texts and labels for early stopping and calibration. None holds out a part of `texts`.
            label_set: All labels in order. None uses the labels of the training set, sorted.
            settings: Settings of the fine-tuning. None uses 2 epochs, 32 pairs per step and learning rate 5e-5.
            base: Folder or hub id of the encoder. None uses the bundled package.
            device: "cuda", "mps" or "cpu". None uses the first available.
            model_id: Name of the model in predictions and logs.
            input_key: Key of the text in mapping inputs.
            label_texts: Description of each label, added to the training set as one more example of it.
            unlabelled: Texts without labels from the same task. They count as training texts, so they cannot be used
                for calibration. The neighbours heads store each of them.

        Returns:
            A trained ensemble of four members.

        Raises:
            DataError: The training set cannot be used. The message gives the reason.
        """
        chosen = (settings or TrainingSettings()).filled(epochs=2, batch_size=32, learning_rate=5e-5, patience=1)
        started = time.perf_counter()
        held = chosen.model_copy(update={"validation_fraction": HELD_OUT})
        split = split_examples(texts, labels, validation=validation, settings=held, label_set=label_set)
        one_hot(list(label_texts or {}), split.labels)  # reject unknown labels before the long training starts
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

    # Bundles: one bundle per member, and one copy of the fine-tuned encoder for all of them

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
                f"The bundle {folder} of kind 'contrastive' has no {ENCODER_FOLDER}/config.json. Copy the complete "
                f"bundle again."
            )
        given = {name: overrides[name] for name in ("device", "dtype", "engine") if overrides.get(name) is not None}
        tuned = SentenceEncoder(str(folder / ENCODER_FOLDER), **given)
        n = int(info.settings["members"])
        return [overrides] * (n // 2) + [{**overrides, "embeddings": tuned}] * (n - n // 2)


@dataclass(frozen=True)
class _Pool:
    """Members and their common temperature; the first half of the members uses the original encoder."""

    members: tuple[SmallModel, ...]
    temperature: float
    teacher: _Pool | None = None
    """Pool that pseudo-labelled the unlabelled texts for these members. None if there were none."""

    def pseudo_labelled(self, texts: list[str]) -> Examples:
        """Return the texts with the pool's sharpened probabilities as targets."""
        pooled = np.mean([log_probabilities(member, texts) for member in self.members], axis=0)
        return Examples(texts, np.asarray(softmax(pooled, self.temperature * SHARPENING), dtype=np.float64))

    def reading(self, original: SentenceEncoder, tuned: SentenceEncoder) -> tuple[SmallModel, ...]:
        """Return the members with their encoders in place of the precomputed embeddings."""
        half = len(self.members) // 2
        encoders = [original] * half + [tuned] * half
        pairs = zip(self.members, encoders, strict=True)
        return tuple(member.model_copy(update={"embeddings": encoder}) for member, encoder in pairs)


@dataclass(frozen=True)
class _Trial:
    """The training and held-out data for one run of fine-tuning and head training."""

    train: Examples
    validation: Examples | None
    labels: tuple[str, ...]
    label_texts: dict[str, str]
    unlabelled: list[str]

    def tune(
        self, encoder: SentenceEncoder, settings: TrainingSettings, what: str
    ) -> tuple[SentenceEncoder, TrainingReport]:
        """Fine-tune an encoder in place, with early stopping if there is a validation set."""
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
        """Train a linear head and a neighbours head on each encoder.

        If there are unlabelled texts, a first pool pseudo-labels them and the heads are trained again on all texts.

        Args:
            frozen: Embeddings of the original encoder.
            tuned: The fine-tuned encoder.
            like: Pool whose penalties, kernel widths and temperatures are reused. None chooses them on the held-out
                texts. Needed if nothing is held out: the encoder was then fine-tuned on all texts, and choosing on
                these would make the heads overconfident.
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
"""Classes of the members, the `train` argument that fixes their hyperparameter, and its key in the lineage."""


def _without_labels(texts: Sequence[str], labelled: Sequence[str]) -> list[str]:
    """Return the distinct texts that are not in `labelled`.

    Raises:
        DataError: A text is empty or is not a string.
    """
    if empty := [i for i, text in enumerate(texts) if not isinstance(text, str) or not text.strip()]:
        raise DataError(f"Unlabelled text {empty[0]} is empty ({len(empty)} empty texts in total). Remove these rows.")
    known = set(labelled)
    return [text for text in dict.fromkeys(texts) if text not in known]


def contrastive_loss(pairs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute the supervised contrastive loss in nats.

    Khosla et al. (2020), equation 2, with the sum over positives outside the logarithm.

    Args:
        pairs: Unit vectors of `n` pairs of texts with the same label, shape `[n, 2, d]`.
        targets: One-hot labels of the pairs, shape `[n, k]`.

    Returns:
        A scalar tensor, the mean over all `2 n` vectors.
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
    """Return the unit vectors of pairs of token ids, shape `[n, 2, d]`."""
    vectors = encoder.embed_ids(network, [ids for pair in pairs for ids in pair])
    return vectors.view(len(pairs), 2, -1)


def _pairs(truth: NDArray[np.intp], rounds: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Pair each text with a random text of the same label, `rounds` times.

    The only text of a label is paired with itself.
    """
    found: list[tuple[int, int]] = []
    for label in np.unique(truth):
        rows = np.flatnonzero(truth == label)
        for _ in range(rounds):
            order = rng.permutation(rows)
            found.extend(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
    return found
