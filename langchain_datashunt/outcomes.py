"""Outputs of a batch, errors among them."""

from __future__ import annotations

from typing import Any


def settled(outputs: list[Any], return_exceptions: bool) -> list[Any]:
    """The outputs; the first error is raised, where errors are not to be returned."""
    if not return_exceptions:
        for output in outputs:
            if isinstance(output, Exception):
                raise output
    return outputs
