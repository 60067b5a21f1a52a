"""EmbeddingClassifier: a linear head on frozen sentence embeddings; strong from a few labels per class."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from langchain_core.embeddings import Embeddings
from numpy.typing import NDArray
from pydantic import Field, model_validator
from typing_extensions import override

from langchain_datashunt._extras import require
from langchain_datashunt.calibration.temperature import fit_temperature
from langchain_datashunt.exceptions import BundleMismatchError, ConfigurationError
from langchain_datashunt.predictions import FloatArray
from langchain_datashunt.small_models.base import Scores, SmallModel
from langchain_datashunt.small_models.bundle import BundleInfo, check_weights
from langchain_datashunt.small_models.encoder import (
    BUNDLED_ENCODER,
    SentenceEncoder,
    embed,
    shared_encoder,
)
from langchain_datashunt.small_models.training import (
    MIN_EXAMPLES_FOR_CALIBRATION,
    Examples,
    TrainingReport,
    TrainingSettings,
    lineage_of,
    progress_bar,
    soft_cross_entropy,
    split_examples,
)

REGULARISATION_PATH = (1.0, 5.0, 20.0, 80.0)
"""Inverse strengths C of the L2 penalty, from strong to weak, as scikit-learn counts them."""

PROBE = "The quick brown fox jumps over the lazy dog."
_PROBE_COSINE = 0.99


class EmbeddingClassifier(SmallModel):
    """Multinomial logistic regression on embeddings of any LangChain `Embeddings`.

    Trained by `train`; the encoder itself is never changed. A bundle keeps the head and the encoder's name; a custom
    encoder is handed to `load(folder, embeddings=...)` again, and one that embeds differently is refused.
    """

    embeddings: Any = Field(exclude=True, repr=False)
    """The encoder: any LangChain `Embeddings`."""

    head: NDArray[Any] = Field(repr=False)
    """Weights of the linear head, shape `[d, k]`."""

    bias: NDArray[Any] = Field(repr=False)
    """Bias of the linear head, shape `[k]`."""

    @model_validator(mode="after")
    def _shapes_agree(self) -> Self:
        if not isinstance(self.embeddings, Embeddings):
            msg = f"`embeddings` must be a LangChain Embeddings; {type(self.embeddings).__name__} is not."
            raise ConfigurationError(msg)
        if self.head.ndim != 2 or self.head.shape[1] != len(self.labels) or self.bias.shape != (len(self.labels),):
            raise ConfigurationError(
                f"{len(self.labels)} labels need a head of shape [d, {len(self.labels)}] and a bias of "
                f"[{len(self.labels)}]; they have {list(self.head.shape)} and {list(self.bias.shape)}."
            )
        return self

    @override
    def predict_scores(self, texts: Sequence[str]) -> Scores:
        vectors, cut = embed(self.embeddings, texts)
        if vectors.shape[1] != len(self.head):
            raise ConfigurationError(
                f"The encoder gives {vectors.shape[1]} dimensions and the head of {self.model_id!r} was trained "
                f"on {len(self.head)}: it is not the encoder that this classifier was trained with."
            )
        return Scores(vectors @ self.head + self.bias, cut)

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
    ) -> Self:
        """Train a head.

        The L2 penalty is weakened step by step until the validation loss stops falling; the head is then fitted
        on all labelled examples with the strength that was best. A temperature is fitted on the validation
        examples where there are enough.

        Args:
            texts: `n` training texts.
            labels: Their labels.
            validation: Texts and labels to stop on; None holds a stratified part of the training set out.
            label_set: All labels and their order; None for those that occur, sorted.
            settings: Seed, validation share and progress; `epochs` are L-BFGS iterations at the most.
            embeddings: The encoder; None for the bundled package.
            model_id: Name of the model in predictions and records.
            input_key: Where mappings hold the text.

        Raises:
            DataError: The training set cannot be used; the message says why.
        """
        chosen = (settings or TrainingSettings()).filled(epochs=200, patience=1)
        split = split_examples(texts, labels, validation=validation, settings=chosen, label_set=label_set)
        encoder = embeddings if embeddings is not None else shared_encoder()
        started = time.perf_counter()
        train = embed(encoder, split.train.texts)[0]
        held_out = embed(encoder, split.validation.texts)[0]
        report, strength, head, bias = _fit_path(train, split.train, held_out, split.validation, chosen)
        temperature = 1.0
        if len(split.validation) >= MIN_EXAMPLES_FOR_CALIBRATION:
            logits = np.asarray(held_out @ head + bias, dtype=np.float64)
            temperature = fit_temperature(logits, split.validation.targets.argmax(axis=1))
        if not split.validation_given:
            everything = np.concatenate([train, held_out])
            targets = np.concatenate([split.train.targets, split.validation.targets])
            head, bias = _fit_head(everything, targets, strength, chosen, head, bias)
        report.seconds = time.perf_counter() - started
        return cls(
            labels=split.labels,
            model_id=model_id,
            input_key=input_key,
            temperature=temperature,
            embeddings=encoder,
            head=head,
            bias=bias,
            lineage=lineage_of(split, chosen, report, regularisation=strength),
        )

    # Bundles

    @classmethod
    @override
    def kind(cls) -> str:
        return "embedding"

    @override
    def settings(self) -> dict[str, Any]:
        encoder = self.embeddings
        if isinstance(encoder, SentenceEncoder):
            return {"encoder": encoder.name, "dtype": encoder.dtype}
        return {"encoder": f"custom:{type(encoder).__module__}.{type(encoder).__qualname__}"}

    @override
    def weights(self) -> dict[str, NDArray[Any]]:
        probe, _ = embed(self.embeddings, [PROBE])
        return {"head": self.head, "bias": self.bias, "probe": probe[0]}

    @classmethod
    @override
    def from_weights(cls, info: BundleInfo, weights: dict[str, NDArray[Any]], folder: Path, **overrides: Any) -> Self:
        k = len(info.labels)
        check_weights(info, weights, {"head": (None, k), "bias": (k,), "probe": (len(weights.get("head", ())),)})
        encoder = overrides.get("embeddings") or _encoder_of(info, overrides)
        _check_probe(encoder, weights["probe"], info)
        return cls(
            labels=info.labels,
            model_id=info.model_id,
            temperature=info.temperature,
            threshold=info.threshold,
            input_key=info.input_key,
            lineage=info.lineage,
            embeddings=encoder,
            head=weights["head"],
            bias=weights["bias"],
        )


def _encoder_of(info: BundleInfo, overrides: dict[str, Any]) -> Embeddings:
    name = str(info.settings.get("encoder", BUNDLED_ENCODER))
    if name.startswith("custom:"):
        raise ConfigurationError(
            f"This bundle was trained with the embeddings {name.removeprefix('custom:')}, which a bundle cannot "
            f"hold. Pass the same ones: load_small_model(folder, embeddings=...)."
        )
    dtype = str(overrides.get("dtype") or info.settings.get("dtype", "float32"))
    return shared_encoder(None if name == BUNDLED_ENCODER else name, overrides.get("device"), dtype)


def _check_probe(encoder: Embeddings, probe: NDArray[Any], info: BundleInfo) -> None:
    """Refuse an encoder that does not embed one known sentence as the training's encoder did."""
    seen = embed(encoder, [PROBE])[0][0]
    fits = seen.shape == probe.shape
    cosine = float(seen @ probe / (np.linalg.norm(seen) * np.linalg.norm(probe) + 1e-12)) if fits else 0.0
    if cosine < _PROBE_COSINE:
        raise BundleMismatchError(
            f"The encoder embeds a known sentence differently from the one this bundle was trained with "
            f"({info.settings.get('encoder')}): {seen.shape[0]} against {probe.shape[0]} dimensions, "
            f"cosine {cosine:.3f}. Pass the encoder that was used, or train again."
        )


