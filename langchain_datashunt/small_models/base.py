"""SmallModel: a Runnable from an input to a `Prediction`, with one vectorised call underneath; no model of its own."""

from __future__ import annotations

import copy
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeAlias, overload

import numpy as np
from langchain_core.runnables import RunnableConfig, RunnableSerializable
from langchain_core.runnables.config import ensure_config, get_callback_manager_for_config, run_in_executor
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, PrivateAttr
from typing_extensions import override

from langchain_datashunt._utils.control_flow import raise_first_error
from langchain_datashunt._utils.fork import Mutex
from langchain_datashunt.exceptions import (
    ConfigurationError,
    PredictionError,
    ShuntError,
    TruncationWarning,
)
from langchain_datashunt.inputs import InputReader, ShuntInput, text_reader
from langchain_datashunt.prediction import Prediction, PredictionBatch, tokens_of_all
from langchain_datashunt.small_models.bundles.bundle import BundleInfo
from langchain_datashunt.small_models.bundles.saving import Saved
from langchain_datashunt.small_models.scores import NOT_OF_SCORES, Outcome, Remembered, Scores, softmax
from langchain_datashunt.small_models.serving.caching import ResultCache
from langchain_datashunt.small_models.serving.dynamic_batching import DynamicBatcher, DynamicBatching
from langchain_datashunt.small_models.serving.serving import Serving

if TYPE_CHECKING:
    from langchain_datashunt.small_models.training.training import Examples, TrainingSettings

Loss: TypeAlias = Callable[[Any, Any], Any]
"""From logits and targets, both torch tensors `[n, k]`, to a scalar tensor."""


