"""Records as rows of the store and back: compressed text, half-precision probabilities, hashes. No SQL here."""

from __future__ import annotations

import hashlib
import json
import struct
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple
from uuid import UUID

import numpy as np

from langchain_datashunt._extras import require
from langchain_datashunt.distillation.record import SUBJECT_HASH, RoutedCall, hash_input, hash_subject, id_bytes
from langchain_datashunt.distillation.sealing import Seal, opened
from langchain_datashunt.predictions import Reason, Route

ROUTES: tuple[Route, ...] = ("small", "learnable", "large")
REASONS: tuple[Reason, ...] = ("confident", "deferred", "small_error", "large_error", "local_only")
KEPT = ("gold", "gold_source", "subject")
"""What a newer call without it does not overwrite."""

OUTSIDE = -1
"""Stands for a label that is not in the label set; its name is in the content."""

_COMPRESSED, _PLAIN = b"z", b"p"
_LENGTHS, _NOTHING = struct.Struct("<II"), 2**32 - 1
_WRITTEN = struct.Struct("<I")
"""The length of the small model's answer, which stands before all else where there is one: kinds "Z" and "P"."""


class Row(NamedTuple):
    """The values of a row of `calls`, in the order of its columns; the row's number is the database's own."""

    key: bytes
    id: bytes
    context: int
    time: float
    content: bytes
    probabilities: bytes | None
    confidence: float | None
    score: float | None
    threshold: float | None
    route: int
    reason: int
    small_label: int | None
    label: int | None
    large_probabilities: bytes | None
    large_confidence: float | None
    input_tokens: int | None
    output_tokens: int | None
    cost_usd: float | None
    small_seconds: float
    large_seconds: float
    audit: bool
    gold: str | None
    gold_source: str | None
    subject: bytes | None
    count: int  # type: ignore[assignment]  # a tuple's own `count` is not needed here


def row_of(record: RoutedCall, context: int, seal: Seal | None = None) -> Row:
    """A record as the values of a row; `context` is the id of what it shares with others."""
    labels, p = _positions(record.labels), record.probabilities
    highest = max(p) if p else None
    written = record.small_answer is not None
    strange = record.label is not None and (written or record.label not in labels)
    small_label = None if p is None or highest is None else p.index(highest)
    if written:  # equal to the label's column where both say the same, so that agreement can be asked for in SQL
        highest, small_label = record.confidence, OUTSIDE if record.small_answer == record.label else 0
    content = _packed(
        record.input, record.raw_output, record.label if strange else None, record.small_answer
    )  # fmt: skip
    return Row(
        keys_of(record.task, record.large_model, hash_input(record.input), seal)[0],
        id_bytes(record.id),
        context,
        record.time,
        content if seal is None else seal.seal(content),
        _halves(p),
        highest,
        record.score,
        record.threshold,
        ROUTES.index(record.route),
        REASONS.index(record.reason),
        small_label,
        None if record.label is None else OUTSIDE if written else labels.get(record.label, OUTSIDE),
        _halves(record.large_probabilities),
        record.large_confidence,
        record.input_tokens,
        record.output_tokens,
        record.cost_usd,
        record.small_seconds,
        record.large_seconds,
        record.audit,
        record.gold,
        record.gold_source,
        None if record.subject is None else hash_subject(record.subject),
        record.count,
    )


@lru_cache(maxsize=64)
def _positions(labels: tuple[str, ...]) -> dict[str, int]:
    return {label: i for i, label in enumerate(labels)}


def key_of(task: str, large_model: str, input_hash: bytes) -> bytes:
    """16 bytes that stand for (task, input, large model)."""
    return hashlib.sha256(b"\0".join((task.encode(), large_model.encode(), input_hash))).digest()[:16]


def keys_of(task: str, large_model: str, input_hash: bytes, seal: Seal | None) -> list[bytes]:
    """The keys that a row may have: keyed hashes where the store is encrypted, the newest key's first."""
    plain = key_of(task, large_model, input_hash)
    return [plain] if seal is None else [*seal.hashes(plain), plain]


def merged(rows: list[Row]) -> list[Row]:
    """One row a key: PostgreSQL refuses to update a row twice in one statement."""
    by_key: dict[bytes, Row] = {}
    for row in rows:
        if (older := by_key.get(row.key)) is not None:
            kept = {name: getattr(older, name) for name in KEPT if getattr(row, name) is None}
            row = row._replace(count=row.count + older.count, **kept)
        by_key[row.key] = row
    return list(by_key.values())


