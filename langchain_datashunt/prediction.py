"""Predictions of small models, single and batched, and the label lists of LLM prompts."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias, get_args, overload

import numpy as np
from langchain_core.messages import BaseMessage
from numpy.typing import NDArray
from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import core_schema

from langchain_datashunt.exceptions import NotAPredictionError, PredictionError

FloatArray: TypeAlias = NDArray[np.float64]
BoolArray: TypeAlias = NDArray[np.bool_]
IntArray: TypeAlias = NDArray[np.intp]

Route: TypeAlias = Literal["small", "student", "large"]
"""Model that answered: the base small model, the student, or the large model."""

ROUTES: tuple[Route, ...] = get_args(Route)
"""All routes."""

Reason: TypeAlias = Literal["confident", "deferred", "unreadable", "small_error", "large_error", "local_only"]
"""Reason for the route.

"confident": the small model answered because the policy accepted its prediction. "deferred": the policy deferred.
"unreadable": the input has parts that the small model cannot read, such as an image. "small_error", "large_error": the
named model failed. "local_only": the input must not leave this machine.
"""

ANSWER_LABELS = ("answer", "other")
"""Labels of predictions by models that generate an answer: this answer is right, or another one is."""

_SUM_TOLERANCE = 1e-3


def label_text(label: Any) -> str:
    """Return a label as text. Numbers, truth values and numpy scalars become their usual text."""
    return label if type(label) is str else str(label.item() if isinstance(label, np.generic) else label)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Prediction:
    """Prediction of a small model for one input.

    Attributes:
        label: Most probable label.
        confidence: Probability of `label`, in [0, 1].
        probabilities: Probabilities of all `labels`, shape `[k]`, summing to 1.
        labels: Label set, in the order of `probabilities`.
        logits: Scores before the softmax, shape `[k]`, if the model provides them.
        model_id: Name of the model.
        truncated: Whether the input was truncated to the model's maximum length.
        features: Representation of the input, such as its embedding, shape `[d]`, if the model keeps it.
        answer: Generated answer, if the model generates one instead of choosing a label. The prediction is then over
            `ANSWER_LABELS`, and label and confidence are those of "answer", even if "other" is more probable.
        token_logprobs: Log-probabilities of the answer's tokens in nats, shape `[t]`, if available.
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

    def __post_init__(self) -> None:
        if type(self.labels) is not tuple or type(self.label) is not str:
            # serialisers such as LangGraph's return lists, and labels may be numbers
            object.__setattr__(self, "labels", tuple(map(label_text, self.labels)))
            object.__setattr__(self, "label", label_text(self.label))
        if type(self.probabilities) is not np.ndarray:
            object.__setattr__(self, "probabilities", np.asarray(self.probabilities, dtype=np.float64))

    @classmethod
    def from_probabilities(cls, probabilities: Mapping[str, float], *, model_id: str = "") -> Prediction:
        """Create a prediction from a mapping of labels to probabilities. Labels that are no strings become text.

        Raises:
            PredictionError: The probabilities are not a distribution.
        """
        return PredictionBatch.from_arrays(tuple(probabilities), [list(probabilities.values())], model_id=model_id)[0]

    @classmethod
    def from_answer(
        cls, answer: Any, confidence: float, *, model_id: str = "", token_logprobs: FloatArray | None = None
    ) -> Prediction:
        """Create a prediction from a generated answer and the probability that it is right.

        Raises:
            PredictionError: The answer is None, or the confidence is not in [0, 1].
        """
        if answer is None or not 0.0 <= confidence <= 1.0:
            raise PredictionError(
                f"Expected an answer and a confidence in [0, 1], got {type(answer).__name__} with confidence "
                f"{confidence} from {model_id or 'the small model'}."
            )
        p = np.array([confidence, 1.0 - confidence])
        return cls(
            ANSWER_LABELS[0], float(confidence), p, ANSWER_LABELS, None, model_id, answer=answer,
            token_logprobs=token_logprobs,
        )  # fmt: skip

    def probability(self, label: str) -> float:
        """Return the probability of a label, or 0.0 if the model does not have this label."""
        return float(self.probabilities[self.labels.index(label)]) if label in self.labels else 0.0

    def top(self, n: int) -> list[tuple[str, float]]:
        """Return the `n` most probable labels with their probabilities, in descending order."""
        order = np.argsort(-self.probabilities, kind="stable")[:n]
        return [(self.labels[i], float(self.probabilities[i])) for i in order]

    def as_batch(self) -> PredictionBatch:
        """Return this prediction as a batch of one, without copying."""
        logits = None if self.logits is None else self.logits[None]
        truncated = np.array([True]) if self.truncated else None
        features = None if self.features is None else self.features[None]
        answers = None if self.answer is None else (self.answer,)
        tokens = None if self.token_logprobs is None else (self.token_logprobs,)
        return PredictionBatch(
            self.labels, self.probabilities[None], logits, self.model_id, truncated, features, answers, tokens
        )

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict with the probabilities by label and the answer as text, if there is one."""
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
        to_dict = core_schema.plain_serializer_function_ser_schema(lambda one: one.to_dict(), when_used="json")
        return core_schema.is_instance_schema(cls, serialization=to_dict)

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
                "probabilities": {"type": "object", "additionalProperties": number},
                "model_id": {"type": "string"},
                "truncated": {"type": "boolean"},
            },
            "required": ["label", "confidence", "probabilities"],
        }

    def __repr__(self) -> str:
        written = "" if self.answer is None else f", answer={reprlib.repr(self.answer)}"
        return (
            f"Prediction(label={self.label!r}, confidence={self.confidence:.4g}, {len(self.labels)} labels, "
            f"model_id={self.model_id!r}{written})"
        )

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


@dataclass(frozen=True, eq=False, repr=False)
class PredictionBatch(Sequence[Prediction]):
    """Predictions for `n` inputs as arrays. Indexing creates single `Prediction` objects.

    Attributes:
        labels: Label set, `k` names.
        probabilities: Shape `[n, k]`, each row a distribution.
        logits: Scores before the softmax, shape `[n, k]`, if the model provides them.
        model_id: Name of the model.
        truncated: Whether each input was truncated, shape `[n]`. None means that no input was.
        features: Representations of the inputs, shape `[n, d]`, if the model keeps them.
        answers: `n` generated answers, if the model generates them (see `Prediction.answer`).
        token_logprobs: `n` arrays of shape `[t]`, if answers have tokens. An answer without tokens has shape `[0]`.
    """

    labels: tuple[str, ...]
    probabilities: FloatArray
    logits: FloatArray | None = None
    model_id: str = ""
    truncated: BoolArray | None = None
    features: FloatArray | None = None
    answers: tuple[Any, ...] | None = None
    token_logprobs: tuple[FloatArray, ...] | None = None

    def __repr__(self) -> str:
        return f"PredictionBatch({len(self)} predictions, {len(self.labels)} labels, model_id={self.model_id!r})"

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
        """Create a batch from array-likes and validate it.

        Raises:
            PredictionError: The shape is not `[n, k]`, or a row is not a distribution. The message names the row.
        """
        batch = cls(
            tuple(map(label_text, labels)),
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
        """Join single predictions over one label set into a batch.

        Raises:
            PredictionError: There are no predictions, their label sets differ, or only some of them have an answer.
        """
        items = list(predictions)
        if not items:
            raise PredictionError("Expected at least one prediction to stack, got none.")
        first = items[0]
        if len(items) == 1:
            return first.as_batch()
        if any(item.labels is not first.labels and item.labels != first.labels for item in items):
            raise PredictionError(
                "The predictions of one batch have different label sets. "
                "Use one small model per batch, or a model over the union of the labels."
            )
        probabilities = np.stack([item.probabilities for item in items]).astype(np.float64, copy=False)
        logits = [item.logits for item in items if item.logits is not None]
        features = [item.features for item in items if item.features is not None]
        truncated = np.array([item.truncated for item in items], dtype=np.bool_)
        answers = tuple(item.answer for item in items if item.answer is not None)
        if answers and len(answers) < len(items):
            raise PredictionError(
                "Only some predictions of one batch have a generated answer. Use one small model per batch."
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
        """Raise a `PredictionError` if the probabilities do not have the shape `[n, k]`."""
        if self.probabilities.ndim != 2 or self.probabilities.shape[1] != len(self.labels):
            msg = (
                f"The small model {self.model_id or 'without a name'!r} returned probabilities of shape "
                f"{list(self.probabilities.shape)} for {len(self.labels)} labels. Expected [n, {len(self.labels)}]. "
                f"Check that its label list belongs to its weights."
            )
            raise PredictionError(msg)

    @cached_property
    def sound(self) -> BoolArray:
        """Whether each row is a distribution (finite, not negative, summing to 1), shape `[n]`."""
        rows = self.probabilities
        with np.errstate(invalid="ignore"):  # NaN and infinity fail both checks below
            proper = np.minimum.reduce(rows, axis=1, initial=0.0) >= 0.0
            return np.asarray(proper & (np.abs(np.add.reduce(rows, axis=1) - 1.0) <= _SUM_TOLERANCE), dtype=np.bool_)

    def complaint(self, row: int) -> str:
        """Return an error message for a row that is not a distribution."""
        values = np.array2string(self.probabilities[row][:5], precision=4, separator=", ")
        return (
            f"Row {row} of {len(self)} from the small model {self.model_id or 'without a name'!r} is not a "
            f"distribution: {values}... sums to {float(self.probabilities[row].sum())}. Check the input and "
            f"the model's weights for NaN and overflow (a lower precision can cause both)."
        )

    @cached_property
    def best(self) -> IntArray:
        """Index of each row's most probable label, shape `[n]`, or of "answer" if the model generates answers."""
        if self.answers is not None:
            return np.zeros(len(self), dtype=np.intp)
        return np.asarray(self.probabilities.argmax(axis=1))

    @cached_property
    def confidence(self) -> FloatArray:
        """Probability of each row's most probable label, shape `[n]`, or of "answer" if the model generates answers."""
        if self.answers is not None:
            return self.probabilities[:, 0]
        return np.asarray(self.probabilities.max(axis=1))

    def label_names(self) -> list[str]:
        """Return the name of each row's most probable label."""
        return [self.labels[i] for i in self.best.tolist()]

    def outputs(self) -> list[Any]:
        """Return the small model's output for each row: the generated answer, or else the label name."""
        return self.label_names() if self.answers is None else list(self.answers)

    def take(self, rows: Any) -> PredictionBatch:
        """Return a batch of the selected rows, given as indices, a slice or a mask."""
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
    """Return the token log-probabilities of a batch, or None if no answer has any.

    An answer without tokens gets an empty array.
    """
    if all(one is None for one in each):
        return None
    return tuple(np.zeros(0) if one is None else one for one in each)


