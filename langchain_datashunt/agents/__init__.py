"""Middleware for LangChain agents: tool routing, model routing and the privacy guard."""

from __future__ import annotations

from typing import TYPE_CHECKING

from langchain_datashunt._utils.lazy import lazy_names

if TYPE_CHECKING:
    from langchain_datashunt.agents.arguments import NoArguments, PatternArguments, WholeText
    from langchain_datashunt.agents.guard_middleware import PrivacyGuardMiddleware
    from langchain_datashunt.agents.model_middleware import ShuntModelRouterMiddleware
    from langchain_datashunt.agents.tool_middleware import ShuntToolRouterMiddleware
    from langchain_datashunt.agents.tool_router import ToolRanking, ToolRouter

_MODULE_OF = {
    "NoArguments": "arguments",
    "PatternArguments": "arguments",
    "PrivacyGuardMiddleware": "guard_middleware",
    "ShuntModelRouterMiddleware": "model_middleware",
    "ShuntToolRouterMiddleware": "tool_middleware",
    "ToolRanking": "tool_router",
    "ToolRouter": "tool_router",
    "WholeText": "arguments",
}

__all__ = [
    "NoArguments",
    "PatternArguments",
    "PrivacyGuardMiddleware",
    "ShuntModelRouterMiddleware",
    "ShuntToolRouterMiddleware",
    "ToolRanking",
    "ToolRouter",
    "WholeText",
]

__getattr__, __dir__ = lazy_names(__name__, _MODULE_OF)
