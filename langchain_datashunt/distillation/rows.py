"""Records as rows of the store and back: hashes, and what SQL is to count and filter by. No SQL here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple
from uuid import UUID

from langchain_datashunt.distillation.record import SUBJECT_HASH, RoutedCall, hash_input, hash_subject, id_bytes
from langchain_datashunt.distillation.sealing import Seal
from langchain_datashunt.distillation.segments import MAX_RECORDS, Segment
from langchain_datashunt.predictions import Reason, Route

ROUTES: tuple[Route, ...] = ("small", "learnable", "large")
REASONS: tuple[Reason, ...] = ("confident", "deferred", "small_error", "large_error", "local_only")
_ROUTES = {route: i for i, route in enumerate(ROUTES)}
_REASONS = {reason: i for i, reason in enumerate(REASONS)}
KEPT = ("gold", "gold_source", "subject")
"""What a newer call without it does not overwrite."""

OUTSIDE = -1
"""Stands for a label that is not in the label set; its name is in the segment."""


class Row(NamedTuple):
    """The values of a row of `calls`, in the order of its columns."""

    number: int
    key: bytes
    id: bytes
    context: int
    time: float
    confidence: float | None
    score: float | None
    threshold: float | None
    route: int
    reason: int
    small_label: int | None
    label: int | None
    input_tokens: int | None
    output_tokens: int | None
    cost_usd: float | None
    gold: str | None
    gold_source: str | None
    subject: bytes | None
    count: int  # type: ignore[assignment]  # a tuple's own `count` is not needed here


def number_of(segment: int, place: int) -> int:
    """A row's number says where its content stands."""
    return segment * MAX_RECORDS + place


def segment_and_place(number: int) -> tuple[int, int]:
    """Where the content of the row with this number stands."""
    return divmod(number, MAX_RECORDS)


def rows_of(
    records: Sequence[RoutedCall], keys: Sequence[bytes], contexts: Sequence[int], segment: int
) -> list[tuple[Any, ...]]:
    """Records of one segment as values of `Row`; `contexts` are the ids of what each shares with others."""
    distributions = [r.probabilities for r in records]
    confidences = [max(p) if p else None for p in distributions]
    columns = (
        range(number_of(segment, 0), number_of(segment, len(records))),
        keys,
        [id_bytes(r.id) for r in records],
        contexts,
        [r.time for r in records],
        confidences,
        [r.score for r in records],
        [r.threshold for r in records],
        [_ROUTES[r.route] for r in records],
        [_REASONS[r.reason] for r in records],
        [p.index(best) if p else None for p, best in zip(distributions, confidences, strict=True)],
        _label_positions(records),
        [r.input_tokens for r in records],
        [r.output_tokens for r in records],
        [r.cost_usd for r in records],
        [r.gold for r in records],
        [r.gold_source for r in records],
        [None if r.subject is None else hash_subject(r.subject) for r in records],
        [r.count for r in records],
    )
    rows: list[tuple[Any, ...]] = list(zip(*columns, strict=True))
    for place, record in enumerate(records):
        if record.small_answer is not None:
            rows[place] = _of_written(Row._make(rows[place]), record)
    return rows


def _of_written(row: Row, record: RoutedCall) -> Row:
    """The labels' columns are equal where both models wrote the same, so that agreement can be asked for in SQL."""
    return row._replace(
        confidence=record.confidence,
        small_label=OUTSIDE if record.small_answer == record.label else 0,
        label=None if record.label is None else OUTSIDE,
    )


def _label_positions(records: Sequence[RoutedCall]) -> list[int | None]:
    """The large model's label of each record in its label set."""
    found: list[int | None] = []
    for labels, alike in groupby(records, key=attrgetter("labels")):
        positions: dict[str | None, int | None] = {label: i for i, label in enumerate(labels)}
        positions[None] = None
        found.extend(positions.get(r.label, OUTSIDE) for r in alike)
    return found


@lru_cache(maxsize=256)
def _asked(task: str, large_model: str) -> bytes:
    return b"\0".join((task.encode(errors="surrogatepass"), large_model.encode(errors="surrogatepass"), b""))


def key_of(task: str, large_model: str, input_hash: bytes) -> bytes:
    """16 bytes that stand for (task, input, large model)."""
    return hashlib.sha256(_asked(task, large_model) + input_hash).digest()[:16]


def keys_of(task: str, large_model: str, input_hash: bytes, seal: Seal | None) -> list[bytes]:
    """The keys that a row may have: keyed hashes where the store is encrypted, the newest key's first."""
    plain = key_of(task, large_model, input_hash)
    return [plain] if seal is None else [*seal.hashes(plain), plain]


def merged(records: Sequence[RoutedCall], seal: Seal | None) -> tuple[list[bytes], list[RoutedCall]]:
    """One record a key, the newest with the counts of all: a statement must not update a row twice."""
    if seal is None:
        keys = [key_of(r.task, r.large_model, hash_input(r.input)) for r in records]
    else:
        keys = [keys_of(r.task, r.large_model, hash_input(r.input), seal)[0] for r in records]
    if len(set(keys)) == len(keys):
        return keys, list(records)
    by_key: dict[bytes, RoutedCall] = {}
    for key, record in zip(keys, records, strict=True):
        if (older := by_key.get(key)) is not None:
            kept = {name: getattr(older, name) for name in KEPT if getattr(record, name) is None}
            record = record.model_copy(update={**kept, "count": record.count + older.count})
        by_key[key] = record
    return list(by_key), list(by_key.values())


def record_of(row: Any, segment: Segment) -> RoutedCall:
    """The record of a row with its context's columns.

    Raises:
        ValueError: Its segment says nothing of it.
    """
    said = segment[segment_and_place(row["number"])[1]]
    labels = label_set(row["labels"])
    label = None if row["label"] is None else labels[row["label"]] if row["label"] >= 0 else said.strange_label
    same = (
        "time", "score", "threshold", "policy", "task", "small_model", "large_model", "input_tokens", "output_tokens",
        "cost_usd", "gold", "gold_source", "count",
    )  # fmt: skip
    told = {name: value for name, value in said._asdict().items() if name != "strange_label"}
    return RoutedCall(
        **{name: row[name] for name in same},
        **told,
        id=id_of(row),
        labels=labels,
        route=ROUTES[row["route"]],
        reason=REASONS[row["reason"]],
        label=label,
        subject=None if row["subject"] is None else SUBJECT_HASH + bytes(row["subject"]).hex(),
    )


def id_of(row: Any) -> str:
    """The id of a row's call."""
    return str(UUID(bytes=bytes(row["id"])))


def fits(row: Any, record: RoutedCall, seal: Seal | None) -> bool:
    """Whether a row's hash is that of its record."""
    return bytes(row["key"]) in keys_of(record.task, record.large_model, hash_input(record.input), seal)


@lru_cache(maxsize=64)
def label_set(written: str) -> tuple[str, ...]:
    """The label set of a context."""
    return tuple(json.loads(written))
