"""Recorder: takes records off the call path and writes them in groups; what cannot be written is spooled."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from sqlalchemy import URL, make_url

from langchain_datashunt._utils.fork import AFTER_FORK
from langchain_datashunt.call_log.encryption import KEY_VARIABLE, Seal
from langchain_datashunt.call_log.process_end import at_the_end_of_a_worker, written_at_the_end
from langchain_datashunt.call_log.record import CallRecord
from langchain_datashunt.call_log.redaction_rules import RedactionRules
from langchain_datashunt.call_log.spool import spool_of
from langchain_datashunt.call_log.store import CallLog, url_of
from langchain_datashunt.exceptions import ConfigurationError, RecordRefusedError, ShuntError, StoreError
from langchain_datashunt.prediction import Route

logger = logging.getLogger(__name__)

MakeRecord = Callable[[], CallRecord]
"""A record, or how to make it: the writer's thread does that, not the caller's."""

_UNREADABLE_SECONDS = 60.0
"""How long a spool is left alone in which only what cannot be read is left."""


@dataclass(frozen=True)
class RecorderCounters:
    """What became of records.

    Attributes:
        written: Stored in the database.
        spooled: Written to the local spool; drained later.
        drained: Moved from the spool to the database since.
        failed: Neither could be written; reported in the log.
        pending: Not dealt with yet.
        sampled_out: Of the small route, not recorded because of the sampling rate.
    """

    written: int = 0
    spooled: int = 0
    drained: int = 0
    failed: int = 0
    pending: int = 0
    sampled_out: int = 0


class _Group:
    """Records that one call handed over together, and the event that it may wait for."""

    __slots__ = ("done", "makers")

    def __init__(self, makers: Sequence[MakeRecord], done: threading.Event | None) -> None:
        self.makers = makers
        self.done = done


class Recorder:
    """Writes records of routed calls to a store, behind the caller's back.

    ```python
    recorder = Recorder("sqlite:///calls.db", task="support")
    chain = ConfidenceRouterChain.from_models(small, model, recorder=recorder)
    ```

    The caller only enqueues. A writer thread commits groups of up to `group_size`. With the queue full a caller waits
    at most `max_wait_ms`, then spools its record itself. With the database away groups go to the spool (a SQLite
    file), and from there to the database when it is back. Pending records are written at exit and on SIGTERM.

    Args:
        store: A store, or its URL.
        task: Name under which records are kept.
        sample_small: Share of the calls that the small models answered which is recorded, in [0, 1].
        durability: "group" returns at once, and a crash may lose what was not committed yet: usually the last group,
            at most `group_size` records and the `queue_size` calls that wait behind them. "record" returns when the
            record is safe on disk.
        queue_size: Groups that may wait.
        group_size: Records of one commit, no further call is added to it above this; what waits is written at once,
            so that a group is as large as this only where calls come faster than a disk takes them.
        max_wait_ms: How long a caller waits for a full queue, in milliseconds.
        spool: File of the spool; None makes one beside a SQLite store, or for another database one of its own in the
            user's state folder (XDG_STATE_HOME, else ~/.local/state), which other processes with this store share.
        retry_seconds: Pause between attempts to reach a database that was away.
        seed: Of the sampling.
        keep: How each text of a record is kept; None keeps all as it is.
    """

    def __init__(
        self,
        store: CallLog | str | Path,
        *,
        task: str = "default",
        sample_small: float = 0.1,
        durability: Literal["group", "record"] = "group",
        queue_size: int = 10_000,
        group_size: int = 32_768,
        max_wait_ms: float = 50.0,
        spool: str | Path | None = None,
        retry_seconds: float = 5.0,
        seed: int | None = None,
        keep: RedactionRules | None = None,
    ) -> None:
        if not 0.0 <= sample_small <= 1.0:
            raise ConfigurationError(f"sample_small is {sample_small}; it is a share, give a number from 0 to 1.")
        if durability not in ("group", "record"):
            raise ConfigurationError(f"durability is {durability!r}; use 'group' or 'record'.")
        self.task = task
        self.sample_small = sample_small
        self.durability = durability
        self.queue_size = queue_size
        self.group_size = group_size
        self.max_wait_ms = max_wait_ms
        self.retry_seconds = retry_seconds
        self.keep = keep
        self._random = random.Random(seed)
        self._url = store.url if isinstance(store, CallLog) else store
        self._store = store if isinstance(store, CallLog) else None
        self.spool = spool
        self._spool_file = Path(spool) if spool is not None else spool_of(store)
        self._spool: CallLog | None = None
        self._lock = threading.Lock()
        self._counters = RecorderCounters()
        self._closed = False
        self._away_until = 0.0
        self._drain_after = 0.0
        self._start()
        if self._store is None:
            self._try_open()
        written_at_the_end(self)
        AFTER_FORK.add(self)

    def after_fork(self) -> None:
        """Begin with a lock that nobody holds; the writer's thread is started when a record comes."""
        self._lock = threading.Lock()

    def _start(self) -> None:
        """A fresh queue and writer thread for this process."""
        self._pid = os.getpid()
        self._open: set[_Group] = set()  # not written yet; changed by single operations, so that no caller needs a lock
        self._queue: queue.SimpleQueue[_Group | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_all, name="datashunt-recorder", daemon=True)
        self._thread.start()

    # The caller's path

    def wants(self, route: Route) -> bool:
        """Whether a call of this route is to be recorded: large ones always, small ones by the sampling rate."""
        if route == "large" or self._random.random() < self.sample_small:
            return True
        self._count(sampled_out=1)
        return False

    def record(self, makers: Sequence[MakeRecord]) -> None:
        """Hand records over. Never raises for a record that cannot be written: that is counted and logged."""
        if not makers:
            return
        group = _Group(makers, threading.Event() if self.durability == "record" else None)
        if not self._enqueue(group):
            self._write(self._made(group), spool=True)
        elif group.done is not None:
            group.done.wait()

    async def arecord(self, makers: Sequence[MakeRecord]) -> None:
        """As `record`, without blocking the event loop."""
        if not makers:
            return
        if self.durability == "record" or self._queue.qsize() >= self.queue_size:
            await asyncio.get_running_loop().run_in_executor(None, self.record, makers)
        else:
            self.record(makers)

    def _enqueue(self, group: _Group) -> bool:
        """Put a group into the queue; False where it stayed full for as long as a caller waits, or after closing."""
        if self._closed:
            return False
        if os.getpid() != self._pid:
            self._start()  # a child process has no writer thread yet
            at_the_end_of_a_worker()
        deadline = time.monotonic() + self.max_wait_ms / 1000.0
        while self._queue.qsize() >= self.queue_size:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.001)
        self._open.add(group)
        self._queue.put(group)
        return True

    # The writer's thread

    def _write_all(self) -> None:
        closing = False
        while not closing:
            groups: list[_Group] = []
            try:
                first = self._queue.get(timeout=self.retry_seconds)
                closing = first is None
                groups = [] if first is None else [first]
                waiting = 0 if first is None else len(first.makers)
                while not closing and waiting < self.group_size:
                    more = self._queue.get_nowait()
                    closing = more is None
                    if more is not None:
                        groups.append(more)
                        waiting += len(more.makers)
            except queue.Empty:
                pass
            records = [record for group in groups for record in self._made(group)]
            self._write(records)
            self._open.difference_update(groups)
            for group in groups:
                if group.done is not None:
                    group.done.set()
            self._drain()

    def _made(self, group: _Group) -> list[CallRecord]:
        """The records of a group; one that cannot be made is counted, and the others are kept."""
        records = []
        for make in group.makers:
            try:
                record = make()
                records.append(record if self.keep is None else self.keep(record))
            except Exception:
                logger.exception("A record of a routed call could not be made.")
                self._count(failed=1)
        return records

    def _write(self, records: list[CallRecord], *, spool: bool = False) -> None:
        """Write to the database, else to the spool, else count and report."""
        if not records:
            return
        refused: set[str] = set()
        refuse = self._refusing(refused)
        if not spool and self._reachable() and self._store is not None:
            try:
                self._store.append_each(records, refuse)
            except ShuntError as error:
                self._went_away(error)
                records = [record for record in records if record.id not in refused]
                refused.clear()
            else:
                self._count(written=len(records) - len(refused))
                return
        try:
            self._spool_store().append_each(records, refuse)
        except Exception as error:
            lost = len(records) - len(refused)
            logger.error("%d records could not be written anywhere: %s: %s", lost, type(error).__name__, error)
            self._count(failed=lost)
        else:
            self._count(spooled=len(records) - len(refused))

    def _refusing(self, refused: set[str]) -> Callable[[CallRecord, Exception], None]:
        """Counts and names a record that the database does not take, and adds its id to these."""

        def refuse(record: CallRecord, error: Exception) -> None:
            logger.error("The record %s cannot be written: %s", record.id, _said_of(error))
            self._count(failed=1)
            refused.add(record.id)

        return refuse

    def _reachable(self) -> bool:
        return time.monotonic() >= self._away_until and (self._store is not None or self._try_open())

    def _try_open(self) -> bool:
        try:
            self._store = CallLog(self._url, durability=self.durability)  # type: ignore[arg-type]
        except StoreError as error:
            self._went_away(error)
        return self._store is not None

    def _went_away(self, error: Exception) -> None:
        logger.warning("The store cannot be written, records are spooled to %s: %s", self._spool_file, error)
        self._away_until = time.monotonic() + self.retry_seconds

    def _spool_store(self) -> CallLog:
        with self._lock:
            if self._spool is None:
                seal = None if self._store is None else self._store.seal
                self._spool = CallLog(self._spool_file, durability="record", key=seal)
            return self._spool

    def _drain(self) -> None:
        """Move what was spooled, also by an earlier process, to the database once it can be reached.

        What waits to be written comes first: where calls come in meanwhile, one batch is moved, and the rest later.
        """
        if time.monotonic() < self._drain_after or not (self._spool is not None or self._spool_file.exists()):
            return
        if not self._reachable() or self._store is None:
            return
        refused: set[str] = set()
        try:
            while moved := self._spool_store().move_to(self._store, batches=1, refused=self._refusing(refused)):
                self._count(drained=moved - len(refused))
                refused.clear()
                if not self._queue.empty():
                    return
            if self._spool_store().count():  # nobody can read it; it is not looked at for each group
                self._drain_after = time.monotonic() + _UNREADABLE_SECONDS
        except Exception as error:  # of the spool, too, whose trouble must not stop what is written otherwise
            logger.warning("The spool %s cannot be drained now: %s: %s", self._spool_file, type(error).__name__, error)
            self._drain_after = time.monotonic() + self.retry_seconds

    # Life

    @property
    def counters(self) -> RecorderCounters:
        """What became of records so far."""
        with self._lock:
            return replace(self._counters, pending=sum(len(group.makers) for group in tuple(self._open)))

    def _count(self, **more: int) -> None:
        with self._lock:
            now = {name: getattr(self._counters, name) + n for name, n in more.items()}
            self._counters = replace(self._counters, **now)

    def flush(self, timeout: float | None = 30.0) -> bool:
        """Wait until everything handed over so far is written or spooled; False where that took too long."""
        if self._closed or not self._thread.is_alive():
            return self._queue.empty()
        marker = _Group((), threading.Event())
        self._queue.put(marker)
        assert marker.done is not None
        return marker.done.wait(timeout)

    def close(self, timeout: float | None = 30.0) -> None:
        """Write what is pending and stop; records handed over later are spooled."""
        if self._closed or os.getpid() != self._pid:
            return
        self.flush(timeout)
        self._closed = True
        self._queue.put(None)
        self._thread.join(timeout)
        for store in (self._store, self._spool):
            if store is not None:
                store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        url = self._url if isinstance(self._url, URL) else make_url(url_of(self._url))
        where = self._store or url.render_as_string(hide_password=True)
        return f"Recorder({where!r}, task={self.task!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its settings: another process has a writer of its own.

        Raises:
            ConfigurationError: The store encrypts with a key that another process would not have.
        """
        seal, told = None if self._store is None else self._store.seal, Seal.from_key(None)
        if seal is not None and (told is None or told.hashes(b"") != seal.hashes(b"")):
            raise ConfigurationError(
                f"{self!r} encrypts with a key that was given to its store, and keys are not pickled. Give the key by "
                f"the environment variable {KEY_VARIABLE}, which the other process reads, too."
            )
        url = self._url if isinstance(self._url, (str, Path)) else self._url.render_as_string(hide_password=False)
        return _restored, (
            str(url),
            {
                name: getattr(self, name)
                for name in (
                    "task",
                    "sample_small",
                    "durability",
                    "queue_size",
                    "group_size",
                    "max_wait_ms",
                    "spool",
                    "retry_seconds",
                    "keep",
                )  # fmt: skip
            },
        )


def _said_of(error: Exception) -> str:
    """What may stand in a log: the database names columns and ids; another error may quote a text."""
    return str(error) if isinstance(error, RecordRefusedError) else type(error).__name__


def _restored(url: str, settings: dict[str, Any]) -> Recorder:
    return Recorder(url, **settings)
