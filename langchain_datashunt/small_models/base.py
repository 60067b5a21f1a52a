"""SmallModel: the base class of local classifiers, a Runnable from an input to a `Prediction`."""

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
    NotAPredictionError,
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
"""Function from logits and targets, both torch tensors of shape `[n, k]`, to a scalar tensor."""


class SmallModel(Saved, RunnableSerializable[ShuntInput, Prediction]):
    """Base class of local classifiers, usable as a LangChain Runnable.

    A subclass implements `predict_scores`. To be saved as a bundle, it also implements `kind`, `settings`, `weights`
    and `from_weights`. This class provides the rest: input reading, temperature scaling and softmax, validation,
    single and batch calls, sync and async, saving and loading.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    reads_text: ClassVar[bool] = True
    """Whether models of this class read text. If True, their reader is known without loading a model."""

    dynamic_batching: DynamicBatching | None = Field(default=DynamicBatching(), exclude=True, repr=False)
    """Settings for batching requests that arrive while the model is busy. None computes each request alone.

    A batch has several callers, so it is computed outside their context variables. Set None if the model reads
    context variables or calls other Runnables."""

    cache_size: int = Field(default=0, ge=0, exclude=True, repr=False)
    """Maximum number of inputs whose scores are cached. 0 disables the cache.

    An exact repeat costs one hash. Changing a setting that affects the scores clears the cache. Call `forget` after
    changing the weights in place, or the settings of a nested model."""

    _serving: Serving = PrivateAttr(default_factory=Serving)

    # Implemented by subclasses

    @abstractmethod
    def predict_scores(self, texts: Sequence[Any]) -> Scores:
        """Return the logits of `n` inputs, computed in one pass.

        Args:
            texts: `n` inputs in the form that `reader` returns, text by default.
        """

    @property
    def is_placeholder(self) -> bool:
        """Whether this model is an untrained placeholder, whose probabilities must not be shown to a large model."""
        return False

    @property
    def reader(self) -> InputReader:
        """Input reader of this model, by default a text reader."""
        return text_reader(self.input_key)

    @classmethod
    def reader_of(cls, info: BundleInfo) -> InputReader | None:
        """Return the input reader of a bundle without loading its weights, or None if it depends on them."""
        return text_reader(info.input_key) if cls.reads_text else None

    # Prediction

    @overload
    def predict_batch(self, inputs: Sequence[Any], *, return_errors: Literal[False] = False) -> PredictionBatch: ...

    @overload
    def predict_batch(self, inputs: Sequence[Any], *, return_errors: Literal[True]) -> Outcome: ...

    def predict_batch(self, inputs: Sequence[Any], *, return_errors: bool = False) -> PredictionBatch | Outcome:
        """Predict `n` inputs in one vectorized call.

        Args:
            inputs: `n` inputs that `reader` can read.
            return_errors: Whether to return the errors of single inputs instead of raising the first one.

        Returns:
            Predictions in the order of `inputs`. With `return_errors`, an `Outcome` that holds the predictions, their
            rows, and the errors by row.

        Raises:
            InputError: If an input cannot be read and `return_errors` is False.
            PredictionError: If the scores have the wrong shape, or if they contain NaN and `return_errors` is False.
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
        if np.count_nonzero(batch.sound) == len(batch):  # the usual case skips the filtering below
            return Outcome(batch, where, errors)
        for i in np.flatnonzero(~batch.sound).tolist():
            errors[rows[i]] = PredictionError(batch.complaint(i))
        sound = np.flatnonzero(batch.sound)
        return Outcome(batch.take(sound) if sound.size else None, where[sound], errors)

    def predict(self, input: Any) -> Prediction:
        """Predict one input, batched with concurrent requests if the model is busy.

        Raises:
            InputError: If the input cannot be read.
            PredictionError: If the scores contain NaN or have the wrong shape.
            QueueFullError: If the queue is full, see `DynamicBatching.max_waiting`.
        """
        if self.dynamic_batching is None:
            return self._predict_one(input)
        prediction: Prediction = self.batcher.call(input)
        return prediction

    async def apredict(self, input: Any) -> Prediction:
        """Async version of `predict`. A request that is cancelled in the queue is not computed."""
        if self.dynamic_batching is None:
            return await run_in_executor(None, self._predict_one, input)
        prediction: Prediction = await self.batcher.acall(input)
        return prediction

    @property
    def batcher(self) -> DynamicBatcher:
        """Request queue and worker threads of this model, with their counters.

        Raises:
            ConfigurationError: If `dynamic_batching` is None.
        """
        return self._served().batcher_of(self)

    @property
    def cache(self) -> ResultCache[Any] | None:
        """Cache of scores, with its hit and miss counters, or None if `cache_size` is 0."""
        return self._served().cache_of(self)

    def forget(self) -> None:
        """Clear the cache and reset its counters, for example after changing the weights in place."""
        self._serving.forget()

    def _served(self) -> Serving:
        if self._serving.owner() is not self:  # this model is a copy, so the state belongs to the original
            with _ONE_MAKES:
                if self._serving.owner() is not self:
                    self._serving = Serving(self)
        return self._serving

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, and clear the cache if the attribute can affect the scores."""
        super().__setattr__(name, value)
        if name not in NOT_OF_SCORES and (not name.startswith("_") or name == "_network"):
            self.forget()

    def workers(self) -> int:
        """Return how many batches to compute concurrently, by default 1."""
        return 1

    def _safe_scores(self, texts: list[Any]) -> Scores:
        try:
            return self.predict_scores(texts)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of a Rust tokenizer, which must not end the process
                raise
            raise PredictionError(f"The small model {self.model_id!r} failed in native code: {error}.") from error

    def _remembered_scores(self, texts: list[Any]) -> Scores:
        cache = self.cache if self.cache_size else None
        if cache is None or not texts:
            return self._safe_scores(texts)

        def compute(new: list[Any]) -> list[Remembered]:
            scores = self._safe_scores(new)
            logits = np.asarray(scores.logits)
            if logits.ndim != 2 or len(logits) != len(new):
                raise NotAPredictionError(self._misshapen(logits, len(new)))
            cut = np.zeros(len(new), dtype=np.bool_) if scores.truncated is None else scores.truncated
            seen, generated, tokens = scores.features, scores.answers, scores.token_logprobs
            return [
                Remembered(
                    logits[i].copy(),
                    bool(cut[i]),
                    None if seen is None else seen[i].copy(),
                    None if generated is None else copy.deepcopy(generated[i]),
                    None if tokens is None else np.array(tokens[i]),
                    scores.errors.get(i),
                )
                for i in range(len(new))
            ]

        rows = cache.get_all(texts, compute, keep=lambda row: row.error is None and bool(np.isfinite(row.logits).all()))
        features = [row.features for row in rows if row.features is not None]
        answers = tuple(copy.deepcopy(row.answer) for row in rows)  # callers may modify their answers
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
            raise NotAPredictionError(self._misshapen(logits, n))
        if scores.truncated is not None and np.count_nonzero(scores.truncated):
            warnings.warn(
                f"{int(scores.truncated.sum())} of {n} inputs were truncated to the maximum length of "
                f"{self.model_id!r}. Their predictions have truncated=True.",
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
            f"Expected scores of shape [{n}, {len(self.labels)}] from the small model {self.model_id!r}, got "
            f"{list(logits.shape)}. Check that its labels match its weights."
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

    # Training

    def fit_soft_targets(
        self, stages: Sequence[Examples], held_out: Examples, settings: TrainingSettings, loss: Loss
    ) -> Self:
        """Return a copy of this model trained further on soft targets, leaving this model unchanged.

        Args:
            stages: Texts with target distributions, one entry per stage. Training takes a step on each in turn.
            held_out: Texts with targets for early stopping.
            settings: Training settings. None fields take the defaults of this kind.
            loss: Function from logits and targets, shape `[n, k]`, to a scalar.

        Raises:
            ConfigurationError: If this kind cannot be trained further.
        """
        raise ConfigurationError(
            f"{type(self).__name__} cannot be distilled. Use EmbeddingClassifier, TransformersClassifier, TextCNN or "
            f"LSTMClassifier."
        )


_ONE_MAKES = Mutex()
"""Lock that creates one `Serving` per model if several threads use a new model at once."""

_LOST = PredictionError("The small model returned neither a prediction nor an error for this input.")


def _unseen(config: RunnableConfig | list[RunnableConfig] | None) -> bool:
    """Return whether a batch has no callback handlers, so that its runs need not be created."""
    if isinstance(config, list):
        return False
    return not get_callback_manager_for_config(ensure_config(config)).handlers
