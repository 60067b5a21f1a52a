"""EmbeddingClassifier: a linear head on frozen sentence embeddings, accurate with a few labels per class."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from langchain_core.embeddings import Embeddings
from numpy.typing import NDArray
from pydantic import Field, model_validator
from typing_extensions import override

from langchain_datashunt._utils.optional import require
from langchain_datashunt.calibration.temperature import fit_temperature
from langchain_datashunt.exceptions import ConfigurationError
from langchain_datashunt.prediction import FloatArray
from langchain_datashunt.small_models.base import Loss
from langchain_datashunt.small_models.bundles.bundle import BundleInfo, check_weights
from langchain_datashunt.small_models.kinds.encoder import embed, shared_encoder
from langchain_datashunt.small_models.kinds.on_embeddings import OnEmbeddings, encoder_of
from langchain_datashunt.small_models.training.training import (
    MIN_EXAMPLES_FOR_CALIBRATION,
    Examples,
    Split,
    TrainingReport,
    TrainingSettings,
    first_copies,
    lineage_of,
    progress_bar,
    pseudo_labels,
    random_folds,
    soft_cross_entropy,
    split_examples,
    stratified_folds,
    write_metrics,
)

REGULARISATION_PATH = (1.0, 5.0, 20.0, 80.0)
"""Inverse strengths C of the L2 penalty in scikit-learn's convention, from strong to weak penalty."""

DEFAULT_STRENGTH = 20.0
"""Inverse strength used to train a head further if its lineage does not record one."""

FOLDS = 5
"""Number of cross-validation folds for small training sets."""

CROSS_VALIDATE_UP_TO = 5_000
"""Largest number of training examples for cross-validation. Larger training sets use a single split."""


class Fold(NamedTuple):
    """Rows to train on and rows to hold out."""

    train: NDArray[np.intp]
    held_out: NDArray[np.intp]


