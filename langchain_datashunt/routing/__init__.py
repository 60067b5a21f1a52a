"""Routing: ShuntRunnable, ConfidenceRouterChain and SubtaskShunt, and the plan that they share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from langchain_datashunt._utils.lazy import lazy_names

if TYPE_CHECKING:
    from langchain_datashunt.routing.label_router import ConfidenceRouterChain
    from langchain_datashunt.routing.shunt import ShuntRunnable
    from langchain_datashunt.routing.subtask_questions import Subtask
    from langchain_datashunt.routing.subtasks import SubtaskResult, SubtaskShunt

_MODULE_OF = {
    "ConfidenceRouterChain": "label_router",
    "ShuntRunnable": "shunt",
    "Subtask": "subtask_questions",
    "SubtaskResult": "subtasks",
    "SubtaskShunt": "subtasks",
}

__all__ = [
    "ConfidenceRouterChain",
    "ShuntRunnable",
    "Subtask",
    "SubtaskResult",
    "SubtaskShunt",
]

__getattr__, __dir__ = lazy_names(__name__, _MODULE_OF)
