"""Base class of classifiers on frozen sentence embeddings."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from langchain_core.embeddings import Embeddings
from numpy.typing import NDArray
from pydantic import Field, model_validator
from typing_extensions import override

from langchain_datashunt.exceptions import BundleMismatchError, ConfigurationError
from langchain_datashunt.small_models.base import SmallModel
from langchain_datashunt.small_models.bundles.bundle import BundleInfo
from langchain_datashunt.small_models.engine.devices import MAX_WORKERS, cpu_workers
from langchain_datashunt.small_models.kinds.encoder import (
    BUNDLED_ENCODER,
    CachedEmbeddings,
    SentenceEncoder,
    embed,
    shared_encoder,
)
from langchain_datashunt.small_models.scores import Scores

PROBE = "The quick brown fox jumps over the lazy dog."
_PROBE_COSINE = 0.99


class OnEmbeddings(SmallModel):
    """A classifier on the vectors of any LangChain `Embeddings`.

    The encoder is never trained. A bundle stores the encoder's name and its embedding of a known sentence. A custom
    encoder must be passed again to `load_small_model(folder, embeddings=...)`. Loading raises an error if the encoder
    embeds the sentence differently.
    """

    embeddings: Any = Field(exclude=True, repr=False)
    """The encoder: any LangChain `Embeddings`."""

    keep_features: bool = False
    """Whether predictions carry the embedding, for use by `LearnedDeferral`."""

    @model_validator(mode="after")
    def _encoder_fits(self) -> Self:
        if not isinstance(self.embeddings, Embeddings):
            msg = f"Expected a LangChain Embeddings for `embeddings`, got {type(self.embeddings).__name__}."
            raise ConfigurationError(msg)
        return self

    @property
    @abstractmethod
    def dimensions(self) -> int:
        """Number of dimensions of the embeddings that the classifier was trained on."""

    @abstractmethod
    def scores_of(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Compute logits `[n, k]` from embeddings `[n, d]`."""

    @override
    def workers(self) -> int:
        encoder = _bare(self.embeddings)
        return cpu_workers(encoder.device) if isinstance(encoder, SentenceEncoder) else MAX_WORKERS

    @override
    def predict_scores(self, texts: Sequence[str]) -> Scores:
        vectors, cut = embed(self.embeddings, texts)
        if vectors.shape[1] != self.dimensions:
            raise ConfigurationError(
                f"Expected embeddings with {self.dimensions} dimensions for {self.model_id!r}, got "
                f"{vectors.shape[1]} dimensions. Pass the encoder that this classifier was trained with."
            )
        return Scores(self.scores_of(vectors), cut, vectors if self.keep_features else None)

    def probe(self) -> NDArray[np.float32]:
        """Return the encoder's embedding of a known sentence, shape `[d]`, to recognise the encoder at loading."""
        return np.asarray(embed(self.embeddings, [PROBE])[0][0])

    @override
    def settings(self) -> dict[str, Any]:
        encoder = _bare(self.embeddings)
        if isinstance(encoder, SentenceEncoder):
            own = {} if encoder.max_length is None else {"max_length": encoder.max_length}
            return {"encoder": encoder.name, "dtype": encoder.dtype, "keep_features": self.keep_features, **own}
        name = f"custom:{type(encoder).__module__}.{type(encoder).__qualname__}"
        return {"encoder": name, "keep_features": self.keep_features}


def _bare(encoder: Embeddings) -> Embeddings:
    """Return the encoder without its cache, if it has one."""
    return encoder.encoder if isinstance(encoder, CachedEmbeddings) else encoder


def encoder_of(info: BundleInfo, probe: NDArray[Any], overrides: dict[str, Any]) -> Embeddings:
    """Return the encoder that a bundle's model was trained with.

    Args:
        info: The bundle's configuration.
        probe: Embedding of a known sentence by the original encoder, shape `[d]`.
        overrides: Loading options; `embeddings` replaces the encoder named in the bundle.

    Raises:
        ConfigurationError: The bundle needs a custom encoder and none was passed.
        BundleMismatchError: The encoder embeds the known sentence differently.
    """
    encoder = overrides.get("embeddings") or _encoder_by_name(info, overrides)
    _check_probe(encoder, probe, info)
    return encoder


def _encoder_by_name(info: BundleInfo, overrides: dict[str, Any]) -> Embeddings:
    name = str(info.settings.get("encoder", BUNDLED_ENCODER))
    if name.startswith("custom:"):
        raise ConfigurationError(
            f"This bundle was trained with the encoder {name.removeprefix('custom:')}, which a bundle cannot store. "
            f"Pass the same encoder: load_small_model(folder, embeddings=...)."
        )
    dtype = str(overrides.get("dtype") or info.settings.get("dtype", "float32"))
    more: dict[str, Any] = {"engine": overrides["engine"]} if overrides.get("engine") else {}
    if info.settings.get("max_length") is not None:
        more["max_length"] = int(info.settings["max_length"])
    return shared_encoder(None if name == BUNDLED_ENCODER else name, overrides.get("device"), dtype, **more)


def _check_probe(encoder: Embeddings, probe: NDArray[Any], info: BundleInfo) -> None:
    """Raise `BundleMismatchError` if the encoder embeds the known sentence differently than in training."""
    seen = embed(encoder, [PROBE])[0][0]
    fits = seen.shape == probe.shape
    cosine = float(seen @ probe / (np.linalg.norm(seen) * np.linalg.norm(probe) + 1e-12)) if fits else 0.0
    if cosine < _PROBE_COSINE:
        raise BundleMismatchError(
            f"The encoder embeds a known sentence differently from the one this bundle was trained with "
            f"({info.settings.get('encoder')}): {seen.shape[0]} dimensions instead of {probe.shape[0]}, "
            f"cosine similarity {cosine:.3f}. Pass the original encoder, or train again."
        )
