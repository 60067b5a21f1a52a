"""Records as rows of the store and back: compressed text, half-precision probabilities, hashes. No SQL here."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any
from uuid import UUID

import numpy as np

from langchain_datashunt._extras import require
from langchain_datashunt.distillation.record import SUBJECT_HASH, RoutedCall, hash_input, hash_subject, id_bytes
from langchain_datashunt.predictions import Reason, Route

ROUTES: tuple[Route, ...] = ("small", "learnable", "large")
REASONS: tuple[Reason, ...] = ("confident", "deferred", "small_error", "large_error")
KEPT = ("gold", "gold_source", "subject")
"""What a newer call without it does not overwrite."""

_COMPRESSED, _PLAIN = b"z", b"p"


def row_of(record: RoutedCall, context: int) -> dict[str, Any]:
    """A record as the values of a row; `context` is the id of what it shares with others."""
    labels = _positions(record.labels)
    small = None if record.small_label is None else labels[record.small_label]
    return {
        "key": key_of(record),
        "id": id_bytes(record.id),
        "context": context,
        "time": record.time,
        "input_hash": hash_input(record.input),
        "content": _packed([record.input, record.raw_output, record.label if record.label not in labels else None]),
        "probabilities": _halves(record.probabilities),
        "confidence": record.confidence,
        "score": record.score,
        "threshold": record.threshold,
        "route": ROUTES.index(record.route),
        "reason": REASONS.index(record.reason),
        "small_label": small,
        "label": None if record.label is None else labels.get(record.label, -1),
        "large_probabilities": _halves(record.large_probabilities),
        "large_confidence": record.large_confidence,
        "input_tokens": record.input_tokens,
        "output_tokens": record.output_tokens,
        "cost_usd": record.cost_usd,
        "small_seconds": record.small_seconds,
        "large_seconds": record.large_seconds,
        "audit": record.audit,
        "gold": record.gold,
        "gold_source": record.gold_source,
        "subject": None if record.subject is None else hash_subject(record.subject),
        "count": record.count,
    }


@lru_cache(maxsize=64)
def _positions(labels: tuple[str, ...]) -> dict[str, int]:
    return {label: i for i, label in enumerate(labels)}


def key_of(record: RoutedCall) -> bytes:
    """16 bytes that stand for (task, input, large model)."""
    parts = (record.task.encode(), record.large_model.encode(), hash_input(record.input))
    return hashlib.sha256(b"\0".join(parts)).digest()[:16]


def merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a key: PostgreSQL refuses to update a row twice in one statement."""
    by_key: dict[bytes, dict[str, Any]] = {}
    for row in rows:
        older = by_key.get(row["key"])
        if older is not None:
            row = {**row, "count": row["count"] + older["count"]}
            for name in KEPT:
                row[name] = older[name] if row[name] is None else row[name]
        by_key[row["key"]] = row
    return list(by_key.values())


_local = threading.local()
"""A compressor for each thread: they must not be shared, and making one costs more than using it."""


def _packed(parts: list[Any]) -> bytes:
    raw = json.dumps(parts, ensure_ascii=False, separators=(",", ":")).encode()
    if len(raw) < 64:
        return _PLAIN + raw
    if (compressor := getattr(_local, "compressor", None)) is None:
        compressor = _local.compressor = require("zstandard", "store").ZstdCompressor(level=1)
    compressed: bytes = compressor.compress(raw)
    return _COMPRESSED + compressed


def _unpacked(data: bytes) -> list[Any]:
    kind, body = data[:1], data[1:]
    if kind == _COMPRESSED:
        body = require("zstandard", "store").ZstdDecompressor().decompress(body)
    parts: list[Any] = json.loads(body)
    return parts


def _halves(values: Sequence[float] | None) -> bytes | None:
    return None if values is None else np.asarray(values, dtype=np.float16).tobytes()


def _wholes(data: bytes | None) -> tuple[float, ...] | None:
    """A distribution again: half-precision numbers no longer sum to 1, so they are scaled."""
    if data is None:
        return None
    p = np.frombuffer(data, dtype=np.float16).astype(np.float64)
    total = p.sum()
    return tuple((p / total if total > 0 else p).tolist())


def record_of(row: Any) -> RoutedCall:
    """The record of a row with its context's columns."""
    text, raw, strange = _unpacked(row["content"])
    labels = tuple(json.loads(row["labels"]))
    label = None if row["label"] is None else strange if row["label"] < 0 else labels[row["label"]]
    same = (
        "time", "score", "threshold", "policy", "task", "small_model", "large_model", "input_tokens", "output_tokens",
        "cost_usd", "small_seconds", "large_seconds", "gold", "gold_source", "count",
    )  # fmt: skip
    return RoutedCall(
        **{name: row[name] for name in same},
        id=str(UUID(bytes=bytes(row["id"]))),
        input=text,
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


def complaint(row: Any) -> str | None:
    """What is wrong with a stored row; None where it reads back and its hashes fit."""
    name = str(UUID(bytes=bytes(row["id"])))
    try:
        record = record_of(row)
    except Exception as error:
        return f"Call {name} cannot be read: {type(error).__name__}: {error}"
    if hash_input(record.input) != bytes(row["input_hash"]) or key_of(record) != bytes(row["key"]):
        return f"Call {name} does not fit its hash: its input or its task was changed."
    return None
