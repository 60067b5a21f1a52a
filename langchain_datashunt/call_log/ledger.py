"""SharedLedger: disclosure budgets and their audit trail in the call log's database."""

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
    """Ledger of disclosure budgets for all processes that use the same call log.

    Amounts are added atomically, so processes cannot exceed a limit together. Each request to the LLM takes one round
    trip to the database.

    Args:
        store: Call log, or its URL.
    """

    def __init__(self, store: CallLog | str | Path) -> None:
        self.store = store if isinstance(store, CallLog) else CallLog(store)

    def spend(self, amounts: Mapping[str, tuple[float, float]]) -> str | None:
        """Add all amounts to those already spent, unless one of them would exceed its limit.

        Args:
            amounts: Pairs of amount and limit, by name.

        Returns:
            Name of the first exceeded limit (nothing is added then), or None.

        Raises:
            StoreError: If the database cannot be reached.
        """
        try:
            with self.store.connection() as connection:
                for name in sorted(amounts):  # a fixed order prevents deadlocks between processes
                    amount, bound = amounts[name]
                    if not self._add(connection, name, amount, bound):
                        raise _AboveError(name)
        except _AboveError as above:
            return above.name
        except StoreError as error:
            raise StoreError(f"{self.store!r} failed to update a budget: {type(error.__cause__).__name__}.") from error
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
            except IntegrityError:  # another process inserted it in the meantime
                continue
        return bool(connection.execute(add).rowcount)

    def note(self, entry: Disclosure) -> None:
        """Append an entry to the audit trail.

        Raises:
            StoreError: If the database cannot be reached.
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
            raise StoreError(f"{self.store!r} failed to log a disclosure: {type(error.__cause__).__name__}.") from error

    def trail(self, since: float = 0.0) -> Iterator[Disclosure]:
        """Yield the entries of the audit trail, oldest first.

        Args:
            since: Earliest time, in seconds since 1970 UTC.
        """
        names = [disclosures.c[name] for name in Disclosure._fields]
        with self.store.reading() as connection:
            rows = connection.execute(
                select(*names).where(disclosures.c.time >= since).order_by(disclosures.c.number)
            ).all()
        for row in rows:
            values = dict(row._mapping)
            yield Disclosure(
                **{**values, "replaced": json.loads(values["replaced"]), "plain": json.loads(values["plain"])}
            )

    def summary(self, since: float = 0.0) -> dict[str, int]:
        """Return the numbers of requests sent and refused, and of characters sent.

        Args:
            since: Earliest time, in seconds since 1970 UTC.
        """
        left = disclosures.c.refused == ""
        with self.store.reading() as connection:
            row = connection.execute(
                select(
                    func.count().filter(left),
                    func.count().filter(~left),
                    func.coalesce(func.sum(disclosures.c.characters).filter(left), 0),
                ).where(disclosures.c.time >= since)
            ).one()
        return dict(zip(("sent", "refused", "characters"), map(int, row), strict=True))

    def prune(self, older_than: float, *, period_seconds: float | Mapping[str, float] = 86_400.0) -> int:
        """Delete old entries of the audit trail, and the amounts spent in periods that have ended.

        Args:
            older_than: Time before which entries are deleted, in seconds since 1970 UTC. Amounts are deleted if their
                period ended by then.
            period_seconds: Length of the budgets' periods, in seconds. If the lengths differ, pass a mapping by budget
                name. Amounts of budgets that it does not name are kept.

        Returns:
            Number of deleted entries.
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
    """Return when a period ends, in seconds since 1970 UTC, or infinity if its length is not known."""
    _, budget, period, *_ = name.split(":")
    seconds = period_seconds.get(budget, math.inf) if isinstance(period_seconds, Mapping) else period_seconds
    return (int(period) + 1) * seconds


class _AboveError(Exception):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name
