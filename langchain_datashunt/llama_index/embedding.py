"""EncoderEmbedding: a local sentence encoder as a LlamaIndex embedding."""

from __future__ import annotations

from typing import Any

from langchain_core.embeddings import Embeddings
from langchain_core.runnables.config import run_in_executor
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr

from langchain_datashunt.small_models.kinds.encoder import shared_encoder


class EncoderEmbedding(BaseEmbedding):
    """LlamaIndex embedding over any LangChain `Embeddings`.

    Args:
        embeddings: Sentence encoder. None uses the bundled encoder, which is shared with classifiers.
        settings: Other fields of `BaseEmbedding`, such as `embed_batch_size`.
    """

    _embeddings: Embeddings = PrivateAttr()

    def __init__(self, embeddings: Embeddings | None = None, **settings: Any) -> None:
        chosen = embeddings if embeddings is not None else shared_encoder()
        super().__init__(**{"model_name": getattr(chosen, "name", type(chosen).__name__), **settings})
        self._embeddings = chosen

    @classmethod
    def class_name(cls) -> str:
        """Return the class name used by LlamaIndex."""
        return "EncoderEmbedding"

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._embeddings.embed_query(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await run_in_executor(None, self._get_query_embedding, query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._embeddings.embed_documents([text])[0]

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await run_in_executor(None, self._get_text_embedding, text)

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._embeddings.embed_documents(texts)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await run_in_executor(None, self._get_text_embeddings, texts)
