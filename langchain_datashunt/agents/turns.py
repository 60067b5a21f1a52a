"""Context that the middleware of one agent share: draft turns and decision metadata."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from langchain_core.messages import AIMessage

METADATA_KEY = "shunt_tools"
"""Key in `response_metadata` of the tool routers' decisions, by middleware name."""

_DRAFTING: ContextVar[bool] = ContextVar("shunt_drafting", default=False)


@contextmanager
def drafting() -> Iterator[None]:
    """Mark model calls in this context as drafts, which are neither counted nor recorded.

    A draft is a turn of a small chat model that may be discarded.
    """
    token = _DRAFTING.set(True)
    try:
        yield
    finally:
        _DRAFTING.reset(token)


def is_draft() -> bool:
    """Return whether the current turn is a draft."""
    return _DRAFTING.get()


def called_directly(message: AIMessage) -> bool:
    """Return whether a tool router made this message without calling a chat model."""
    metadata = message.response_metadata.get(METADATA_KEY, {})
    return any(one.get("route") == "small" for one in metadata.values())
