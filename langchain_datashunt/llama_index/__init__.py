"""LlamaIndex integration: an LLM, a router selector, a query engine and the privacy guard."""

from __future__ import annotations

from typing import TYPE_CHECKING

from langchain_datashunt._utils.lazy import lazy_names

if TYPE_CHECKING:
    from langchain_datashunt.llama_index.deciding import ShuntDecisionEvent
    from langchain_datashunt.llama_index.embedding import EncoderEmbedding
    from langchain_datashunt.llama_index.guarded_llm import GuardedFunctionCallingLLM, GuardedLLM
    from langchain_datashunt.llama_index.llm import ShuntFunctionCallingLLM, ShuntLLM
    from langchain_datashunt.llama_index.query_engine import ShuntQueryEngine
    from langchain_datashunt.llama_index.selector import ShuntSelection, ShuntSelector

_MODULE_OF = {
    "EncoderEmbedding": "embedding",
    "GuardedFunctionCallingLLM": "guarded_llm",
    "GuardedLLM": "guarded_llm",
    "ShuntDecisionEvent": "deciding",
    "ShuntFunctionCallingLLM": "llm",
    "ShuntLLM": "llm",
    "ShuntQueryEngine": "query_engine",
    "ShuntSelection": "selector",
    "ShuntSelector": "selector",
}

__all__ = [
    "EncoderEmbedding",
    "GuardedFunctionCallingLLM",
    "GuardedLLM",
    "ShuntDecisionEvent",
    "ShuntFunctionCallingLLM",
    "ShuntLLM",
    "ShuntQueryEngine",
    "ShuntSelection",
    "ShuntSelector",
]

__getattr__, __dir__ = lazy_names(__name__, _MODULE_OF)
