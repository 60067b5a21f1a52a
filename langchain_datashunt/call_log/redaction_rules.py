"""What of a call is kept in the log: plain, with placeholders, as a hash, or not at all; field by field."""

from __future__ import annotations

import hashlib
import logging
from typing import Any, ClassVar, Literal, TypeAlias

from pydantic import ConfigDict, Field

from langchain_datashunt._utils.settings import Configured
from langchain_datashunt.call_log.record import HASHED, LEFT_OUT, CallRecord, hash_subject
from langchain_datashunt.prediction import ANSWER_LABELS
from langchain_datashunt.privacy.budget import PeriodBudget
from langchain_datashunt.privacy.detectors import DETECTORS
from langchain_datashunt.privacy.redaction import Placeholders

Form: TypeAlias = Literal["plain", "redacted", "hashed", "left_out"]
"""How a field is kept: as it is; with placeholders for entities; as a hash, by which repeats are still counted; not at
all."""


logger = logging.getLogger(__name__)


class OutputBudget(PeriodBudget):
    """Bounds on how many of the large model's answers are stored; above one, records tell of calls, not of answers.

    The newest call with an input is what stands in the log, so that a repeat above the bound takes the place of an
    answer that was stored.
    """

    bounds: ClassVar[tuple[str, ...]] = ("outputs", "subject_outputs")

    outputs: int | None = Field(default=None, ge=0)
    """Of all together in a period."""

    subject_outputs: int | None = Field(default=None, ge=0)
    """To one person's inputs in a period."""

    def admits(self, record: CallRecord) -> bool:
        """Whether the answer of this record may be stored; counts it. Where nobody can count, it may not."""
        person = None if record.subject is None else hash_subject(record.subject)
        try:
            return not self.above({"outputs": 1}, person)
        except Exception:
            logger.exception("Stored answers cannot be counted, so that this one is left out.")
            return False


class RedactionRules(Configured):
    """How each text of a record is kept.

    Redaction happens in the writer's thread, before anything touches a disk. From inputs that are hashed or left out
    nothing can be learnt; they still count calls, cost and agreement.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", frozen=True)

    input: Form = "plain"
    """The input."""

    answer: Form = "plain"
    """What the large model said, and its answer where it is no label."""

    small_answer: Form = "plain"
    """What the small model wrote."""

    subject: bool = True
    """Whether the hash of whose data it is, is kept; without it a person's records cannot be deleted by their name."""

    outputs: OutputBudget | None = None
    """How many answers of the large model are stored; None for all."""

    detectors: tuple[Any, ...] = Field(default=DETECTORS, exclude=True, repr=False)
    """What is looked for where something is redacted."""

    def __call__(self, record: CallRecord) -> CallRecord:
        """The record as it is kept."""
        names = Placeholders(self.detectors, allow_binary=True)  # one set, so that a text has one placeholder in all
        names.reserve([record.input, record.answer, record.small_answer])
        kept: dict[str, Any] = {"input": self._kept(record.input, self.input, names, record.id)}
        for name, form in (("answer", self.answer), ("small_answer", self.small_answer)):
            kept[name] = self._kept(getattr(record, name), form, names, None)
        if record.labels in ((), ANSWER_LABELS) or record.answer_label not in record.labels:
            kept["answer_label"] = self._kept(record.answer_label, self.answer, names, None)
        if not self.subject:
            kept["subject"] = None
        said = record.answer is not None or record.answer_label is not None
        if self.outputs is not None and said and not self.outputs.admits(record):
            kept |= {"answer": None, "answer_label": None, "large_probabilities": None, "large_confidence": None}
        return record.model_copy(update=kept)

    @staticmethod
    def _kept(text: str | None, form: Form, names: Placeholders, record_id: str | None) -> str | None:
        if text is None or form == "plain":
            return text
        if form == "redacted":
            return str(names.redact(text))
        if form == "hashed":
            return HASHED + hashlib.sha256(text.strip().lower().encode(errors="surrogatepass")).hexdigest()
        return None if record_id is None else LEFT_OUT + record_id
