"""What a group of records says, as one compressed value: texts, distributions, times, column by column. No SQL here."""

from __future__ import annotations

import struct
import threading
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import chain, starmap
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from langchain_datashunt._utils.optional import require
from langchain_datashunt.call_log.record import Columns, runs

MAX_RECORDS = 4096
"""Of one segment: the place of a record in its segment has so many values."""

MAX_BYTES = 2**31 - 1
"""Of one segment when it is unpacked; one that says it is larger is damaged."""

_COMPRESSED, _CHECKED, _PLAIN = b"z", b"c", b"p"
"""The first byte of a packed segment; plain ones without a check are of former versions."""

_CHECK = struct.Struct("<I")
_COUNT = struct.Struct("<I")
_TEXTS = ("inputs", "raw_outputs", "strange_labels", "small_answers")
_DISTRIBUTIONS = ("probabilities", "large_probabilities")
_FORMATS = {"audits": "u1", "small_seconds": "<f4", "large_seconds": "<f4", "large_confidences": "<f4"}
_SHORT = 128
_local = threading.local()
"""A compressor for each thread: they must not be shared, and making one costs more than using it."""

Distribution = tuple[float, ...]


class Content(NamedTuple):
    """What a segment says of one record; the fields are those of `CallRecord`, `strange_label` one outside its set."""

    input: str
    raw_output: str | None
    strange_label: str | None
    small_answer: str | None
    probabilities: Distribution | None
    large_probabilities: Distribution | None
    audit: bool
    small_seconds: float
    large_seconds: float
    large_confidence: float | None


@dataclass(frozen=True)
class Segment:
    """Columns of `n` records in the order of their places; a record that was erased has no input."""

    inputs: list[str | None]
    raw_outputs: list[str | None]
    strange_labels: list[str | None]
    small_answers: list[str | None]
    probabilities: list[Distribution | None]
    large_probabilities: list[Distribution | None]
    audits: list[bool]
    small_seconds: list[float]
    large_seconds: list[float]
    large_confidences: list[float | None]

    @classmethod
    def of(cls, columns: Columns) -> Self:
        """What the columns of records say that rows do not."""
        small_answers = columns["small_answer"]
        return cls(
            inputs=columns["input"],
            raw_outputs=columns["raw_output"],
            strange_labels=strange_labels(columns["labels"], columns["label"], small_answers),
            small_answers=small_answers,
            probabilities=columns["probabilities"],
            large_probabilities=columns["large_probabilities"],
            audits=columns["audit"],
            small_seconds=columns["small_seconds"],
            large_seconds=columns["large_seconds"],
            large_confidences=columns["large_confidence"],
        )

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, place: int) -> Content:
        """What it says of one record.

        Raises:
            ValueError: There is none, or it was erased.
        """
        if not 0 <= place < len(self) or (text := self.inputs[place]) is None:
            raise ValueError(f"its segment says nothing of place {place}")
        return Content(
            text,
            self.raw_outputs[place],
            self.strange_labels[place],
            self.small_answers[place],
            self.probabilities[place],
            self.large_probabilities[place],
            self.audits[place],
            self.small_seconds[place],
            self.large_seconds[place],
            self.large_confidences[place],
        )

    def without(self, places: Collection[int]) -> Segment:
        """With nothing left of the records at these places; all others stay where they are."""
        gone, nothing = frozenset(places), {"audits": False, "small_seconds": 0.0, "large_seconds": 0.0}

        def column(name: str) -> list[Any]:
            return [nothing.get(name) if i in gone else v for i, v in enumerate(getattr(self, name))]

        return Segment(**{field.name: column(field.name) for field in fields(self)})

    @cached_property
    def _numbers(self) -> dict[str, NDArray[np.float64]]:
        return {name: _flat(getattr(self, name)) for name in _DISTRIBUTIONS}

    def tops(self) -> tuple[list[float | None], list[int | None]]:
        """The highest number of each of the small model's distributions, and where it stands first."""
        k = len(self.probabilities[0] or ()) if self.probabilities else 0
        if k and all(p is not None and len(p) == k for p in self.probabilities):
            p = self._numbers["probabilities"].reshape(-1, k)
            places = p.argmax(axis=1)
            return p[np.arange(len(p)), places].tolist(), places.tolist()
        highest = [max(p) if p else None for p in self.probabilities]
        return highest, [p.index(max(p)) if p else None for p in self.probabilities]

    # As bytes

    def pack(self) -> bytes:
        """All of it, compressed."""
        return compressed(self.body())

    def body(self) -> bytes:
        """All of it: how many, lengths (of texts in characters), columns of fixed width, numbers, texts.

        Distributions are kept as half-precision numbers.
        """
        texts = [getattr(self, name) for name in _TEXTS]
        distributions = [getattr(self, name) for name in _DISTRIBUTIONS]
        return b"".join(
            (
                _COUNT.pack(len(self)),
                *(_lengths(column) for column in (*texts, *distributions)),
                *(_fixed(getattr(self, name), kind) for name, kind in _FORMATS.items()),
                *(numbers.astype("<f2").tobytes() for numbers in self._numbers.values()),
                *("".join(filter(None, column)).encode(errors="surrogatepass") for column in texts),
            )
        )

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """What `pack` gave.

        Raises:
            ValueError: It is damaged.
        """
        read = _Reader(_decompressed(data))
        (n,) = _COUNT.unpack(read.take(_COUNT.size))
        if n > MAX_RECORDS:
            raise ValueError(f"its segment claims {n} records, more than {MAX_RECORDS}")
        lengths = {name: read.numbers("<i4", n) for name in (*_TEXTS, *_DISTRIBUTIONS)}
        columns: dict[str, Any] = {name: read.numbers(kind, n).tolist() for name, kind in _FORMATS.items()}
        columns["audits"] = [bool(audit) for audit in columns["audits"]]
        columns["large_confidences"] = [None if p != p else p for p in columns["large_confidences"]]
        for name in _DISTRIBUTIONS:
            columns[name] = _distributions(read, lengths[name])
        texts, at = read.rest().decode(errors="surrogatepass"), 0
        for name in _TEXTS:
            columns[name] = [
                None if part is None else texts[at + part[0] : at + part[1]] for part in _parts(lengths[name])
            ]
            at += _total(lengths[name])
        if at != len(texts):
            raise ValueError("its segment's texts are not as long as it says")
        return cls(**columns)


