"""Reading records page by page: rows, and what their segments say, as of one moment, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, TypeAlias

from sqlalchemy import ColumnElement, Connection, RowMapping, select

from langchain_datashunt.call_log.record import CallRecord
from langchain_datashunt.call_log.rows import record_of, segment_and_place
from langchain_datashunt.call_log.schema import calls, contexts
from langchain_datashunt.call_log.segment_table import read_segment
from langchain_datashunt.call_log.segments import Segment

if TYPE_CHECKING:
    from langchain_datashunt.call_log.store import CallLog

SHARED = ("task", "small_model", "large_model", "policy", "labels")
"""What calls share with others, by the names of its columns."""

Found: TypeAlias = tuple[RowMapping, CallRecord | Exception]
"""A row, and its record, or why that cannot be read."""

_ROWS = select(calls, *(contexts.c[name] for name in SHARED))


class Reader:
    """Gives rows in the order of their numbers, and so of their segments, of which it holds one at a time.

    Args:
        store: Whose records.
    """

    def __init__(self, store: CallLog) -> None:
        self._store = store
        self._after = -1
        self._open: tuple[int, Segment] | None = None

    def page(self, where: ColumnElement[bool], size: int) -> list[Found]:
        """The next rows and their records; none at the end."""
        statement = _ROWS.where(where, calls.c.number > self._after).order_by(calls.c.number).limit(size)
        found: list[Found] = []
        with self._reading() as connection:
            rows = connection.execute(statement).mappings().all()
            for number, same in groupby(rows, key=lambda row: segment_and_place(row["number"])[0]):
                found += self._of_segment(connection, number, list(same))
        if found:
            self._after = found[-1][0]["number"]
        return found

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        """A connection that sees rows and segments as of one moment."""
        with self._store.reading() as connection:
            if connection.dialect.name == "postgresql":
                connection = connection.execution_options(isolation_level="REPEATABLE READ")
            yield connection

    def _of_segment(self, connection: Connection, number: int, rows: list[RowMapping]) -> list[Found]:
        try:
            if self._open is None or self._open[0] != number:
                self._open = (number, read_segment(connection, number, self._store.seal))
        except Exception as error:  # damaged in whatever way, or encrypted with another key: for each of its calls
            return [(row, error) for row in rows]
        return [(row, self._record(row, self._open[1])) for row in rows]

    @staticmethod
    def _record(row: RowMapping, segment: Segment) -> CallRecord | Exception:
        try:
            return record_of(row, segment)
        except Exception as error:
            return error
