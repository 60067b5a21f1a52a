"""Rules for raising exceptions: control flow of frameworks, and errors in the outputs of a batch."""

from __future__ import annotations

from typing import Any


def raise_if_control_flow(error: Exception) -> None:
    """Raise the exception if it is a control-flow signal of LangGraph, such as an interrupt, and not a failure."""
    # Compared by name, so that LangGraph need not be installed.
    if any(kind.__name__ == "GraphBubbleUp" for kind in type(error).__mro__):
        raise error


def raise_first_error(outputs: list[Any], return_exceptions: bool) -> list[Any]:
    """Return outputs that may contain errors, or raise the first error unless `return_exceptions`."""
    if not return_exceptions:
        for output in outputs:
            if isinstance(output, Exception):
                raise output
    return outputs
