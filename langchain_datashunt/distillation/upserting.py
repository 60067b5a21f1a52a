"""The one statement that writes calls: insert, or replace an older call with the same input."""

from __future__ import annotations

import sqlite3
from functools import lru_cache
from itertools import compress
from operator import itemgetter
from typing import Any

from sqlalchemy import Connection, Engine, func

from langchain_datashunt.distillation.rows import KEPT, Rows
from langchain_datashunt.distillation.schema import calls

_MOST_ROWS = 512
"""Of one statement of SQLite."""

_BY_KEY = itemgetter(Rows._fields.index("key"))


class Upsert:
    """Inserts rows, or replaces older ones of the same key, adding the counts and keeping what only the old one knew.

    SQLite gets many rows in one statement: the interpreter is given up, and has to be won back, once a statement, for
    which a thread that has other threads computing beside it waits some milliseconds. A column that no row fills is no
    parameter of it. PostgreSQL gets them one by one in a pipeline, in the order of their keys, so that two writers do
    not wait for each other.

    Args:
        engine: Of the database.
    """

    def __init__(self, engine: Engine) -> None:
        self._sql = _sql(engine)
        self._many_rows = engine.dialect.name == "sqlite"

    def write(self, connection: Connection, rows: Rows) -> None:
        """Write rows, no two of which have the same key."""
        if not self._many_rows:
            connection.exec_driver_sql(self._sql, sorted(zip(*rows, strict=True), key=_BY_KEY))
            return
        n = len(rows.key)
        filled = tuple(column.count(None) < n for column in rows)
        width = sum(filled)
        values: list[Any] = [None] * (n * width)
        for i, column in enumerate(compress(rows, filled)):
            values[i::width] = column
        start, size = 0, _most_rows(connection, width)
        while start < n:
            while size > n - start:
                size //= 2
            some = tuple(values[start * width : (start + size) * width])
            connection.exec_driver_sql(_of_rows(self._sql, size, filled), some)
            start += size


def _most_rows(connection: Connection, width: int) -> int:
    """How many rows a statement may have, a power of two."""
    raw = connection.connection.driver_connection
    parameters = raw.getlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER) if isinstance(raw, sqlite3.Connection) else 999
    return min(_MOST_ROWS, 1 << (parameters // width).bit_length() - 1)


@lru_cache(maxsize=128)
def _of_rows(sql: str, n: int, filled: tuple[bool, ...]) -> str:
    """The statement for `n` rows that have only these columns filled."""
    row = f"({', '.join('?' if given else 'NULL' for given in filled)})"
    return sql.replace(f"({', '.join('?' * len(filled))})", ", ".join([row] * n))


def _sql(engine: Engine) -> str:
    """As the driver's own SQL with a parameter for each field of `Rows`: rows are many, and all of one form."""
    statement: Any
    if engine.dialect.name == "sqlite":
        from sqlalchemy.dialects.sqlite import insert as dialect_insert

        statement = dialect_insert(calls)
    else:
        from sqlalchemy.dialects.postgresql import insert as postgres_insert

        statement = postgres_insert(calls)
    new = statement.excluded
    newest = {column.name: new[column.name] for column in calls.c if column.name not in ("key", "count", *KEPT)}
    kept = {name: func.coalesce(new[name], calls.c[name]) for name in KEPT}
    upsert = statement.on_conflict_do_update(
        index_elements=[calls.c.key], set_={**newest, **kept, "count": calls.c.count + new["count"]}
    )
    style = "qmark" if engine.dialect.name == "sqlite" else "format"
    dialect = type(engine.dialect)(paramstyle=style)  # type: ignore[call-arg]
    compiled = upsert.compile(dialect=dialect, column_keys=Rows._fields)
    assert tuple(compiled.positiontup or ()) == Rows._fields
    return str(compiled)
