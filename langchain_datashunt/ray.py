"""Bulk routing on Ray Data: small models in one pool of actors, LLM calls in another.

Small models receive whole batches and can run on GPUs. The number of concurrent LLM calls is bounded. Budgets and call
records are shared through a database. The chain alone decides how each row is routed.
"""

from __future__ import annotations

import asyncio
import json
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from pydantic import PrivateAttr
from typing_extensions import override

from langchain_datashunt._utils.optional import require
from langchain_datashunt.decision import ShuntResult
from langchain_datashunt.exceptions import ConfigurationError, NotAPredictionError, PredictionError, ShuntWarning
from langchain_datashunt.inputs import InputReader
from langchain_datashunt.prediction import Prediction, answer_text, writable
from langchain_datashunt.routing.plan import WIRING_ERRORS, checked_prediction, in_task_order, outcome_of
from langchain_datashunt.routing.settings import policy_for
from langchain_datashunt.routing.shunt import ShuntRunnable
from langchain_datashunt.small_models.base import SmallModel
from langchain_datashunt.small_models.scores import Outcome, Scores

if TYPE_CHECKING:
    import ray.data

Table: TypeAlias = Any
"""A `pyarrow.Table`, the batch format of Ray Data."""

ANSWER_COLUMNS = {
    "answer": "string",
    "route": "string",
    "reason": "string",
    "label": "string",
    "confidence": "double",
    "cost_usd": "double",
    "record_id": "string",
    "error": "string",
}
"""Columns that `shunt_dataset` adds to each row, with their Arrow types."""

_STAGES = ("small", "student")
_OURS = "datashunt_"
"""Prefix of the internal columns passed from one stage to the next."""