class SmallModel(Saved, RunnableSerializable[ShuntInput, Prediction]):
    """A local classifier as a Runnable.

    A kind of small model implements `predict_scores`, `weights` and `from_weights`; everything else is here:
    reading inputs, temperature and softmax, checks, single and batch calls, sync and async, saving and loading.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    reads_text: ClassVar[bool] = True
    """Whether inputs of this kind are texts, so that nobody needs to ask a model for its reader."""

    dynamic_batching: DynamicBatching | None = Field(default=DynamicBatching(), exclude=True, repr=False)
    """How single requests that arrive while the model is busy are computed together; None computes each alone.

    A batch has many callers, so it is computed without their context variables: a kind that reads these, or calls
    other Runnables, sets None."""

    cache_size: int = Field(default=0, ge=0, exclude=True, repr=False)
    """Texts whose scores are remembered, so that an exact repeat costs a hash; 0 remembers none.

    Another setting of this model forgets them; after other weights, or other settings of a model in it, call
    `forget`."""

    _serving: Serving = PrivateAttr(default_factory=Serving)

    # What a kind implements

    @abstractmethod
    def predict_scores(self, texts: Sequence[Any]) -> Scores:
        """Logits for `n` inputs, as `reader` reads them (texts, where a kind says nothing else), in one pass."""

    @property
    def is_placeholder(self) -> bool:
        """Whether this model has learned nothing yet, so that its probabilities must not be shown to a large model."""
        return False

    @property
    def reader(self) -> InputReader:
        """How inputs are read: as text, where a kind does not say otherwise."""
        return text_reader(self.input_key)

    @classmethod
    def reader_of(cls, info: BundleInfo) -> InputReader | None:
        """How a bundle of this kind reads its inputs, told without its weights; None where only they can tell."""
        return text_reader(info.input_key) if cls.reads_text else None

    # Predicting

    @overload
    def predict_batch(self, inputs: Sequence[Any], *, return_errors: Literal[False] = False) -> PredictionBatch: ...

    @overload
    def predict_batch(self, inputs: Sequence[Any], *, return_errors: Literal[True]) -> Outcome: ...

    def predict_batch(self, inputs: Sequence[Any], *, return_errors: bool = False) -> PredictionBatch | Outcome:
        """Predict `n` inputs in one vectorised call.

        Args:
            inputs: `n` inputs, as `reader` reads them.
            return_errors: Whether an input that fails is returned as an error, beside the predictions of the others,
                instead of raising.

        Returns:
            The predictions. With `return_errors`, an `Outcome`: predictions, their rows, and errors by row.

        Raises:
            InputError: An input cannot be read, and `return_errors` is False.
            PredictionError: The model returned NaN, and `return_errors` is False; or scores of a wrong shape.
        """
        outcome = self._outcome(inputs)
        if return_errors:
            return outcome
        if outcome.errors:
            raise outcome.errors[min(outcome.errors)]
        return outcome.batch if outcome.batch is not None else self._empty()

    def _outcome(self, inputs: Sequence[Any]) -> Outcome:
        texts, rows, errors = self._read(inputs)
        if not texts:
            return Outcome(None, np.array(rows, dtype=np.intp), errors)
        scores = self._remembered_scores(texts)
        batch = self._finish(scores, len(texts))
        where = np.array(rows, dtype=np.intp)
        if scores.errors:
            errors.update({rows[i]: error for i, error in scores.errors.items()})
            good = np.array([i not in scores.errors for i in range(len(texts))])
            batch, where = batch.take(good), where[good]
            rows = where.tolist()
            if not rows:
                return Outcome(None, where, errors)
        if np.count_nonzero(batch.sound) == len(batch):  # as nearly always
            return Outcome(batch, where, errors)
        for i in np.flatnonzero(~batch.sound).tolist():
            errors[rows[i]] = PredictionError(batch.complaint(i))
        sound = np.flatnonzero(batch.sound)
        return Outcome(batch.take(sound) if sound.size else None, where[sound], errors)

    def predict(self, input: Any) -> Prediction:
        """Predict one input; together with others' where the model is busy.

        Raises:
            InputError: The input cannot be read.
            PredictionError: The model gave NaN, or scores of a wrong shape.
            QueueFullError: More requests wait than `dynamic_batching` allows.
        """
        if self.dynamic_batching is None:
            return self._predict_one(input)
        prediction: Prediction = self.batcher.call(input)
        return prediction

    async def apredict(self, input: Any) -> Prediction:
        """As `predict`; the event loop goes on meanwhile, and a cancelled request is not computed."""
        if self.dynamic_batching is None:
            return await run_in_executor(None, self._predict_one, input)
        prediction: Prediction = await self.batcher.acall(input)
        return prediction

    @property
    def batcher(self) -> DynamicBatcher:
        """The line in front of this model, with its counters.

        Raises:
            ConfigurationError: `dynamic_batching` is None.
        """
        return self._served().batcher_of(self)

    @property
    def cache(self) -> ResultCache[Any] | None:
        """What is remembered, with its counters; None with `cache_size=0`."""
        return self._served().cache_of(self)

    def forget(self) -> None:
        """Remember nothing of what was computed so far, as after weights were changed; counters begin at 0."""
        self._serving.forget()

    def _served(self) -> Serving:
        if self._serving.owner() is not self:  # this model is a copy of the one that it was made for
            with _ONE_MAKES:
                if self._serving.owner() is not self:
                    self._serving = Serving(self)
        return self._serving

    def __setattr__(self, name: str, value: Any) -> None:
        """Change a setting; what was remembered under another is forgotten."""
        super().__setattr__(name, value)
        if name not in NOT_OF_SCORES and (not name.startswith("_") or name == "_network"):
            self.forget()

    def workers(self) -> int:
        """Batches that are best computed at once on this machine; 1 where a kind does not say otherwise."""
        return 1

    def _remembered_scores(self, texts: list[Any]) -> Scores:
        cache = self.cache if self.cache_size else None
        if cache is None or not texts:
            return self.predict_scores(texts)

        def compute(new: list[Any]) -> list[Remembered]:
            scores = self.predict_scores(new)
            logits = np.asarray(scores.logits)
            if logits.ndim != 2 or len(logits) != len(new):
                raise PredictionError(self._misshapen(logits, len(new)))
            cut = np.zeros(len(new), dtype=np.bool_) if scores.truncated is None else scores.truncated
            seen, said, tokens = scores.features, scores.answers, scores.token_logprobs
            return [
                Remembered(
                    logits[i].copy(),
                    bool(cut[i]),
                    None if seen is None else seen[i].copy(),
                    None if said is None else copy.deepcopy(said[i]),
                    None if tokens is None else np.array(tokens[i]),
                    scores.errors.get(i),
                )
                for i in range(len(new))
            ]

        rows = cache.get_all(texts, compute, keep=lambda row: row.error is None and bool(np.isfinite(row.logits).all()))
        features = [row.features for row in rows if row.features is not None]
        answers = tuple(copy.deepcopy(row.answer) for row in rows)  # callers may change what they are given
        return Scores(
            np.stack([row.logits for row in rows]),
            np.array([row.truncated for row in rows]),
            np.stack(features) if len(features) == len(rows) else None,
            None if all(answer is None for answer in answers) else answers,
            tokens_of_all([None if row.token_logprobs is None else row.token_logprobs.copy() for row in rows]),
            {i: row.error for i, row in enumerate(rows) if row.error is not None},
        )

    def _read(self, inputs: Sequence[Any]) -> tuple[list[Any], list[int], dict[int, Exception]]:
        texts: list[Any] = []
        read = self.reader.read
        rows: list[int] = []
        errors: dict[int, Exception] = {}
        for i, value in enumerate(inputs):
            try:
                texts.append(read(value))
                rows.append(i)
            except ShuntError as error:
                errors[i] = error
        return texts, rows, errors

    def _finish(self, scores: Scores, n: int) -> PredictionBatch:
        logits = np.asarray(scores.logits, dtype=np.float64)
        if logits.shape != (n, len(self.labels)):
            raise PredictionError(self._misshapen(logits, n))
        if scores.truncated is not None and np.count_nonzero(scores.truncated):
            warnings.warn(
                f"{int(scores.truncated.sum())} of {n} inputs were cut to the maximal length of "
                f"{self.model_id!r}; their predictions are marked `truncated`.",
                TruncationWarning,
                stacklevel=2,
            )
        p = softmax(logits, self.temperature)
        return PredictionBatch(
            self.labels, p, logits, self.model_id, scores.truncated, scores.features, scores.answers,
            scores.token_logprobs,
        )  # fmt: skip

    def _misshapen(self, logits: NDArray[Any], n: int) -> str:
        return (
            f"The small model {self.model_id!r} gave scores of shape {list(logits.shape)} for {n} inputs "
            f"and {len(self.labels)} labels. Check that its label list belongs to its weights."
        )

    def _empty(self) -> PredictionBatch:
        return PredictionBatch(self.labels, np.zeros((0, len(self.labels))), None, self.model_id)

    # Runnable

    @override
    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Prediction:
        return self._call_with_config(self.predict, input, config, run_type="small_model")

    @override
    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Prediction:
        return await self._acall_with_config(self.apredict, input, config, run_type="small_model")

    @override
    def batch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Prediction]:
        if _unseen(config):
            return raise_first_error(self._predict_many(inputs), return_exceptions)
        return self._batch_with_config(
            self._predict_many, inputs, config, return_exceptions=return_exceptions, run_type="small_model"
        )

    @override
    async def abatch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Prediction]:
        async def predict(values: list[Any]) -> list[Prediction | Exception]:
            return await run_in_executor(None, self._predict_many, values)

        if _unseen(config):
            return raise_first_error(await predict(inputs), return_exceptions)
        return await self._abatch_with_config(
            predict, inputs, config, return_exceptions=return_exceptions, run_type="small_model"
        )

    def _predict_one(self, value: Any) -> Prediction:
        return self.predict_batch([value])[0]

    def _predict_many(self, values: list[Any]) -> list[Prediction | Exception]:
        outcome = self.predict_batch(values, return_errors=True)
        answers: list[Prediction | Exception | None] = [outcome.errors.get(i) for i in range(len(values))]
        for prediction, row in zip(outcome.batch or (), outcome.rows.tolist(), strict=True):
            answers[row] = prediction
        return [_LOST if answer is None else answer for answer in answers]

    @property
    @override
    def InputType(self) -> Any:
        return ShuntInput

    @property
    @override
    def OutputType(self) -> type[Prediction]:
        return Prediction

    # Learning on

    def fit_soft_targets(
        self, stages: Sequence[Examples], held_out: Examples, settings: TrainingSettings, loss: Loss
    ) -> Self:
        """A copy of this model, trained on soft targets of several stages; this one is not changed.

        Args:
            stages: Texts with target distributions; a step on each is taken in turn.
            held_out: Texts with targets that training stops on.
            settings: How to train; what is None is filled with this kind's defaults.
            loss: From logits and targets `[n, k]` to a number.

        Raises:
            ConfigurationError: This kind cannot learn on.
        """
        raise ConfigurationError(
            f"A {type(self).__name__} cannot be distilled; use EmbeddingClassifier, TransformersClassifier, TextCNN or "
            f"LSTMClassifier."
        )


_ONE_MAKES = Mutex()
"""What serves a model is made once, whatever number of threads ask a new one at once."""

_LOST = PredictionError("The small model gave neither a prediction nor an error for this input.")


def _unseen(config: RunnableConfig | list[RunnableConfig] | None) -> bool:
    """Whether no handler wants to see the runs of a batch, so that none need be made."""
    if isinstance(config, list):
        return False
    return not get_callback_manager_for_config(ensure_config(config)).handlers
