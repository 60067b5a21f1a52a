"""What left, what it cost, and how good the answers were, side by side for each period of a store. Counts, no texts."""

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
"""The first of 1970 was a Thursday; weeks begin on Mondays."""


@dataclass(frozen=True)
class SummaryRow:
    """One period. A figure that nothing is known of is None.

    Attributes:
        start: When it began, seconds since 1970 UTC; the first record's time where all is one period.
        calls: Calls that were made, repeats counted; of what the small model kept, the part that is recorded is scaled
            up. Audits are no calls of their own.
        deferral_rate: Part of them that the large model was asked about, also where it failed.
        cost_usd: What was paid for all that is recorded, audits too.
        usd_per_1000: The same for 1,000 calls.
        all_large_usd_per_1000: What 1,000 calls would have cost if all had been asked, at the mean price of those that
            were.
        sent: Requests that left by the gate, from its trail.
        refused: Requests that the gate's budget kept here.
        characters: Characters that left.
        replaced: Entities that left as placeholders, by kind.
        plain: Entities that left as they were, by kind.
        agreement: How often both models said the same, where both did.
        labelled: Answered calls whose true label is known.
        accuracy: Among those, of the small model's answers and, where it was asked, the large one's; what fusion made
            of the two is not recorded.
        small_accuracy: Of the small model, among those.
        large_accuracy: Of the large model, among those that it answered.
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
        """JSON-ready."""
        return asdict(self)


def summarize(
    store: CallLog,
    *,
    by: Period = "day",
    sample_small: float = 0.1,
    which: CallFilter = CallFilter(),  # noqa: B008
) -> list[SummaryRow]:
    """Leakage, cost and quality of a store's calls, period by period.

    Args:
        store: The log, in which a gate's `SharedLedger` may keep its trail too. The trail knows no tasks: it is counted
            whole for the time that `which` gives.
        by: The periods, UTC.
        sample_small: The recorder's rate for the calls that the small model answered, by which they are scaled up.
        which: What is meant.

    Raises:
        ConfigurationError: There is no such period, or the rate is not above 0.
    """
    if by not in _SECONDS:
        raise ConfigurationError(f"There is no period {by!r}; use one of {', '.join(_SECONDS)}.")
    if not 0.0 < sample_small <= 1.0:
        raise ConfigurationError(f"sample_small is {sample_small}; give the recorder's rate, above 0 and at most 1.")
    rows = {
        start: _counted(SummaryRow(start), counts, sample_small) for start, counts in _calls(store, by, which)
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
    """Return the number of a moment's period, in SQL; a cast truncates in SQLite and rounds in PostgreSQL."""
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
        func.count().filter(sampled).label("sampled"),
        func.count().filter(~or_(asked, audited, sampled)).label("others"),
        func.coalesce(func.sum(c.cost_usd).filter(asked), 0.0).label("asked_usd"),
        func.coalesce(func.sum(c.cost_usd), 0.0).label("cost_usd"),
        func.count().filter(c.agrees.isnot(None)).label("compared"),
        func.count().filter(c.agrees.is_(True)).label("agreeing"),
    )
    with store.connection() as connection:
        for row in connection.execute(statement.where(which.where()).group_by(number)).mappings().all():
            yield _start(row["number"], by), dict(row)


def _counted(row: SummaryRow, counts: dict[str, Any], sample_small: float) -> SummaryRow:
    asked, cost = float(counts["asked"]), float(counts["cost_usd"])
    everything = asked + float(counts["sampled"]) / sample_small + float(counts["others"])
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
    with store.connection() as connection:
        for number, refused, characters, replaced_kinds, plain in connection.execute(statement):
            start = _start(number, by)
            found[start]["refused" if refused else "sent"] += 1
            if not refused:
                found[start]["characters"] += characters
                kinds[start]["replaced"].update(json.loads(replaced_kinds))
                kinds[start]["plain"].update(json.loads(plain))
    return {start: {**told, **{name: dict(n) for name, n in kinds[start].items()}} for start, told in found.items()}


def _right(store: CallLog, by: str, which: CallFilter) -> dict[float, dict[str, Any]]:
    told = defaultdict[float, Counter[str]](Counter)
    for batch in store.iterate(replace(which, labelled=True)):
        for call in batch:
            if call.route == "large" and call.reason == "large_error":
                continue  # it was not answered
            now = told[_start(int((call.time - _offset(by)) // _SECONDS[by]), by)]
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
        for start, now in told.items()
    }
