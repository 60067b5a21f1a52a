"""Exceptions that carry a framework's control flow and are no failures."""

from __future__ import annotations


def raise_control_flow(error: Exception) -> None:
    """Raise what is no failure but a message to the caller's framework, such as LangGraph's interrupts."""
    if any(kind.__name__ == "GraphBubbleUp" for kind in type(error).__mro__):
        raise error
