"""What the middlewares of one agent know of each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from langchain_core.messages import AIMessage

METADATA_KEY = "shunt_tools"
"""Where messages carry what a tool router decided, by its name."""

_DRAFTING: ContextVar[bool] = ContextVar("shunt_drafting", default=False)


@contextmanager
def drafting() -> Iterator[None]:
    """While a small chat model makes a turn that may not be kept: nothing is recorded or counted then."""
    token = _DRAFTING.set(True)
    try:
        yield
    finally:
        _DRAFTING.reset(token)


def is_draft() -> bool:
    """Whether this turn may not be kept."""
    return _DRAFTING.get()


def called_directly(message: AIMessage) -> bool:
    """Whether a tool router made this message itself, without any chat model."""
    told = message.response_metadata.get(METADATA_KEY, {})
    return any(one.get("route") == "small" for one in told.values())
