"""LocalLargeModel: a local model as the large model, which supports the prompt variables of Prompt Pruning."""

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
"""Value used for a rounded probability of 0."""


class Told(NamedTuple):
    """Prompt variables of one input.

    Attributes:
        value: Input.
        candidates: Labels that are allowed as an answer; empty means all.
        probabilities: Probabilities of the small model by label.
    """

    value: Any
    candidates: tuple[str, ...]
    probabilities: Mapping[str, float]


def told_by(mapping: Any, input_key: str) -> Told:
    """Return the prompt variables of a mapping from a shunt. Any other value is a bare input."""
    if not isinstance(mapping, Mapping) or input_key not in mapping:
        return Told(mapping, (), {})
    return Told(
        mapping[input_key], tuple(mapping.get("candidates") or ()), dict(mapping.get("candidate_probabilities") or {})
    )


def weigh(own: FloatArray, labels: Sequence[str], told: Told, *, heed: bool) -> FloatArray:
    """Return probabilities `[k]` restricted to the candidates and, with `heed`, times those of the small model.

    Labels without a probability of the small model share the remaining probability.

    Raises:
        ConfigurationError: If no candidate is a label of this model.
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
    """Small model of this package as the large model of a shunt.

    ```python
    shunt = ShuntRunnable(small=resnet, large=LocalLargeModel(model=big_vision_model), pruning=SoftPruning())
    ```

    It answers with a label or a generated text. `candidates` restrict its answers. With `opinion="heed"`, its
    probabilities are multiplied by `candidate_probabilities`, which corresponds to soft pruning with an LLM.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    model: SmallModel
    """Model that answers."""

    opinion: Literal["heed", "ignore"] = "heed"
    """Whether to use the small model's probabilities."""

    input_key: str = "input"
    """Key of the input in the mapping."""

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
