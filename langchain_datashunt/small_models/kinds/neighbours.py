"""NeighbourClassifier: kernel regression over the labels of similar training texts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from langchain_core.embeddings import Embeddings
from numpy.typing import NDArray
from pydantic import Field
from typing_extensions import override

from langchain_datashunt.calibration.temperature import fit_temperature
from langchain_datashunt.prediction import FloatArray
from langchain_datashunt.small_models.base import Loss
from langchain_datashunt.small_models.bundles.bundle import BundleInfo, check_weights
from langchain_datashunt.small_models.kinds.encoder import embed, shared_encoder
from langchain_datashunt.small_models.kinds.on_embeddings import OnEmbeddings, encoder_of
from langchain_datashunt.small_models.training.training import (
    MIN_EXAMPLES_FOR_CALIBRATION,
    Examples,
    TrainingReport,
    TrainingSettings,
    first_copies,
    lineage_of,
    one_hot,
    pseudo_labels,
    split_examples,
    write_metrics,
)

WIDTHS = (0.03, 0.05, 0.08, 0.12, 0.2)
"""Kernel widths to try, in cosine distance."""

JUDGES = 2_000
"""Maximum number of training texts in the leave-one-out choice of the width."""

_FLOOR = 1e-6
_CELLS = 50_000_000


class NeighbourClassifier(OnEmbeddings):
    """Kernel regression on the vectors of any LangChain `Embeddings` (Nadaraya 1964, Watson 1964).

    The probability of label `y` is proportional to `sum_i exp((cos(x, x_i) - 1) / width) q_i(y)`, with the label
    distribution `q_i` of training text `i`. New examples are added to the stored ones without retraining, which suits
    data that arrives continuously. Each prediction costs a product with all stored vectors.
    """

    vectors: NDArray[Any] = Field(repr=False)
    """Unit vectors of the training texts, shape `[m, d]`."""

    targets: NDArray[Any] = Field(repr=False)
    """Label distributions of the training texts, shape `[m, k]`."""

    width: float = Field(default=0.08, gt=0.0)
    """Kernel width in cosine distance."""

    @property
    @override
    def dimensions(self) -> int:
        return int(self.vectors.shape[1])

    @override
    def scores_of(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        step, found = max(1, _CELLS // max(1, len(self.vectors))), []
        for start in range(0, len(vectors), step):
            likeness = _unit(vectors[start : start + step]) @ self.vectors.T
            found.append(_log_shares(likeness, self.targets, self.width))
        return np.concatenate(found).astype(np.float32) if found else np.zeros((0, len(self.labels)), np.float32)

    @classmethod
    def train(
        cls,
        texts: Sequence[str],
        labels: Sequence[str],
        *,
        validation: tuple[Sequence[str], Sequence[str]] | None = None,
        label_set: Sequence[str] | None = None,
        settings: TrainingSettings | None = None,
        embeddings: Embeddings | None = None,
        model_id: str = "neighbours",
        input_key: str = "input",
        label_texts: Mapping[str, str] | None = None,
        pseudo_labelled: Examples | None = None,
        widths: Sequence[float] = WIDTHS,
    ) -> Self:
        """Store the training texts and choose the kernel width with the lowest held-out loss.

        If no validation set is given, the loss is measured leave-one-out on up to 2,000 training texts. All copies of
        a text are left out with it. The temperature is fitted on the same held-out scores.

        Args:
            texts: `n` training texts.
            labels: Labels of the texts.
            validation: Texts and labels to choose the width and the temperature. None uses leave-one-out.
            label_set: All labels in order. None uses the labels of the training set, sorted.
            settings: Training settings, of which only seed, validation fraction and log are used.
            embeddings: The encoder. None uses the bundled package.
            model_id: Name of the model in predictions and logs.
            input_key: Key of the text in mapping inputs.
            label_texts: Description of each label, added to the training set as one more example of it.
            pseudo_labelled: Texts with target distributions from another model (Lee 2013), in the order of the label
                set. They are stored with the training texts and never held out. If the other model was trained on the
                held-out texts, the calibration of this one is overconfident.
            widths: Kernel widths to try, in cosine distance.

        Returns:
            A trained classifier.

        Raises:
            DataError: The training set cannot be used. The message gives the reason.
        """
        chosen, started, report = settings or TrainingSettings(), time.perf_counter(), TrainingReport()
        texts, labels = [*texts, *(label_texts or {}).values()], [*labels, *(label_texts or {})]
        split = split_examples(texts, labels, validation=validation, settings=chosen, label_set=label_set)
        own = Examples(list(texts), one_hot(labels, split.labels))
        encoder = embeddings if embeddings is not None else shared_encoder()
        n, beside = len(own), pseudo_labels(pseudo_labelled, split.labels)
        vectors = _unit(embed(encoder, [*own.texts, *beside.texts])[0])
        targets = np.concatenate([own.targets, beside.targets])
        if split.validation_given:
            asked = _unit(embed(encoder, split.validation.texts)[0])
            likeness, wanted = asked @ vectors.T, split.validation.targets
        else:
            rows = np.random.default_rng(chosen.seed).permutation(n)[:JUDGES]
            likeness, wanted = vectors[rows] @ vectors.T, own.targets[rows]
            first = first_copies([*own.texts, *beside.texts])
            likeness[first[rows][:, None] == first] = -np.inf  # no text may predict itself or a copy
        width, temperature = _best_width(likeness, targets, wanted, widths, report)
        report.seconds = time.perf_counter() - started
        write_metrics(chosen, report, "kernel widths")
        return cls(
            labels=split.labels,
            model_id=model_id,
            input_key=input_key,
            temperature=temperature,
            embeddings=encoder,
            vectors=vectors,
            targets=targets.astype(np.float32),
            width=width,
            lineage=lineage_of(split, chosen, report, width=width),
        )

    @override
    def fit_soft_targets(
        self, stages: Sequence[Examples], held_out: Examples, settings: TrainingSettings, loss: Loss
    ) -> Self:
        """Return a copy that also stores these examples; width and temperature stay, and `loss` is ignored."""
        texts = [text for stage in (*stages, held_out) for text in stage.texts]
        more = np.concatenate([stage.targets for stage in (*stages, held_out)]).astype(np.float32)
        changed = {
            "vectors": np.concatenate([self.vectors, _unit(embed(self.embeddings, texts)[0])]),
            "targets": np.concatenate([self.targets, more]),
            "lineage": {"parent": self.lineage, "remembered": len(texts)},
        }
        learner = self.model_copy(update=changed)
        learner._bundle = None
        return learner

    # Bundles

    @classmethod
    @override
    def kind(cls) -> str:
        return "neighbours"

    @override
    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "width": self.width}

    @override
    def weights(self) -> dict[str, NDArray[Any]]:
        return {"vectors": self.vectors, "targets": self.targets, "probe": self.probe()}

    @classmethod
    @override
    def from_weights(cls, info: BundleInfo, weights: dict[str, NDArray[Any]], folder: Path, **overrides: Any) -> Self:
        m, d = weights["vectors"].shape if weights.get("vectors", np.zeros(0)).ndim == 2 else (None, None)
        check_weights(info, weights, {"vectors": (m, d), "targets": (m, len(info.labels)), "probe": (d,)})
        return cls(
            **info.shared(),
            embeddings=encoder_of(info, weights["probe"], overrides),
            keep_features=bool(info.settings.get("keep_features", False)),
            vectors=weights["vectors"],
            targets=weights["targets"],
            width=info.settings["width"],
        )


def _unit(vectors: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12), dtype=np.float32)


def _log_shares(likeness: NDArray[Any], targets: NDArray[Any], width: float) -> FloatArray:
    """Return log-probabilities of shape `[n, k]`, floored so that they stay finite."""
    raised = np.exp((likeness - 1.0) / width)
    shares = raised @ targets
    total = np.maximum(shares.sum(axis=1, keepdims=True), 1e-30)
    return np.asarray(np.log(shares / total + _FLOOR), dtype=np.float64)


def _best_width(
    likeness: NDArray[Any], targets: FloatArray, wanted: FloatArray, widths: Sequence[float], report: TrainingReport
) -> tuple[float, float]:
    """Choose the width and temperature with the lowest held-out loss.

    Args:
        likeness: Cosine similarities of held-out and stored texts, shape `[n, m]`; `-inf` excludes a pair.
        targets: Label distributions of the stored texts, shape `[m, k]`.
        wanted: One-hot labels of the held-out texts, shape `[n, k]`.
        widths: Kernel widths to try.
        report: Report to which the loss of each width is added.
    """
    truth, best = wanted.argmax(axis=1), (widths[0], 1.0)
    for width in widths:
        scores = _log_shares(likeness, targets, width)
        temperature = fit_temperature(scores, truth) if len(truth) >= MIN_EXAMPLES_FOR_CALIBRATION else 1.0
        scaled = scores / temperature
        scaled -= scaled.max(axis=1, keepdims=True)
        loss = float((np.log(np.exp(scaled).sum(axis=1)) - scaled[np.arange(len(truth)), truth]).mean())
        if report.note(loss, width=width):
            best = (width, temperature)
    return best
