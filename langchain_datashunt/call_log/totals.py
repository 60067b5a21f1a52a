"""Totals of a store, computed by the database."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import BigInteger, ColumnElement, and_, cast, func, select

from langchain_datashunt.call_log.filters import CallFilter
from langchain_datashunt.call_log.rows import ROUTES
from langchain_datashunt.call_log.schema import calls

if TYPE_CHECKING:
    from langchain_datashunt.call_log.store import CallLog


def totals(store: CallLog, which: CallFilter) -> dict[str, Any]:
    """As `CallLog.stats`."""
    c = calls.c
    spared = and_(c.route == ROUTES.index("large"), c.score >= c.threshold)
    both = and_(c.small_label.isnot(None), c.label.isnot(None))
    statement = select(
        func.count().label("records"),
        _calls().label("calls"),
        *(_calls(c.route == i).label(f"route_{name}") for i, name in enumerate(ROUTES)),
        func.count().filter(both).label("compared"),
        func.count().filter(and_(both, c.small_label == c.label)).label("agreeing"),
        func.count().filter(c.gold.isnot(None)).label("labelled"),
        _calls(spared).label("would_be_kept"),
        _calls(and_(spared, c.small_label == c.label)).label("would_be_kept_agreeing"),
        func.coalesce(func.sum(c.cost_usd * c.count).filter(spared), 0.0).label("would_be_saved_usd"),
        func.count().filter(c.label == -1).label("outside_label_set"),
        func.coalesce(func.sum(c.cost_usd * c.count), 0.0).label("cost_usd"),
        _whole(func.sum(c.input_tokens * c.count)).label("input_tokens"),
        _whole(func.sum(c.output_tokens * c.count)).label("output_tokens"),
        func.min(c.time).label("oldest"),
        func.max(c.time).label("newest"),
    ).where(which.where())
    with store.reading() as connection:
        row = connection.execute(statement).one()._mapping
    return {
        key: value if value is None or isinstance(value, (int, float)) else float(value) for key, value in row.items()
    }


def _calls(where: ColumnElement[bool] | None = None) -> ColumnElement[int]:
    total = func.sum(calls.c.count)
    return _whole(total if where is None else total.filter(where))


def _whole(total: ColumnElement[Any]) -> ColumnElement[int]:
    return cast(func.coalesce(total, 0), BigInteger)
