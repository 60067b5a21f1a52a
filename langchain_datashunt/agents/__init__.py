"""A small model in front of an agent's tools and turns."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from langchain_datashunt.agents.tool_router import ToolRanking, ToolRouter

if TYPE_CHECKING:
    from langchain_datashunt.agents.arguments import NoArguments, PatternArguments, WholeText
    from langchain_datashunt.agents.gate_middleware import OutboundGateMiddleware
    from langchain_datashunt.agents.model_middleware import ShuntModelRouterMiddleware
    from langchain_datashunt.agents.tool_middleware import ShuntToolRouterMiddleware

_LAZY = {
    "NoArguments": "arguments",
    "PatternArguments": "arguments",
    "WholeText": "arguments",
    "OutboundGateMiddleware": "gate_middleware",
    "ShuntModelRouterMiddleware": "model_middleware",
    "ShuntToolRouterMiddleware": "tool_middleware",
}

__all__ = [
    "NoArguments",
    "OutboundGateMiddleware",
    "PatternArguments",
    "ShuntModelRouterMiddleware",
    "ShuntToolRouterMiddleware",
    "ToolRanking",
    "ToolRouter",
    "WholeText",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
