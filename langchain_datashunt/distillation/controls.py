"""SharedControl: a number in the store that many processes read and move, for budgets that they keep together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import insert, select

from langchain_datashunt.distillation.schema import controls
from langchain_datashunt.distillation.store import DistillationStore


class SharedControl:
    """The threshold of a `QueryBudget` or `CostBudget`, shared through a store.

    ```python
    policy = QueryBudget(share=0.2, control=SharedControl("postgresql+psycopg://...", "support"))
    ```

    Each decision then costs a round trip to the database.

    Args:
        store: A store, or its URL.
        name: Of this number; processes that name it alike share it.
    """

    def __init__(self, store: DistillationStore | str | Path, name: str) -> None:
        self.store = store if isinstance(store, DistillationStore) else DistillationStore(store)
        self.name = name

    def get(self, start: float) -> float:
        """Its value; `start` where it has none yet."""
        with self.store.connection() as connection:
            found = connection.execute(select(controls.c.value).where(controls.c.name == self.name)).scalar()
        return start if found is None else float(found)

    def add(self, start: float, change: float) -> float:
        """Move it, at once for all processes; its new value."""
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
        return SharedControl, (self.store.url.render_as_string(hide_password=False), self.name)