def strange_labels(
    label_sets: list[tuple[str, ...]], answers: Sequence[str | None], small_answers: Sequence[str | None]
) -> list[str | None]:
    """The labels that their label sets do not have, or that are written answers; None for all others."""
    found: list[str | None] = []
    for labels, these in runs(label_sets):
        known, pairs = frozenset((*labels, None)), zip(answers[these], small_answers[these], strict=True)
        found += [None if answer in known and written is None else answer for answer, written in pairs]
    return found


def _flat(distributions: Sequence[Distribution | None]) -> NDArray[np.float64]:
    """All their numbers one after the other."""
    given = list(filter(None, distributions))
    if len(lengths := set(map(len, given))) == 1:
        as_bytes = struct.Struct(f"{lengths.pop()}d").pack
        return np.frombuffer(b"".join(starmap(as_bytes, given)))  # the quickest way from tuples to an array
    return np.array(list(chain.from_iterable(given)), dtype=np.float64)


def _lengths(column: Sequence[Any]) -> bytes:
    if column.count(None) == len(column):
        return np.full(len(column), -1, dtype="<i4").tobytes()
    return np.array([-1 if value is None else len(value) for value in column], dtype="<i4").tobytes()


def _fixed(column: Sequence[Any], kind: str) -> bytes:
    if column and column.count(None) == len(column):
        return np.full(len(column), np.nan, dtype=kind).tobytes()
    return np.array(column, dtype=kind).tobytes()


def compressed(body: bytes) -> bytes:
    """What `Segment.unpack` reads, from a segment's `body`, with a check of its content."""
    if len(body) < _SHORT:
        return _CHECKED + _CHECK.pack(zlib.crc32(body)) + body
    if (compressor := getattr(_local, "compressor", None)) is None:
        zstandard: Any = require("zstandard", "store")
        compressor = _local.compressor = zstandard.ZstdCompressor(level=1, write_checksum=True)
    return _COMPRESSED + bytes(compressor.compress(body))


def _decompressed(data: bytes) -> bytes:
    kind, body = data[:1], data[1:]
    if kind == _PLAIN:
        return body
    if kind == _CHECKED:
        check, body = body[: _CHECK.size], body[_CHECK.size :]
        if check != _CHECK.pack(zlib.crc32(body)):
            raise ValueError("its segment was changed: its checksum does not fit")
        return body
    if kind != _COMPRESSED:
        raise ValueError("its segment is none")
    zstandard: Any = require("zstandard", "store")
    if (decompressor := getattr(_local, "decompressor", None)) is None:
        decompressor = _local.decompressor = zstandard.ZstdDecompressor()
    try:
        if not 0 <= zstandard.frame_content_size(body) <= MAX_BYTES:
            raise ValueError("its segment does not say how large it is, or is too large")
        plain: bytes = decompressor.decompress(body)
    except zstandard.ZstdError as error:
        raise ValueError(f"its segment cannot be decompressed: {error}") from error
    return plain


class _Reader:
    """Takes bytes from the front, and no more than there are."""

    def __init__(self, body: bytes) -> None:
        self.body, self.at = body, 0

    def take(self, size: int) -> bytes:
        if size < 0 or self.at + size > len(self.body):
            raise ValueError("its segment is shorter than it says")
        self.at += size
        return self.body[self.at - size : self.at]

    def numbers(self, kind: str, n: int) -> NDArray[Any]:
        return np.frombuffer(self.take(n * np.dtype(kind).itemsize), dtype=kind)

    def rest(self) -> bytes:
        return self.body[self.at :]


def _total(lengths: NDArray[Any]) -> int:
    return int(lengths.clip(0).sum(dtype=np.int64))


def _parts(lengths: NDArray[Any]) -> list[tuple[int, int] | None]:
    """Start and end of each part, None where there is none."""
    if (lengths < -1).any():
        raise ValueError("its segment has a negative length")
    ends = lengths.clip(0).cumsum(dtype=np.int64).tolist()
    return [None if n < 0 else (end - n, end) for n, end in zip(lengths.tolist(), ends, strict=True)]


def _distributions(read: _Reader, lengths: NDArray[Any]) -> list[Distribution | None]:
    """Distributions again: half-precision numbers no longer sum to 1, so they are scaled."""
    parts, given = _parts(lengths), lengths[lengths > 0]
    numbers = read.numbers("<f2", _total(lengths)).astype(np.float64)
    if len(given):
        sums = np.add.reduceat(numbers, given.cumsum(dtype=np.int64) - given)
        numbers /= np.repeat(np.where(sums > 0, sums, 1.0), given)
    values = numbers.tolist()
    return [None if part is None else tuple(values[slice(*part)]) for part in parts]