def answer_text(answer: Any) -> str:
    """Return a generated answer as text: strings and the text of messages unchanged, other objects as JSON."""
    if isinstance(answer, BaseMessage):
        return str(answer.text)
    if isinstance(answer, BaseModel):
        answer = answer.model_dump()
    if isinstance(answer, str):
        return answer
    try:
        return json.dumps(answer, default=_plain, ensure_ascii=False)
    except (TypeError, ValueError):  # keys that JSON does not support, or circular references
        return str(answer)


def _plain(value: Any) -> Any:
    """Convert a part of an answer that `json` cannot serialise."""
    return value.model_dump() if isinstance(value, BaseModel) else str(value)


def writable(text: str) -> str:
    """Return the text with lone surrogates escaped, because files and Arrow columns cannot encode them."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class Candidates(tuple[str, ...]):
    """Labels that the LLM may choose from, formatted one per line with their descriptions."""

    descriptions: Mapping[str, str]

    def __new__(cls, labels: Sequence[str], descriptions: Mapping[str, str] | None = None) -> Candidates:
        """Create it from label names. Descriptions of other labels are ignored."""
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
    """Probabilities by label, most probable first, formatted one per line."""

    def __str__(self) -> str:
        return "\n".join(f"- {label} with probability {p}" for label, p in self.items())

    def __format__(self, spec: str) -> str:
        return str(self)


def prediction_from(output: Any, labels: Sequence[str] | None = None) -> Prediction:
    """Return the output of another library's classifier as a prediction, if it holds a whole distribution.

    These outputs are accepted:

    * a mapping of labels to probabilities
    * a list of (label, probability) pairs, or of `{"label": ..., "score": ...}` dicts as from a Hugging Face pipeline
      with `top_k=None`
    * one `{"label": ..., "score": ...}` dict, if there are two labels
    * a row of `predict_proba`, if the labels are known
    * an answer of a LangChain decision model to a `Choice`

    Args:
        output: The output.
        labels: All labels of the task, or None if they are not known.

    Raises:
        NotAPredictionError: The output is none of these. The message names it and the remedy.
        PredictionError: It contains NaN.
    """
    found = _probabilities_of(output, None if labels is None else [label_text(label) for label in labels])
    if found is None:
        raise NotAPredictionError(
            f"Expected a Prediction or a distribution over labels from the small model, got {type(output).__name__}: "
            f"{reprlib.repr(output)}. Return Prediction.from_probabilities({{label: probability, ...}}), with a "
            f"probability for every label. For a Hugging Face pipeline, set top_k=None."
        )
    try:
        return Prediction.from_probabilities(found)
    except PredictionError as error:
        if any(np.isnan(value) for value in found.values()):
            raise
        raise NotAPredictionError(f"{error} The small model returned {reprlib.repr(output)}.") from error


def _probabilities_of(output: Any, labels: Sequence[str] | None) -> dict[str, float] | None:
    choice = getattr(output, "probabilities", None)
    if isinstance(choice, Mapping) and hasattr(output, "choice"):
        return _numbers(choice.items())
    if isinstance(output, Mapping):
        if set(output) == {"label", "score"}:
            return _of_two(output, labels)
        return _numbers(output.items())
    if isinstance(output, np.ndarray):
        output = output.tolist()
    if not isinstance(output, (list, tuple)) or not output:
        return None
    if len(output) == 1 and isinstance(output[0], (list, tuple)) and not isinstance(output[0][:1], str):
        return _probabilities_of(list(output[0]), labels)
    if all(isinstance(one, Mapping) and {"label", "score"} <= set(one) for one in output):
        if len(output) == 1:
            return _of_two(output[0], labels)
        return _numbers((one["label"], one["score"]) for one in output)
    if all(isinstance(one, (list, tuple)) and len(one) == 2 and isinstance(one[0], str) for one in output):
        return _numbers(tuple(one) for one in output)
    if labels is not None and len(output) == len(labels):
        return _numbers(zip(labels, output, strict=True))
    return None


def _of_two(top: Mapping[str, Any], labels: Sequence[str] | None) -> dict[str, float] | None:
    """Return the distribution that the more probable of two labels determines."""
    if labels is None or len(labels) != 2 or label_text(top["label"]) not in labels:
        return None
    found = _numbers([(top["label"], top["score"])])
    if found is None:
        return None
    ((best, p),) = found.items()
    return {label: p if label == best else 1.0 - p for label in labels}


def _numbers(pairs: Iterable[tuple[Any, Any]]) -> dict[str, float] | None:
    """Return pairs of labels and numbers as a mapping, or None if a value is not a number or a label comes twice."""
    found: dict[str, float] = {}
    for label, value in pairs:
        name = label_text(label) if isinstance(label, (str, int, float, np.generic)) else None
        number = isinstance(value, (int, float, np.floating, np.integer)) and not isinstance(value, bool)
        if name is None or not number or name in found:
            return None
        found[name] = float(value)
    return found or None
