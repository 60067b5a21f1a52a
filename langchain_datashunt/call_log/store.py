"""CallLog: log of routed calls in SQLite or PostgreSQL, as a table for SQL queries."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

from langchain_datashunt._utils.fork import AFTER_FORK, LEFT_ALONE
from langchain_datashunt._utils.watchdog import WATCHDOG
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
    from sqlalchemy.exc import DataError, DisconnectionError, IntegrityError, SQLAlchemyError, StatementError

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


PRAGMAS = ("journal_mode=WAL", "cache_size=-65536", "secure_delete=ON", "temp_store=MEMORY")
"""Settings of each SQLite connection. Deleted content is overwritten, and temporary content stays in memory."""

_LOG = logging.getLogger(__name__)

Refused: TypeAlias = Callable[[CallRecord, Exception], None]
"""Callback for a record that the database rejects, with the reason."""

_READS = "datashunt_reads"
"""Execution option of read-only transactions."""

_AT_ONCE = 500
"""Maximum number of values in one IN (...) condition."""


class CallLog:
    """Log of routed calls, which audits, reports and distillation read.

    ```python
    log = CallLog("sqlite:///calls.db")  # or postgresql+psycopg://user@host/database
    for batch in log.iterate(CallFilter(route="large")):
        ...
    ```

    Each call is one row of the table `calls`, with readable columns, for queries such as `SELECT task, avg(cost_usd)
    FROM calls GROUP BY 1`. Calls are identified by id, so writing a call again has no effect. Several processes can
    write concurrently.

    Args:
        url: SQLAlchemy URL, or path of a SQLite file (created with mode 0600).
        durability: Durability of commits to SQLite. "record" makes each commit survive a power failure
            (synchronous=FULL). With "group" (synchronous=NORMAL), a power failure may lose the last commits, but a
            killed process loses none.
        key: Fernet key, or several, of which the first encrypts. All texts and labels are then encrypted, and hashes
            of inputs and subjects are keyed. Tasks, models, policies, numbers and times are not encrypted. None reads
            DATASHUNT_STORE_KEY from the environment.
        timeout_seconds: Maximum time to wait for a connection, a lock, or the answer to a statement, in seconds. A
            connection that stays silent for longer is closed, and the operation fails.

    Raises:
        StoreError: If the database cannot be opened, or its schema version is not supported.
        ConfigurationError: If the database or its driver is not supported, or a key is invalid.
    """

    def __init__(
        self,
        url: str | Path,
        *,
        durability: str = "group",
        key: str | bytes | Sequence[str | bytes] | Seal | None = None,
        timeout_seconds: float = 10.0,
    ) -> None:
        if not timeout_seconds > 0.0:
            raise ConfigurationError(f"Expected seconds above 0 for `timeout_seconds`, got {timeout_seconds}.")
        self.timeout_seconds = timeout_seconds
        self.url = make_url(url_of(url))
        self.seal = key if isinstance(key, Seal) else Seal.from_key(key)
        self.durability = durability
        self._label_sets: dict[tuple[str, ...], int] = {}
        self._lock = threading.Lock()
        self._identity: tuple[int, int] | None = None
        self.engine = self._open()
        AFTER_FORK.add(self)
        self._insert = _insert_of(self.engine)
        with self._own_errors(), self._transaction(False) as connection:
            migrate(connection)

    def after_fork(self) -> None:
        """Replace lock and connections in a forked child. The parent still uses its connections."""
        self._lock = threading.Lock()
        LEFT_ALONE.append(self.engine.pool)
        self.engine.dispose(close=False)

    @property
    def _on_sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    def _open(self) -> Engine:
        if self._on_sqlite:
            return self._open_sqlite()
        seconds = max(1, round(self.timeout_seconds))
        silent: dict[str, Any] = {}
        if self.url.drivername.partition("+")[2].startswith("psycopg"):
            silent = {"connect_timeout": seconds, "keepalives_idle": seconds, "keepalives_interval": 2}
            silent |= {"keepalives_count": 3, "tcp_user_timeout": 1000 * seconds}
        try:
            engine = create_engine(
                self.url, pool_timeout=self.timeout_seconds, hide_parameters=True,
                connect_args={name: value for name, value in silent.items() if name not in self.url.query},
            )  # fmt: skip
        except (ImportError, SQLAlchemyError) as error:  # unknown database, or driver not installed
            shown = self.url.render_as_string(hide_password=True)
            raise ConfigurationError(
                f"The call log {shown} cannot be used: {type(error).__name__}: {error}. Pass a file, or a "
                f"postgresql+psycopg:// URL."
            ) from error
        if engine.dialect.name == "postgresql":

            @event.listens_for(engine, "connect")
            def limit(connection: Any, _: Any) -> None:
                with connection.cursor() as cursor:
                    cursor.execute(f"SET statement_timeout = {int(1000 * self.timeout_seconds)}")
                    cursor.execute(f"SET lock_timeout = {int(1000 * self.timeout_seconds)}")
                connection.commit()

        @event.listens_for(engine, "checkout")
        def ping(connection: Any, *_: Any) -> None:
            # instead of `pool_pre_ping`, which waits for a silent server forever
            try:
                with WATCHDOG.watching(self.timeout_seconds, partial(_cut, connection)):
                    engine.dialect.do_ping(connection)
            except Exception as error:
                raise DisconnectionError("the connection was lost") from error

        return engine

    def _open_sqlite(self) -> Engine:
        if (path := self._file) is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
                self._identity = _identity_of(path)
            except OSError as error:
                raise StoreError(
                    f"The call log {path} cannot be opened: {error.strerror}. Check its path and permissions."
                ) from error
        engine = create_engine(self.url, connect_args={"timeout": self.timeout_seconds}, hide_parameters=True)
        synchronous = "FULL" if self.durability == "record" else "NORMAL"
        busy = int(1000 * self.timeout_seconds)

        @event.listens_for(engine, "connect")
        def prepare(connection: Any, _: Any) -> None:
            connection.isolation_level = None
            for pragma in (f"busy_timeout={busy}", *PRAGMAS, f"synchronous={synchronous}"):
                connection.execute(f"PRAGMA {pragma}")

        @event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            reads = connection.get_execution_options().get(_READS, False)
            connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

        return engine

    @property
    def _file(self) -> Path | None:
        """File of a SQLite log, or None for other databases and logs in memory."""
        name = self.url.database
        return Path(name) if self._on_sqlite and name and name != ":memory:" else None

    def _follow_file(self) -> None:
        """Open the file again if it was removed or replaced, because records would otherwise vanish with the old one.

        Raises:
            StoreError: If it cannot be opened.
        """
        if (path := self._file) is None or _identity_of(path) == self._identity:
            return
        with self._lock:
            if _identity_of(path) == self._identity:
                return
            _LOG.warning("The call log %s was removed or replaced, so it is opened again.", path)
            self._label_sets.clear()
            self.engine.dispose()
            self.engine = self._open_sqlite()
            with self._own_errors(), self._transaction(False) as connection:
                migrate(connection)

    # Writing

    def append(self, records: Sequence[CallRecord]) -> None:
        """Store records in one transaction. Skip records whose id is already stored.

        Raises:
            StoreError: If the database cannot be reached or is full. None of the records is stored then.
            RecordRefusedError: If the database rejects a record, for example because a number is too large. None of the
                records is stored then.
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
        with self._lock:  # new label sets are valid only after the commit
            self._label_sets.update(known)

    @staticmethod
    def _check_repeated(connection: Connection, rows: Sequence[tuple[Any, ...]]) -> None:
        """Raise `RecordRefusedError` if a row was skipped because a call with another input has the same id."""
        place_of_id, place_of_hash = COLUMNS.index("id"), COLUMNS.index("input_hash")
        stored: dict[str, bytes] = {}
        for start in range(0, len(rows), _AT_ONCE):
            ids = [row[place_of_id] for row in rows[start : start + _AT_ONCE]]
            found = connection.execute(select(calls.c.id, calls.c.input_hash).where(calls.c.id.in_(ids)))
            stored.update((row.id, bytes(row.input_hash)) for row in found)
        for row in rows:
            if stored.get(row[place_of_id], row[place_of_hash]) != row[place_of_hash]:
                raise RecordRefusedError(f"The id {row[place_of_id]!r} is already stored for another input.")

    def append_each(self, records: Sequence[CallRecord], refused: Refused) -> None:
        """Store records, except those that the database rejects, which are found by bisection.

        Args:
            records: Records to store.
            refused: Callback for each rejected record, with the reason.

        Raises:
            StoreError: If the database cannot be reached or is full. Some of the records may be stored then.
        """
        try:
            self.append(records)
            return
        except RecordRefusedError as error:
            reason: Exception = error
        except StoreError:
            raise
        except Exception as error:  # drivers raise their own errors for values that they cannot convert
            reason = error
        if len(records) == 1:
            refused(records[0], reason)
            return
        for half in (records[: len(records) // 2], records[len(records) // 2 :]):
            self.append_each(half, refused)

    def _number_of(self, connection: Connection, labels: tuple[str, ...]) -> int:
        """Return the row id of a label set, and store the label set if it is new."""
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
            label: True label.
            source: Source of the label.

        Raises:
            StoreError: If no call with this id is stored.
        """
        gold = label if self.seal is None else self.seal.seal_text(label)
        with self.connection() as connection:
            noted = update(calls).values(gold=gold, gold_source=source).where(calls.c.id == record_id)
            done = connection.execute(noted).rowcount
        if not done:
            raise StoreError(
                f"No call with the id {record_id!r} is stored. Pass a `ShuntResult.record_id`. Recent records may be "
                f"pending (call Recorder.flush()), and old ones may have been pruned."
            )

    # Reading

    def iterate(self, which: CallFilter = EVERYTHING, *, batch_size: int = 1000) -> Iterator[list[CallRecord]]:
        """Yield records in batches, in the order in which they were written and in constant memory.

        Records that are written during the iteration may or may not be included.

        Args:
            which: Filter of the records. By default, all records.
            batch_size: Maximum number of records per batch.

        Raises:
            StoreError: If a record cannot be read, because it is damaged or encrypted with another key.
        """
        for page in self._pages(which.where(), batch_size):
            yield [self._readable(row, found) for row, found in page]

    def _pages(
        self, where: ColumnElement[bool], size: int
    ) -> Iterator[list[tuple[RowMapping, CallRecord | Exception]]]:
        """Yield pages of rows, each row with its record or with the error that prevents reading it."""
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
                    raise StoreError(
                        f"The call log is encrypted and has no key. Pass `key` to CallLog, or set {KEY_VARIABLE}."
                    )
                written = self.seal.open_text(written)
            return record_of(row, label_set(written), self.seal)
        except StoreError as error:
            return error
        except Exception as error:  # damaged rows can cause any error
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
        """Return the record with this id, or None if there is none."""
        page = next(self._pages(calls.c.id == record_id, 1), [])
        return self._readable(*page[0]) if page else None

    def count(self, which: CallFilter = EVERYTHING, *, distinct: bool = False) -> int:
        """Count calls.

        Args:
            which: Filter of the calls. By default, all calls.
            distinct: Whether to count calls with the same task, large model and input once.
        """
        rows = select(calls.c.task, calls.c.large_model, calls.c.input_hash).where(which.where())
        counted = (rows.distinct() if distinct else rows).subquery()
        with self.reading() as connection:
            return int(connection.execute(select(func.count()).select_from(counted)).scalar_one())

    def stats(self, which: CallFilter = EVERYTHING) -> dict[str, Any]:
        """Return counts, cost and agreement as a JSON-ready dictionary, computed by the database.

        The keys `would_be_*` describe the calls that the large model answered although the small model was confident,
        as in shadow mode. They give the number of these calls, the number in which both models agree, and their cost.
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
        """Return the problems of the log, one sentence each, or an empty list if there are none."""
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
            subject: Id of the data subject. With both arguments, only calls that match both are deleted.

        Returns:
            Number of deleted calls.

        Raises:
            StoreError: If both are None, or `input_hash` is not a hash.
        """
        if input_hash is None and subject is None:
            raise StoreError("Pass input_hash or subject. To delete by age or number, use prune().")
        tests: list[ColumnElement[bool]] = []
        if input_hash is not None:
            try:
                digest = bytes.fromhex(input_hash)
            except ValueError as error:
                raise StoreError(f"{input_hash!r} is not an input hash. Pass a `CallRecord.input_hash`.") from error
            tests.append(calls.c.input_hash.in_(keyed(digest, self.seal)))
        if subject is not None:
            tests.append(calls.c.subject.in_(subject_hashes(subject, self.seal)))
        return self._delete(and_(*tests))

    def prune(self, *, max_age_seconds: float | None = None, max_records: int | None = None) -> int:
        """Delete old calls, by age and by number.

        Args:
            max_age_seconds: Maximum age of a call, in seconds. None means unlimited.
            max_records: Maximum number of calls to keep, newest first. None means unlimited.

        Returns:
            Number of deleted calls.
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
        """Move records to another log in batches. Each batch is deleted only after the other log has stored it.

        Records that cannot be read, because they are damaged or encrypted with another key, are logged and not moved.

        Args:
            other: Destination log. A batch that two processes move concurrently is stored once.
            batch_size: Maximum number of records per batch.
            batches: Maximum number of batches. None moves all.
            refused: Callback for a record that the other log rejects, which is deleted from this log. None raises
                `RecordRefusedError` instead.

        Returns:
            Number of records removed from this log.

        Raises:
            StoreError: If one of the logs cannot be reached. Earlier batches stay moved.
        """
        moved = 0
        for page in islice(self._pages(true(), batch_size), batches):
            batch = [found for _, found in page if not isinstance(found, Exception)]
            if len(batch) < len(page):
                _LOG.error("%d records in %r cannot be read and were not moved.", len(page) - len(batch), self)
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
            # otherwise deleted content stays in the write-ahead log for some time
            with self._own_errors(), closing(self.engine.raw_connection()) as raw:
                raw.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return int(gone)

    # Connections

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """Open a connection in a write transaction, which also serves the other tables of the log.

        Raises:
            StoreError: If the database cannot be used, or does not answer within `timeout_seconds`.
            RecordRefusedError: If the database rejects a value.
        """
        self._follow_file()
        with self._own_errors(), self._transaction(False) as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Open a connection for reading, which neither blocks writers nor waits for them.

        Raises:
            StoreError: If the database cannot be used, or does not answer within `timeout_seconds`.
        """
        self._follow_file()
        with self._own_errors(), self._transaction(True) as connection:
            yield connection

    @contextmanager
    def _transaction(self, reads: bool) -> Iterator[Connection]:
        """Open a transaction. A line that stays silent is cut, because drivers would wait for it forever."""
        with closing(self.engine.connect()) as connection:
            if reads:
                connection = connection.execution_options(**{_READS: True})
            if self._on_sqlite:
                with connection.begin():
                    yield connection
                return
            socket_of = connection.connection.driver_connection
            with WATCHDOG.watching(2.0 * self.timeout_seconds, partial(_cut, socket_of)), connection.begin():
                yield connection

    @contextmanager
    def _own_errors(self) -> Iterator[None]:
        """Convert errors of SQLAlchemy to `StoreError`, or to `RecordRefusedError` if the database rejects a value."""
        try:
            yield
        except SQLAlchemyError as error:
            of_values = isinstance(error, (DataError, IntegrityError)) or type(error) is StatementError
            cause = f"{type(error).__name__}: {getattr(error, 'orig', None) or error}"
            if of_values:
                raise RecordRefusedError(f"{self!r} rejected a value: {cause}") from error
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


def _identity_of(path: Path) -> tuple[int, int] | None:
    """Return the device and inode of a file, or None if it does not exist."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _cut(connection: Any) -> None:
    """Shut a connection's socket down, so that a driver that waits for an answer gets an error."""
    descriptor = os.dup(connection.fileno())
    with closing(socket.socket(fileno=descriptor)) as line:
        line.shutdown(socket.SHUT_RDWR)


def url_of(url: str | Path) -> str:
    """Return a SQLAlchemy URL unchanged, or convert a path to the URL of a SQLite file."""
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
    """Return driver-level SQL that inserts a row of `COLUMNS`, compiled once because all rows have the same form."""
    style = "qmark" if engine.dialect.name == "sqlite" else "format"
    dialect = type(engine.dialect)(paramstyle=style)  # type: ignore[call-arg]
    statement = _dialect_insert(engine, calls).on_conflict_do_nothing(index_elements=[calls.c.id])
    compiled: Any = statement.compile(dialect=dialect, column_keys=COLUMNS)
    assert tuple(compiled.positiontup or ()) == COLUMNS
    return str(compiled)
