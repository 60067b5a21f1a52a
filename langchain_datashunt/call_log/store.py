"""CallLog: the records of routed calls in SQLite or PostgreSQL. It stores and finds; it does not train."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import groupby, islice, repeat
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

from langchain_datashunt._utils.fork import AFTER_FORK, LEFT_ALONE
from langchain_datashunt.call_log.encryption import Seal
from langchain_datashunt.call_log.groups import Group, groups_of
from langchain_datashunt.call_log.record import CallRecord, Columns, hash_subject, id_bytes
from langchain_datashunt.call_log.rows import (
    Key,
    fits,
    id_of,
    keys_of,
    rows_of,
    segment_and_place,
)
from langchain_datashunt.exceptions import ConfigurationError, MissingExtraError, RecordRefusedError, StoreError

try:
    from sqlalchemy import (
        ColumnElement,
        Connection,
        Engine,
        and_,
        create_engine,
        delete,
        event,
        func,
        insert,
        select,
        tuple_,
        update,
    )
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError, StatementError

    from langchain_datashunt.call_log.filters import EVERYTHING, CallFilter
    from langchain_datashunt.call_log.reading import SHARED, Reader
    from langchain_datashunt.call_log.schema import calls, contexts, has_key, migrate, replaced
    from langchain_datashunt.call_log.segment_table import drop_empty, erase, wasteful, write_segment
    from langchain_datashunt.call_log.totals import totals
    from langchain_datashunt.call_log.upserting import Upsert
except ImportError as error:  # pragma: no cover - tested without the extra
    raise MissingExtraError("sqlalchemy", "store") from error


PRAGMAS = (
    "page_size=8192",
    "journal_mode=WAL",
    "busy_timeout=30000",
    "cache_size=-65536",
    "wal_autocheckpoint=8192",
    "secure_delete=ON",
    "temp_store=MEMORY",
)
"""Of every SQLite connection. What is deleted is overwritten, and nothing stands in temporary files, where a statement
of many rows would otherwise keep how the pages were that it changes. Keys are hashes, so each record dirties a random
page of their index: pages of 8 KiB are fewer to find, a cache of 64 MiB holds the index of a million records, and a log
of 64 MiB lets many changes of one page be written at once. A file that is there keeps the size of its pages."""


_LOG = logging.getLogger(__name__)

Refused: TypeAlias = Callable[[CallRecord, Exception], None]
"""Is told of a record that a database does not take, and why."""

_READS = "datashunt_reads"
"""An execution option: nothing is written in this transaction."""

_KEYS_AT_ONCE = 300
"""In one statement, three values for each."""

_JOINED = calls.c.context == contexts.c.id

TIDY_EVERY = 65_536
"""After so many records it is looked whether much of what is stored has been replaced."""


class CallLog:
    """The log of routed calls that later distillation learns from.

    ```python
    store = CallLog("sqlite:///calls.db")  # or postgresql+psycopg://user@host/database
    for batch in store.iterate(CallFilter(route="large")):
        ...
    ```

    One row stands for each (task, input, large model): a newer call with the same input replaces an older one, and both
    are counted; the same call, by its id, is counted once, however often it is written. Many processes may write at
    once.

    Args:
        url: A SQLAlchemy URL, or the path of a SQLite file (made with mode 0600).
        durability: "record" makes every commit survive a power cut (SQLite synchronous=FULL); "group" leaves
            that to the operating system (NORMAL), where the last commits may be lost to a power cut, not to a kill.
        key: A Fernet key, or several, the first of which encrypts: inputs and answers are then encrypted, and the
            hashes by which repeats are found are keyed. None takes DATASHUNT_STORE_KEY of the environment, where set.
            Labels, models, figures and times are not encrypted.

    Raises:
        StoreError: The database cannot be opened or was written by newer code.
        ConfigurationError: It is of a kind, or wants a driver, that is not there.
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
        self._contexts: dict[tuple[Any, ...], int] = {}
        self._appended = 0
        self._lock = threading.Lock()
        self.engine = self._open()
        AFTER_FORK.add(self)
        self._upsert = Upsert(self.engine)
        with self.connection() as connection:
            migrate(connection)

    def after_fork(self) -> None:
        """Leave the parent's connections to the parent, which goes on speaking through them."""
        self._lock = threading.Lock()
        LEFT_ALONE.append(self.engine.pool)
        self.engine.dispose(close=False)

    def _open(self) -> Engine:
        if self.url.get_backend_name() != "sqlite":
            try:
                return create_engine(self.url, pool_pre_ping=True, hide_parameters=True)
            except (ImportError, SQLAlchemyError) as error:  # a database or a driver that is not known here
                shown = self.url.render_as_string(hide_password=True)
                raise ConfigurationError(
                    f"The store {shown} cannot be used: {type(error).__name__}: {error}. Give a file, or a "
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
        """Store records in one transaction, the newest of each (task, input, large model) winning.

        Raises:
            StoreError: The database is away or full; nothing of these records is stored.
            RecordRefusedError: It does not take one of them: a number is too large, or its id is another input's.
        """
        if not records:
            return
        with self._lock:
            known = dict(self._contexts)
        try:
            with self.connection() as connection:
                for group in groups_of(records, self.seal):
                    self._append(connection, group, known)
        except StoreError:
            self._contexts.clear()
            raise
        with self._lock:  # only now are they there for others
            self._contexts.update(known)

    def append_each(self, records: Sequence[CallRecord], refused: Refused) -> None:
        """Store records but those that the database does not take, which are found by halves.

        Args:
            records: What to store.
            refused: Is told of each record that cannot be stored, and why.

        Raises:
            StoreError: The database is away or full; some of these records may be stored.
        """
        try:
            self.append(records)
            return
        except RecordRefusedError as error:
            reason: Exception = error
        except StoreError:
            raise
        except Exception as error:  # whatever a driver says to a value
            reason = error
        if len(records) == 1:
            refused(records[0], reason)
            return
        for half in (records[: len(records) // 2], records[len(records) // 2 :]):
            self.append_each(half, refused)

    def _append(self, connection: Connection, group: Group, known: dict[tuple[Any, ...], int]) -> None:
        shared = self._shared(connection, group.columns, known)
        number = write_segment(connection, group.content())
        rows = rows_of(group.columns, group.keys, shared, group.segment, number)
        self._upsert.write(connection, rows, group.others)
        self._appended += len(group.keys)
        if self._appended >= TIDY_EVERY:
            self._appended = 0
            if wasteful(connection):
                erase(connection, self.seal)

    def _shared(self, connection: Connection, columns: Columns, known: dict[tuple[Any, ...], int]) -> list[int]:
        """For each record the row of what it shares with others; made, and added to `known`, where it is new."""
        values = [columns[name] for name in SHARED]
        n = len(values[0])
        if all(column.count(column[0]) == n for column in values):  # as nearly always
            alike = [(tuple(column[0] for column in values), n)]
        else:
            alike = [(one, sum(1 for _ in same)) for one, same in groupby(zip(*values, strict=True))]
        for new in sorted({one for one, _ in alike} - known.keys()):
            known[new] = self._context(connection, dict(zip(SHARED, new, strict=True)))
        return [number for one, n in alike for number in repeat(known[one], n)]

    def _context(self, connection: Connection, shared: dict[str, Any]) -> int:
        shared["labels"] = json.dumps(shared["labels"], ensure_ascii=False)
        digest = hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).digest()[:16]
        find = select(contexts.c.id).where(contexts.c.digest == digest)
        found = connection.execute(find).scalar()
        if found is None:
            if self.url.get_backend_name() == "postgresql":
                from sqlalchemy.dialects.postgresql import insert as postgres_insert

                connection.execute(postgres_insert(contexts).values(digest=digest, **shared).on_conflict_do_nothing())
            else:
                connection.execute(insert(contexts).values(digest=digest, **shared))
            found = connection.execute(find).scalar_one()
        return int(found)

    def label(self, record_id: str, label: str, source: str = "user") -> None:
        """Note the true label of a call, also where a newer call with the same input has replaced it.

        Raises:
            StoreError: No call with this id is stored.
        """
        wanted = id_bytes(record_id)
        with self.connection() as connection:
            noted = update(calls).values(gold=label, gold_source=source)
            done = connection.execute(noted.where(calls.c.id == wanted)).rowcount
            if not done:
                older = select(replaced.c.key_high, replaced.c.key_low).where(replaced.c.id == wanted)
                keys = [(row.key_high, row.key_low) for row in connection.execute(older)]
                done = connection.execute(noted.where(has_key(calls, keys))).rowcount
        if not done:
            raise StoreError(
                f"No call with the id {record_id!r} is stored. Ids are those of `ShuntResult.record_id`; records are "
                f"written with a short delay (Recorder.flush()) and pruned by the store's retention."
            )

    # Reading

    def iterate(self, which: CallFilter = EVERYTHING, *, batch_size: int = 1000) -> Iterator[list[CallRecord]]:
        """The records in batches, in constant memory, in the order in which they were last written.

        Records written meanwhile may or may not be among them.

        Raises:
            StoreError: What a record says cannot be read: it is damaged, or encrypted with another key.
        """
        reader = Reader(self)
        while rows := reader.page(which.where(), batch_size):
            yield [self._read(row, found) for row, found in rows]

    def _read(self, row: Any, found: CallRecord | Exception) -> CallRecord:
        if isinstance(found, StoreError):
            raise found
        if isinstance(found, Exception):
            raise StoreError(
                f"Call {id_of(row)} in {self!r} cannot be read: {found}. `datashunt log verify` tells which are "
                f"damaged."
            ) from found
        return found

    def get(self, record_id: str) -> CallRecord | None:
        """One record by the id of its newest call."""
        rows = Reader(self).page(and_(_JOINED, calls.c.id == id_bytes(record_id)), 1)
        return self._read(*rows[0]) if rows else None

    def count(self, which: CallFilter = EVERYTHING, *, repeated: bool | None = None) -> int:
        """How many records there are; True counts those of inputs that came more than once, False the others."""
        with self.reading() as connection:
            statement = select(func.count()).select_from(calls, contexts).where(which.where())
            if repeated is not None:
                statement = statement.where(calls.c.count > 1 if repeated else calls.c.count == 1)
            return int(connection.execute(statement).scalar_one())

    def stats(self, which: CallFilter = EVERYTHING) -> dict[str, Any]:
        """Counts, cost and agreement, computed by the database; JSON-ready.

        `calls`, `route_*`, `would_be_*`, cost and tokens count repeats, at what the newest of them cost; `records`,
        `compared`, `agreeing`, `labelled` and `outside_label_set` are of different inputs.

        `would_be_*`: calls that the large model answered though the small model was sure, as in shadow mode; how many
        of them agree, and what they cost.
        """
        return totals(self, which)

    def verify(self) -> list[str]:
        """What is wrong with the store, in words; an empty list where nothing is."""
        problems: list[str] = []
        with self.reading() as connection:
            if self.url.get_backend_name() == "sqlite":
                found = connection.exec_driver_sql("PRAGMA integrity_check").scalars().all()
                problems += [f"SQLite: {line}" for line in found if line != "ok"]
            known = set(connection.execute(select(contexts.c.id)).scalars())
            used = set(connection.execute(select(calls.c.context).distinct()).scalars())
        problems += [f"Calls refer to context {missing}, which is not there." for missing in sorted(used - known)]
        reader = Reader(self)
        while not used - known and (rows := reader.page(_JOINED, 1000)):
            for row, said in rows:
                if isinstance(said, Exception):
                    problems.append(f"Call {id_of(row)} cannot be read: {type(said).__name__}: {said}")
                elif not fits(row, said, self.seal):
                    problems.append(f"Call {id_of(row)} does not fit its hash: its input or its task was changed.")
        return problems

    # Removing

    def delete(self, *, input_hash: str | None = None, subject: str | None = None) -> int:
        """Delete all records of one input, or of one person; returns how many there were.

        Raises:
            StoreError: Neither was given.
        """
        if input_hash is None and subject is None:
            raise StoreError("Give an input_hash or a subject; to delete by age or number use prune().")
        tests: list[ColumnElement[bool]] = []
        if input_hash is not None:
            try:
                sought = bytes.fromhex(input_hash)
            except ValueError as error:
                raise StoreError(f"{input_hash!r} is no input hash; take it from a record's `input_hash`.") from error
            tests.append(has_key(calls, self._keys(sought)))
        if subject is not None:
            tests.append(calls.c.subject == hash_subject(subject))
        return self._delete(and_(*tests))

    def _keys(self, input_hash: bytes) -> list[Key]:
        """The keys that an input has with all tasks and large models that were ever recorded."""
        with self.reading() as connection:
            known = connection.execute(select(contexts.c.task, contexts.c.large_model).distinct()).all()
        return [key for row in known for key in keys_of(row.task, row.large_model, input_hash, self.seal)]

    def prune(self, *, max_age_seconds: float | None = None, max_records: int | None = None) -> int:
        """Delete records that are too old or, the oldest first, too many; returns how many there were."""
        gone = 0
        if max_age_seconds is not None:
            gone += self._delete(calls.c.time < time.time() - max_age_seconds)
        if max_records is not None:
            order = (calls.c.time.desc(), calls.c.number.desc())
            edge = select(calls.c.time, calls.c.number).order_by(*order).offset(max_records).limit(1)
            with self.reading() as connection:
                found = connection.execute(edge).first()
            if found is not None:
                gone += self._delete(tuple_(calls.c.time, calls.c.number) <= tuple_(found.time, found.number))
        return gone

    def move_to(
        self,
        other: CallLog,
        *,
        batch_size: int = 2048,
        batches: int | None = None,
        refused: Refused | None = None,
    ) -> int:
        """Move records into another store, batch by batch, each deleted here only when it is safe there.

        What cannot be read (it is damaged, or encrypted with another key) stays here, and is named in the log.

        Args:
            other: Where to. A batch that another process moves at the same time is there once.
            batch_size: Records of a batch.
            batches: How many to move at the most; None moves all.
            refused: Is told of a record that the other store does not take, which is then deleted here; None raises.

        Returns:
            How many are no longer here.

        Raises:
            StoreError: One of the stores is away; what was moved before stays moved.
        """
        moved, reader = 0, Reader(self)
        pages = iter(lambda: reader.page(_JOINED, batch_size), [])
        for page in islice(pages, batches):
            batch = [found for _, found in page if not isinstance(found, Exception)]
            if len(batch) < len(page):
                _LOG.error("%d records in %r cannot be read and stay there.", len(page) - len(batch), self)
            if refused is None:
                other.append(batch)
            else:
                other.append_each(batch, refused)
            other._note_replaced(self._replaced([(row["key_high"], row["key_low"]) for row, _ in page]))
            with self.connection() as connection:
                some = [id_bytes(record.id) for record in batch]
                for start in range(0, len(some), 500):
                    self._drop(connection, calls.c.id.in_(some[start : start + 500]))
                drop_empty(connection)
            moved += len(batch)
        return moved

    def _replaced(self, keys: Sequence[Key]) -> list[tuple[bytes, Key]]:
        """Ids, with their keys, of older calls for which the rows of these keys stand, too."""
        found: list[tuple[bytes, Key]] = []
        with self.reading() as connection:
            for start in range(0, len(keys), _KEYS_AT_ONCE):
                some = select(replaced).where(has_key(replaced, keys[start : start + _KEYS_AT_ONCE]))
                found += [(row.id, (row.key_high, row.key_low)) for row in connection.execute(some)]
        return found

    def _note_replaced(self, ids: Sequence[tuple[bytes, Key]]) -> None:
        if ids:
            with self.connection() as connection:
                self._upsert.note_replaced(connection, ids)

    def _delete(self, where: ColumnElement[bool]) -> int:
        """Delete rows, and erase what they said, with all else that no row refers to."""
        with self.connection() as connection:
            numbers = self._drop(connection, where)
            erase(connection, self.seal, {segment_and_place(number)[0] for number in numbers})
        if numbers and self.url.get_backend_name() == "sqlite":
            # else it stands in the write-ahead log for some time
            with self._in_words(), closing(self.engine.raw_connection()) as raw:
                raw.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return len(numbers)

    @staticmethod
    def _drop(connection: Connection, where: ColumnElement[bool]) -> Sequence[int]:
        """Delete rows; the numbers that they had, which the database notes as dead."""
        returned = (calls.c.number, calls.c.key_high, calls.c.key_low)
        gone = connection.execute(delete(calls).where(where).returning(*returned)).all()
        for start in range(0, len(gone), _KEYS_AT_ONCE):
            keys = [(row.key_high, row.key_low) for row in gone[start : start + _KEYS_AT_ONCE]]
            connection.execute(delete(replaced).where(has_key(replaced, keys)))
        return [row.number for row in gone]

    # Life

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """A connection inside a transaction, also for what is kept beside the records.

        Raises:
            StoreError: The database cannot be used.
        """
        with self._in_words(), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection that changes nothing, and does not wait for those that do, nor they for it.

        Raises:
            StoreError: The database cannot be used.
        """
        with self._in_words(), self.engine.connect() as connection:
            yield connection.execution_options(**{_READS: True})

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        """Errors of the database, and of values that it does not take, as ours."""
        try:
            yield
        except SQLAlchemyError as error:
            of_values = isinstance(error, (DataError, IntegrityError)) or type(error) is StatementError
            told = f"{type(error).__name__}: {getattr(error, 'orig', None) or error}"
            if of_values:
                raise RecordRefusedError(f"{self!r} refuses this: {told}") from error
            raise StoreError(f"{self!r} cannot be used: {told}") from error

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
    """A SQLAlchemy URL as it is; a path as that of a SQLite file."""
    text = str(url)
    return text if "://" in text else f"sqlite:///{text}"
