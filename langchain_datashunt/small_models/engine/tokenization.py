"""Tokenization without padding or silent truncation, using a private copy of the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from langchain_datashunt._utils.optional import require
from langchain_datashunt.prediction import BoolArray
from langchain_datashunt.small_models.engine.devices import on_device

if TYPE_CHECKING:
    import torch


class TextTokenizer:
    """Fast tokenizer that reports truncated texts instead of truncating them silently.

    Args:
        backend: A `tokenizers.Tokenizer`, owned by this object. Its padding and truncation are disabled.
        pad_id: Token id of padding. It also stands for a text without tokens.
        max_length: Maximum tokens per text, including special tokens.
    """

    def __init__(self, backend: Any, pad_id: int, max_length: int) -> None:
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.pad_id = pad_id
        self.max_length = max_length
        self._closing = _closing_tokens(backend)

    @classmethod
    def from_pretrained(cls, model: str, max_length: int | None = None) -> TextTokenizer:
        """Load the tokenizer of a transformers folder or hub id.

        Args:
            model: Folder or hub id.
            max_length: Maximum tokens per text, at most the limit of the tokenizer; None means that limit.
        """
        return cls.from_auto(require("transformers", "torch").AutoTokenizer.from_pretrained(model), max_length)

    @classmethod
    def from_auto(cls, auto: Any, max_length: int | None = None) -> TextTokenizer:
        """Create the tokenizer from a copy of a fast transformers tokenizer."""
        limit = min(n for n in (max_length, auto.model_max_length) if n is not None)
        backend = require("tokenizers", "torch").Tokenizer.from_str(auto.backend_tokenizer.to_str())
        return cls(backend, auto.pad_token_id or 0, int(limit))

    def __call__(self, texts: Sequence[str]) -> tuple[list[list[int]], BoolArray]:
        """Return the token ids of each text and a mask of the truncated texts, shape `[n]`.

        Truncation keeps the closing special tokens.
        """
        try:
            encodings = self.backend.encode_batch_fast(list(texts))  # fast, because it computes no character offsets
        except TypeError:  # a lone surrogate, as in a text that was cut within an emoji
            encodings = self.backend.encode_batch_fast([text.encode(errors="replace").decode() for text in texts])
        ids = [encoding.ids or [self.pad_id] for encoding in encodings]  # an encoder needs at least one token per text
        cut = np.zeros(len(ids), dtype=np.bool_)
        for i, one in enumerate(ids):
            if len(one) > self.max_length:
                ids[i], cut[i] = self._cut(one), True
        return ids, cut

    def _cut(self, ids: list[int]) -> list[int]:
        return ids[: self.max_length - self._closing] + ids[len(ids) - self._closing :]

    def save(self, file: Path) -> None:
        """Save the tokenizer as one JSON file."""
        self.backend.save(str(file))


_KEPT_FOR_PADDING = frozenset(
    {
        "camembert",
        "data2vec-text",
        "esm",
        "ibert",
        "longformer",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)
"""Values of transformers `model_type` whose positions start after the id of the padding token."""

_UNLIMITED = 512
"""Maximum tokens per text if neither the network nor the caller sets a limit."""


def usable_length(config: Any, asked: int | None = None) -> int:
    """Return the maximum tokens per text that a transformers network supports, at most `asked` if given."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return asked or _UNLIMITED
    if config.model_type in _KEPT_FOR_PADDING:
        positions -= (getattr(config, "pad_token_id", None) or 1) + 1
    return min(positions, asked or positions)


def _closing_tokens(backend: Any) -> int:
    """Return the number of special tokens after a text."""
    text, whole = backend.encode("a", add_special_tokens=False).ids, backend.encode("a").ids
    for start in range(len(whole) - len(text) + 1):
        if text and whole[start : start + len(text)] == text:
            return len(whole) - start - len(text)
    return 1 if backend.num_special_tokens_to_add(False) >= 2 else 0


def pad(ids: Sequence[Sequence[int]], pad_id: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return right-padded token ids and the attention mask, both of shape `[n, longest]`."""
    longest = max(1, *(len(one) for one in ids)) if ids else 1
    array = np.full((len(ids), longest), pad_id, dtype=np.int64)
    mask = np.zeros((len(ids), longest), dtype=np.int64)
    for i, one in enumerate(ids):
        array[i, : len(one)] = one
        mask[i, : len(one)] = 1
    return on_device(array, device), on_device(mask, device)
