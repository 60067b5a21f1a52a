"""CallLog: the log of calls in SQLite or PostgreSQL, as a table that people can query."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

from langchain_datashunt._utils.fork import AFTER_FORK, LEFT_ALONE
from langchain_datashunt.call_log.encryption import KEY_VARIABLE, Seal
from langchain_datashunt.call_log.record import CallRecord
from langchain_datashunt.exceptions import ConfigurationError, MissingExtraError, RecordRefusedError, StoreError

try:
    from sqlalchemy import (
        BigInteger,
        ColumnElement,
        Connection,
        Engine,
        RowMapping,
        and_,
        cast,
        create_engine,
        delete,
        event,
        func,
        insert,
        or_,
        select,
        true,
        update,
    )
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError, StatementError

    from langchain_datashunt.call_log.filters import EVERYTHING, CallFilter
    from langchain_datashunt.call_log.rows import (
        COLUMNS,
        digest_of,
        fits,
        keyed,
        label_set,
        record_of,
        row_of,
        subject_hashes,
    )
    from langchain_datashunt.call_log.schema import as_datetime, as_seconds, calls, label_sets, migrate
except ImportError as error:  # pragma: no cover - tested without the extra
    raise MissingExtraError("sqlalchemy", "store") from error


PRAGMAS = ("journal_mode=WAL", "busy_timeout=30000", "cache_size=-65536", "secure_delete=ON", "temp_store=MEMORY")
"""Of every SQLite connection. Deleted content is overwritten, and temporary content never reaches a disk."""

_LOG = logging.getLogger(__name__)

Refused: TypeAlias = Callable[[CallRecord, Exception], None]
"""Called with a record that a database does not take, and the reason."""

_READS = "datashunt_reads"
"""Execution option: nothing is written in this transaction."""

_AT_ONCE = 500
"""Values in one IN (...) condition."""


class CallLog:
    """The log of calls that audits, reports and distillation read.

    ```python
    log = CallLog("sqlite:///calls.db")  # or postgresql+psycopg://user@host/database
    for batch in log.iterate(CallFilter(route="large")):
        ...
    ```

    Each call is one row of the table `calls`, with readable columns: `SELECT task, avg(cost_usd) FROM calls GROUP BY
    1`. A call that is written again, by its id, is not stored twice. Many processes may write at once.

    Args:
        url: A SQLAlchemy URL, or the path of a SQLite file (created with mode 0600).
        durability: "record" makes every commit survive a power cut (SQLite synchronous=FULL). "group" leaves that to
            the operating system (NORMAL): a power cut may lose the last commits, a killed process loses none.
        key: A Fernet key, or several, of which the first encrypts. All texts and labels are then encrypted, and
            hashes of inputs and subjects are keyed. Tasks, models, policies, figures and times are not encrypted.
            None reads DATASHUNT_STORE_KEY from the environment.

    Raises:
        StoreError: The database cannot be opened, or was written by newer code.
        ConfigurationError: The database or its driver is not supported.
    """

    def __init__(
        self,
        url: str | Path,
        *,
        durability: str = "group",
        key: str | bytes | Sequence[str | bytes] | Seal | None = None,
    ) -> None:
        self.url = make_url(url_of(url))
        self.seal = key if isinstance(key, Seal) else Seal.from_key(key)
        self.durability = durability
        self._label_sets: dict[tuple[str, ...], int] = {}
        self._lock = threading.Lock()
        self.engine = self._open()
        AFTER_FORK.add(self)
        self._insert = _insert_of(self.engine)
        with self.connection() as connection:
            migrate(connection)

    def after_fork(self) -> None:
        """Leave the parent's connections to the parent, which still uses them."""
        self._lock = threading.Lock()
        LEFT_ALONE.append(self.engine.pool)
        self.engine.dispose(close=False)

    @property
    def _on_sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    def _open(self) -> Engine:
        if not self._on_sqlite:
            try:
                return create_engine(self.url, pool_pre_ping=True, hide_parameters=True)
            except (ImportError, SQLAlchemyError) as error:  # an unknown database, or a driver that is not installed
                shown = self.url.render_as_string(hide_password=True)
                raise ConfigurationError(
                    f"The call log {shown} cannot be used: {type(error).__name__}: {error}. Pass a file, or a "
                    f"postgresql+psycopg:// URL."
                ) from error
        if self.url.database and self.url.database != ":memory:":
            path = Path(self.url.database)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        engine = create_engine(self.url, connect_args={"timeout": 30}, hide_parameters=True)
        synchronous = "FULL" if self.durability == "record" else "NORMAL"

        @event.listens_for(engine, "connect")
        def prepare(connection: Any, _: Any) -> None:
            connection.isolation_level = None
            for pragma in (*PRAGMAS, f"synchronous={synchronous}"):
                connection.execute(f"PRAGMA {pragma}")

        @event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            reads = connection.get_execution_options().get(_READS, False)
            connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

        return engine

    # Writing

    def append(self, records: Sequence[CallRecord]) -> None:
        """Store records in one transaction; records whose id is stored already are skipped.

        Raises:
            StoreError: The database cannot be reached or is full; none of these records is stored.
            RecordRefusedError: The database does not take one of them, for example because a number is too large.
        """
        if not records:
            return
        with self._lock:
            known = dict(self._label_sets)
        try:
            with self.connection() as connection:
                rows = []
                for record in records:
                    if record.labels and record.labels not in known:
                        known[record.labels] = self._number_of(connection, record.labels)
                    number = known[record.labels] if record.labels else None
                    rows.append(row_of(record, number, self.seal, sqlite=self._on_sqlite))
                if connection.exec_driver_sql(self._insert, rows).rowcount != len(rows):
                    self._check_repeated(connection, rows)
        except StoreError:
            self._label_sets.clear()
            raise
        with self._lock:  # other transactions see the new label sets only now
            self._label_sets.update(known)

    @staticmethod
    def _check_repeated(connection: Connection, rows: Sequence[tuple[Any, ...]]) -> None:
        """Raise if a row was skipped because another input's call has its id."""
        place_of_id, place_of_hash = COLUMNS.index("id"), COLUMNS.index("input_hash")
        stored: dict[str, bytes] = {}
        for start in range(0, len(rows), _AT_ONCE):
            ids = [row[place_of_id] for row in rows[start : start + _AT_ONCE]]
            found = connection.execute(select(calls.c.id, calls.c.input_hash).where(calls.c.id.in_(ids)))
            stored.update((row.id, bytes(row.input_hash)) for row in found)
        for row in rows:
            if stored.get(row[place_of_id], row[place_of_hash]) != row[place_of_hash]:
                raise RecordRefusedError(f"The id {row[place_of_id]!r} is stored already, for another input.")

    def append_each(self, records: Sequence[CallRecord], refused: Refused) -> None:
        """Store records except those that the database does not take, which are found by bisection.

        Args:
            records: The records.
            refused: Called with each record that cannot be stored, and the reason.

        Raises:
            StoreError: The database cannot be reached or is full; some of these records may be stored.
        """
        try:
            self.append(records)
            return
        except RecordRefusedError as error:
            reason: Exception = error
        except StoreError:
            raise
        except Exception as error:  # drivers raise errors of their own for values that they cannot convert
            reason = error
        if len(records) == 1:
            refused(records[0], reason)
            return
        for half in (records[: len(records) // 2], records[len(records) // 2 :]):
            self.append_each(half, refused)

    def _number_of(self, connection: Connection, labels: tuple[str, ...]) -> int:
        """Return the number of a label set, which is stored if it is new."""
        digest = digest_of(labels, self.seal)
        find = select(label_sets.c.id).where(label_sets.c.digest == digest)
        found = connection.execute(find).scalar()
        if found is None:
            written = json.dumps(labels, ensure_ascii=False).replace("\\u0000", "\ufffd")
            written = written.encode(errors="replace").decode()
            values = {"digest": digest, "labels": written if self.seal is None else self.seal.seal_text(written)}
            connection.execute(_dialect_insert(self.engine, label_sets).values(**values).on_conflict_do_nothing())
            found = connection.execute(find).scalar_one()
        return int(found)

    def label(self, record_id: str, label: str, source: str = "user") -> None:
        """Store the true label of a call.

        Args:
            record_id: Id of the call, as in `ShuntResult.record_id`.
            label: The true label.
            source: Who provided it.

        Raises:
            StoreError: No call with this id is stored.
        """
        gold = label if self.seal is None else self.seal.seal_text(label)
        with self.connection() as connection:
            noted = update(calls).values(gold=gold, gold_source=source).where(calls.c.id == record_id)
            done = connection.execute(noted).rowcount
        if not done:
            raise StoreError(
                f"No call with the id {record_id!r} is stored. Ids are those of `ShuntResult.record_id`; records are "
                f"written with a short delay (Recorder.flush()) and pruned by the log's retention."
            )

    # Reading

    def iterate(self, which: CallFilter = EVERYTHING, *, batch_size: int = 1000) -> Iterator[list[CallRecord]]:
        """Yield the records in batches, in constant memory and in the order in which they were written.

        Records that are written meanwhile may or may not be among them.

        Raises:
            StoreError: A record cannot be read: it is damaged, or encrypted with another key.
        """
        for page in self._pages(which.where(), batch_size):
            yield [self._readable(row, found) for row, found in page]

    def _pages(
        self, where: ColumnElement[bool], size: int
    ) -> Iterator[list[tuple[RowMapping, CallRecord | Exception]]]:
        """Yield pages of rows with their records, or with the reasons why these cannot be read."""
        after, known = 0, dict[int, tuple[str, ...]]()
        while True:
            statement = select(calls).where(where, calls.c.number > after).order_by(calls.c.number).limit(size)
            with self.reading() as connection:
                rows = connection.execute(statement).mappings().all()
                if {row["label_set"] for row in rows if row["label_set"] is not None} - known.keys():
                    known = dict(connection.execute(select(label_sets.c.id, label_sets.c.labels)).all())
            if not rows:
                return
            after = rows[-1]["number"]
            yield [(row, self._read(row, known)) for row in rows]

    def _read(self, row: RowMapping, known: dict[int, Any]) -> CallRecord | Exception:
        try:
            written = "[]" if row["label_set"] is None else known[row["label_set"]]
            if not written.startswith("["):
                if self.seal is None:
                    raise StoreError(f"The log is encrypted. Give it its key, or set {KEY_VARIABLE}.")
                written = self.seal.open_text(written)
            return record_of(row, label_set(written), self.seal)
        except StoreError as error:
            return error
        except Exception as error:  # damaged in whatever way
            return ValueError(f"{type(error).__name__}: {error}")

    def _readable(self, row: RowMapping, found: CallRecord | Exception) -> CallRecord:
        if isinstance(found, StoreError):
            raise found
        if isinstance(found, Exception):
            raise StoreError(
                f"Call {row['id']} in {self!r} cannot be read: {found}. List damaged calls with `datashunt log verify`."
            ) from found
        return found

    def get(self, record_id: str) -> CallRecord | None:
        """Return the record with this id; None if there is none."""
        page = next(self._pages(calls.c.id == record_id, 1), [])
        return self._readable(*page[0]) if page else None

    def count(self, which: CallFilter = EVERYTHING, *, distinct: bool = False) -> int:
        """Count calls.

        Args:
            which: Which calls.
            distinct: Whether calls of one task and large model with the same input count once.
        """
        rows = select(calls.c.task, calls.c.large_model, calls.c.input_hash).where(which.where())
        counted = (rows.distinct() if distinct else rows).subquery()
        with self.reading() as connection:
            return int(connection.execute(select(func.count()).select_from(counted)).scalar_one())

    def stats(self, which: CallFilter = EVERYTHING) -> dict[str, Any]:
        """Return counts, cost and agreement, computed by the database; JSON-ready.

        The keys `would_be_*` are about calls that the large model answered although the small model was confident, as
        in shadow mode: how many there are, in how many both models agree, and their cost.
        """
        c = calls.c
        spared = and_(c.route == "large", c.score >= c.threshold)

        def number(where: ColumnElement[bool]) -> ColumnElement[int]:
            return func.count().filter(where)

        def usd(where: ColumnElement[bool]) -> ColumnElement[float]:
            return func.coalesce(func.sum(c.cost_usd).filter(where), 0.0)

        statement = select(
            func.count().label("calls"),
            *(number(c.route == name).label(f"route_{name}") for name in ("small", "student", "large")),
            number(c.agrees.isnot(None)).label("compared"),
            number(c.agrees.is_(True)).label("agreeing"),
            number(c.gold.isnot(None)).label("labelled"),
            number(c.in_label_set.is_(False)).label("outside_label_set"),
            number(spared).label("would_be_kept"),
            number(and_(spared, c.agrees.is_(True))).label("would_be_kept_agreeing"),
            usd(spared).label("would_be_saved_usd"),
            usd(true()).label("cost_usd"),
            cast(func.coalesce(func.sum(c.input_tokens), 0), BigInteger).label("input_tokens"),
            cast(func.coalesce(func.sum(c.output_tokens), 0), BigInteger).label("output_tokens"),
            func.min(c.time).label("oldest"),
            func.max(c.time).label("newest"),
        ).where(which.where())
        with self.reading() as connection:
            found = dict(connection.execute(statement).one()._mapping)
        for name in ("oldest", "newest"):
            found[name] = None if found[name] is None else as_seconds(found[name])
        return {
            name: value if value is None or isinstance(value, int) else float(value) for name, value in found.items()
        }

    def verify(self) -> list[str]:
        """Return what is wrong with the log, one sentence a problem; an empty list if nothing is."""
        problems: list[str] = []
        if self._on_sqlite:
            with self.reading() as connection:
                found = connection.exec_driver_sql("PRAGMA integrity_check").scalars().all()
            problems += [f"SQLite: {line}" for line in found if line != "ok"]
        for page in self._pages(true(), 1000):
            for row, record in page:
                if isinstance(record, Exception):
                    problems.append(f"Call {row['id']} cannot be read: {type(record).__name__}: {record}")
                elif not fits(row, record, self.seal):
                    problems.append(f"Call {row['id']} does not match its hash: its input was changed.")
        return problems

    # Removing

    def delete(self, *, input_hash: str | None = None, subject: str | None = None) -> int:
        """Delete all calls with one input, or of one subject.

        Args:
            input_hash: `CallRecord.input_hash` of the input.
            subject: Whose data is deleted.

        Returns:
            The number of deleted calls.

        Raises:
            StoreError: Neither was given.
        """
        if input_hash is None and subject is None:
            raise StoreError("Pass input_hash or subject; to delete by age or number use prune().")
        tests: list[ColumnElement[bool]] = []
        if input_hash is not None:
            try:
                digest = bytes.fromhex(input_hash)
            except ValueError as error:
                raise StoreError(f"{input_hash!r} is not an input hash as in `CallRecord.input_hash`.") from error
            tests.append(calls.c.input_hash.in_(keyed(digest, self.seal)))
        if subject is not None:
            tests.append(calls.c.subject.in_(subject_hashes(subject, self.seal)))
        return self._delete(and_(*tests))

    def prune(self, *, max_age_seconds: float | None = None, max_records: int | None = None) -> int:
        """Delete calls that are too old, and the oldest of those that are too many.

        Args:
            max_age_seconds: Highest age, in seconds.
            max_records: Highest number of calls.

        Returns:
            The number of deleted calls.
        """
        gone, c = 0, calls.c
        if max_age_seconds is not None:
            gone += self._delete(c.time < as_datetime(time.time() - max_age_seconds))
        if max_records is not None:
            edge = select(c.time, c.number).order_by(c.time.desc(), c.number.desc()).offset(max_records).limit(1)
            with self.reading() as connection:
                found = connection.execute(edge).first()
            if found is not None:
                gone += self._delete(or_(c.time < found.time, and_(c.time == found.time, c.number <= found.number)))
        return gone

    def move_to(
        self,
        other: CallLog,
        *,
        batch_size: int = 2048,
        batches: int | None = None,
        refused: Refused | None = None,
    ) -> int:
        """Move records into another log, batch by batch; each is deleted here only after it is stored there.

        Records that cannot be read (damaged, or encrypted with another key) stay here, which is logged.

        Args:
            other: The log to move to. A batch that two processes move at once is stored there once.
            batch_size: Records of a batch.
            batches: Maximum batches; None moves all.
            refused: Called with a record that the other log does not take, which is then deleted here; None raises.

        Returns:
            The number of records that left this log.

        Raises:
            StoreError: One of the logs cannot be reached; batches moved before stay moved.
        """
        moved = 0
        for page in islice(self._pages(true(), batch_size), batches):
            batch = [found for _, found in page if not isinstance(found, Exception)]
            if len(batch) < len(page):
                _LOG.error("%d records in %r cannot be read and stay there.", len(page) - len(batch), self)
            if refused is None:
                other.append(batch)
            else:
                other.append_each(batch, refused)
            ids = [record.id for record in batch]
            with self.connection() as connection:
                for start in range(0, len(ids), _AT_ONCE):
                    connection.execute(delete(calls).where(calls.c.id.in_(ids[start : start + _AT_ONCE])))
            moved += len(batch)
        return moved

    def _delete(self, where: ColumnElement[bool]) -> int:
        with self.connection() as connection:
            gone = connection.execute(delete(calls).where(where)).rowcount
            used = select(calls.c.label_set).where(calls.c.label_set.isnot(None))
            connection.execute(delete(label_sets).where(label_sets.c.id.not_in(used)))
        self._label_sets.clear()
        if gone and self._on_sqlite:
            # deleted content would otherwise stay in the write-ahead log for some time
            with self._own_errors(), closing(self.engine.raw_connection()) as raw:
                raw.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return int(gone)

    # Connections

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """A connection inside a transaction, also for the tables beside the calls.

        Raises:
            StoreError: The database cannot be used.
        """
        with self._own_errors(), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection for reading, which neither blocks writers nor waits for them.

        Raises:
            StoreError: The database cannot be used.
        """
        with self._own_errors(), self.engine.connect() as connection:
            yield connection.execution_options(**{_READS: True})

    @contextmanager
    def _own_errors(self) -> Iterator[None]:
        """Raise errors of the database, and of values that it does not take, as our own."""
        try:
            yield
        except SQLAlchemyError as error:
            of_values = isinstance(error, (DataError, IntegrityError)) or type(error) is StatementError
            cause = f"{type(error).__name__}: {getattr(error, 'orig', None) or error}"
            if of_values:
                raise RecordRefusedError(f"{self!r} refuses a value: {cause}") from error
            raise StoreError(f"{self!r} cannot be used: {cause}") from error

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"CallLog({self.url.render_as_string(hide_password=True)!r})"


def url_of(url: str | Path) -> str:
    """Return a SQLAlchemy URL as it is, and a path as the URL of a SQLite file."""
    text = str(url)
    return text if "://" in text else f"sqlite:///{text}"


def _dialect_insert(engine: Engine, table: Any) -> Any:
    if engine.dialect.name == "postgresql":
        from sqlalchemy.dialects.postgresql import insert as postgres_insert

        return postgres_insert(table)
    if engine.dialect.name == "sqlite":
        from sqlalchemy.dialects.sqlite import insert as sqlite_insert

        return sqlite_insert(table)
    return insert(table)


def _insert_of(engine: Engine) -> str:
    """Return the driver's own SQL that inserts a row of `COLUMNS`: rows are many, and all have one form."""
    style = "qmark" if engine.dialect.name == "sqlite" else "format"
    dialect = type(engine.dialect)(paramstyle=style)  # type: ignore[call-arg]
    statement = _dialect_insert(engine, calls).on_conflict_do_nothing(index_elements=[calls.c.id])
    compiled: Any = statement.compile(dialect=dialect, column_keys=COLUMNS)
    assert tuple(compiled.positiontup or ()) == COLUMNS
    return str(compiled)
