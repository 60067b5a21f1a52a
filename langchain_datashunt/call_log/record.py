"""The record of one routed call: what the small model thought, what the large one said, what is known of the truth."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from hashlib import sha256
from operator import attrgetter
from typing import Annotated, Any, Self, TypeAlias
from uuid import UUID, uuid5

from langchain_core.utils.uuid import uuid7
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from langchain_datashunt.exceptions import DataError
from langchain_datashunt.prediction import ANSWER_LABELS, Reason, Route

SCHEMA = 3
"""The version of the record that this code writes."""

SUBJECT_HASH = "sha256:"
"""What a subject begins with that is a hash already, as the store gives it back."""

HASHED, LEFT_OUT = "hashed:sha256:", "left out:"
"""What an input begins with that was not kept as a text; nothing can be learnt from it."""

_NAMESPACE = UUID("6f2c3b1e-5c0b-4a52-9b53-0f3ad2f7a6d1")


Seconds: TypeAlias = Annotated[float, AfterValidator(lambda seconds: round(seconds, 6))]
"""Seconds to a microsecond, as databases hold times."""


class CallRecord(BaseModel):
    """One call, as it is stored. Probabilities are in the order of `labels`."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), hide_input_in_errors=True)

    schema_version: int = SCHEMA
    id: str = Field(default_factory=lambda: str(uuid7()))
    """The LangChain run id."""

    time: Annotated[float, AfterValidator(lambda seconds: round(seconds, 6))] = Field(
        default_factory=time.time, validate_default=True
    )
    """When the call ended, in seconds since 1970 UTC, to a microsecond."""

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

    answer: str | None = None
    """The large model's answer as it came."""

    answer_label: str | None = None
    """The large model's answer as a label, or as text if answers are generated; None if it was not asked or its answer
    could not be parsed."""

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

    disclosed: str | None = None
    """What the large prompt disclosed of the small model's prediction, as JSON: the pruning strategy, the candidates
    if it narrowed them, and whether probabilities were shown. None if the large model was not asked."""

    def __repr__(self) -> str:
        return (  # never a text: a record may stand in an error or a log line
            f"CallRecord(id={self.id!r}, task={self.task!r}, route={self.route!r}, reason={self.reason!r}, "
            f"{len(self.labels)} labels)"
        )

    __str__ = __repr__

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
    def generated(self) -> bool:
        """Whether answers of this task are generated texts, not labels."""
        return self.labels == ANSWER_LABELS

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
        return None if self.answer_label is None or self.small_label is None else self.answer_label == self.small_label


def hash_input(text: str) -> bytes:
    """Return 16 bytes that identify an input; case and outer white space are ignored."""
    return sha256(text.strip().lower().encode("utf-8", "surrogatepass")).digest()[:16]


def hash_subject(subject: str) -> bytes:
    """16 bytes that stand for a person; the name itself is never stored. A hash in words passes as it is."""
    if subject.startswith(SUBJECT_HASH):
        return bytes.fromhex(subject.removeprefix(SUBJECT_HASH))
    return sha256(b"subject\0" + subject.encode()).digest()[:16]


def id_bytes(record_id: str) -> bytes:
    """Return a run id as 16 bytes; an id that is not a UUID gets a UUID derived from it."""
    try:
        return UUID(record_id).bytes
    except ValueError:
        return uuid5(_NAMESPACE, record_id).bytes


def latest_of_each_input(records: Iterable[CallRecord] | Iterable[Sequence[CallRecord]]) -> list[CallRecord]:
    """Return the newest record of each (task, large model, input), so that repeated inputs are learnt once.

    A true label and a subject that only an older call of the input has are carried over. The order is that of the
    newest records.

    Args:
        records: Records, or batches of them as from `CallLog.iterate`.
    """
    flat: list[CallRecord] = []
    for item in records:
        flat += [item] if isinstance(item, CallRecord) else item
    alike: dict[tuple[str, str, str], list[CallRecord]] = {}
    for record in flat:
        alike.setdefault((record.task, record.large_model, record.input_hash), []).append(record)
    if len(alike) == len(flat):
        return flat
    newest = {id(max(calls, key=attrgetter("time"))): calls for calls in alike.values()}
    return [_with_older(record, newest[id(record)]) for record in flat if id(record) in newest]


def _with_older(record: CallRecord, calls: Sequence[CallRecord]) -> CallRecord:
    """Return the newest record with what only older calls of the input know."""
    update: dict[str, Any] = {}
    for call in sorted(calls, key=attrgetter("time")):
        if record.gold is None and call.gold is not None:
            update |= {"gold": call.gold, "gold_source": call.gold_source}
        if record.subject is None and call.subject is not None:
            update |= {"subject": call.subject}
    return record.model_copy(update=update) if update else record