def shunt_dataset(
    dataset: ray.data.Dataset,
    chain: ShuntRunnable | Callable[[], ShuntRunnable],
    *,
    column: str = "text",
    batch_size: int = 256,
    small_actors: int | tuple[int, int] = 1,
    small_cpus: float = 1.0,
    small_gpus: float = 0.0,
    large_actors: int | tuple[int, int] = 1,
    large_cpus: float = 0.25,
    large_concurrency: int = 32,
) -> ray.data.Dataset:
    """Answer every row of a dataset, lazily.

    The rows are computed when the result is consumed, as always in Ray Data. The stages overlap: small models compute
    the next batches during LLM calls. If an actor dies, Ray restarts it and computes its batch again.

    ```python
    answered = shunt_dataset(ray.data.read_parquet("questions"), make_chain, column="question", small_gpus=0.5)
    answered.write_parquet("answers")
    ```

    Args:
        dataset: Rows with a column of texts.
        chain: Shunt, or a function without arguments that creates one in each actor. A function is required if the
            chain holds objects that cannot be pickled, such as clients of chat models. A chain with a `recorder` writes
            its records before its batch is passed on. A budget shared by all actors requires a `SharedThreshold`.
        column: Name of the text column.
        batch_size: Rows per small-model call.
        small_actors: Number of small-model actors, or (minimum, maximum).
        small_cpus: CPUs per small-model actor.
        small_gpus: GPUs per small-model actor. 0.25 lets four share one.
        large_actors: Number of actors that call the large model, or (minimum, maximum).
        large_cpus: CPUs per large-model actor, which mostly waits.
        large_concurrency: Maximum concurrent LLM calls, all actors together.

    Returns:
        The rows with `ANSWER_COLUMNS` added. A row that could not be answered has an `error` and no `answer`.

    Raises:
        ConfigurationError: A setting is out of range, or the chain cannot be pickled or has no labels.
        MissingExtraError: Ray is not installed.
    """
    data = require("ray.data", "ray")
    most = large_actors if isinstance(large_actors, int) else large_actors[1]
    if batch_size < 1 or large_concurrency < most:
        raise ConfigurationError(
            f"Expected batch_size >= 1 and at least one LLM call per large actor, got batch_size={batch_size} and "
            f"large_concurrency={large_concurrency} for {most} large actors. Pass larger values."
        )
    make = _maker(chain)
    small = dataset.map_batches(
        _SmallStage,
        fn_constructor_args=(make, column),
        batch_size=batch_size,
        batch_format="pyarrow",
        compute=_pool(data, small_actors),
        num_cpus=small_cpus,
        num_gpus=small_gpus or None,
    )
    answered: ray.data.Dataset = small.map_batches(
        _LargeStage,
        fn_constructor_args=(make, column, large_concurrency // most),
        batch_size=batch_size,
        batch_format="pyarrow",
        compute=_pool(data, large_actors),
        num_cpus=large_cpus,
    )
    return answered


def _pool(data: Any, actors: int | tuple[int, int]) -> Any:
    least, most = (actors, actors) if isinstance(actors, int) else actors
    if not 1 <= least <= most:
        raise ConfigurationError(f"Expected a number of actors or (minimum, maximum), at least 1, got {actors}.")
    return data.ActorPoolStrategy(min_size=least, max_size=most)


def _maker(chain: ShuntRunnable | Callable[[], ShuntRunnable]) -> Callable[[], ShuntRunnable]:
    """Return a function that creates the chain and can be sent to other processes."""
    cloudpickle = require("ray.cloudpickle", "ray")
    make: Callable[[], ShuntRunnable] = chain if not isinstance(chain, ShuntRunnable) else lambda: chain
    if isinstance(chain, ShuntRunnable):
        _made(make)
    try:
        cloudpickle.dumps(make)
    except Exception as error:
        raise ConfigurationError(
            f"The chain cannot be sent to other processes ({type(error).__name__}: {error}). Pass a function "
            f"without arguments that creates the chain in each actor: shunt_dataset(dataset, make_chain)."
        ) from error
    return make


def _made(make: Callable[[], ShuntRunnable]) -> ShuntRunnable:
    found = make()
    if not isinstance(found, ShuntRunnable):
        message = f"Expected a ShuntRunnable from the chain function, got {type(found).__name__}"
        raise ConfigurationError(f"{message}. Return the chain from the function.")
    if not found.task_labels:
        raise ConfigurationError("The chain has no labels before its first call. Create it with labels=(...).")
    return found


class _Stage(ABC):
    """Actor with its own chain.

    If the chain cannot be created, the first batch raises the error. Ray would restart an actor whose constructor fails
    again and again.

    Args:
        make: Function that creates the chain.
        column: Name of the text column.
    """

    def __init__(self, make: Callable[[], ShuntRunnable], column: str) -> None:
        self._column = column
        self._failed: Exception | None = None
        try:
            self._begin(_made(make))
        except Exception as error:
            self._failed = error

    @abstractmethod
    def _begin(self, chain: ShuntRunnable) -> None:
        """Prepare this stage from the chain."""

    @abstractmethod
    def _done(self, batch: Table) -> Table:
        """Return the batch with this stage's columns added."""

    def __call__(self, batch: Table) -> Table:
        """Return the batch with this stage's columns added."""
        if self._failed is not None:
            raise self._failed
        return self._done(batch)


class _SmallStage(_Stage):
    """Stage that adds the small models' predictions to the rows."""

    @override
    def _begin(self, chain: ShuntRunnable) -> None:
        self._models, self._labels = _stages_of(chain), chain.task_labels

    @override
    def _done(self, batch: Table) -> Table:
        texts = _texts(batch, self._column)
        if taken := sorted(name for name in batch.column_names if name.startswith(_OURS)):
            raise ConfigurationError(
                f"Column names with the prefix {_OURS!r} are reserved, got {', '.join(taken)}. Rename the columns."
            )
        for stage, model in self._models.items():
            for name, values in _cells_of(_predictions(model, texts, self._labels)).items():
                batch = batch.append_column(f"{_OURS}{stage}_{name}", _array(values, _CELLS[name]))
        return batch


class _LargeStage(_Stage):
    """Stage that routes the predicted rows, calls the large model and adds the answers.

    The records of a batch are written before it is passed on.

    Args:
        make: Function that creates the chain.
        column: Name of the text column.
        concurrency: Maximum concurrent LLM calls of this actor.
    """

    def __init__(self, make: Callable[[], ShuntRunnable], column: str, concurrency: int) -> None:
        self._concurrency = concurrency
        super().__init__(make, column)

    @override
    def _begin(self, chain: ShuntRunnable) -> None:
        self._given = {}
        for stage, model in _stages_of(chain).items():
            labels = tuple(getattr(model, "labels", None) or chain.task_labels or ())
            self._given[stage] = _GivenPredictions(labels=labels)
            self._given[stage]._reader = getattr(model, "reader", None)
        settings = {
            "policy": policy_for(chain.small, chain.policy),
            "max_concurrency": min(self._concurrency, chain.max_concurrency or self._concurrency),
            "return_decision": True,
        }
        self._chain = chain.model_copy(update={**self._given, **settings})
        self._loop = asyncio.new_event_loop()  # one for all batches, since the connections of clients belong to it
        threading.Thread(target=self._loop.run_forever, name="datashunt-large", daemon=True).start()

    @override
    def _done(self, batch: Table) -> Table:
        texts = [_Numbered(text, i) for i, text in enumerate(_texts(batch, self._column))]
        for stage, given in self._given.items():
            given.take({name: batch[f"{_OURS}{stage}_{name}"].to_pylist() for name in _CELLS})
        answering = self._chain.abatch(texts, return_exceptions=True)
        results = asyncio.run_coroutine_threadsafe(answering, self._loop).result()
        self._write_down()
        batch = batch.drop_columns([f"{_OURS}{stage}_{name}" for stage in self._given for name in _CELLS])
        rows = [_answered(result) for result in results]
        for i, (name, kind) in enumerate(ANSWER_COLUMNS.items()):
            batch = batch.append_column(name, _array([row[i] for row in rows], kind))
        return batch

    def _write_down(self) -> None:
        """Wait for background audits and for records to be written."""
        parts = (self._chain.auditor, self._chain.recorder)
        if not all(part is None or part.flush() is not False for part in parts):
            warnings.warn(
                "Some records of this batch are not in the database yet, because it is slow or unreachable. They are "
                "kept in the local spool and written when the database is available.",
                ShuntWarning,
                stacklevel=2,
            )


class _GivenPredictions(SmallModel):
    """Small model that returns the predictions of the previous stage."""

    _cells: dict[str, list[Any]] = PrivateAttr(default_factory=dict)
    _reader: InputReader | None = PrivateAttr(default=None)

    @property
    @override
    def reader(self) -> InputReader:
        """Reader of the model that made the predictions."""
        return self._reader or super().reader

    def take(self, cells: dict[str, list[Any]]) -> None:
        """Store the predictions for a batch's rows."""
        self._cells = cells

    @override
    def _outcome(self, inputs: Sequence[Any]) -> Outcome:
        return outcome_of([self._given(value.row) for value in inputs])

    def _given(self, row: int) -> Prediction | Exception:
        own = {name: values[row] for name, values in self._cells.items()}
        if own["error"] is not None:
            kind, _, detail = own["error"].partition(": ")
            base = NotAPredictionError if kind in WIRING_ERRORS else PredictionError
            failed: PredictionError = type(kind, (base,), {})(detail)  # keeps the class name of the original error
            return failed
        arrays = {name: None if own[name] is None else np.frombuffer(own[name]) for name in _ARRAYS}
        p = arrays.pop("probabilities")
        assert p is not None
        labels, best = tuple(json.loads(own["labels"])), int(p.argmax()) if own["answer"] is None else 0
        fields: dict[str, Any] = {**arrays, "truncated": own["truncated"], "answer": own["answer"]}
        return Prediction(labels[best], float(p[best]), p, labels, model_id=own["model"], **fields)

    @override
    def predict_scores(self, texts: Sequence[str]) -> Scores:
        raise ConfigurationError("Predictions come from the previous stage and cannot be computed here.")


class _Numbered(str):
    """Text that carries its row number within the batch."""

    row: int

    def __new__(cls, text: str, row: int) -> _Numbered:
        made = super().__new__(cls, text)
        made.row = row
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy as a plain string."""
        return str, (str(self),)


def _stages_of(chain: ShuntRunnable) -> dict[str, Any]:
    """Return the chain's small models by stage."""
    found = {stage: getattr(chain, stage) for stage in _STAGES}
    return {stage: model for stage, model in found.items() if model is not None}


def _predictions(model: Any, texts: list[str], labels: Sequence[str] | None) -> list[Prediction | Exception]:
    """Return the prediction for each text, or the same error for all if the model fails as a whole."""
    try:
        found = [checked_prediction(answer, labels=labels) for answer in model.batch(texts, return_exceptions=True)]
    except Exception as error:
        return [error] * len(texts)
    if isinstance(model, SmallModel):
        return found
    return [in_task_order(labels, one) if isinstance(one, Prediction) else one for one in found]


def _cells_of(predictions: list[Prediction | Exception]) -> dict[str, list[Any]]:
    """Return predictions as columns, with arrays as bytes and errors as text."""
    cells: dict[str, list[Any]] = {name: [None] * len(predictions) for name in _CELLS}
    written: dict[tuple[str, ...], str] = {}
    for row, one in enumerate(predictions):
        if isinstance(one, Exception):
            cells["error"][row] = f"{type(one).__name__}: {one}"
            continue
        if one.labels not in written:
            written[one.labels] = json.dumps(one.labels)
        cells["labels"][row], cells["model"][row] = written[one.labels], one.model_id
        cells["truncated"][row], cells["answer"][row] = (
            one.truncated,
            None if one.answer is None else answer_text(one.answer),
        )
        for name in _ARRAYS:
            array = getattr(one, name)
            cells[name][row] = None if array is None else np.asarray(array, dtype=np.float64).tobytes()
    return cells


_ARRAYS = ("probabilities", "logits", "features", "token_logprobs")
_CELLS = dict.fromkeys(_ARRAYS, "binary") | {
    "truncated": "bool",
    "labels": "names",
    "model": "names",
    "answer": "string",
    "error": "string",
}
"""Columns passed between the stages for each small model, with their Arrow types."""


def _answered(result: Any) -> tuple[Any, ...]:
    """Return a row's values of `ANSWER_COLUMNS`."""
    if not isinstance(result, ShuntResult):
        return (None, "large", "large_error", None, None, None, None, f"{type(result).__name__}: {result}")
    label, confidence = (None, None) if (p := result.prediction) is None else (p.label, p.confidence)
    output = answer_text(result.output)
    fields = (result.route, result.reason, label, confidence, result.cost_usd, result.record_id, result.decision.error)
    return (output, *fields)


def _array(values: list[Any], kind: str) -> Any:
    """Return a column of the named Arrow type, even if all its values are missing."""
    arrow = require("pyarrow", "ray")
    if kind in ("names", "string"):
        values = [value if value is None or value.isascii() else writable(value) for value in values]
    if kind == "names":  # few distinct values, repeated in every row
        return arrow.array(values, "string").dictionary_encode()
    return arrow.array(values, arrow.type_for_alias(kind))


def _texts(batch: Table, column: str) -> list[str]:
    if column not in batch.column_names:
        raise ConfigurationError(
            f"The dataset has no column {column!r}. Available columns: {', '.join(batch.column_names)}."
        )
    if taken := sorted({*ANSWER_COLUMNS} & {*batch.column_names}):
        raise ConfigurationError(
            f"The dataset has columns that answers would overwrite: {', '.join(taken)}. Rename them."
        )
    return ["" if text is None else str(text) for text in batch[column].to_pylist()]
