"""The tables of the store and the numbered steps that bring a database up to date. Explicit statements, no ORM."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import (
    BigInteger,
    Column,
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
    inspect,
    select,
    text,
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
    Column("key", LargeBinary(16), nullable=False, unique=True),
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
)
"""One row for each (task, input, large model): the newest call, and how many there were.

A row's number is its segment's number and its place in the segment (`rows.number_of`), so that rows lie in the order in
which they came, and a segment's rows are found without an index. The keys, which are hashes, are in one."""

by_subject = Index("datashunt_calls_subject", calls.c.subject, sqlite_where=calls.c.subject.isnot(None))

replaced = Table(
    "datashunt_replaced",
    metadata,
    Column("id", LargeBinary(16), primary_key=True),
    Column("key", LargeBinary(16), nullable=False),
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
        "UPDATE OF id", "OLD.id IS DISTINCT FROM NEW.id", "datashunt_replaced (id, key) VALUES (OLD.id, OLD.key)"
    ),
    "datashunt_moved": (
        "UPDATE OF number", "OLD.number <> NEW.number", "datashunt_dead (number) VALUES (OLD.number)"
    ),
    "datashunt_deleted": ("DELETE", "", "datashunt_dead (number) VALUES (OLD.number)"),
}  # fmt: skip
"""What the database notes by itself when a row of `calls` changes: the event, the condition, what is inserted."""


def _notes(connection: Connection) -> None:
    replaced.create(connection)
    dead.create(connection)
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


STEPS: tuple[Callable[[Connection], None], ...] = (_calls, _notes, _controls, _disclosures)
"""Step i brings version FIRST + i - 1 to version FIRST + i. Never change one that was released; add another."""


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
            f"Export it with the code that wrote it (datashunt store export), and begin a new one."
        )
    for version, step in enumerate(STEPS, start=FIRST):
        if version not in done:
            step(connection)
            connection.execute(versions.insert().values(version=version))
    return latest
