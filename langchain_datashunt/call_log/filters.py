"""CallFilter: conditions that select records of the call log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from langchain_datashunt.exceptions import MissingExtraError
from langchain_datashunt.prediction import Route

try:
    from sqlalchemy import ColumnElement, and_, true

    from langchain_datashunt.call_log.schema import as_datetime, calls
except ImportError as error:  # pragma: no cover - tested without the extra
    raise MissingExtraError("sqlalchemy", "store") from error


@dataclass(frozen=True)
class CallFilter:
    """Conditions that a record must all meet. Attributes that are None set no condition.

    Attributes:
        task: Task name.
        since: Earliest end of the call, in seconds since 1970 UTC.
        until: Time before which the call ended, in seconds since 1970 UTC.
        route: Route of the call.
        min_confidence: Minimum confidence of the small model, inclusive.
        max_confidence: Maximum confidence of the small model, inclusive.
        agrees: Whether both models gave the same label.
        labelled: Whether the true label is known.
        asked: Whether the large model was called.
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
        """Return the filter as an SQL condition on the table `calls`."""
        c = calls.c
        tests: dict[str, Callable[[Any], ColumnElement[bool]]] = {
            "task": lambda task: c.task == task,
            "since": lambda moment: c.time >= as_datetime(moment),
            "until": lambda moment: c.time < as_datetime(moment),
            "route": lambda route: c.route == route,
            "min_confidence": lambda p: c.confidence >= p,
            "max_confidence": lambda p: c.confidence <= p,
            "agrees": lambda yes: c.agrees.is_(yes),
            "labelled": lambda yes: c.gold.isnot(None) if yes else c.gold.is_(None),
            "asked": lambda yes: (c.large_model != "") if yes else (c.large_model == ""),
        }
        given = {name: getattr(self, name) for name in tests}
        return and_(true(), *(tests[name](value) for name, value in given.items() if value is not None))


EVERYTHING = CallFilter()
