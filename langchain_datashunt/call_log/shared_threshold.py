"""SharedThreshold: a number in the store that many processes read and move, for budgets that they keep together."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

from sqlalchemy import insert, select

from langchain_datashunt._utils.fork import AFTER_FORK
from langchain_datashunt.call_log.schema import controls
from langchain_datashunt.call_log.store import CallLog
from langchain_datashunt.exceptions import StoreError

_LOG = logging.getLogger(__name__)


class SharedThreshold:
    """The threshold of a `DeferralBudget` or `CostBudget`, shared through a store.

    ```python
    policy = DeferralBudget(rate=0.2, control=SharedThreshold("postgresql+psycopg://...", "support"))
    ```

    Each decision then costs a round trip to the database. With the database away a process goes on with the number that
    it knew last and moves it alone; what it moved is added when the database is back.

    Args:
        store: A store, or its URL.
        name: Of this number; processes that name it alike share it.
        retry_seconds: Pause between attempts to reach a database that was away.
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
        """Begin with a lock that nobody holds; what was not added yet is the parent's to add."""
        self._lock, self._owed = threading.Lock(), 0.0

    def get(self, start: float) -> float:
        """Its value; `start` where it has none yet."""
        return self._value(start, 0.0)

    def add(self, start: float, change: float) -> float:
        """Move it, at once for all processes; its new value."""
        return self._value(start, change)

    def _value(self, start: float, change: float) -> float:
        """Its value after it was moved by this, and by what could not be added before."""
        if time.monotonic() >= self._away_until:
            with self._lock:
                owed, self._owed = self._owed, 0.0
            try:
                known = self._moved(start, change + owed) if change + owed else self._read(start)
            except StoreError as error:
                self._away_until = time.monotonic() + self.retry_seconds
                _LOG.warning("%r is kept by this process alone until the database is back: %s", self.name, error)
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
        return SharedThreshold, (self.store.url.render_as_string(hide_password=False), self.name)
