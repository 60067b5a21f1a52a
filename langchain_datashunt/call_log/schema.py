"""The tables of the store and the numbered steps that bring a database up to date. Explicit statements, no ORM."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    UniqueConstraint,
    and_,
    inspect,
    select,
    text,
    tuple_,
)

from langchain_datashunt.exceptions import StoreError

metadata = MetaData()

contexts = Table(
    "datashunt_contexts",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("digest", LargeBinary(16), nullable=False, unique=True),
    Column("task", Text, nullable=False),
    Column("small_model", Text, nullable=False),
    Column("large_model", Text, nullable=False),
    Column("policy", Text, nullable=False),
    Column("labels", Text, nullable=False),
)
"""What many calls share, stored once: task, models, policy, and the label set as JSON."""

segments = Table(
    "datashunt_segments",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("content", LargeBinary, nullable=False),
    sqlite_autoincrement=True,
)
"""What the records of one group say: texts and distributions, compressed together. Numbers are never used again."""

calls = Table(
    "datashunt_calls",
    metadata,
    Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=False),
    Column("key_high", BigInteger, nullable=False),
    Column("key_low", BigInteger, nullable=False),
    Column("id", LargeBinary(16), nullable=False, unique=True),
    Column("context", Integer, nullable=False),
    Column("time", Float(53), nullable=False),
    Column("confidence", Float(24)),
    Column("score", Float(53)),
    Column("threshold", Float(53)),
    Column("route", SmallInteger, nullable=False),
    Column("reason", SmallInteger, nullable=False),
    Column("small_label", Integer),
    Column("label", Integer),
    Column("input_tokens", Integer),
    Column("output_tokens", Integer),
    Column("cost_usd", Float(53)),
    Column("gold", String),
    Column("gold_source", String),
    Column("subject", LargeBinary(16)),
    Column("count", BigInteger, nullable=False),
    UniqueConstraint("key_high", "key_low"),
)
"""One row for each (task, input, large model): the newest call, and how many there were.

A row's number is its segment's number and its place in the segment (`rows.number_of`), so that rows lie in the order in
which they came, and a segment's rows are found without an index. The keys, which are hashes, are in one."""

by_subject = Index("datashunt_calls_subject", calls.c.subject, sqlite_where=calls.c.subject.isnot(None))

replaced = Table(
    "datashunt_replaced",
    metadata,
    Column("id", LargeBinary(16), primary_key=True),
    Column("key_high", BigInteger, nullable=False),
    Column("key_low", BigInteger, nullable=False),
)
"""Ids of calls that a newer one with the same input replaced, so that feedback on them still finds its row."""

dead = Table(
    "datashunt_dead",
    metadata,
    Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=False),
)
"""Numbers that no row has any more, until what stands there is erased from its segment."""

controls = Table(
    "datashunt_controls",
    metadata,
    Column("name", String(200), primary_key=True),
    Column("value", Float(53), nullable=False),
)
"""Numbers that several processes share, such as the threshold of a budget."""

disclosures = Table(
    "datashunt_disclosures",
    metadata,
    Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("time", Float(53), nullable=False),
    Column("budget", String(60), nullable=False),
    Column("subject", LargeBinary(16)),
    Column("digest", LargeBinary(16), nullable=False),
    Column("characters", BigInteger, nullable=False),
    Column("replaced", Text, nullable=False),
    Column("plain", Text, nullable=False),
    Column("refused", String(60), nullable=False),
)
"""The trail of what left for large models: counts and hashes, never a text."""

versions = Table("datashunt_schema", metadata, Column("version", Integer, primary_key=True))


FIRST = 5
"""The first version of the tables that was published."""


def _calls(connection: Connection) -> None:
    for table in (contexts, segments, calls):
        table.create(connection)


_TRIGGERS = {
    "datashunt_replaced_ids": (
        "UPDATE OF id",
        "OLD.id IS DISTINCT FROM NEW.id",
        "datashunt_replaced (id, key_high, key_low) VALUES (OLD.id, OLD.key_high, OLD.key_low)",
    ),
    "datashunt_moved": (
        "UPDATE OF number",
        "OLD.number <> NEW.number",
        "datashunt_dead (number) VALUES (OLD.number)",
    ),
    "datashunt_deleted": ("DELETE", "", "datashunt_dead (number) VALUES (OLD.number)"),
}
"""What the database notes by itself when a row of `calls` changes: the event, the condition, what is inserted."""


def _notes(connection: Connection) -> None:
    replaced.create(connection)
    dead.create(connection)
    _create_triggers(connection)


def _drop_triggers(connection: Connection) -> None:
    on_postgresql = connection.dialect.name == "postgresql"
    for name in _TRIGGERS:
        gone = f"FUNCTION IF EXISTS {name}() CASCADE" if on_postgresql else f"TRIGGER IF EXISTS {name}"
        connection.execute(text(f"DROP {gone}"))


