"""CallRecord: one routed call, with the predictions of both models and the true label if known."""

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
"""Version of the record format."""

SUBJECT_HASH = "sha256:"
"""Prefix of a subject that is already hashed, as in records that are read from the log."""

HASHED, LEFT_OUT = "hashed:sha256:", "left out:"
"""Prefixes of texts that were hashed or left out. Such inputs cannot be used for training."""

_NAMESPACE = UUID("6f2c3b1e-5c0b-4a52-9b53-0f3ad2f7a6d1")


Seconds: TypeAlias = Annotated[float, AfterValidator(lambda seconds: round(seconds, 6))]
"""Seconds, rounded to microseconds like the times in databases."""


class CallRecord(BaseModel):
    """Record of one call. Probabilities are in the order of `labels`."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), hide_input_in_errors=True)

    schema_version: int = SCHEMA
    id: str = Field(default_factory=lambda: str(uuid7()))
    """LangChain run id."""

    time: Annotated[float, AfterValidator(lambda seconds: round(seconds, 6))] = Field(
        default_factory=time.time, validate_default=True
    )
    """End of the call, in seconds since 1970 UTC, rounded to microseconds."""

    task: str = "default"
    """Task name."""

    input: str
    """Text of the input."""

    subject: str | None = None
    """Id of the data subject, for deletion on request. It is stored as a hash."""

    labels: tuple[str, ...] = ()
    """Label set."""

    small_model: str = ""
    probabilities: tuple[float, ...] | None = None
    """Probabilities of the small model, or None if it failed or was not called."""

    score: float | None = None
    """Confidence score that the policy compared with the threshold."""

    small_answer: str | None = None
    """Generated answer of the small model, or None if it classifies. If set, `labels` are "answer" and "other"."""

    threshold: float | None = None
    policy: str = ""
    route: Route = "large"
    reason: Reason = "deferred"

    large_model: str = ""
    """Name of the large model, or "" if it was not called."""

    answer: str | None = None
    """Raw answer of the large model."""

    answer_label: str | None = None
    """Large model's answer as a label, or as text if answers are generated. None if the large model was not called or
    its answer could not be parsed."""

    large_probabilities: tuple[float, ...] | None = None
    """Large model's probabilities over `labels`, or None if it returned no log-probabilities of the label's tokens."""

    large_confidence: float | None = Field(default=None, ge=0.0, le=1.0)
    """Confidence of the large model, from log-probabilities or as stated in its answer."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    cost_usd: float | None = None
    small_seconds: float = 0.0
    large_seconds: float = 0.0

    weight: float = Field(default=1.0, ge=1.0)
    """Number of calls that this record stands for: 1 / sampling rate of locally answered calls, 1 for others."""

    audit: bool = False
    """Whether the large model was called only to check a confident answer."""

    gold: str | None = None
    """True label, if known."""

    gold_source: str | None = None
    """Source of the true label."""

    disclosed: str | None = None
    """Part of the small model's prediction that the large model's prompt disclosed, as JSON: the pruning strategy, the
    candidates if it narrowed them, and whether it showed probabilities. None if the large model was not called."""

    def __repr__(self) -> str:
        return (  # without texts, because records can appear in errors and logs
            f"CallRecord(id={self.id!r}, task={self.task!r}, route={self.route!r}, reason={self.reason!r}, "
            f"{len(self.labels)} labels)"
        )

    __str__ = __repr__

    @model_validator(mode="after")
    def _distributions_fit(self) -> Self:
        for name in ("probabilities", "large_probabilities"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.labels):
                raise DataError(
                    f"Expected one value of `{name}` for each of the {len(self.labels)} labels, got {len(values)}."
                )
        return self

    @property
    def input_hash(self) -> str:
        """Hash of the input as 32 hex digits."""
        return hash_input(self.input).hex()

    @property
    def readable(self) -> bool:
        """Whether the input is a text, neither hashed nor left out."""
        return not self.input.startswith((HASHED, LEFT_OUT))

    @property
    def confidence(self) -> float | None:
        """Highest probability of the small model, or the probability of its generated answer."""
        if self.probabilities and self.small_answer is not None:
            return self.probabilities[0]
        return max(self.probabilities) if self.probabilities else None

    @property
    def generated(self) -> bool:
        """Whether answers are generated texts instead of labels."""
        return self.labels == ANSWER_LABELS

    @property
    def small_label(self) -> str | None:
        """Label or generated answer of the small model, or None without a prediction."""
        if self.small_answer is not None:
            return self.small_answer
        if not self.probabilities:
            return None
        return self.labels[self.probabilities.index(max(self.probabilities))]

    @property
    def agrees(self) -> bool | None:
        """Whether both models gave the same label, or None if one of them gave none."""
        return None if self.answer_label is None or self.small_label is None else self.answer_label == self.small_label


def hash_input(text: str) -> bytes:
    """Return the first 16 bytes of an input's SHA-256.

    The text is hashed as it is, because a small model may tell texts apart that differ in case or white space.
    """
    return sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


def hash_subject(subject: str) -> bytes:
    """Return the 16-byte hash of a data subject's id. An id that is already hashed keeps its hash."""
    if subject.startswith(SUBJECT_HASH):
        return bytes.fromhex(subject.removeprefix(SUBJECT_HASH))
    return sha256(b"subject\0" + subject.encode()).digest()[:16]


def id_bytes(record_id: str) -> bytes:
    """Return a run id as 16 bytes, derived by UUIDv5 if the id is not a UUID."""
    try:
        return UUID(record_id).bytes
    except ValueError:
        return uuid5(_NAMESPACE, record_id).bytes


def latest_of_each_input(records: Iterable[CallRecord] | Iterable[Sequence[CallRecord]]) -> list[CallRecord]:
    """Return the newest record of each (task, large model, input), so that training uses a repeated input once.

    A true label or data subject that only older records of the input have is copied to the newest one. The records keep
    their order.

    Args:
        records: Records, or batches of records as returned by `CallLog.iterate`.
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
    """Return the newest record, with a true label and data subject copied from older records if it has none."""
    update: dict[str, Any] = {}
    for call in sorted(calls, key=attrgetter("time")):
        if record.gold is None and call.gold is not None:
            update |= {"gold": call.gold, "gold_source": call.gold_source}
        if record.subject is None and call.subject is not None:
            update |= {"subject": call.subject}
    return record.model_copy(update=update) if update else record
