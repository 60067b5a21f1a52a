"""Records as rows of the store and back: hashes, and what SQL is to count and filter by. No SQL here."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import sha256
from itertools import compress
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias

from langchain_datashunt.call_log.encryption import Seal
from langchain_datashunt.call_log.record import (
    SUBJECT_HASH,
    CallRecord,
    Columns,
    columns_of,
    hash_input,
    hash_subject,
    hashes_of,
    id_bytes,
    ids_bytes,
    runs,
)
from langchain_datashunt.call_log.segments import MAX_RECORDS, Segment
from langchain_datashunt.prediction import Reason, Route

ROUTES: tuple[Route, ...] = ("small", "student", "large")
REASONS: tuple[Reason, ...] = ("confident", "deferred", "small_error", "large_error", "local_only")
_ROUTES = {route: i for i, route in enumerate(ROUTES)}
_REASONS = {reason: i for i, reason in enumerate(REASONS)}
KEPT = ("gold", "gold_source", "subject")
"""What a newer call without it does not overwrite."""

OUTSIDE = -1
"""Stands for a label that is not in the label set; its name is in the segment."""

_ID_BYTES = 16

Key: TypeAlias = tuple[int, int]
"""16 bytes that stand for (task, input, large model), as two numbers of 64 bits, which SQLite compares in half the time
that it takes for bytes."""


class Rows(NamedTuple):
    """The values of rows of `calls`, `n` of each column, in the order of its columns."""

    number: Sequence[int]
    key_high: Sequence[int]
    key_low: Sequence[int]
    id: Sequence[bytes]
    context: Sequence[int]
    time: Sequence[float]
    confidence: Sequence[float | None]
    score: Sequence[float | None]
    threshold: Sequence[float | None]
    route: Sequence[int]
    reason: Sequence[int]
    small_label: Sequence[int | None]
    label: Sequence[int | None]
    input_tokens: Sequence[int | None]
    output_tokens: Sequence[int | None]
    cost_usd: Sequence[float | None]
    gold: Sequence[str | None]
    gold_source: Sequence[str | None]
    subject: Sequence[bytes | None]
    count: Sequence[int]  # type: ignore[assignment]  # a tuple's own `count` is not needed here

    def only(self, chosen: Sequence[bool]) -> Rows:
        """The rows that are chosen, of `n` flags."""
        columns: Iterator[Any] = (list(compress(column, chosen)) for column in self)
        return Rows(*columns)


def number_of(segment: int, place: int) -> int:
    """A row's number says where its content stands."""
    return segment * MAX_RECORDS + place


def segment_and_place(number: int) -> tuple[int, int]:
    """Where the content of the row with this number stands."""
    return divmod(number, MAX_RECORDS)


def rows_of(
    columns: Columns, keys: Sequence[bytes], contexts: Sequence[int], segment: Segment, segment_number: int
) -> Rows:
    """The rows of one segment's records.

    Args:
        columns: Of `n` records, in the order of their places.
        keys: Of each.
        contexts: For each the number of what it shares with others.
        segment: What rows do not say of them.
        segment_number: Where it stands.
    """
    distributions, answers = columns["probabilities"], columns["label"]
    halves = _halves(keys)
    confidences, small_labels = segment.tops()
    positions = _label_positions(columns["labels"], answers)
    for place, written in enumerate(columns["small_answer"]):
        if written is not None:  # equal where both wrote the same, so that agreement can be asked for in SQL
            confidences[place] = distributions[place][0] if distributions[place] else None
            small_labels[place] = OUTSIDE if written == answers[place] else 0
            positions[place] = None if answers[place] is None else OUTSIDE
    return Rows(
        number=range(number_of(segment_number, 0), number_of(segment_number, len(keys))),
        key_high=halves[::2],
        key_low=halves[1::2],
        id=ids_bytes(columns["id"]),
        context=contexts,
        time=columns["time"],
        confidence=confidences,
        score=columns["score"],
        threshold=columns["threshold"],
        route=[_ROUTES[route] for route in columns["route"]],
        reason=[_REASONS[reason] for reason in columns["reason"]],
        small_label=small_labels,
        label=positions,
        input_tokens=columns["input_tokens"],
        output_tokens=columns["output_tokens"],
        cost_usd=columns["cost_usd"],
        gold=columns["gold"],
        gold_source=columns["gold_source"],
        subject=[None if subject is None else hash_subject(subject) for subject in columns["subject"]],
        count=columns["count"],
    )


