"""How calls are written: a new one is inserted; of two with one input the newer stays, and both are counted."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from functools import lru_cache
from itertools import compress
from operator import itemgetter
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Insert,
    Table,
    case,
    exists,
    func,
    insert,
    literal_column,
    or_,
    select,
)

from langchain_datashunt.call_log.rows import KEPT, Key, Rows
from langchain_datashunt.call_log.schema import calls, dead, replaced

_MOST_ROWS = 512
"""Of one statement of SQLite."""

_KEY = ("key_high", "key_low")

_BY_KEY = itemgetter(*map(Rows._fields.index, _KEY))


class Upsert:
    """Inserts rows; of two with one key the newer call stays, with the counts of both and what only the other knew.

    A call that is written again, by its id, is not counted again: a spool may be drained by two processes, or by one
    that died before it noted how far it was. What a call said that came late, after a newer one, is noted as dead, and
    its id among those that were replaced, so that feedback on it finds its row.

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
        self._insert_replaced = _dialect_insert(engine, replaced).on_conflict_do_nothing()

    def write(self, connection: Connection, rows: Rows, replaced_ids: Sequence[tuple[bytes, Key]] = ()) -> None:
        """Write rows, no two of which have the same key or number.

        Args:
            connection: Inside a transaction.
            rows: In the order of their numbers, which are those of one segment.
            replaced_ids: Ids and keys of calls for which one of the rows stands, too.
        """
        late = self._write(connection, rows)
        if late.number:
            connection.execute(insert(dead), [{"number": number} for number in late.number])
        late_keys = zip(late.key_high, late.key_low, strict=True)
        self.note_replaced(connection, [*replaced_ids, *zip(late.id, late_keys, strict=True)])

    def note_replaced(self, connection: Connection, ids: Sequence[tuple[bytes, Key]]) -> None:
        """Note ids, with their keys, of calls for which another with the same input stands, too."""
        if ids:
            noted = [{"id": one, "key_high": high, "key_low": low} for one, (high, low) in ids]
            connection.execute(self._insert_replaced, noted)

    def _write(self, connection: Connection, rows: Rows) -> Rows:
        """Write rows; returns those that came late."""
        if self._insert_new is None:
            connection.exec_driver_sql(self._upsert, sorted(zip(*rows, strict=True), key=_BY_KEY))
        elif _write_many(connection, self._insert_new, rows) == len(rows.number):
            return rows.only([])
        else:
            _write_many(connection, self._upsert, _not_there(connection, rows))
        return _not_there(connection, rows)


def _not_there(connection: Connection, rows: Rows) -> Rows:
    """The rows whose numbers no row of the table has."""
    where = calls.c.number.between(rows.number[0], rows.number[-1])
    there = connection.execute(select(func.count()).select_from(calls).where(where)).scalar_one()
    if there == len(rows.number):
        return rows.only([])
    numbers = set(connection.execute(select(calls.c.number).where(where)).scalars())
    return rows.only([number not in numbers for number in rows.number])


def _write_many(connection: Connection, sql: str, rows: Rows) -> int:
    """Write rows into SQLite with as few statements as may be; returns how many rows they changed."""
    n, changed = len(rows.number), 0
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
    """The statement that inserts a row, or joins it with that of its key."""
    statement = _dialect_insert(engine, calls)
    new = statement.excluded
    late = new.time < calls.c.time
    newest = {
        column.name: case((late, column), else_=new[column.name])
        for column in calls.c
        if column.name not in (*_KEY, "count", *KEPT)
    }
    kept = {
        name: case((late, func.coalesce(calls.c[name], new[name])), else_=func.coalesce(new[name], calls.c[name]))
        for name in KEPT
    }
    written_id: ColumnElement[bytes] = literal_column("excluded.id")
    again = or_(written_id == calls.c.id, exists(select(replaced.c.id).where(replaced.c.id == written_id)))
    count = calls.c.count + case((again, literal_column("0")), else_=new["count"])
    return _with_a_parameter_for_each_field(
        engine,
        statement.on_conflict_do_update(
            index_elements=[calls.c[name] for name in _KEY], set_={**newest, **kept, "count": count}
        ),
    )


def _dialect_insert(engine: Engine, table: Table) -> Any:
    """The insert that knows what to do in a conflict."""
    if engine.dialect.name == "sqlite":
        from sqlalchemy.dialects.sqlite import insert as dialect_insert

        return dialect_insert(table)
    from sqlalchemy.dialects.postgresql import insert as postgres_insert

    return postgres_insert(table)


def _with_a_parameter_for_each_field(engine: Engine, statement: Insert) -> str:
    """As the driver's own SQL: rows are many, and all of one form."""
    style = "qmark" if engine.dialect.name == "sqlite" else "format"
    dialect = type(engine.dialect)(paramstyle=style)  # type: ignore[call-arg]
    compiled: Any = statement.compile(dialect=dialect, column_keys=Rows._fields)
    assert tuple(compiled.positiontup or ()) == Rows._fields
    return str(compiled)
