"""Asking the large model: Prompt Pruning, the caller with retries and limits, label parsing, replay."""

from __future__ import annotations

from typing import TYPE_CHECKING

from langchain_datashunt._utils.lazy import lazy_names

if TYPE_CHECKING:
    from langchain_datashunt.large_models.chat_asker import ChatAsker
    from langchain_datashunt.large_models.circuit_breaker import CircuitBreaker
    from langchain_datashunt.large_models.label_parser import LabelParser
    from langchain_datashunt.large_models.prompt_pruning import (
        ConformalPruning,
        HardPruning,
        NoPruning,
        Pruning,
        SoftPruning,
        TopHint,
        measure_proficiency,
    )
    from langchain_datashunt.large_models.retry import Retry

_MODULE_OF = {
    "ChatAsker": "chat_asker",
    "CircuitBreaker": "circuit_breaker",
    "ConformalPruning": "prompt_pruning",
    "HardPruning": "prompt_pruning",
    "LabelParser": "label_parser",
    "NoPruning": "prompt_pruning",
    "Pruning": "prompt_pruning",
    "Retry": "retry",
    "SoftPruning": "prompt_pruning",
    "TopHint": "prompt_pruning",
    "measure_proficiency": "prompt_pruning",
}

__all__ = [
    "ChatAsker",
    "CircuitBreaker",
    "ConformalPruning",
    "HardPruning",
    "LabelParser",
    "NoPruning",
    "Pruning",
    "Retry",
    "SoftPruning",
    "TopHint",
    "measure_proficiency",
]

__getattr__, __dir__ = lazy_names(__name__, _MODULE_OF)
