"""How calls are written: a new one is inserted, one with the input of an older call replaces it."""

from __future__ import annotations

import sqlite3
from functools import lru_cache
from itertools import compress
from operator import itemgetter
from typing import Any

from sqlalchemy import Connection, Engine, Insert, func, insert, select

from langchain_datashunt.distillation.rows import KEPT, Rows
from langchain_datashunt.distillation.schema import calls

_MOST_ROWS = 512
"""Of one statement of SQLite."""

_BY_KEY = itemgetter(Rows._fields.index("key"))


class Upsert:
    """Inserts rows, or replaces older ones of the same key, adding the counts and keeping what only the old one knew.

    SQLite gets many rows in one statement: the interpreter is given up, and has to be won back, once a statement, for
    which a thread that has other threads computing beside it waits some milliseconds. A column that no row fills is no
    parameter of it. What is new is inserted first, and only what that left out is upserted: a statement that may fail
    in mid-run, as an upsert of many rows may, has SQLite copy each page before it is changed, and each key, being a
    hash, changes a page of its own.

    PostgreSQL gets rows one by one in a pipeline, in the order of their keys, so that two writers do not wait for each
    other.

    Args:
        engine: Of the database.
    """

    def __init__(self, engine: Engine) -> None:
        self._upsert = _upsert(engine)
        self._insert_new = _insert_new(engine) if engine.dialect.name == "sqlite" else None

    def write(self, connection: Connection, rows: Rows) -> None:
        """Write rows, no two of which have the same key or number."""
        if self._insert_new is None:
            connection.exec_driver_sql(self._upsert, sorted(zip(*rows, strict=True), key=_BY_KEY))
            return
        n = len(rows.key)
        if _write_many(connection, self._insert_new, rows) < n:
            of_these = calls.c.number.between(min(rows.number), max(rows.number))
            written = set(connection.execute(select(calls.c.number).where(of_these)).scalars())
            left_out = [number not in written for number in rows.number]
            _write_many(connection, self._upsert, rows.only(left_out))


def _write_many(connection: Connection, sql: str, rows: Rows) -> int:
    """Write rows into SQLite with as few statements as may be; returns how many rows they changed."""
    n, changed = len(rows.key), 0
    filled = tuple(column[0] is not None or column.count(None) < n for column in rows)
    width = sum(filled)
    values: list[Any] = [None] * (n * width)
    for i, column in enumerate(compress(rows, filled)):
        values[i::width] = column
    start, size = 0, _most_rows(connection, width)
    while start < n:
        while size > n - start:
            size //= 2
        some = tuple(values[start * width : (start + size) * width])
        changed += connection.exec_driver_sql(_of_rows(sql, size, filled), some).rowcount
        start += size
    return changed


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


def _insert_new(engine: Engine) -> str:
    """SQLite's statement that inserts a row unless one of its key, or one that it clashes with, is there."""
    return _with_a_parameter_for_each_field(engine, insert(calls).prefix_with("OR IGNORE"))


def _upsert(engine: Engine) -> str:
    """The statement that inserts a row, or replaces that of its key."""
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
    return _with_a_parameter_for_each_field(
        engine,
        statement.on_conflict_do_update(
            index_elements=[calls.c.key], set_={**newest, **kept, "count": calls.c.count + new["count"]}
        ),
    )


def _with_a_parameter_for_each_field(engine: Engine, statement: Insert) -> str:
    """As the driver's own SQL: rows are many, and all of one form."""
    style = "qmark" if engine.dialect.name == "sqlite" else "format"
    dialect = type(engine.dialect)(paramstyle=style)  # type: ignore[call-arg]
    compiled: Any = statement.compile(dialect=dialect, column_keys=Rows._fields)
    assert tuple(compiled.positiontup or ()) == Rows._fields
    return str(compiled)
