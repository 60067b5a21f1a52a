"""Segments in the database: written once, read by their numbers, erased where their records are gone."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable

from sqlalchemy import Connection, delete, exists, func, insert, select, update

from langchain_datashunt.distillation.rows import Segments, number_of, segment_and_place
from langchain_datashunt.distillation.schema import calls, replaced, segments
from langchain_datashunt.distillation.sealing import Seal, opened
from langchain_datashunt.distillation.segments import MAX_RECORDS, Segment

logger = logging.getLogger(__name__)

_AT_ONCE = 64
"""Segments that are erased in one go."""


def write_segment(connection: Connection, segment: Segment, seal: Seal | None) -> int:
    """Store a segment; returns its number."""
    content = _sealed(segment, seal)
    return int(connection.execute(insert(segments).values(content=content)).inserted_primary_key[0])  # type: ignore[index]


def read_segments(connection: Connection, numbers: Collection[int], known: Segments) -> None:
    """Fetch those of these segments that are there."""
    if numbers:
        rows = connection.execute(select(segments.c.number, segments.c.content).where(segments.c.number.in_(numbers)))
        for number, content in rows:
            known.put(number, content)


def erase(connection: Connection, numbers: Iterable[int], seal: Seal | None) -> None:
    """Erase from segments whatever no row refers to any more; one that has nothing left is deleted.

    Segments are locked before their rows are looked up, so that two that erase at once do not undo each other's work.
    """
    wanted = sorted(set(numbers))
    for start in range(0, len(wanted), _AT_ONCE):
        some = wanted[start : start + _AT_ONCE]
        locked = select(segments.c.number, segments.c.content).where(segments.c.number.in_(some))
        for number, content in connection.execute(locked.order_by(segments.c.number).with_for_update()).all():
            own = calls.c.number.between(number_of(number, 0), number_of(number, MAX_RECORDS - 1))
            kept = [segment_and_place(n)[1] for n in connection.execute(select(calls.c.number).where(own)).scalars()]
            if not kept:
                connection.execute(delete(segments).where(segments.c.number == number))
                continue
            plain = opened(bytes(content), seal)
            try:
                left = Segment.unpack(plain).erased_but(kept)
            except ValueError as error:  # nobody can read it, and what is to be forgotten must not stay
                logger.error("Segment %d is damaged and was deleted with its %d calls: %s", number, len(kept), error)
                connection.execute(delete(segments).where(segments.c.number == number))
                connection.execute(delete(calls).where(own))
                continue
            changed = update(segments).where(segments.c.number == number).values(content=_sealed(left, seal))
            connection.execute(changed)
        for number in some:
            those = replaced.c.number.between(number_of(number, 0), number_of(number, MAX_RECORDS - 1))
            connection.execute(update(replaced).where(those).values(number=None))


def drop_empty(connection: Connection) -> None:
    """Delete the segments that no row refers to any more, without a look into the others."""
    first = segments.c.number * MAX_RECORDS
    used = exists().where(calls.c.number >= first, calls.c.number < first + MAX_RECORDS)
    connection.execute(delete(segments).where(~used))


def left_over(connection: Connection) -> set[int]:
    """The segments in which something stands that a newer call has replaced."""
    numbers = connection.execute(select(replaced.c.number).where(replaced.c.number.isnot(None))).scalars()
    return {segment_and_place(number)[0] for number in numbers}


def wasteful(connection: Connection) -> bool:
    """Whether more records are left over than there are."""
    dead = connection.execute(select(func.count()).where(replaced.c.number.isnot(None))).scalar_one()
    return dead > 0 and bool(dead > connection.execute(select(func.count()).select_from(calls)).scalar_one())


def _sealed(segment: Segment, seal: Seal | None) -> bytes:
    packed = segment.pack()
    return packed if seal is None else seal.seal(packed)
