"""SharedThreshold: a threshold in the call log's database that several processes read and adjust."""

from __future__ import annotations

import logging
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import insert, select

from langchain_datashunt._utils.fork import AFTER_FORK
from langchain_datashunt.call_log.schema import controls
from langchain_datashunt.call_log.store import CallLog
from langchain_datashunt.exceptions import StoreError

_LOG = logging.getLogger(__name__)


class SharedThreshold:
    """Threshold of a `DeferralBudget` or `CostBudget` that processes share through a call log's database.

    ```python
    policy = DeferralBudget(rate=0.2, control=SharedThreshold("postgresql+psycopg://...", "support"))
    ```

    Each decision takes one round trip to the database. If the database cannot be reached, each process continues with
    the last value it read and adjusts it locally. These adjustments are added when the database can be reached again.

    Args:
        store: Call log, or its URL.
        name: Name of the threshold. Processes that use the same name share it.
        retry_seconds: Pause between attempts to reach the database after a failure, in seconds.
    """

    def __init__(self, store: CallLog | str | Path, name: str, *, retry_seconds: float = 5.0) -> None:
        self.store = store if isinstance(store, CallLog) else CallLog(store)
        self.name = name
        self.retry_seconds = retry_seconds
        self._known: float | None = None
        self._owed = 0.0
        self._away_until = 0.0
        self._lock = threading.Lock()
        AFTER_FORK.add(self)

    def after_fork(self) -> None:
        """Replace the lock in a forked child, and drop the pending adjustments, which the parent still adds."""
        self._lock, self._owed = threading.Lock(), 0.0

    def get(self, start: float) -> float:
        """Return the threshold, or `start` if it is not stored yet."""
        return self._value(start, 0.0)

    def add(self, start: float, change: float) -> float:
        """Add `change` to the threshold, starting from `start` if it is not stored yet, and return its new value."""
        return self._value(start, change)

    def _value(self, start: float, change: float) -> float:
        """Add `change` and all pending adjustments, and return the new value."""
        if time.monotonic() >= self._away_until:
            with self._lock:
                owed, self._owed = self._owed, 0.0
            try:
                known = self._moved(start, change + owed) if change + owed else self._read(start)
            except StoreError as error:
                self._away_until = time.monotonic() + self.retry_seconds
                _LOG.warning(
                    "The shared threshold %r is adjusted locally until the database can be reached again: %s",
                    self.name,
                    error,
                )
                change += owed
            else:
                self._known = known
                return known
        with self._lock:
            self._owed += change
            return (start if self._known is None else self._known) + self._owed

    def _read(self, start: float) -> float:
        with self.store.reading() as connection:
            found = connection.execute(select(controls.c.value).where(controls.c.name == self.name)).scalar()
        return start if found is None else float(found)

    def _moved(self, start: float, change: float) -> float:
        dialect: Any
        if self.store.url.get_backend_name() == "postgresql":
            from sqlalchemy.dialects import postgresql as dialect
        else:
            from sqlalchemy.dialects import sqlite as dialect
        make: Any = getattr(dialect, "insert", insert)
        moved = (
            make(controls)
            .values(name=self.name, value=start + change)
            .on_conflict_do_update(index_elements=[controls.c.name], set_={"value": controls.c.value + change})
            .returning(controls.c.value)
        )
        with self.store.connection() as connection:
            return float(connection.execute(moved).scalar_one())

    def __reduce__(self) -> tuple[Any, ...]:
        make = partial(SharedThreshold, retry_seconds=self.retry_seconds)
        return make, (self.store.url.render_as_string(hide_password=False), self.name)
