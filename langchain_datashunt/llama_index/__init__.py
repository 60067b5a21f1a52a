"""The shunt in LlamaIndex: as an LLM, as a selector of a router, and in front of a query engine."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from langchain_datashunt.llama_index.deciding import ShuntDecisionEvent
    from langchain_datashunt.llama_index.embedding import EncoderEmbedding
    from langchain_datashunt.llama_index.gated_llm import GatedFunctionCallingLLM, GatedLLM
    from langchain_datashunt.llama_index.llm import ShuntFunctionCallingLLM, ShuntLLM
    from langchain_datashunt.llama_index.query_engine import ShuntQueryEngine
    from langchain_datashunt.llama_index.selector import ShuntSelection, ShuntSelector

_WHERE = {
    "EncoderEmbedding": "embedding",
    "GatedFunctionCallingLLM": "gated_llm",
    "GatedLLM": "gated_llm",
    "ShuntDecisionEvent": "deciding",
    "ShuntFunctionCallingLLM": "llm",
    "ShuntLLM": "llm",
    "ShuntQueryEngine": "query_engine",
    "ShuntSelection": "selector",
    "ShuntSelector": "selector",
}

__all__ = [
    "EncoderEmbedding",
    "GatedFunctionCallingLLM",
    "GatedLLM",
    "ShuntDecisionEvent",
    "ShuntFunctionCallingLLM",
    "ShuntLLM",
    "ShuntQueryEngine",
    "ShuntSelection",
    "ShuntSelector",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
