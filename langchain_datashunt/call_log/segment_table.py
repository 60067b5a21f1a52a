"""Segments in the database: written once, read by their numbers, erased where nothing refers to what they say."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from itertools import groupby

from sqlalchemy import BigInteger, ColumnElement, Connection, cast, delete, exists, func, insert, select, update

from langchain_datashunt.call_log.encryption import Seal, opened, sealed
from langchain_datashunt.call_log.rows import number_of, segment_and_place
from langchain_datashunt.call_log.schema import calls, dead, segments
from langchain_datashunt.call_log.segments import MAX_RECORDS, Segment
from langchain_datashunt.exceptions import StoreError

logger = logging.getLogger(__name__)

_AT_ONCE = 500
"""Numbers in one statement."""


def write_segment(connection: Connection, content: bytes) -> int:
    """Store a segment as it is stored; returns its number."""
    return int(connection.execute(insert(segments).values(content=content)).inserted_primary_key[0])  # type: ignore[index]


def read_segment(connection: Connection, number: int, seal: Seal | None) -> Segment:
    """A segment.

    Raises:
        ValueError: It is not there, or damaged.
        StoreError: It is encrypted, and the key is not given.
    """
    content = connection.execute(select(segments.c.content).where(segments.c.number == number)).scalar()
    if content is None:
        raise ValueError(f"its segment {number} is not there")
    return Segment.unpack(opened(bytes(content), seal))


def erase(connection: Connection, seal: Seal | None, needed: Collection[int] = ()) -> None:
    """Erase from segments whatever no row refers to any more; one that has nothing left is deleted.

    The database itself notes each number that a row gives up, in the transaction that does so; a number is never used
    again. So only what is noted is erased, and who erases at the same time, or writes, undoes nothing.

    Args:
        connection: Inside a transaction.
        seal: Of the store.
        needed: Segments that must be erased; others whose key is missing are left for later.

    Raises:
        StoreError: A segment that must be erased is encrypted with another key.
    """
    noted = connection.execute(select(dead.c.number).order_by(dead.c.number)).scalars().all()
    for number, group in groupby(noted, key=lambda one: segment_and_place(one)[0]):
        numbers = list(group)
        try:
            _erase_places(connection, number, {segment_and_place(one)[1] for one in numbers}, seal)
        except StoreError:
            if number in needed:
                raise
            logger.warning("Segment %d is encrypted with a key that is not given; it is erased another time.", number)
            continue
        for some in _parts(numbers):
            connection.execute(delete(dead).where(dead.c.number.in_(some)))


def _erase_places(connection: Connection, number: int, places: set[int], seal: Seal | None) -> None:
    this, own = segments.c.number == number, _rows_of(number)
    content = connection.execute(select(segments.c.content).where(this).with_for_update()).scalar()
    if content is None:
        return
    if not connection.execute(select(exists().where(own))).scalar():
        connection.execute(delete(segments).where(this))
        return
    plain = opened(bytes(content), seal)
    try:
        left = Segment.unpack(plain).without(places)
    except ValueError as error:  # nobody can read it, and what is to be forgotten must not stay
        logger.error("Segment %d is damaged; it was deleted with its calls: %s", number, error)
        connection.execute(delete(calls).where(own))
        connection.execute(delete(segments).where(this))
        return
    connection.execute(update(segments).where(this).values(content=sealed(left.pack(), seal)))


def drop_empty(connection: Connection) -> None:
    """Delete the segments that no row refers to, and what is noted of them, without a look into any."""
    first = cast(segments.c.number, BigInteger) * MAX_RECORDS
    used = exists().where(calls.c.number >= first, calls.c.number < first + MAX_RECORDS)
    for number in connection.execute(select(segments.c.number).where(~used)).scalars().all():
        connection.execute(delete(segments).where(segments.c.number == number))
        connection.execute(delete(dead).where(_between(dead.c.number, number)))


def wasteful(connection: Connection) -> bool:
    """Whether more of what is stored is dead than alive."""
    gone = connection.execute(select(func.count()).select_from(dead)).scalar_one()
    return gone > 0 and bool(gone > connection.execute(select(func.count()).select_from(calls)).scalar_one())


def _rows_of(number: int) -> ColumnElement[bool]:
    return _between(calls.c.number, number)


def _between(column: ColumnElement[int], number: int) -> ColumnElement[bool]:
    return column.between(number_of(number, 0), number_of(number, MAX_RECORDS - 1))


def _parts(numbers: list[int]) -> Iterator[list[int]]:
    for start in range(0, len(numbers), _AT_ONCE):
        yield numbers[start : start + _AT_ONCE]
