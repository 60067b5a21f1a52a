"""Tables of the call log, and the numbered migrations that create them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    DateTime,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    inspect,
    select,
    text,
)

from langchain_datashunt.exceptions import StoreError

metadata = MetaData()

_NUMBER = BigInteger().with_variant(Integer, "sqlite")

label_sets = Table(
    "label_sets",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("digest", LargeBinary(16), nullable=False, unique=True),
    Column("labels", Text, nullable=False),
)
"""Label sets as JSON lists. Each distinct set is stored once."""

calls = Table(
    "calls",
    metadata,
    Column("number", _NUMBER, primary_key=True, autoincrement=True),
    Column("id", String(60), nullable=False, unique=True),
    Column("time", DateTime, nullable=False),
    Column("task", Text, nullable=False),
    Column("input", Text, nullable=False),
    Column("route", String(20), nullable=False),
    Column("reason", String(20), nullable=False),
    Column("small_model", Text, nullable=False),
    Column("small_label", Text),
    Column("small_answer", Text),
    Column("confidence", Float(53)),
    Column("score", Float(53)),
    Column("threshold", Float(53)),
    Column("policy", Text, nullable=False),
    Column("large_model", Text, nullable=False),
    Column("answer", Text),
    Column("answer_label", Text),
    Column("large_confidence", Float(53)),
    Column("agrees", Boolean),
    Column("in_label_set", Boolean),
    Column("gold", Text),
    Column("gold_source", Text),
    Column("cost_usd", Float(53)),
    Column("input_tokens", BigInteger),
    Column("output_tokens", BigInteger),
    Column("small_seconds", Float(53), nullable=False),
    Column("large_seconds", Float(53), nullable=False),
    Column("weight", Float(53), nullable=False),
    Column("audit", Boolean, nullable=False),
    Column("disclosed", Text),
    Column("label_set", Integer),
    Column("probabilities", LargeBinary),
    Column("large_probabilities", LargeBinary),
    Column("input_hash", LargeBinary(16), nullable=False),
    Column("subject", LargeBinary(16)),
    Column("encrypted", Boolean, nullable=False),
)
"""Calls, one row each, numbered in the order in which they were written.

`time` is UTC. Probabilities are stored as 32-bit floats in the order of the label set. `agrees` is whether both models
gave the same label, or NULL if one of them gave none. `weight` is the number of calls that a row stands for, because
locally answered calls may be sampled. `in_label_set` is whether the large model's label is in the label
set, or NULL if one of these is missing or answers are generated."""

by_input = Index("calls_by_input", calls.c.input_hash)
by_time = Index("calls_by_time", calls.c.time)
by_subject = Index("calls_by_subject", calls.c.subject, sqlite_where=calls.c.subject.isnot(None))

controls = Table(
    "datashunt_controls",
    metadata,
    Column("name", String(200), primary_key=True),
    Column("value", Float(53), nullable=False),
)
"""Numbers that processes share, such as thresholds and the amounts spent of budgets."""

disclosures = Table(
    "datashunt_disclosures",
    metadata,
    Column("number", _NUMBER, primary_key=True, autoincrement=True),
    Column("time", Float(53), nullable=False),
    Column("budget", String(60), nullable=False),
    Column("subject", LargeBinary(16)),
    Column("digest", LargeBinary(16), nullable=False),
    Column("characters", BigInteger, nullable=False),
    Column("replaced", Text, nullable=False),
    Column("plain", Text, nullable=False),
    Column("refused", String(60), nullable=False),
)
"""Audit trail of the requests to large models: counts and hashes, never texts."""

versions = Table("datashunt_schema", metadata, Column("version", Integer, primary_key=True))

FIRST = 11
"""First published version of the schema."""


def _first_tables(connection: Connection) -> None:
    for table in (label_sets, calls, controls, disclosures):
        if inspect(connection).has_table(table.name):
            raise StoreError(
                f"The database already has a table {table.name!r} of another program. Use another database, or "
                f"in PostgreSQL another schema: ...?options=-csearch_path%3Ddatashunt."
            )
        table.create(connection)


STEPS: tuple[Callable[[Connection], None], ...] = (_first_tables,)
"""Migrations: step i creates version FIRST + i. Never change a released step. Append a new one instead."""


def migrate(connection: Connection) -> int:
    """Migrate the database to the current schema version, in the connection's transaction.

    Returns:
        The current schema version.

    Raises:
        StoreError: If the schema is newer than this package or older than its first release, or if another program
            uses a table name of the call log.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(7229150463)"))
    if not inspect(connection).has_table(versions.name):
        versions.create(connection)
    done, latest = set(connection.execute(select(versions.c.version)).scalars()), FIRST + len(STEPS) - 1
    if done and max(done) > latest:
        raise StoreError(
            f"The call log has schema version {max(done)}, but this package supports only versions up to {latest}. "
            f"Upgrade: pip install -U langchain-datashunt."
        )
    if done and min(done) < FIRST:
        raise StoreError(
            f"The call log has schema version {max(done)}, from before the first release, which cannot be read. "
            f"Export it with the package version that wrote it (datashunt log export), and start a new log."
        )
    for version, step in enumerate(STEPS, start=FIRST):
        if version not in done:
            step(connection)
            connection.execute(versions.insert().values(version=version))
    return latest


def as_datetime(seconds: float) -> datetime:
    """Convert seconds since 1970 UTC to the naive UTC time that the tables store."""
    return datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None)


def as_seconds(moment: Any) -> float:
    """Convert a stored time to seconds since 1970 UTC."""
    return float(moment.replace(tzinfo=UTC).timestamp())
