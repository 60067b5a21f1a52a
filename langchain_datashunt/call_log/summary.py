"""Summaries of the call log by period: disclosure, cost and quality, as counts without texts."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from sqlalchemy import Float, Integer, and_, cast, func, or_, select

from langchain_datashunt.call_log.filters import CallFilter
from langchain_datashunt.call_log.schema import calls, disclosures
from langchain_datashunt.call_log.store import CallLog
from langchain_datashunt.exceptions import ConfigurationError

Period = Literal["day", "week", "all"]

_SECONDS: dict[str, float] = {"day": 86_400.0, "week": 7 * 86_400.0, "all": 1e12}
_FIRST_MONDAY = 4 * 86_400.0
"""First Monday of 1970, in seconds since 1970 UTC, because weeks begin on Mondays."""


@dataclass(frozen=True)
class SummaryRow:
    """Summary of one period. Rates without data are None.

    Attributes:
        start: Start of the period, in seconds since 1970 UTC. With `by="all"`, the time of the first record.
        calls: Estimated number of calls, including repeats. Locally answered calls count with the weights
            of their records. Audits are not counted.
        deferral_rate: Share of the calls that were deferred to the large model, including those that failed.
        cost_usd: Cost of all recorded calls, including audits.
        usd_per_1000: Cost per 1,000 calls.
        all_large_usd_per_1000: Cost per 1,000 calls if all were deferred, at the mean cost of the deferred calls.
        sent: Number of requests that the privacy guard sent.
        refused: Number of requests that the guard's budget refused.
        characters: Number of characters sent.
        replaced: Number of entities sent as placeholders, by kind.
        plain: Number of entities sent unchanged, by kind.
        agreement: Share of calls in which both models gave the same label, among those that both answered.
        labelled: Number of answered calls with a known true label.
        accuracy: Accuracy on the labelled calls. The answer is the large model's label if a deferred call has one, else
            the small model's. Fusion is ignored, because fused answers are not recorded.
        small_accuracy: Accuracy of the small model on the labelled calls.
        large_accuracy: Accuracy of the large model on the labelled calls that it answered.
    """

    start: float
    calls: float = 0.0
    deferral_rate: float | None = None
    cost_usd: float = 0.0
    usd_per_1000: float | None = None
    all_large_usd_per_1000: float | None = None
    sent: int = 0
    refused: int = 0
    characters: int = 0
    replaced: dict[str, int] = field(default_factory=dict)
    plain: dict[str, int] = field(default_factory=dict)
    agreement: float | None = None
    labelled: int = 0
    accuracy: float | None = None
    small_accuracy: float | None = None
    large_accuracy: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as a JSON-ready dictionary."""
        return asdict(self)


def summarize(
    store: CallLog,
    *,
    by: Period = "day",
    which: CallFilter = CallFilter(),  # noqa: B008
) -> list[SummaryRow]:
    """Summarize disclosure, cost and quality of the calls by period.

    Args:
        store: Call log. If a privacy guard uses it as its `SharedLedger`, its audit trail is summarized too. The trail
            holds no tasks, so only the times of `which` apply to it.
        by: Length of the periods, which begin in UTC.
        which: Filter of the calls. By default, all calls.

    Returns:
        One row for each period with data, oldest first.

    Raises:
        ConfigurationError: If `by` is invalid.
    """
    if by not in _SECONDS:
        raise ConfigurationError(f"Expected a period of {', '.join(_SECONDS)}, got {by!r}.")
    rows = {
        start: _counted(SummaryRow(start), counts) for start, counts in _calls(store, by, which)
    }  # fmt: skip
    for start, left in _left(store, by, which).items():
        rows[start] = replace(rows.get(start, SummaryRow(start)), **left)
    for start, right in _right(store, by, which).items():
        rows[start] = replace(rows.get(start, SummaryRow(start)), **right)
    if by == "all" and rows:
        oldest = store.stats(which)["oldest"]
        return [replace(row, start=row.start if oldest is None else float(oldest)) for row in rows.values()]
    return [rows[start] for start in sorted(rows)]


def _bucket(store: CallLog, moment: Any, by: str) -> Any:
    """Return the number of the period of a time, in SQL. A cast truncates in SQLite and rounds in PostgreSQL."""
    number = (moment - _offset(by)) / _SECONDS[by]
    return cast(number if store.url.get_backend_name() == "sqlite" else func.floor(number), Integer)