def _label_positions(label_sets: Sequence[tuple[str, ...]], answers: Sequence[str | None]) -> list[int | None]:
    """The place of each answer in its label set; None where there is none."""
    found: list[int | None] = []
    for labels, these in runs(label_sets):
        positions: dict[str | None, int | None] = {label: i for i, label in enumerate(labels)}
        positions[None] = None
        found += [positions.get(answer, OUTSIDE) for answer in answers[these]]
    return found


@lru_cache(maxsize=256)
def _asked(task: str, large_model: str) -> bytes:
    return b"\0".join((task.encode(errors="surrogatepass"), large_model.encode(errors="surrogatepass"), b""))


def _each_key_of(tasks: Sequence[str], large_models: Sequence[str], input_hashes: Sequence[bytes]) -> list[bytes]:
    """The keys of records, as bytes."""
    asked = zip(map(_asked, tasks, large_models), input_hashes, strict=True)
    return [sha256(before + input_hash).digest()[:16] for before, input_hash in asked]


def _halves(keys: Sequence[bytes]) -> tuple[int, ...]:
    """The two numbers of each key, one after the other."""
    return struct.unpack(f">{2 * len(keys)}q", b"".join(keys))


def key_of_bytes(key: bytes) -> Key:
    """A key as the two numbers by which rows are found."""
    high, low = _halves([key])
    return high, low


def keys_of(task: str, large_model: str, input_hash: bytes, seal: Seal | None) -> list[Key]:
    """The keys that a row may have: keyed hashes where the store is encrypted, the newest key's first."""
    (plain,) = _each_key_of([task], [large_model], [input_hash])
    return list(map(key_of_bytes, [plain] if seal is None else [*seal.hashes(plain), plain]))


def merged(records: Sequence[CallRecord], seal: Seal | None) -> tuple[list[bytes], Columns, list[tuple[bytes, Key]]]:
    """Keys, the columns of one record a key, and the ids of the others with their keys: no row is written twice.

    The newest record stands for its key, with the counts of all; one that is there twice, by its id, counts once.
    """
    columns = columns_of(records)
    keys = _each_key_of(columns["task"], columns["large_model"], hashes_of(columns["input"]))
    if seal is not None:
        keys = [seal.hashes(key)[0] for key in keys]
    if len(set(keys)) == len(keys):
        return keys, columns, []
    alike: dict[bytes, dict[str, CallRecord]] = {}
    for key, record in zip(keys, records, strict=True):
        alike.setdefault(key, {})[record.id] = record
    newest = {key: _joined(sorted(same.values(), key=attrgetter("time"))) for key, same in alike.items()}
    others = [
        (id_bytes(record_id), key_of_bytes(key))
        for key, same in alike.items()
        for record_id in same
        if record_id != newest[key].id
    ]
    return list(newest), columns_of(list(newest.values())), others


def _joined(calls: Sequence[CallRecord]) -> CallRecord:
    """The last of calls with one input, with the counts of all, and what only older ones know."""
    last = calls[-1]
    if len(calls) == 1:
        return last
    known = {name: [value for call in calls if (value := getattr(call, name)) is not None] for name in KEPT}
    kept = {name: values[-1] for name, values in known.items() if values}
    return last.model_copy(update={**kept, "count": sum(call.count for call in calls)})


def record_of(row: Any, segment: Segment) -> CallRecord:
    """The record of a row with its context's columns.

    Raises:
        ValueError: Its segment says nothing of it, or its id is damaged.
    """
    said = segment[segment_and_place(row["number"])[1]]
    if len(row["id"]) != _ID_BYTES:
        raise ValueError(f"its id has {len(row['id'])} bytes and not {_ID_BYTES}")
    labels = label_set(row["labels"])
    label = None if row["label"] is None else labels[row["label"]] if row["label"] >= 0 else said.strange_label
    same = (
        "time", "score", "threshold", "policy", "task", "small_model", "large_model", "input_tokens", "output_tokens",
        "cost_usd", "gold", "gold_source", "count",
    )  # fmt: skip
    told = {name: value for name, value in said._asdict().items() if name != "strange_label"}
    return CallRecord(
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
    """The id of a row's call; one that is damaged, as it is."""
    value = row["id"]
    digits = bytes(value).hex() if isinstance(value, (bytes, memoryview)) else str(value)
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def fits(row: Any, record: CallRecord, seal: Seal | None) -> bool:
    """Whether a row's hash is that of its record."""
    return (row["key_high"], row["key_low"]) in keys_of(record.task, record.large_model, hash_input(record.input), seal)


@lru_cache(maxsize=64)
def label_set(written: str) -> tuple[str, ...]:
    """The label set of a context."""
    return tuple(json.loads(written))