def _fit_path(
    train: NDArray[np.float32],
    examples: Examples,
    held_out: NDArray[np.float32],
    validation: Examples,
    settings: TrainingSettings,
) -> tuple[TrainingReport, float, NDArray[Any], NDArray[Any]]:
    report = TrainingReport()
    strength, best_head, best_bias = REGULARISATION_PATH[0], None, None
    head = bias = None
    with progress_bar(len(REGULARISATION_PATH), "regularisation path", settings) as bar:
        for candidate in REGULARISATION_PATH:
            head, bias = _fit_head(train, examples.targets, candidate, settings, head, bias)
            if report.note(_best_temperature_loss(held_out @ head + bias, validation.targets)):
                strength, best_head, best_bias = candidate, head, bias
            bar.update(1)
            if report.waited() >= (settings.patience or 1):
                break
    assert best_head is not None and best_bias is not None
    return report, strength, best_head, best_bias


def _best_temperature_loss(logits: NDArray[Any], targets: FloatArray) -> float:
    """Validation loss after calibration, so that a strong penalty is not blamed for its soft probabilities."""
    scores, truth = np.asarray(logits, dtype=np.float64), targets.argmax(axis=1)
    scores = scores / fit_temperature(scores, truth)
    scores = scores - scores.max(axis=1, keepdims=True)
    return float((np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(len(scores)), truth]).mean())


def _fit_head(
    vectors: NDArray[np.float32],
    targets: FloatArray,
    strength: float,
    settings: TrainingSettings,
    head: NDArray[Any] | None = None,
    bias: NDArray[Any] | None = None,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Minimise cross-entropy + |W|^2 / (2 C n) by L-BFGS, from the given start or from zero."""
    torch = require("torch", "torch")
    n, d, k = len(vectors), vectors.shape[1], targets.shape[1]
    x, wanted = torch.from_numpy(vectors), torch.from_numpy(targets).float()
    w = torch.zeros(d, k) if head is None else torch.from_numpy(head.copy())
    b = torch.zeros(k) if bias is None else torch.from_numpy(bias.copy())
    w.requires_grad_(True)
    b.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [w, b], max_iter=settings.epochs or 200, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def loss() -> Any:
        optimizer.zero_grad()
        value = soft_cross_entropy(x @ w + b, wanted) + (w * w).sum() / (2.0 * strength * n)
        value.backward()
        return value

    optimizer.step(loss)
    return w.detach().numpy(), b.detach().numpy()