def _seconds(store: CallLog, moment: Any) -> Any:
    """Return a time column as seconds since 1970, in SQL."""
    if store.url.get_backend_name() == "sqlite":
        return (func.julianday(moment, type_=Float) - 2440587.5) * 86400.0
    return cast(func.extract("epoch", moment), Float)


def _offset(by: str) -> float:
    return _FIRST_MONDAY if by == "week" else 0.0


def _start(number: int, by: str) -> float:
    return number * _SECONDS[by] + _offset(by)


def _calls(store: CallLog, by: str, which: CallFilter) -> Iterator[tuple[float, dict[str, Any]]]:
    c, number = calls.c, _bucket(store, _seconds(store, calls.c.time), by).label("number")
    large, confident = c.route == "large", c.reason == "confident"
    asked = or_(large, c.reason == "large_error")
    audited = and_(~large, confident, c.large_model != "")
    sampled = and_(~large, confident, c.large_model == "")
    statement = select(
        number,
        func.count().filter(asked).label("asked"),
        func.coalesce(func.sum(c.weight).filter(sampled), 0.0).label("sampled"),
        func.count().filter(~or_(asked, audited, sampled)).label("others"),
        func.coalesce(func.sum(c.cost_usd).filter(asked), 0.0).label("asked_usd"),
        func.coalesce(func.sum(c.cost_usd), 0.0).label("cost_usd"),
        func.count().filter(c.agrees.isnot(None)).label("compared"),
        func.count().filter(c.agrees.is_(True)).label("agreeing"),
    )
    with store.reading() as connection:
        for row in connection.execute(statement.where(which.where()).group_by(number)).mappings().all():
            yield _start(row["number"], by), dict(row)


def _counted(row: SummaryRow, counts: dict[str, Any]) -> SummaryRow:
    asked, cost = float(counts["asked"]), float(counts["cost_usd"])
    everything = asked + float(counts["sampled"]) + float(counts["others"])
    return replace(
        row,
        calls=everything,
        deferral_rate=asked / everything if everything else None,
        cost_usd=cost,
        usd_per_1000=1000.0 * cost / everything if everything else None,
        all_large_usd_per_1000=1000.0 * float(counts["asked_usd"]) / asked if asked else None,
        agreement=counts["agreeing"] / counts["compared"] if counts["compared"] else None,
    )


def _left(store: CallLog, by: str, which: CallFilter) -> dict[float, dict[str, Any]]:
    d, found = disclosures.c, defaultdict[float, dict[str, Any]](lambda: {"sent": 0, "refused": 0, "characters": 0})
    kinds = defaultdict[float, dict[str, Counter[str]]](lambda: {"replaced": Counter(), "plain": Counter()})
    statement = select(_bucket(store, d.time, by), d.refused, d.characters, d.replaced, d.plain)
    for edge in ([d.time >= which.since] if which.since is not None else []) + (
        [d.time < which.until] if which.until is not None else []
    ):
        statement = statement.where(edge)
    with store.reading() as connection:
        for number, refused, characters, replaced_kinds, plain in connection.execute(statement):
            start = _start(number, by)
            found[start]["refused" if refused else "sent"] += 1
            if not refused:
                found[start]["characters"] += characters
                kinds[start]["replaced"].update(json.loads(replaced_kinds))
                kinds[start]["plain"].update(json.loads(plain))
    return {
        start: {**counted, **{name: dict(n) for name, n in kinds[start].items()}} for start, counted in found.items()
    }


def _right(store: CallLog, by: str, which: CallFilter) -> dict[float, dict[str, Any]]:
    counted = defaultdict[float, Counter[str]](Counter)
    for batch in store.iterate(replace(which, labelled=True)):
        for call in batch:
            if call.route == "large" and call.reason == "large_error":
                continue  # the call has no answer
            now = counted[_start(int((call.time - _offset(by)) // _SECONDS[by]), by)]
            answer = call.answer_label if call.route == "large" and call.answer_label is not None else call.small_label
            now["labelled"] += 1
            now["right"] += answer == call.gold
            now["small"] += call.small_label == call.gold
            now["asked"] += call.answer_label is not None
            now["large"] += call.answer_label == call.gold
    return {
        start: {
            "labelled": now["labelled"],
            "accuracy": now["right"] / now["labelled"],
            "small_accuracy": now["small"] / now["labelled"],
            "large_accuracy": now["large"] / now["asked"] if now["asked"] else None,
        }
        for start, now in counted.items()
    }
