"""Conversion between records and rows of the table `calls`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256
from typing import Any

import numpy as np

from langchain_datashunt.call_log.encryption import KEY_VARIABLE, Seal
from langchain_datashunt.call_log.record import SUBJECT_HASH, CallRecord, hash_input, hash_subject
from langchain_datashunt.call_log.schema import as_datetime, as_seconds, calls
from langchain_datashunt.exceptions import StoreError

COLUMNS = tuple(column.name for column in calls.c if column.name != "number")
"""Columns that `row_of` fills, in its order."""

ENCRYPTED = ("input", "small_label", "small_answer", "answer", "answer_label", "gold", "disclosed")
"""Text columns, which are encrypted if there is a key. Models, policies, tasks, numbers and times stay readable."""

_LONE_SURROGATES = re.compile("[\ud800-\udfff]")

_SAME = (
    "task", "small_answer", "score", "threshold", "policy", "route", "reason", "small_model", "large_model", "answer",
    "answer_label", "large_confidence", "input_tokens", "output_tokens", "cost_usd", "small_seconds", "large_seconds",
    "weight", "audit", "gold", "gold_source", "disclosed",
)  # fmt: skip
"""Fields of a record that are stored in columns of the same name, unchanged."""

_PLACE = {name: i for i, name in enumerate(COLUMNS)}
_ENCRYPTED_PLACES = tuple(_PLACE[name] for name in ENCRYPTED)
_TEXT_PLACES = tuple(
    _PLACE[column.name] for column in calls.c if column.name in COLUMNS and column.type.python_type is str
)


def row_of(record: CallRecord, label_set: int | None, seal: Seal | None, *, sqlite: bool) -> tuple[Any, ...]:
    """Return the values of a record's row, in the order of `COLUMNS`.

    Args:
        record: The record.
        label_set: Row id of its label set, or None if it has no labels.
        seal: Encrypts the texts and keys the hashes. None does neither.
        sqlite: Whether the row is for SQLite, which stores times as text.
    """
    text = as_text(record.input)
    moment: Any = as_datetime(record.time)
    small_label, labels = record.small_label, record.labels
    answer_label = record.answer_label
    values = {
        **{name: getattr(record, name) for name in _SAME},
        "id": record.id,
        "time": moment.isoformat(" ", "microseconds") if sqlite else moment,
        "input": text,
        "small_label": small_label,
        "confidence": record.confidence,
        "agrees": record.agrees,
        "in_label_set": None if answer_label is None or not labels or record.generated else answer_label in labels,
        "label_set": label_set,
        "probabilities": _packed(record.probabilities),
        "large_probabilities": _packed(record.large_probabilities),
        "input_hash": keyed(hash_input(text), seal)[0],
        "subject": None if record.subject is None else _subject(record.subject, seal),
        "encrypted": seal is not None,
    }
    row = [values[name] for name in COLUMNS]
    for i in _TEXT_PLACES:
        if row[i] is not None:
            row[i] = as_text(row[i])
    if seal is not None:
        for i in _ENCRYPTED_PLACES:
            if row[i] is not None:
                row[i] = seal.seal_text(row[i])
    return tuple(row)


def record_of(row: Any, labels: tuple[str, ...], seal: Seal | None) -> CallRecord:
    """Return the record of a row.

    Args:
        row: Mapping from column names to values.
        labels: Label set of the record.
        seal: Decrypts the texts. None can read only rows that are not encrypted.

    Raises:
        StoreError: If the row is encrypted and the key is missing or wrong.
        ValueError: If the row is damaged.
    """
    texts = {name: opened(row, name, seal) for name in ENCRYPTED}
    return CallRecord(
        **{name: texts.get(name, row[name]) for name in _SAME},
        id=row["id"],
        time=as_seconds(row["time"]),
        input=texts["input"],
        labels=labels,
        probabilities=_unpacked(row["probabilities"]),
        large_probabilities=_unpacked(row["large_probabilities"]),
        subject=None if row["subject"] is None else SUBJECT_HASH + bytes(row["subject"]).hex(),
    )


def opened(row: Any, name: str, seal: Seal | None) -> str | None:
    """Return a text of a row, decrypted if the row is encrypted.

    Raises:
        StoreError: If the row is encrypted and the key is missing or wrong.
    """
    value: str | None = row[name]
    if value is None or not row["encrypted"]:
        return value
    if seal is None:
        raise StoreError(
            f"A record is encrypted, and the call log has no key. Pass `key` to CallLog, or set {KEY_VARIABLE}."
        )
    return seal.open_text(value)


def fits(row: Any, record: CallRecord, seal: Seal | None) -> bool:
    """Return whether a row's hash matches its input."""
    return bytes(row["input_hash"]) in keyed(hash_input(record.input), seal)


def keyed(digest: bytes, seal: Seal | None) -> list[bytes]:
    """Return the stored forms of a hash: one for each key, current key first. Without keys, return the hash itself."""
    return [digest] if seal is None else seal.hashes(digest)


def subject_hashes(subject: str, seal: Seal | None) -> list[bytes]:
    """Return the stored forms of a data subject's hash."""
    if subject.startswith(SUBJECT_HASH):
        return [hash_subject(subject)]
    return keyed(hash_subject(subject), seal)


def _subject(subject: str, seal: Seal | None) -> bytes:
    return subject_hashes(subject, seal)[0]


def as_text(text: str) -> str:
    """Replace lone surrogates and NUL by U+FFFD, because databases do not store them."""
    if "\0" in text:
        text = text.replace("\0", "\ufffd")
    try:
        text.encode()
    except UnicodeEncodeError:
        return _LONE_SURROGATES.sub("\ufffd", text)
    return text


def digest_of(labels: Sequence[str], seal: Seal | None) -> bytes:
    """Return 16 bytes that identify a label set."""
    return keyed(sha256(json.dumps(labels).encode()).digest()[:16], seal)[0]


@lru_cache(maxsize=256)
def label_set(written: str) -> tuple[str, ...]:
    """Parse the JSON of a label set."""
    return tuple(json.loads(written))


def _packed(distribution: tuple[float, ...] | None) -> bytes | None:
    return None if distribution is None else np.asarray(distribution, dtype="<f4").tobytes()


def _unpacked(data: Any) -> tuple[float, ...] | None:
    return None if data is None else tuple(np.frombuffer(bytes(data), dtype="<f4").astype(np.float64).tolist())
