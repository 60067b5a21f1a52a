"""The words that all other rooms speak: a prediction, a decision, a result. No routing happens here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias, overload

import numpy as np
from langchain_core.messages import BaseMessage
from numpy.typing import NDArray
from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import core_schema

from langchain_datashunt.exceptions import PredictionError

FloatArray: TypeAlias = NDArray[np.float64]
BoolArray: TypeAlias = NDArray[np.bool_]
IntArray: TypeAlias = NDArray[np.intp]

Route: TypeAlias = Literal["small", "student", "large"]
"""Who answered: the specific small model, the student, or the large model."""

Reason: TypeAlias = Literal["confident", "deferred", "small_error", "large_error", "local_only"]
"""Why: sure enough; not sure enough; the small model failed; the large model failed; the input must not leave."""

ANSWER_LABELS = ("answer", "other")
"""What a prediction is over where the small model writes its answer: that this answer is right, or that another is."""

_SUM_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """What a small model thinks of one input.

    Attributes:
        label: The most probable label.
        confidence: Probability of `label`, in [0, 1].
        probabilities: Probabilities over all `labels`, shape `[k]`, summing to 1.
        labels: The label set, in the order of `probabilities`.
        logits: Scores before the softmax, shape `[k]`, where the model has them.
        model_id: Name of the model that predicted.
        truncated: Whether the input was cut to the model's maximal length.
        features: What the model saw of the input, shape `[d]`, where it keeps that.
        answer: What the model wrote, where it writes its answer instead of choosing a label. The prediction is then
            over `ANSWER_LABELS`; label and confidence are those of "answer", however small.
        token_logprobs: Log-probabilities of the answer's tokens, shape `[t]`, in nats, where there are some.
    """

    label: str
    confidence: float
    probabilities: FloatArray
    labels: tuple[str, ...]
    logits: FloatArray | None = None
    model_id: str = ""
    truncated: bool = False
    features: FloatArray | None = None
    answer: Any = None
    token_logprobs: FloatArray | None = None

    @classmethod
    def from_probabilities(cls, probabilities: Mapping[str, float], *, model_id: str = "") -> Prediction:
        """Make a prediction from a mapping of label to probability, as a plain function would return it.

        Raises:
            PredictionError: The values are no distribution.
        """
        return PredictionBatch.from_arrays(tuple(probabilities), [list(probabilities.values())], model_id=model_id)[0]

    @classmethod
    def from_answer(
        cls, answer: Any, confidence: float, *, model_id: str = "", token_logprobs: FloatArray | None = None
    ) -> Prediction:
        """Make a prediction of an answer that was written, and of how sure the model is that it is right.

        Raises:
            PredictionError: There is no answer, or the confidence is not in [0, 1].
        """
        if answer is None or not 0.0 <= confidence <= 1.0:
            raise PredictionError(
                f"{model_id or 'The small model'} gave the answer {answer!r} with confidence {confidence}; an answer "
                f"and a number in [0, 1] are needed."
            )
        p = np.array([confidence, 1.0 - confidence])
        return cls(
            ANSWER_LABELS[0], float(confidence), p, ANSWER_LABELS, None, model_id, answer=answer,
            token_logprobs=token_logprobs,
        )  # fmt: skip

    def probability(self, label: str) -> float:
        """Probability of one label, 0.0 for a label that this model does not know."""
        return float(self.probabilities[self.labels.index(label)]) if label in self.labels else 0.0

    def top(self, n: int) -> list[tuple[str, float]]:
        """The `n` most probable labels with their probabilities, best first."""
        order = np.argsort(-self.probabilities, kind="stable")[:n]
        return [(self.labels[i], float(self.probabilities[i])) for i in order]

    def as_batch(self) -> PredictionBatch:
        """This prediction as a batch of one, without copying."""
        logits = None if self.logits is None else self.logits[None]
        truncated = np.array([True]) if self.truncated else None
        features = None if self.features is None else self.features[None]
        answers = None if self.answer is None else (self.answer,)
        tokens = None if self.token_logprobs is None else (self.token_logprobs,)
        return PredictionBatch(
            self.labels, self.probabilities[None], logits, self.model_id, truncated, features, answers, tokens
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form: label, confidence, probabilities by label, model id, truncated, and a written answer."""
        return {
            **({} if self.answer is None else {"answer": answer_text(self.answer)}),
            "label": self.label,
            "confidence": self.confidence,
            "probabilities": dict(zip(self.labels, self.probabilities.tolist(), strict=True)),
            "model_id": self.model_id,
            "truncated": self.truncated,
        }

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.is_instance_schema(cls)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        number = {"type": "number"}
        return {
            "title": "Prediction",
            "type": "object",
            "properties": {
                "label": {"type": "string"},
                "confidence": number,
                "probabilities": {"type": "array", "items": number},
                "labels": {"type": "array", "items": {"type": "string"}},
                "model_id": {"type": "string"},
                "truncated": {"type": "boolean"},
            },
            "required": ["label", "confidence", "probabilities", "labels"],
        }

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Prediction):
            return NotImplemented
        return (self.labels, self.model_id, self.truncated, self.answer) == (
            other.labels,
            other.model_id,
            other.truncated,
            other.answer,
        ) and np.array_equal(self.probabilities, other.probabilities)

    def __hash__(self) -> int:
        return hash((self.label, self.confidence, self.model_id))


