"""When an exception is raised: control flow of frameworks at once, errors of a batch on request."""

from __future__ import annotations

from typing import Any


def raise_control_flow(error: Exception) -> None:
    """Raise what is no failure but a message to the caller's framework, such as LangGraph's interrupts."""
    if any(kind.__name__ == "GraphBubbleUp" for kind in type(error).__mro__):
        raise error


def raise_first_error(outputs: list[Any], return_exceptions: bool) -> list[Any]:
    """Return outputs that may contain errors; raise the first error unless `return_exceptions`."""
    if not return_exceptions:
        for output in outputs:
            if isinstance(output, Exception):
                raise output
    return outputs
