"""Recorder: writes call records to the log in the background, with a local spool for database outages."""

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
"""Function that returns a record. It runs in the writer thread, to keep the work off the call path."""

_UNREADABLE_SECONDS = 60.0
"""Pause before the next attempt to drain a spool that holds only unreadable records, in seconds."""


@dataclass(frozen=True)
class RecorderCounters:
    """Numbers of records by outcome.

    Attributes:
        written: Records written to the database directly.
        spooled: Records written to the local spool, from which they are drained later.
        drained: Records moved from the spool to the database.
        failed: Records that could not be created, were rejected by the database, or could not be written anywhere.
            Each failure is logged.
        pending: Records that are queued or being written.
        sampled_out: Locally answered calls that were not recorded because of `sample_small`.
    """

    written: int = 0
    spooled: int = 0
    drained: int = 0
    failed: int = 0
    pending: int = 0
    sampled_out: int = 0


_STEP = 0.2
"""Seconds between two looks at the writer thread while waiting for it."""


class _Group:
    """Records passed in one call of `record`.

    Attributes:
        makers: Functions that return the records.
        done: Event that the caller waits for, or None.
        records: The records once they are created.
        spooled: Whether the caller has written the records to the spool, because the writer thread took too long.
        finished: Whether the writer thread has written the records.
        lock: Guards the other attributes. A signal handler may take it again in the same thread.
    """

    __slots__ = ("done", "finished", "lock", "makers", "records", "spooled")

    def __init__(self, makers: Sequence[MakeRecord], done: threading.Event | None) -> None:
        self.makers = makers
        self.done = done
        self.records: list[CallRecord] | None = None
        self.spooled = self.finished = False
        self.lock = threading.RLock()