class EmbeddingClassifier(OnEmbeddings):
    """Multinomial logistic regression on the vectors of any LangChain `Embeddings`, trained by `train`."""

    head: NDArray[Any] = Field(repr=False)
    """Weights of the linear head, shape `[d, k]`."""

    bias: NDArray[Any] = Field(repr=False)
    """Bias of the linear head, shape `[k]`."""

    @model_validator(mode="after")
    def _shapes_agree(self) -> Self:
        if self.head.ndim != 2 or self.head.shape[1] != len(self.labels) or self.bias.shape != (len(self.labels),):
            raise ConfigurationError(
                f"Expected `head` of shape [d, {len(self.labels)}] and `bias` of shape [{len(self.labels)}] for "
                f"{len(self.labels)} labels, got {list(self.head.shape)} and {list(self.bias.shape)}. Pass arrays "
                f"with one column per label."
            )
        return self

    @property
    @override
    def dimensions(self) -> int:
        return len(self.head)

    @override
    def scores_of(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(vectors @ self.head + self.bias)

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
        model_id: str = "embedding",
        input_key: str = "input",
        label_texts: Mapping[str, str] | None = None,
        pseudo_labelled: Examples | None = None,
        strengths: Sequence[float] = REGULARISATION_PATH,
    ) -> Self:
        """Train a head with the L2 penalty that has the lowest held-out loss.

        The penalties are tried from strong to weak until the held-out loss stops falling. The held-out set is
        `validation` if given, and otherwise a stratified part of a large training set. A small training set is
        cross-validated instead, so that no label is lost for training. The temperature is fitted on the same held-out
        logits.

        Args:
            texts: `n` training texts.
            labels: Labels of the texts.
            validation: Texts and labels to choose the penalty and the temperature. None holds out a part of `texts`.
            label_set: All labels in order. None uses the labels of the training set, sorted.
            settings: Seed, validation fraction, patience and progress; `epochs` is the maximum number of L-BFGS
                iterations per fit, 200 by default.
            embeddings: The encoder. None uses the bundled package.
            model_id: Name of the model in predictions and logs.
            input_key: Key of the text in mapping inputs.
            label_texts: Description of each label, added to the training set as one more example of it.
            pseudo_labelled: Texts with target distributions from another model (Lee 2013), in the order of the label
                set. They are always trained on and never held out. If the other model was trained on the held-out
                texts, the calibration of this one is overconfident.
            strengths: Inverse strengths C of the penalty to try, from strong to weak penalty.

        Returns:
            A trained classifier.

        Raises:
            DataError: The training set cannot be used. The message gives the reason.
        """
        chosen = (settings or TrainingSettings()).filled(epochs=200, patience=1)
        texts, labels = [*texts, *(label_texts or {}).values()], [*labels, *(label_texts or {})]
        split = split_examples(texts, labels, validation=validation, settings=chosen, label_set=label_set)
        encoder = embeddings if embeddings is not None else shared_encoder()
        started, report = time.perf_counter(), TrainingReport()
        known = (split.train, split.validation)
        truth = np.concatenate([part.targets.argmax(axis=1) for part in known])
        parts = (*known, pseudo_labels(pseudo_labelled, split.labels))
        vectors = embed(encoder, [text for part in parts for text in part.texts])[0]
        targets = np.concatenate([part.targets for part in parts])
        beside = np.arange(len(truth), len(targets))
        folds = _folds(split, truth, first_copies([text for part in known for text in part.texts]), chosen, beside)
        strength, logits, wanted = _walk_path(vectors, targets, folds, strengths, chosen, report)
        own = np.concatenate([np.arange(len(split.train) if split.validation_given else len(truth)), beside])
        head, bias = _fit_head(vectors[own], targets[own], strength, chosen)
        temperature = 1.0
        if len(wanted) >= MIN_EXAMPLES_FOR_CALIBRATION:
            temperature = fit_temperature(logits, wanted)
        report.seconds = time.perf_counter() - started
        write_metrics(chosen, report, "regularisation path")
        return cls(
            labels=split.labels,
            model_id=model_id,
            input_key=input_key,
            temperature=temperature,
            embeddings=encoder,
            head=head,
            bias=bias,
            lineage=lineage_of(split, chosen, report, regularisation=strength, folds=len(folds)),
        )

    @override
    def fit_soft_targets(
        self, stages: Sequence[Examples], held_out: Examples, settings: TrainingSettings, loss: Loss
    ) -> Self:
        """Return a copy with the head trained further on soft targets.

        All stages and `held_out` are fitted together by L-BFGS, from the current head as starting point. The
        temperature is fitted on cross-fitted logits, in which each example is scored by a head that was not trained
        on it.
        """
        chosen = settings.filled(epochs=200)
        texts = [text for stage in (*stages, held_out) for text in stage.texts]
        targets = np.concatenate([stage.targets for stage in (*stages, held_out)])
        vectors = embed(self.embeddings, texts)[0]
        strength = float(self.lineage.get("regularisation", DEFAULT_STRENGTH))

        def fit(rows: NDArray[np.intp]) -> tuple[NDArray[Any], NDArray[Any]]:
            return _fit_head(vectors[rows], targets[rows], strength, chosen, self.head, self.bias, loss=loss)

        logits, everything = np.zeros(targets.shape), np.arange(len(texts))
        for fold in random_folds(first_copies(texts), FOLDS, chosen.seed):
            head, bias = fit(np.setdiff1d(everything, fold))
            logits[fold] = vectors[fold] @ head + bias
        head, bias = fit(everything)
        report, wanted = TrainingReport(), targets.argmax(axis=1)
        report.note(_calibrated_loss(logits, wanted))
        write_metrics(chosen, report, "distillation")
        changed = {
            "head": head,
            "bias": bias,
            "temperature": fit_temperature(logits, wanted)
            if len(texts) >= MIN_EXAMPLES_FOR_CALIBRATION
            else self.temperature,
            "lineage": {"parent": self.lineage, "regularisation": strength, "held_out_nll": report.best_loss},
        }
        learner = self.model_copy(update=changed)
        learner._bundle = None
        return learner

    # Bundles

    @classmethod
    @override
    def kind(cls) -> str:
        return "embedding"

    @override
    def weights(self) -> dict[str, NDArray[Any]]:
        return {"head": self.head, "bias": self.bias, "probe": self.probe()}

    @classmethod
    @override
    def from_weights(cls, info: BundleInfo, weights: dict[str, NDArray[Any]], folder: Path, **overrides: Any) -> Self:
        k = len(info.labels)
        check_weights(info, weights, {"head": (None, k), "bias": (k,), "probe": (len(weights.get("head", ())),)})
        return cls(
            **info.shared(),
            embeddings=encoder_of(info, weights["probe"], overrides),
            keep_features=bool(info.settings.get("keep_features", False)),
            head=weights["head"],
            bias=weights["bias"],
        )