_local = threading.local()
"""A compressor for each thread: they must not be shared, and making one costs more than using it."""


def _packed(text: str, raw: str | None, strange: str | None, written: str | None) -> bytes:
    """Input, raw answer, a label outside the label set and what the small model wrote as one compressed value."""
    parts = [b"" if part is None else part.encode(errors="surrogatepass") for part in (text, raw, strange)]
    body = _LENGTHS.pack(len(parts[0]), _NOTHING if raw is None else len(parts[1])) + b"".join(parts)
    plain, squeezed = _PLAIN, _COMPRESSED
    if written is not None:
        first = written.encode(errors="surrogatepass")
        body, plain, squeezed = _WRITTEN.pack(len(first)) + first + body, plain.upper(), squeezed.upper()
    if len(body) < 64:
        return plain + body
    if (compressor := getattr(_local, "compressor", None)) is None:
        compressor = _local.compressor = require("zstandard", "store").ZstdCompressor(level=1)
    compressed: bytes = compressor.compress(body)
    return squeezed + compressed


def _unpacked(data: bytes) -> tuple[str, str | None, str, str | None]:
    kind, body, written = data[:1], data[1:], None
    if kind.lower() == _COMPRESSED:
        if (decompressor := getattr(_local, "decompressor", None)) is None:
            decompressor = _local.decompressor = require("zstandard", "store").ZstdDecompressor()
        body = decompressor.decompress(body)
    if kind.isupper():
        (length,) = _WRITTEN.unpack_from(body)
        end = _WRITTEN.size + length
        if end > len(body):
            raise ValueError("its text is shorter than it says")
        written, body = body[_WRITTEN.size : end].decode(errors="surrogatepass"), body[end:]
    first, second = _LENGTHS.unpack_from(body)
    if _LENGTHS.size + first + (0 if second == _NOTHING else second) > len(body):
        raise ValueError("its text is shorter than it says")
    edges = (_LENGTHS.size, _LENGTHS.size + first, _LENGTHS.size + first + (0 if second == _NOTHING else second))
    text, raw, strange = (
        body[a:b].decode(errors="surrogatepass") for a, b in zip(edges, (*edges[1:], len(body)), strict=True)
    )
    return text, None if second == _NOTHING else raw, strange, written


def _halves(values: Sequence[float] | None) -> bytes | None:
    return None if values is None else np.asarray(values, dtype=np.float16).tobytes()


def _wholes(data: bytes | None) -> tuple[float, ...] | None:
    """A distribution again: half-precision numbers no longer sum to 1, so they are scaled."""
    if data is None:
        return None
    p = np.frombuffer(data, dtype=np.float16).astype(np.float64)
    total = p.sum()
    return tuple((p / total if total > 0 else p).tolist())


def record_of(row: Any, seal: Seal | None = None) -> RoutedCall:
    """The record of a row with its context's columns."""
    text, raw, strange, written = _unpacked(opened(bytes(row["content"]), seal))
    labels = tuple(json.loads(row["labels"]))
    label = None if row["label"] is None else strange if row["label"] == OUTSIDE else labels[row["label"]]
    same = (
        "time", "score", "threshold", "policy", "task", "small_model", "large_model", "input_tokens", "output_tokens",
        "cost_usd", "small_seconds", "large_seconds", "gold", "gold_source", "count",
    )  # fmt: skip
    return RoutedCall(
        **{name: row[name] for name in same},
        id=str(UUID(bytes=bytes(row["id"]))),
        input=text,
        small_answer=written,
        labels=labels,
        probabilities=_wholes(row["probabilities"]),
        route=ROUTES[row["route"]],
        reason=REASONS[row["reason"]],
        raw_output=raw,
        label=label,
        large_probabilities=_wholes(row["large_probabilities"]),
        large_confidence=row["large_confidence"],
        audit=bool(row["audit"]),
        subject=None if row["subject"] is None else SUBJECT_HASH + bytes(row["subject"]).hex(),
    )


def complaint(row: Any, seal: Seal | None = None) -> str | None:
    """What is wrong with a stored row; None where it reads back and its hashes fit."""
    name = str(UUID(bytes=bytes(row["id"])))
    try:
        record = record_of(row, seal)
    except Exception as error:
        return f"Call {name} cannot be read: {type(error).__name__}: {error}"
    if bytes(row["key"]) not in keys_of(record.task, record.large_model, hash_input(record.input), seal):
        return f"Call {name} does not fit its hash: its input or its task was changed."
    return None
