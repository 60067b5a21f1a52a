"""RedactionRules: store each text of a call unchanged, redacted, hashed, or not at all."""

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
"""Stored form of a field: unchanged, with placeholders for entities, as a hash, or not at all.

Equal texts have equal hashes, so repeats can still be counted."""

logger = logging.getLogger(__name__)


class OutputBudget(PeriodBudget):
    """Limits on the number of stored LLM answers. Above a limit, calls are recorded without their answers.

    Training uses only the newest record of each input. A repeat that is stored without its answer therefore hides an
    answer stored earlier.
    """

    bounds: ClassVar[tuple[str, ...]] = ("outputs", "subject_outputs")

    outputs: int | None = Field(default=None, ge=0)
    """Maximum number of answers per period, over all data subjects. None means unlimited."""

    subject_outputs: int | None = Field(default=None, ge=0)
    """Maximum number of answers per period to the inputs of one data subject. None means unlimited."""

    def admits(self, record: CallRecord) -> bool:
        """Count the answer of a record, and return whether it may be stored: False if the ledger fails."""
        person = None if record.subject is None else hash_subject(record.subject)
        try:
            return not self.above({"outputs": 1}, person)
        except Exception:
            logger.exception("The output budget cannot be updated, so the answer is not stored.")
            return False


class RedactionRules(Configured):
    """Stored form of each text of a record.

    The recorder applies the rules before it writes to the log or to the spool. Calls whose inputs are hashed or left
    out cannot be used for training. They still count in the statistics of calls, cost and agreement.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", frozen=True)

    input: Form = "plain"
    """Form of the input."""

    answer: Form = "plain"
    """Form of the large model's answer, and of its label if that is not in the label set."""

    small_answer: Form = "plain"
    """Form of the answer that a small model generated."""

    subject: bool = True
    """Whether to store the hash of the data subject. Without it, a subject's records cannot be deleted on request."""

    outputs: OutputBudget | None = None
    """Limits on the number of stored LLM answers. None stores all."""

    detectors: tuple[Any, ...] = Field(default=DETECTORS, exclude=True, repr=False)
    """Detectors of the entities to redact."""

    def __call__(self, record: CallRecord) -> CallRecord:
        """Return the record in its stored form."""
        names = Placeholders(self.detectors, allow_binary=True)  # shared, so that placeholders match across fields
        names.reserve([record.input, record.answer, record.small_answer])
        kept: dict[str, Any] = {"input": self._kept(record.input, self.input, names, record.id)}
        for name, form in (("answer", self.answer), ("small_answer", self.small_answer)):
            kept[name] = self._kept(getattr(record, name), form, names, None)
        if record.labels in ((), ANSWER_LABELS) or record.answer_label not in record.labels:
            kept["answer_label"] = self._kept(record.answer_label, self.answer, names, None)
        if not self.subject:
            kept["subject"] = None
        answered = record.answer is not None or record.answer_label is not None
        if self.outputs is not None and answered and not self.outputs.admits(record):
            kept |= {"answer": None, "answer_label": None, "large_probabilities": None, "large_confidence": None}
        return record.model_copy(update=kept)

    @staticmethod
    def _kept(text: str | None, form: Form, names: Placeholders, record_id: str | None) -> str | None:
        if text is None or form == "plain":
            return text
        if form == "redacted":
            return str(names.redact(text))
        if form == "hashed":
            return HASHED + hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
        return None if record_id is None else LEFT_OUT + record_id
