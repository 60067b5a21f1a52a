"""SharedLedger: disclosure budgets and their trail in the store, for all processes and machines that use it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from langchain_datashunt.call_log.schema import controls, disclosures
from langchain_datashunt.call_log.store import CallLog
from langchain_datashunt.exceptions import StoreError
from langchain_datashunt.privacy.budget import Disclosure


class SharedLedger:
    """Counts what leaves in the database, atomically: no two processes together go above a bound.

    Each outgoing call then costs a round trip to the database.

    Args:
        store: A store, or its URL.
    """

    def __init__(self, store: CallLog | str | Path) -> None:
        self.store = store if isinstance(store, CallLog) else CallLog(store)

    def spend(self, amounts: Mapping[str, tuple[float, float]]) -> str | None:
        """Add amounts to what was spent under their names, all or none; the name of the first that is above its bound.

        Raises:
            StoreError: The database cannot be reached.
        """
        try:
            with self.store.connection() as connection:
                for name in sorted(amounts):  # in one order, so that two processes do not wait for each other
                    amount, bound = amounts[name]
                    if not self._add(connection, name, amount, bound):
                        raise _AboveError(name)
        except _AboveError as above:
            return above.name
        except StoreError as error:
            raise StoreError(f"{self.store!r} cannot count a budget: {type(error.__cause__).__name__}.") from error
        return None

    @staticmethod
    def _add(connection: Any, name: str, amount: float, bound: float) -> bool:
        within = update(controls).where(controls.c.name == name, controls.c.value + amount <= bound)
        add = within.values(value=controls.c.value + amount)
        for _ in range(2):
            if connection.execute(add).rowcount:
                return True
            if connection.execute(select(controls.c.value).where(controls.c.name == name)).first() is not None:
                return False
            if amount > bound:
                return False
            try:
                with connection.begin_nested():
                    connection.execute(insert(controls).values(name=name, value=0.0))
            except IntegrityError:  # another process has made it meanwhile
                continue
        return bool(connection.execute(add).rowcount)

    def note(self, entry: Disclosure) -> None:
        """Write a line of the trail.

        Raises:
            StoreError: The database cannot be reached.
        """
        values = {
            **entry._asdict(),
            "replaced": json.dumps(dict(entry.replaced), sort_keys=True),
            "plain": json.dumps(dict(entry.plain), sort_keys=True),
        }
        try:
            with self.store.connection() as connection:
                connection.execute(insert(disclosures).values(**values))
        except StoreError as error:
            raise StoreError(f"{self.store!r} cannot note a disclosure: {type(error.__cause__).__name__}.") from error

    def trail(self, since: float = 0.0) -> Iterator[Disclosure]:
        """The lines of the trail, the oldest first."""
        names = [disclosures.c[name] for name in Disclosure._fields]
        with self.store.connection() as connection:
            rows = connection.execute(
                select(*names).where(disclosures.c.time >= since).order_by(disclosures.c.number)
            ).all()
        for row in rows:
            told = dict(row._mapping)
            yield Disclosure(**{**told, "replaced": json.loads(told["replaced"]), "plain": json.loads(told["plain"])})

    def summary(self, since: float = 0.0) -> dict[str, int]:
        """How many calls left and were refused, and the characters that left; JSON-ready."""
        left = disclosures.c.refused == ""
        with self.store.connection() as connection:
            row = connection.execute(
                select(
                    func.count().filter(left),
                    func.count().filter(~left),
                    func.coalesce(func.sum(disclosures.c.characters).filter(left), 0),
                ).where(disclosures.c.time >= since)
            ).one()
        return dict(zip(("sent", "refused", "characters"), map(int, row), strict=True))

    def prune(self, older_than: float, *, period_seconds: float | Mapping[str, float] = 86_400.0) -> int:
        """Delete lines of the trail from before a time, and what was spent in periods that ended by then.

        Args:
            older_than: Seconds since 1970 UTC.
            period_seconds: Of the budgets that are counted here; where they differ, by the budgets' names: what a
                budget spent that is not named stays.

        Returns:
            How many lines there were.
        """
        with self.store.connection() as connection:
            spent = connection.execute(select(controls.c.name).where(controls.c.name.like("spent:%"))).scalars().all()
            over = [name for name in spent if _end(name, period_seconds) <= older_than]
            for start in range(0, len(over), 500):
                connection.execute(delete(controls).where(controls.c.name.in_(over[start : start + 500])))
            gone = connection.execute(delete(disclosures).where(disclosures.c.time < older_than)).rowcount
        return int(gone)

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedLedger, (self.store.url.render_as_string(hide_password=False),)


def _end(name: str, period_seconds: float | Mapping[str, float]) -> float:
    """When the period ended in which something was spent, seconds since 1970; never where that is not known."""
    _, budget, period, *_ = name.split(":")
    seconds = period_seconds.get(budget, math.inf) if isinstance(period_seconds, Mapping) else period_seconds
    return (int(period) + 1) * seconds


class _AboveError(Exception):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name
