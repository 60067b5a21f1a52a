"""The tables of the store and the numbered steps that bring a database up to date. Explicit statements, no ORM."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import (
    BigInteger,
    Boolean,
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

calls = Table(
    "datashunt_calls",
    metadata,
    Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("key", LargeBinary(16), nullable=False, unique=True),
    Column("id", LargeBinary(16), nullable=False, unique=True),
    Column("context", Integer, nullable=False),
    Column("time", Float(53), nullable=False),
    Column("content", LargeBinary, nullable=False),
    Column("probabilities", LargeBinary),
    Column("confidence", Float(24)),
    Column("score", Float(53)),
    Column("threshold", Float(53)),
    Column("route", SmallInteger, nullable=False),
    Column("reason", SmallInteger, nullable=False),
    Column("small_label", Integer),
    Column("label", Integer),
    Column("large_probabilities", LargeBinary),
    Column("large_confidence", Float(24)),
    Column("input_tokens", Integer),
    Column("output_tokens", Integer),
    Column("cost_usd", Float(53)),
    Column("small_seconds", Float(24), nullable=False),
    Column("large_seconds", Float(24), nullable=False),
    Column("audit", Boolean, nullable=False),
    Column("gold", String),
    Column("gold_source", String),
    Column("subject", LargeBinary(16)),
    Column("count", BigInteger, nullable=False),
)
"""One row for each (task, input, large model): the newest call, and how many there were.

Rows lie in the order in which they came, so that a million of them are written at the end of the table; the keys,
which are hashes, are in an index."""

by_time = Index("datashunt_calls_time", calls.c.time)
by_subject = Index("datashunt_calls_subject", calls.c.subject, sqlite_where=calls.c.subject.isnot(None))

replaced = Table(
    "datashunt_replaced",
    metadata,
    Column("id", LargeBinary(16), primary_key=True),
    Column("key", LargeBinary(16), nullable=False),
)
"""Ids of calls that a newer one with the same input replaced, so that feedback on them still finds its row."""

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


def _first_tables(connection: Connection) -> None:
    for table in (contexts, calls):
        table.create(connection)


def _replaced_ids(connection: Connection) -> None:
    replaced.create(connection)
    if connection.dialect.name == "postgresql":
        connection.execute(
            text(
                "CREATE FUNCTION datashunt_note_replaced() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
                "INSERT INTO datashunt_replaced (id, key) VALUES (OLD.id, OLD.key) ON CONFLICT (id) DO NOTHING; "
                "RETURN NULL; END $$"
            )
        )
        connection.execute(
            text(
                "CREATE TRIGGER datashunt_replaced_ids AFTER UPDATE OF id ON datashunt_calls FOR EACH ROW "
                "WHEN (OLD.id IS DISTINCT FROM NEW.id) EXECUTE FUNCTION datashunt_note_replaced()"
            )
        )
    else:
        connection.execute(
            text(
                "CREATE TRIGGER datashunt_replaced_ids AFTER UPDATE OF id ON datashunt_calls "
                "WHEN OLD.id IS NOT NEW.id BEGIN "
                "INSERT OR IGNORE INTO datashunt_replaced (id, key) VALUES (OLD.id, OLD.key); END"
            )
        )


def _controls(connection: Connection) -> None:
    controls.create(connection)


def _disclosures(connection: Connection) -> None:
    disclosures.create(connection)


STEPS: tuple[Callable[[Connection], None], ...] = (_first_tables, _replaced_ids, _controls, _disclosures)
"""Step i brings version i to version i + 1. Never change one that was released; add another."""


def migrate(connection: Connection) -> int:
    """Bring the database up to this code's version, inside the connection's transaction; returns that version.

    Raises:
        StoreError: The database was written by newer code.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(7229150463)"))
    if not inspect(connection).has_table(versions.name):
        versions.create(connection)
    current = len(connection.execute(select(versions.c.version)).all())
    if current > len(STEPS):
        raise StoreError(
            f"The store has schema version {current} and this code knows up to {len(STEPS)}. "
            f"Upgrade: pip install -U langchain-datashunt."
        )
    for version, step in enumerate(STEPS[current:], start=current + 1):
        step(connection)
        connection.execute(versions.insert().values(version=version))
    return len(STEPS)