@dataclass(frozen=True, eq=False)
class PredictionBatch(Sequence[Prediction]):
    """The predictions for `n` inputs as arrays; single `Prediction` objects are made when asked for.

    Attributes:
        labels: The label set, `k` names.
        probabilities: Shape `[n, k]`, each row a distribution.
        logits: Shape `[n, k]`, where the model has them.
        model_id: Name of the model that predicted.
        truncated: Shape `[n]`, which inputs were cut; None for none.
        features: Shape `[n, d]`: what the model saw of each input, where it keeps that.
        answers: `n` answers, where the model writes them; see `Prediction.answer`.
        token_logprobs: `n` arrays of shape `[t]`, where answers have tokens; `[0]` for one that has none.
    """

    labels: tuple[str, ...]
    probabilities: FloatArray
    logits: FloatArray | None = None
    model_id: str = ""
    truncated: BoolArray | None = None
    features: FloatArray | None = None
    answers: tuple[Any, ...] | None = None
    token_logprobs: tuple[FloatArray, ...] | None = None

    @classmethod
    def from_arrays(
        cls,
        labels: Sequence[str],
        probabilities: Any,
        *,
        logits: Any = None,
        model_id: str = "",
        truncated: Any = None,
    ) -> PredictionBatch:
        """Make a checked batch from anything array-like.

        Raises:
            PredictionError: The shape is not `[n, k]`, or a row is no distribution. The message names the row.
        """
        batch = cls(
            tuple(labels),
            np.asarray(probabilities, dtype=np.float64),
            None if logits is None else np.asarray(logits, dtype=np.float64),
            model_id,
            None if truncated is None else np.asarray(truncated, dtype=np.bool_),
        )
        batch.check_shape()
        if (bad := np.flatnonzero(~batch.sound)).size:
            raise PredictionError(batch.complaint(int(bad[0])))
        return batch

    @classmethod
    def stack(cls, predictions: Iterable[Prediction]) -> PredictionBatch:
        """Join single predictions over one label set.

        Raises:
            PredictionError: There are none, or their label sets differ.
        """
        items = list(predictions)
        if not items:
            raise PredictionError("There is no prediction to stack; give at least one.")
        first = items[0]
        if len(items) == 1:
            return first.as_batch()
        if any(item.labels is not first.labels and item.labels != first.labels for item in items):
            raise PredictionError(
                "The predictions of one batch have different label sets. "
                "Use one small model a batch, or one over the union of the labels."
            )
        probabilities = np.stack([item.probabilities for item in items]).astype(np.float64, copy=False)
        logits = [item.logits for item in items if item.logits is not None]
        features = [item.features for item in items if item.features is not None]
        truncated = np.array([item.truncated for item in items], dtype=np.bool_)
        answers = tuple(item.answer for item in items if item.answer is not None)
        if answers and len(answers) < len(items):
            raise PredictionError(
                "Some predictions of one batch have a written answer and some have none. Use one model."
            )
        return cls(
            first.labels,
            probabilities,
            np.stack(logits) if len(logits) == len(items) else None,
            first.model_id,
            truncated if truncated.any() else None,
            np.stack(features) if len(features) == len(items) else None,
            answers or None,
            tokens_of_all([item.token_logprobs for item in items]),
        )

    def check_shape(self) -> None:
        """Raise a `PredictionError` unless the arrays fit each other and the labels."""
        if self.probabilities.ndim != 2 or self.probabilities.shape[1] != len(self.labels):
            msg = (
                f"The small model {self.model_id or 'without a name'!r} gave probabilities of shape "
                f"{list(self.probabilities.shape)} for {len(self.labels)} labels; [n, {len(self.labels)}] "
                f"is needed. Check that its label list belongs to its weights."
            )
            raise PredictionError(msg)

    @cached_property
    def sound(self) -> BoolArray:
        """Which rows are distributions (finite, not negative, summing to 1), shape `[n]`."""
        rows = self.probabilities
        with np.errstate(invalid="ignore"):  # what is not finite has no such least value, or no such sum
            proper = np.minimum.reduce(rows, axis=1, initial=0.0) >= 0.0
            return np.asarray(proper & (np.abs(np.add.reduce(rows, axis=1) - 1.0) <= _SUM_TOLERANCE), dtype=np.bool_)

    def complaint(self, row: int) -> str:
        """What is wrong with a row that is not sound, in words."""
        values = np.array2string(self.probabilities[row][:5], precision=4, separator=", ")
        return (
            f"Row {row} of {len(self)} from the small model {self.model_id or 'without a name'!r} is not a "
            f"distribution: {values}... sums to {float(self.probabilities[row].sum())}. Check the input and "
            f"the model's weights for NaN and overflow (a lower precision can cause both)."
        )

    @cached_property
    def best(self) -> IntArray:
        """Index of the most probable label of each row, shape `[n]`; of "answer" where answers are written."""
        if self.answers is not None:
            return np.zeros(len(self), dtype=np.intp)
        return np.asarray(self.probabilities.argmax(axis=1))

    @cached_property
    def confidence(self) -> FloatArray:
        """Probability of the most probable label of each row, shape `[n]`; of "answer" where answers are written."""
        if self.answers is not None:
            return self.probabilities[:, 0]
        return np.asarray(self.probabilities.max(axis=1))

    def label_names(self) -> list[str]:
        """The most probable label of each row, by name."""
        return [self.labels[i] for i in self.best.tolist()]

    def outputs(self) -> list[Any]:
        """What the small model answers to each row: its label's name, or what it wrote."""
        return self.label_names() if self.answers is None else list(self.answers)

    def take(self, rows: Any) -> PredictionBatch:
        """The batch of some rows only, by index or mask."""
        chosen = np.arange(len(self))[rows].tolist() if self.answers is not None else []
        return PredictionBatch(
            self.labels,
            self.probabilities[rows],
            None if self.logits is None else self.logits[rows],
            self.model_id,
            None if self.truncated is None else self.truncated[rows],
            None if self.features is None else self.features[rows],
            None if self.answers is None else tuple(self.answers[i] for i in chosen),
            None if self.token_logprobs is None else tuple(self.token_logprobs[i] for i in chosen),
        )

    def __len__(self) -> int:
        return len(self.probabilities)

    @overload
    def __getitem__(self, index: int) -> Prediction: ...
    @overload
    def __getitem__(self, index: slice) -> PredictionBatch: ...
    def __getitem__(self, index: int | slice) -> Prediction | PredictionBatch:
        if isinstance(index, slice):
            return self.take(index)
        return Prediction(
            self.labels[self.best[index]],
            float(self.confidence[index]),
            self.probabilities[index],
            self.labels,
            None if self.logits is None else self.logits[index],
            self.model_id,
            False if self.truncated is None else bool(self.truncated[index]),
            None if self.features is None else self.features[index],
            None if self.answers is None else self.answers[index],
            None if self.token_logprobs is None else self.token_logprobs[index],
        )

    def __iter__(self) -> Iterator[Prediction]:
        return (self[i] for i in range(len(self)))