class Recorder:
    """Background writer of call records to a call log.

    ```python
    recorder = Recorder("sqlite:///calls.db", task="support")
    chain = ConfidenceRouterChain.from_models(small, model, recorder=recorder)
    ```

    The caller only adds records to a queue, and a writer thread commits all queued records together. If the database
    cannot be reached, records go to the spool (a SQLite file). They are moved to the database when it can be reached
    again. Pending records are written at exit and on SIGTERM.

    Args:
        store: Call log, or its URL.
        task: Task name of the records.
        sample_small: Share of the locally answered calls to record, in [0, 1].
        durability: "group" returns at once. A crash may then lose the records that are not committed: usually the
            last group, at most one commit and `queue_size` queued calls. "record" returns after the records are
            committed.
        queue_size: Maximum number of queued calls of `record`.
        group_size: Number of records from which a commit takes no further call from the queue. Commits are this large
            only if calls arrive faster than the disk writes them.
        max_wait_ms: Maximum time that a caller waits if the queue is full, in milliseconds. After that, it writes its
            records to the spool itself.
        record_seconds: Maximum time that a caller waits for the commit with durability "record", in seconds. After
            that, it writes its records to the spool itself, which survives a crash too.
        spool: File of the spool. None uses a file next to a SQLite log. For other databases, None uses a file in the
            user's state folder (XDG_STATE_HOME, by default ~/.local/state), which all processes with this log share.
        retry_seconds: Pause between attempts to reach the database after a failure, in seconds.
        seed: Seed of the sampling.
        keep: Rules for the texts of a record. None stores all texts unchanged.

    Raises:
        ConfigurationError: If `sample_small` or `durability` is invalid, or the database is not supported.
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
        record_seconds: float = 5.0,
        spool: str | Path | None = None,
        retry_seconds: float = 5.0,
        seed: int | None = None,
        keep: RedactionRules | None = None,
    ) -> None:
        if not 0.0 <= sample_small <= 1.0:
            raise ConfigurationError(f"Expected a share from 0 to 1 for `sample_small`, got {sample_small}.")
        if durability not in ("group", "record"):
            raise ConfigurationError(f"Expected 'group' or 'record' for `durability`, got {durability!r}.")
        self.task = task
        self.sample_small = sample_small
        self.durability = durability
        self.queue_size = queue_size
        self.group_size = group_size
        self.max_wait_ms = max_wait_ms
        self.record_seconds = record_seconds
        self.retry_seconds = retry_seconds
        self.keep = keep
        self._random = random.Random(seed)
        self._url = store.url if isinstance(store, CallLog) else store
        self._store = store if isinstance(store, CallLog) else None
        self.spool = spool
        self._spool_file = Path(spool) if spool is not None else spool_of(store)
        self._spool: CallLog | None = None
        self._lock = threading.RLock()
        self._closing = threading.Lock()
        self._counters = RecorderCounters()
        self._closed = False
        self._away_until = 0.0
        self._drain_after = 0.0
        self._start()
        if self._store is None:
            self._try_open()
        if self._spool_file.exists():  # of an earlier process
            self._ensure_thread()
        written_at_the_end(self)
        AFTER_FORK.add(self)

    def after_fork(self) -> None:
        """Replace the locks in a forked child, because a thread of the parent may have held them.

        The next record starts the writer thread of the child.
        """
        self._lock = threading.RLock()
        self._closing = threading.Lock()

    def _start(self) -> None:
        """Create the queue of this process. The writer thread starts with the first record, and ends when idle."""
        self._pid = os.getpid()
        self._open: set[_Group] = set()  # pending groups, changed only by atomic operations, so no lock is needed
        self._queue: queue.SimpleQueue[_Group | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def _ensure_thread(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._write_all, name="datashunt-recorder", daemon=True)
            self._thread.start()

    # Called in the caller's thread

    def wants(self, route: Route) -> bool:
        """Return whether to record a call: deferred calls always, locally answered ones at the rate `sample_small`."""
        if route == "large" or self._random.random() < self.sample_small:
            return True
        self._count(sampled_out=1)
        return False

    def weight(self, route: Route) -> float:
        """Return the number of calls that a record stands for: 1 / `sample_small` for local answers, else 1."""
        return 1.0 if route == "large" or not self.sample_small else 1.0 / self.sample_small

    def record(self, makers: Sequence[MakeRecord]) -> None:
        """Queue records for writing. Records that cannot be written are counted and logged instead of raising."""
        if not makers:
            return
        group = _Group(makers, threading.Event() if self.durability == "record" else None)
        if not self._enqueue(group) or (group.done is not None and not group.done.wait(self.record_seconds)):
            self._spool_now(group)

    async def arecord(self, makers: Sequence[MakeRecord]) -> None:
        """Async version of `record`."""
        if not makers:
            return
        if self.durability == "record" or self._queue.qsize() >= self.queue_size:  # `record` blocks only then
            await asyncio.get_running_loop().run_in_executor(None, self.record, makers)
        else:
            self.record(makers)

    def _enqueue(self, group: _Group) -> bool:
        """Add a group to the queue. Return False if it stays full for `max_wait_ms`, or if the recorder is closed."""
        if self._closed:
            return False
        if os.getpid() != self._pid:
            self._start()  # a forked child has no writer thread yet
            at_the_end_of_a_worker()
        deadline = time.monotonic() + self.max_wait_ms / 1000.0
        while self._queue.qsize() >= self.queue_size:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.001)
        with self._closing:  # nothing may be queued behind the end marker of `close`, because no thread would read it
            if self._closed:
                return False
            self._open.add(group)
            self._queue.put(group)
            self._ensure_thread()
        return True

    def _spool_now(self, group: _Group) -> None:
        """Write the records of a group to the spool in this thread, unless the writer thread has written them."""
        with group.lock:
            if group.finished or group.spooled:
                return
            group.spooled = True
            self._to_spool(self._made(group))

    # Called in the writer thread

    def _write_all(self) -> None:
        closing = False
        while not closing:
            groups: list[_Group] = []
            first = None
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
                if first is None and not closing and self._ends_idle():
                    return
            self._write([group for group in groups if not group.spooled])
            self._open.difference_update(groups)
            for group in groups:
                if group.done is not None:
                    group.done.set()
            self._drain()

    def _ends_idle(self) -> bool:
        """Return whether this thread may end, because nothing is queued or spooled."""
        if self._spool is not None or self._spool_file.exists():
            return False
        with self._closing:
            if not self._queue.empty():
                return False
            self._thread = None
            return True

    def _made(self, group: _Group) -> list[CallRecord]:
        """Return the records of a group, except those that cannot be created, which are counted and logged."""
        with group.lock:
            if group.records is None:
                group.records = []
                for make in group.makers:
                    try:
                        record = make()
                        group.records.append(record if self.keep is None else self.keep(record))
                    except Exception:
                        logger.exception("Failed to create the record of a call.")
                        self._count(failed=1)
            return group.records

    def _write(self, groups: list[_Group]) -> None:
        """Write the records of groups to the database, or to the spool if that fails."""
        records = [record for group in groups for record in self._made(group)]
        if not records:
            return
        refused: set[str] = set()
        if self._reachable() and self._store is not None:
            try:
                self._store.append_each(records, self._refusing(refused))
            except ShuntError as error:
                self._went_away(error)
            else:
                for group in groups:
                    with group.lock:
                        group.finished = True
                        if not group.spooled:  # else its records were counted as spooled, and are stored once
                            self._count(written=sum(record.id not in refused for record in self._made(group)))
                return
        rest = []
        for group in groups:
            with group.lock:
                if not group.spooled:
                    group.spooled = True
                    rest += [record for record in self._made(group) if record.id not in refused]
        self._to_spool(rest)

    def _to_spool(self, records: list[CallRecord]) -> None:
        """Write records to the spool. If that fails, count and log the loss."""
        if not records:
            return
        refused: set[str] = set()
        try:
            self._spool_store().append_each(records, self._refusing(refused))
        except Exception as error:
            lost = len(records) - len(refused)
            logger.error("Lost %d records, log and spool failed: %s: %s", lost, type(error).__name__, error)
            self._count(failed=lost)
        else:
            self._count(spooled=len(records) - len(refused))

    def _refusing(self, refused: set[str]) -> Callable[[CallRecord, Exception], None]:
        """Return a callback that counts and logs a rejected record, and adds its id to `refused`."""

        def refuse(record: CallRecord, error: Exception) -> None:
            logger.error("The database rejected the record %s: %s", record.id, _cause_of(error))
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
        logger.warning("The call log cannot be written, so records go to the spool %s: %s", self._spool_file, error)
        self._away_until = time.monotonic() + self.retry_seconds

    def _spool_store(self) -> CallLog:
        with self._lock:
            if self._spool is None:
                seal = None if self._store is None else self._store.seal
                self._spool = CallLog(self._spool_file, durability="record", key=seal)
            return self._spool

    def _drain(self) -> None:
        """Move spooled records to the database if it can be reached, including those of earlier processes.

        New records take precedence. If some are queued, return after one batch and leave the rest for the next call.
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
            if self._spool_store().count():  # only unreadable records are left, so do not retry after every group
                self._drain_after = time.monotonic() + _UNREADABLE_SECONDS
        except Exception as error:  # no error of the spool may stop the writer thread
            logger.warning(
                "Failed to drain the spool %s, retrying later: %s: %s", self._spool_file, type(error).__name__, error
            )
            self._drain_after = time.monotonic() + self.retry_seconds

    # Lifecycle

    @property
    def counters(self) -> RecorderCounters:
        """Current numbers of records by outcome."""
        with self._lock:
            return replace(self._counters, pending=sum(len(group.makers) for group in tuple(self._open)))

    def _count(self, **more: int) -> None:
        with self._lock:
            now = {name: getattr(self._counters, name) + n for name, n in more.items()}
            self._counters = replace(self._counters, **now)

    def flush(self, timeout: float | None = 30.0) -> bool:
        """Wait until all records queued so far are processed.

        Args:
            timeout: Maximum time to wait, in seconds. None waits without limit.

        Returns:
            False if the timeout was reached, else True. Without a writer thread, whether the queue is empty.
        """
        thread = self._thread
        if self._closed or thread is None or not thread.is_alive():
            return self._queue.empty()
        marker = _Group((), threading.Event())
        self._queue.put(marker)
        assert marker.done is not None
        deadline = None if timeout is None else time.monotonic() + timeout
        while not marker.done.wait(_STEP if deadline is None else max(0.0, min(_STEP, deadline - time.monotonic()))):
            if self._thread is not thread and self._queue.qsize() <= 1:  # it ended idle before it saw the marker
                return True
            if deadline is not None and time.monotonic() >= deadline:
                return False
        return True

    def rescue(self) -> None:
        """Write all pending records to the spool in this thread, because the writer thread takes too long."""
        pending = tuple(self._open)
        if pending:
            logger.warning("%d groups of records are still pending, so they go to the spool.", len(pending))
        for group in pending:
            self._spool_now(group)
            self._open.discard(group)

    def close(self, timeout: float | None = 30.0) -> None:
        """Write all pending records and stop the writer thread. Later records go to the spool.

        Records that the database does not accept in time go to the spool too.

        Args:
            timeout: Maximum time to wait for the pending records, in seconds.
        """
        if self._closed or os.getpid() != self._pid:
            return
        in_time = self.flush(timeout)
        with self._closing:
            self._closed = True
            self._queue.put(None)
            thread = self._thread
        if not in_time:
            self.rescue()
        elif thread is not None:
            thread.join(timeout)
        for store in (self._store, self._spool):
            if store is not None and in_time:
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
        """Pickle the settings. The unpickled recorder starts its own writer thread.

        Raises:
            ConfigurationError: If the log is encrypted and the environment does not hold the same key.
        """
        seal, own = None if self._store is None else self._store.seal, Seal.from_key(None)
        if seal is not None and (own is None or own.hashes(b"") != seal.hashes(b"")):
            raise ConfigurationError(
                f"{self!r} cannot be pickled, because its key was passed to CallLog and keys are not pickled. Set the "
                f"environment variable {KEY_VARIABLE} instead, in this process and in the other one."
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
                    "record_seconds",
                    "spool",
                    "retry_seconds",
                    "keep",
                )  # fmt: skip
            },
        )


def _cause_of(error: Exception) -> str:
    """Return the message of a rejection, but only the type of other errors, whose messages may quote a text."""
    return str(error) if isinstance(error, RecordRefusedError) else type(error).__name__


def _restored(url: str, settings: dict[str, Any]) -> Recorder:
    return Recorder(url, **settings)
