"""The one statement that writes calls: insert, or replace an older call with the same input."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Engine, func

from langchain_datashunt.distillation.rows import KEPT, Row
from langchain_datashunt.distillation.schema import calls


def upsert_statement(engine: Engine) -> str:
    """Insert, or replace an older row of the same key, adding the counts and keeping what only the old one knew.

    As the driver's own SQL with a parameter for each field of `Row`: rows are many, and all of one form.
    """
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
    compiled = upsert.compile(dialect=dialect, column_keys=Row._fields)
    assert tuple(compiled.positiontup or ()) == Row._fields
    return str(compiled)