def _folds(
    split: Split,
    truth: NDArray[np.intp],
    first: NDArray[np.intp],
    settings: TrainingSettings,
    beside: NDArray[np.intp],  # additional rows that are trained on in every fold
) -> list[Fold]:
    """Split the rows into one or several folds.

    The rows are the training examples, the validation examples and the additional rows, in this order. `first` is the
    row of the first copy of each text, shape `[n]`. Copies stay in one fold.
    """
    n, everything = len(split.train), np.arange(len(truth))
    if split.validation_given or len(truth) > CROSS_VALIDATE_UP_TO:
        return [Fold(np.concatenate([everything[:n], beside]), everything[n:])]
    return [
        Fold(np.concatenate([np.setdiff1d(everything, held), beside]), held)
        for held in stratified_folds(truth, first, FOLDS, settings.seed)
    ]


def _walk_path(
    vectors: NDArray[np.float32],
    targets: FloatArray,
    folds: list[Fold],
    strengths: Sequence[float],
    settings: TrainingSettings,
    report: TrainingReport,
) -> tuple[float, FloatArray, NDArray[np.intp]]:
    """Return the best inverse strength, its held-out logits `[m, k]` and their true labels `[m]`."""
    held = np.concatenate([fold.held_out for fold in folds])
    truth = targets[held].argmax(axis=1)
    chosen = (strengths[0], np.zeros((0, targets.shape[1])))
    starts: list[tuple[NDArray[Any], NDArray[Any]] | None] = [None] * len(folds)
    with progress_bar(len(strengths) * len(folds), "regularisation path", settings) as bar:
        for strength in strengths:
            parts = []
            for i, fold in enumerate(folds):
                start = starts[i] or (None, None)  # warm start from the stronger penalty
                head, bias = _fit_head(vectors[fold.train], targets[fold.train], strength, settings, *start)
                starts[i] = (head, bias)
                parts.append(vectors[fold.held_out] @ head + bias)
                bar.update(1)
            logits = np.concatenate(parts).astype(np.float64)
            if report.note(_calibrated_loss(logits, truth)):
                chosen = (strength, logits)
            elif report.waited() >= (settings.patience or 1):
                break
    return *chosen, truth


def _calibrated_loss(logits: FloatArray, truth: NDArray[np.intp]) -> float:
    """Return the mean negative log-likelihood in nats after temperature scaling.

    A strong penalty flattens the probabilities. Without scaling, the comparison of penalties would count that as error.
    """
    scores = logits / fit_temperature(logits, truth)
    scores = scores - scores.max(axis=1, keepdims=True)
    return float((np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(len(scores)), truth]).mean())


def _fit_head(
    vectors: NDArray[np.float32],
    targets: FloatArray,
    strength: float,
    settings: TrainingSettings,
    head: NDArray[Any] | None = None,
    bias: NDArray[Any] | None = None,
    loss: Loss = soft_cross_entropy,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Minimise `loss + |W|^2 / (2 C n)` by L-BFGS.

    The fit starts at `head` and `bias`, or at zero if they are None.

    Returns:
        Weights `[d, k]` and bias `[k]`.
    """
    torch = require("torch", "torch")
    n, d, k = len(vectors), vectors.shape[1], targets.shape[1]
    x, wanted = torch.from_numpy(vectors), torch.from_numpy(targets).float()
    w = torch.zeros(d, k) if head is None else torch.from_numpy(head.copy()).float()
    b = torch.zeros(k) if bias is None else torch.from_numpy(bias.copy()).float()
    w.requires_grad_(True)
    b.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [w, b], max_iter=settings.epochs or 200, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def objective() -> Any:
        optimizer.zero_grad()
        value = loss(x @ w + b, wanted) + (w * w).sum() / (2.0 * strength * n)
        value.backward()
        return value

    optimizer.step(objective)
    return w.detach().numpy(), b.detach().numpy()