def tokens_of_all(each: Sequence[FloatArray | None]) -> tuple[FloatArray, ...] | None:
    """Token log-probabilities of a batch: of no length for an answer without, None where no answer has some."""
    if all(one is None for one in each):
        return None
    return tuple(np.zeros(0) if one is None else one for one in each)


def answer_text(answer: Any) -> str:
    """A written answer as a text: a message's text, a text as it is, anything else as JSON."""
    if isinstance(answer, BaseMessage):
        return str(answer.text)
    if isinstance(answer, BaseModel):
        answer = answer.model_dump()
    if isinstance(answer, str):
        return answer
    try:
        return json.dumps(answer, default=_plain, ensure_ascii=False)
    except (TypeError, ValueError):  # keys that JSON has not, or something that holds itself
        return str(answer)


def _plain(value: Any) -> Any:
    """A part of an answer that JSON does not know."""
    return value.model_dump() if isinstance(value, BaseModel) else str(value)


def writable(text: str) -> str:
    """The same without halves of characters, which no file and no Arrow column can hold."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class Candidates(tuple[str, ...]):
    """The labels that the large model may choose from; formats as one line a label, with its description."""

    descriptions: Mapping[str, str]

    def __new__(cls, labels: Sequence[str], descriptions: Mapping[str, str] | None = None) -> Candidates:
        """Make it of label names; descriptions of other labels are ignored."""
        self = super().__new__(cls, labels)
        self.descriptions = descriptions or {}
        return self

    def __str__(self) -> str:
        return "\n".join(
            f"- {label}: {self.descriptions[label]}" if self.descriptions.get(label) else f"- {label}" for label in self
        )

    def __getnewargs__(self) -> tuple[tuple[str, ...], Mapping[str, str]]:
        return tuple(self), self.descriptions


class CandidateProbabilities(dict[str, float]):
    """Probability by label, the likeliest first; formats as one line a label."""

    def __str__(self) -> str:
        return "\n".join(f"- {label} with probability {p}" for label, p in self.items())

    def __format__(self, spec: str) -> str:
        return str(self)
