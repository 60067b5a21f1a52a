"""CallFilter: which records of a store are meant, as an SQL condition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from langchain_datashunt.call_log.rows import ROUTES
from langchain_datashunt.exceptions import MissingExtraError
from langchain_datashunt.prediction import Route

try:
    from sqlalchemy import ColumnElement, and_

    from langchain_datashunt.call_log.schema import calls, contexts
except ImportError as error:  # pragma: no cover - tested without the extra
    raise MissingExtraError("sqlalchemy", "store") from error


@dataclass(frozen=True)
class CallFilter:
    """Which records are meant; what is None does not count.

    Attributes:
        task: Of this task.
        since: Not before this time, seconds since 1970 UTC.
        until: Before this time.
        route: Answered by this side.
        min_confidence: The small model's highest probability is at least this.
        max_confidence: And at most this.
        agrees: Both models say the same, or not.
        labelled: A true label is known, or not.
        asked: The large model was asked, or not.
    """

    task: str | None = None
    since: float | None = None
    until: float | None = None
    route: Route | None = None
    min_confidence: float | None = None
    max_confidence: float | None = None
    agrees: bool | None = None
    labelled: bool | None = None
    asked: bool | None = None

    def where(self) -> ColumnElement[bool]:
        """As an SQL condition over calls joined with contexts."""
        c, large = calls.c, contexts.c.large_model
        said_both = and_(c.small_label.isnot(None), c.label.isnot(None))
        tests: dict[str, Callable[[Any], ColumnElement[bool]]] = {
            "task": lambda task: contexts.c.task == task,
            "since": lambda moment: c.time >= moment,
            "until": lambda moment: c.time < moment,
            "route": lambda route: c.route == ROUTES.index(route),
            "min_confidence": lambda p: c.confidence >= p,
            "max_confidence": lambda p: c.confidence <= p,
            "agrees": lambda yes: and_(said_both, (c.small_label == c.label) if yes else (c.small_label != c.label)),
            "labelled": lambda yes: c.gold.isnot(None) if yes else c.gold.is_(None),
            "asked": lambda yes: (large != "") if yes else (large == ""),
        }
        given = {name: getattr(self, name) for name in tests}
        return and_(
            c.context == contexts.c.id, *(tests[name](value) for name, value in given.items() if value is not None)
        )


EVERYTHING = CallFilter()
