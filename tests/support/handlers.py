"""Callback handlers that record runs, for tests that every started run also ends."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler


class RunBook(BaseCallbackHandler):
    """Callback handler that records name, parent, tags, metadata and end of each run, and custom events."""

    def __init__(self) -> None:
        self.started: dict[UUID, dict[str, Any]] = {}
        self.ended: list[UUID] = []
        self.failed: list[UUID] = []
        self.events: list[tuple[str, Any, UUID]] = []

    def _start(self, name: str | None, run_id: UUID, parent_run_id: UUID | None, **kwargs: Any) -> None:
        assert run_id not in self.started, "a run started twice"
        self.started[run_id] = {
            "name": name or kwargs.get("name"),
            "parent": parent_run_id,
            "tags": kwargs.get("tags"),
            "metadata": kwargs.get("metadata"),
        }

    def on_chain_start(self, serialized: Any, inputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        self._start(kwargs.pop("name", None), run_id, kwargs.pop("parent_run_id", None), **kwargs)

    def on_chat_model_start(self, serialized: Any, messages: Any, *, run_id: UUID, **kwargs: Any) -> None:
        name = kwargs.pop("name", None) or (serialized or {}).get("name")
        self._start(name, run_id, kwargs.pop("parent_run_id", None), **kwargs)

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        self.ended.append(run_id)

    def on_llm_end(self, response: Any, *, run_id: UUID, **kwargs: Any) -> None:
        self.ended.append(run_id)

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        self.failed.append(run_id)

    def on_llm_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        self.failed.append(run_id)

    def on_custom_event(self, name: str, data: Any, *, run_id: UUID, **kwargs: Any) -> None:
        self.events.append((name, data, run_id))

    def assert_balanced(self) -> None:
        """Assert that every run that started ended exactly once."""
        closed = self.ended + self.failed
        assert len(closed) == len(set(closed)), "a run ended twice"
        assert set(closed) == set(self.started), "a run did not end, or ended without a start"

    def roots(self) -> list[dict[str, Any]]:
        return [run for run in self.started.values() if run["parent"] is None]

    def named(self, name: str) -> list[dict[str, Any]]:
        return [run for run in self.started.values() if run["name"] == name]