def _create_triggers(connection: Connection) -> None:
    for name, (event, condition, insertion) in _TRIGGERS.items():
        when = f"WHEN ({condition}) " if condition else ""
        if connection.dialect.name == "postgresql":
            function = (
                f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
                f"INSERT INTO {insertion} ON CONFLICT DO NOTHING; RETURN NULL; END $$"
            )
            trigger = f"FOR EACH ROW {when}EXECUTE FUNCTION {name}()"
        else:
            function, when = "", when.replace("IS DISTINCT FROM", "IS NOT")
            trigger = f"FOR EACH ROW {when}BEGIN INSERT OR IGNORE INTO {insertion}; END"
        if function:
            connection.execute(text(function))
        connection.execute(text(f"CREATE TRIGGER {name} AFTER {event} ON datashunt_calls {trigger}"))


def _controls(connection: Connection) -> None:
    controls.create(connection)


def _disclosures(connection: Connection) -> None:
    disclosures.create(connection)


def _keys_as_numbers(connection: Connection) -> None:
    """Two numbers instead of the 16 bytes that keys were before; what the steps above make now has them already."""
    before = [table for table in (calls, replaced) if "key" in _columns_of(connection, table)]
    if not before:
        return
    _drop_triggers(connection)
    for table in before:
        if connection.dialect.name == "postgresql":
            _halve_in_postgresql(connection, table)
        else:
            _halve_in_sqlite(connection, table)
    _create_triggers(connection)


def _columns_of(connection: Connection, table: Table) -> list[str]:
    return [column["name"] for column in inspect(connection).get_columns(table.name)]


def _halve_in_postgresql(connection: Connection, table: Table) -> None:
    def half(start: int) -> str:
        return f"CAST(CAST('x' || encode(substring(key FROM {start} FOR 8), 'hex') AS bit(64)) AS bigint)"

    unique = ", ADD UNIQUE (key_high, key_low)" if table is calls else ""
    for statement in (
        f"ALTER TABLE {table.name} ADD COLUMN key_high BIGINT, ADD COLUMN key_low BIGINT",
        f"UPDATE {table.name} SET key_high = {half(1)}, key_low = {half(9)}",
        f"ALTER TABLE {table.name} ALTER COLUMN key_high SET NOT NULL, ALTER COLUMN key_low SET NOT NULL, "
        f"DROP COLUMN key{unique}",
    ):
        connection.execute(text(statement))


def _halve_in_sqlite(connection: Connection, table: Table) -> None:
    """The table is made anew: SQLite does not drop a column that has to be unique."""
    driver: Any = connection.connection.driver_connection
    driver.create_function("datashunt_half", 2, lambda key, i: struct.unpack(">qq", key)[i], deterministic=True)
    old = f"{table.name}_before"
    names = ", ".join(name for name in _columns_of(connection, table) if name != "key")
    for index in table.indexes:
        index.drop(connection)
    connection.execute(text(f"ALTER TABLE {table.name} RENAME TO {old}"))
    table.create(connection)
    connection.execute(
        text(
            f"INSERT INTO {table.name} (key_high, key_low, {names}) "
            f"SELECT datashunt_half(key, 0), datashunt_half(key, 1), {names} FROM {old}"
        )
    )
    connection.execute(text(f"DROP TABLE {old}"))


STEPS: tuple[Callable[[Connection], None], ...] = (_calls, _notes, _controls, _disclosures, _keys_as_numbers)
"""Step i brings version FIRST + i - 1 to version FIRST + i. Never change one that was released; add another."""


def has_key(table: Table, keys: Sequence[tuple[int, int]]) -> ColumnElement[bool]:
    """Whether a row of `calls` or `replaced` has one of these keys."""
    # SQLite uses the index for the first half alone, not for pairs
    return and_(table.c.key_high.in_([high for high, _ in keys]), tuple_(table.c.key_high, table.c.key_low).in_(keys))


def migrate(connection: Connection) -> int:
    """Bring the database up to this code's version, inside the connection's transaction; returns that version.

    Raises:
        StoreError: The database was written by newer code, or before the first published version.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(7229150463)"))
    if not inspect(connection).has_table(versions.name):
        versions.create(connection)
    done, latest = set(connection.execute(select(versions.c.version)).scalars()), FIRST + len(STEPS) - 1
    if done and max(done) > latest:
        raise StoreError(
            f"The store has schema version {max(done)} and this code knows up to {latest}. "
            f"Upgrade: pip install -U langchain-datashunt."
        )
    if done and min(done) < FIRST:
        raise StoreError(
            f"The store has schema version {max(done)}, from before the first release, which this code does not read. "
            f"Export it with the code that wrote it (datashunt log export), and begin a new one."
        )
    for version, step in enumerate(STEPS, start=FIRST):
        if version not in done:
            step(connection)
            connection.execute(versions.insert().values(version=version))
    return latest
