"""LocalLargeModel: a larger model on one's own machine as the large side, which heeds what Prompt Pruning tells it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from langchain_core.runnables import RunnableConfig, RunnableSerializable
from langchain_core.runnables.config import run_in_executor
from pydantic import ConfigDict
from typing_extensions import override

from langchain_datashunt._utils.settings import Configured
from langchain_datashunt.exceptions import ConfigurationError
from langchain_datashunt.prediction import FloatArray
from langchain_datashunt.small_models.base import SmallModel

_LEAST = 1e-3
"""What a rounded probability of 0 counts for."""


class Told(NamedTuple):
    """What the prompt variables say of one input.

    Attributes:
        value: The input.
        candidates: The labels that may be answered; empty for all.
        probabilities: What the small model thinks, by label.
    """

    value: Any
    candidates: tuple[str, ...]
    probabilities: Mapping[str, float]


def told_by(mapping: Any, input_key: str) -> Told:
    """The prompt variables of a mapping that a shunt hands to its large side; anything else is a bare input."""
    if not isinstance(mapping, Mapping) or input_key not in mapping:
        return Told(mapping, (), {})
    return Told(
        mapping[input_key], tuple(mapping.get("candidates") or ()), dict(mapping.get("candidate_probabilities") or {})
    )


def weigh(own: FloatArray, labels: Sequence[str], told: Told, *, heed: bool) -> FloatArray:
    """Own probabilities `[k]` with what was told: candidates only, and times the small model's probabilities.

    Labels whose probability was not told share what is left.

    Raises:
        ConfigurationError: None of the candidates is a label of this model.
    """
    p = np.array(own, dtype=np.float64)
    if told.candidates:
        candidates = set(told.candidates)
        among = np.array([label in candidates for label in labels])
        if not among.any():
            raise ConfigurationError(
                f"None of the candidates {', '.join(told.candidates[:5])} is a label of the large model, whose labels "
                f"are {', '.join(labels[:5])}. Give both models the same labels."
            )
        p = np.where(among, p, 0.0)
    if heed and told.probabilities:
        rest = [label for label in labels if label not in told.probabilities]
        share = max(0.0, 1.0 - sum(told.probabilities.values())) / max(1, len(rest))
        p = p * np.array([max(_LEAST, told.probabilities.get(label, share)) for label in labels])
    total = float(p.sum())
    if total > 0:
        return p / total
    return among / among.sum() if told.candidates else np.asarray(own, dtype=np.float64)


class LocalLargeModel(Configured, RunnableSerializable[Any, Any]):
    """Any model of this package as the large side of a shunt.

    ```python
    shunt = ShuntRunnable(small=resnet, large=LocalLargeModel(model=big_vision_model), pruning=SoftPruning())
    ```

    It answers with a label (or with what it writes). `candidates` bound what it may answer; with `opinion="heed"` the
    probabilities of `candidate_probabilities` multiply its own, which is what a soft prompt is to a language model.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    model: SmallModel
    """The larger model."""

    opinion: Literal["heed", "ignore"] = "heed"
    """What is made of the small model's probabilities."""

    input_key: str = "input"
    """The name of the input in the mapping."""

    @override
    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        return self._call_with_config(self._one, input, config)

    @override
    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        async def answer(value: Any) -> Any:
            return await run_in_executor(None, self._one, value)

        return await self._acall_with_config(answer, input, config)

    @override
    def batch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        return self._batch_with_config(self._many, inputs, config, return_exceptions=return_exceptions)

    @override
    async def abatch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        async def answer(values: list[Any]) -> list[Any]:
            return await run_in_executor(None, self._many, values)

        return await self._abatch_with_config(answer, inputs, config, return_exceptions=return_exceptions)

    def _one(self, value: Any) -> Any:
        answer = self._many([value])[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _many(self, values: list[Any]) -> list[Any]:
        told = [told_by(value, self.input_key) for value in values]
        outcome = self.model.predict_batch([one.value for one in told], return_errors=True)
        answers: list[Any] = [outcome.errors.get(i) for i in range(len(values))]
        if outcome.batch is None:
            return answers
        for row, i in enumerate(outcome.rows.tolist()):
            try:
                answers[i] = self._answer(outcome.batch, row, told[i])
            except ConfigurationError as error:
                answers[i] = error
        return answers

    def _answer(self, batch: Any, row: int, told: Told) -> Any:
        if batch.answers is not None:
            return batch.answers[row]
        p = weigh(batch.probabilities[row], batch.labels, told, heed=self.opinion == "heed")
        return batch.labels[int(p.argmax())]
