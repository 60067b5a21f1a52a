"""The record of one routed call: what the small model thought, what the large one said, what is known of the truth."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import chain, groupby
from operator import itemgetter
from typing import Any, Self, TypeAlias
from uuid import UUID, uuid5

from langchain_core.utils.uuid import uuid7
from pydantic import BaseModel, ConfigDict, Field, model_validator

from langchain_datashunt.exceptions import DataError
from langchain_datashunt.prediction import Reason, Route

SCHEMA = 2
"""The version of the record that this code writes."""

SUBJECT_HASH = "sha256:"
"""What a subject begins with that is a hash already, as the store gives it back."""

HASHED, LEFT_OUT = "hashed:sha256:", "left out:"
"""What an input begins with that was not kept as a text; nothing can be learnt from it."""

_NAMESPACE = UUID("6f2c3b1e-5c0b-4a52-9b53-0f3ad2f7a6d1")


Columns: TypeAlias = dict[str, list[Any]]
"""For each field of `CallRecord` its values in `n` records."""


class CallRecord(BaseModel):
    """One call, as it is stored. Probabilities are in the order of `labels`."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), hide_input_in_errors=True)

    schema_version: int = SCHEMA
    id: str = Field(default_factory=lambda: str(uuid7()))
    """The LangChain run id."""

    time: float = Field(default_factory=time.time)
    """When the call ended, seconds since 1970 UTC."""

    task: str = "default"
    """Which task of the user's this call belongs to."""

    input: str
    """The text that was classified."""

    subject: str | None = None
    """Whose data this is, for deletion on request; stored as a hash."""

    labels: tuple[str, ...] = ()
    """The label set."""

    small_model: str = ""
    probabilities: tuple[float, ...] | None = None
    """The small model's distribution; None where it failed or there was none."""

    score: float | None = None
    """The confidence score that the policy compared."""

    small_answer: str | None = None
    """What the small model wrote, where it writes its answers; `labels` are then "answer" and "other"."""

    threshold: float | None = None
    policy: str = ""
    route: Route = "large"
    reason: Reason = "deferred"

    large_model: str = ""
    """Name of the large model that answered; empty where none was asked."""

    raw_output: str | None = None
    """The large model's answer as it came."""

    label: str | None = None
    """The large model's answer as a label, or as a text where answers are written; None where it was not asked or was
    unparsable."""

    large_probabilities: tuple[float, ...] | None = None
    """The large model's distribution over `labels`, where log-probabilities of the label's tokens were returned."""

    large_confidence: float | None = Field(default=None, ge=0.0, le=1.0)
    """How sure the large model was: from log-probabilities, or as it stated itself."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    cost_usd: float | None = None
    small_seconds: float = 0.0
    large_seconds: float = 0.0

    audit: bool = False
    """Whether the large model was asked only to check a confident answer."""

    gold: str | None = None
    """The true label, where somebody said it."""

    gold_source: str | None = None
    """Who said it."""

    count: int = Field(default=1, ge=1)
    """How many calls had this input, task and large model; the newest stands here."""

    @model_validator(mode="after")
    def _distributions_fit(self) -> Self:
        for name in ("probabilities", "large_probabilities"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.labels):
                raise DataError(f"A record has {len(values)} {name} for {len(self.labels)} labels; give one for each.")
        return self

    @property
    def input_hash(self) -> str:
        """SHA-256 of the input, case and outer blanks ignored; 32 hex digits of it."""
        return hash_input(self.input).hex()

    @property
    def readable(self) -> bool:
        """Whether the input was kept as a text."""
        return not self.input.startswith((HASHED, LEFT_OUT))

    @property
    def confidence(self) -> float | None:
        """The small model's highest probability; that of its answer, where it writes them."""
        if self.probabilities and self.small_answer is not None:
            return self.probabilities[0]
        return max(self.probabilities) if self.probabilities else None

    @property
    def small_label(self) -> str | None:
        """The small model's answer."""
        if self.small_answer is not None:
            return self.small_answer
        if not self.probabilities:
            return None
        return self.labels[self.probabilities.index(max(self.probabilities))]

    @property
    def agrees(self) -> bool | None:
        """Whether both models say the same; None where one of them said nothing."""
        return None if self.label is None or self.small_label is None else self.label == self.small_label


def columns_of(records: Sequence[CallRecord]) -> Columns:
    """Records column by column: in one pass, for many at a time are larger than a processor's cache."""
    fields, values = tuple(CallRecord.model_fields), list(map(vars, records))
    if values and tuple(values[0]) == fields and set(map(len, values)) == {len(fields)}:
        flat = list(chain.from_iterable(map(dict.values, values)))  # pydantic keeps fields in their order
        return {field: flat[i :: len(fields)] for i, field in enumerate(fields)}
    return {field: list(map(itemgetter(field), values)) for field in fields}


def runs(column: Sequence[Any]) -> Iterator[tuple[Any, slice]]:
    """Each run of equal neighbours: their value, and where they stand."""
    n = len(column)
    if n and column.count(column[0]) == n:  # as nearly always
        yield column[0], slice(0, n)
        return
    start = 0
    for value, alike in groupby(column):
        end = start + sum(1 for _ in alike)
        yield value, slice(start, end)
        start = end


def hash_input(text: str) -> bytes:
    """16 bytes that stand for an input."""
    return hashes_of([text])[0]


def hashes_of(texts: Sequence[str]) -> list[bytes]:
    """`hash_input` of each."""
    return [sha256(text.strip().lower().encode("utf-8", "surrogatepass")).digest()[:16] for text in texts]


def hash_subject(subject: str) -> bytes:
    """16 bytes that stand for a person; the name itself is never stored. A hash in words passes as it is."""
    if subject.startswith(SUBJECT_HASH):
        return bytes.fromhex(subject.removeprefix(SUBJECT_HASH))
    return sha256(b"subject\0" + subject.encode()).digest()[:16]


def id_bytes(record_id: str) -> bytes:
    """A run id as 16 bytes; anything that is no UUID gets a UUID of its own."""
    try:
        if len(digits := record_id.replace("-", "")) == 32 and len(data := bytes.fromhex(digits)) == 16:
            return data
        return UUID(record_id).bytes
    except ValueError:
        return uuid5(_NAMESPACE, record_id).bytes


def ids_bytes(ids: Sequence[str]) -> list[bytes]:
    """`id_bytes` of each; all at once where all are UUIDs as they are usually written."""
    n, text = len(ids), "".join(ids)
    usual = set(map(len, ids)) == {36} and text.count("-") == 4 * n
    if usual and all(text[at::36].count("-") == n for at in (8, 13, 18, 23)):
        try:
            data = bytes.fromhex(text.replace("-", ""))
        except ValueError:
            data = b""
        if len(data) == 16 * n:
            return [data[at : at + 16] for at in range(0, 16 * n, 16)]
    return list(map(id_bytes, ids))
