"""Records in groups of one segment each: taken apart, hashed and compressed before they are written. No SQL here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from langchain_datashunt.call_log.encryption import Seal, sealed
from langchain_datashunt.call_log.record import CallRecord, Columns
from langchain_datashunt.call_log.rows import Key, merged
from langchain_datashunt.call_log.segments import MAX_RECORDS, Segment, compressed


@dataclass(frozen=True)
class Group:
    """What becomes one segment and its rows.

    Attributes:
        keys: Of `n` records, no two alike, in the order of their places.
        columns: What these records say.
        others: Ids and keys of calls that newer ones of the group replaced.
        segment: What rows do not say of them.
        content: Gives the segment as it is stored; waits until it is compressed.
    """

    keys: list[bytes]
    columns: Columns
    others: list[tuple[bytes, Key]]
    segment: Segment
    content: Callable[[], bytes]


def groups_of(records: Sequence[CallRecord], seal: Seal | None) -> Iterator[Group]:
    """Records in groups; where there are several, each is compressed by another thread while that before is written."""
    if len(records) <= MAX_RECORDS:
        yield _group(records, seal, lambda work: work)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="datashunt-compress") as thread:
        starts = range(0, len(records), MAX_RECORDS)
        groups = (_group(records[start : start + MAX_RECORDS], seal, _started_in(thread)) for start in starts)
        before = next(groups)
        for coming in groups:
            yield before
            before = coming
        yield before


_Later: TypeAlias = Callable[[Callable[[], bytes]], Callable[[], bytes]]


def _group(records: Sequence[CallRecord], seal: Seal | None, later: _Later) -> Group:
    keys, columns, others = merged(records, seal)
    segment = Segment.of(columns)
    return Group(keys, columns, others, segment, later(partial(_stored, segment.body(), seal)))


def _stored(body: bytes, seal: Seal | None) -> bytes:
    """Computes without holding the interpreter, so that another thread loses nothing by it."""
    return sealed(compressed(body), seal)


def _started_in(thread: ThreadPoolExecutor) -> _Later:
    def later(work: Callable[[], bytes]) -> Callable[[], bytes]:
        try:
            return thread.submit(work).result
        except RuntimeError:  # the interpreter ends, and no thread is started any more
            return work

    return later
