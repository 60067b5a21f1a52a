"""ToolRouter: from a query to ranked tools with calibrated probabilities, and a shortlist; needs no agent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeAlias

import numpy as np
from langchain_core.runnables import Runnable, RunnableConfig, RunnableSerializable
from langchain_core.runnables.base import coerce_to_runnable
from langchain_core.runnables.config import patch_config
from pydantic import Field, field_validator, model_validator
from typing_extensions import override

from langchain_datashunt._utils.settings import Configured
from langchain_datashunt.exceptions import ConfigurationError
from langchain_datashunt.large_models.prompt_pruning import ConformalPruning
from langchain_datashunt.prediction import FloatArray, Prediction, PredictionBatch
from langchain_datashunt.routing.plan import checked_prediction
from langchain_datashunt.small_models.base import SmallModel

Mode: TypeAlias = Literal["soft", "hard", "conformal"]
"""How tools are shortlisted: not at all (their probabilities are told), to the likeliest, to a conformal set."""


@dataclass(frozen=True, slots=True)
class ToolRanking:
    """What a router makes of one query.

    Attributes:
        tools: All tools that the classifier knows, the likeliest first.
        probabilities: Of these, shape `[k]`.
        shortlist: Those that stay, the likeliest first.
        prediction: What the classifier thought.
    """

    tools: tuple[str, ...]
    probabilities: FloatArray
    shortlist: tuple[str, ...]
    prediction: Prediction

    @property
    def best(self) -> str:
        """The likeliest tool."""
        return self.tools[0]

    @property
    def confidence(self) -> float:
        """Its probability."""
        return float(self.probabilities[0])

    def top(self, n: int) -> list[tuple[str, float]]:
        """The `n` likeliest tools with their probabilities."""
        return list(zip(self.tools[:n], self.probabilities[:n].tolist(), strict=True))


class ToolRouter(Configured, RunnableSerializable[Any, ToolRanking]):
    """Ranks tools by a small model whose labels are their names.

    ```python
    router = ToolRouter(classifier=load_small_model("tools")).calibrate(queries, names, alpha=0.05)
    router.invoke("What will the weather be?").shortlist  # ("WeatherTool",)
    ```
    """

    classifier: Runnable[Any, Any]
    """The small model; its labels are names of tools."""

    mode: Mode = "conformal"
    """"conformal" shortlists the tools among which the right one is with probability `1 - alpha`, "hard" the `keep`
    likeliest, "soft" all."""

    keep: int = Field(default=5, ge=1)
    """Tools of a "hard" shortlist, and of a conformal one that would be empty."""

    conformal: ConformalPruning | None = None
    """Fitted by `calibrate`."""

    @field_validator("classifier", mode="before")
    @classmethod
    def _runnable(cls, value: Any) -> Any:
        try:
            return coerce_to_runnable(value)
        except TypeError as error:
            raise ConfigurationError(f"A {type(value).__name__} is no small model: give a Runnable.") from error

    @model_validator(mode="after")
    def _is_calibrated(self) -> Self:
        if self.conformal is not None and self.conformal.quantile is None:
            raise ConfigurationError("`conformal` is not fitted; use ToolRouter.calibrate(queries, tools, alpha).")
        return self

    def calibrate(self, queries: Sequence[Any], tools: Sequence[str], *, alpha: float = 0.05) -> Self:
        """A copy whose conformal shortlists hold the right tool of all but `alpha` of queries like these.

        Args:
            queries: `n` queries that the classifier was not trained on.
            tools: The right tool of each.
            alpha: The share whose right tool may be lost, in (0, 1).

        Raises:
            ConfigurationError: A tool is not among the classifier's labels.
        """
        fitted = ConformalPruning(alpha=alpha).fit(self._predict(queries), tools)
        return self.model_copy(update={"mode": "conformal", "conformal": fitted})

    def rank_batch(self, queries: Sequence[Any]) -> list[ToolRanking]:
        """Rank for `n` queries in one vectorised call.

        Raises:
            InputError: A query cannot be read.
            PredictionError: The classifier failed on one.
        """
        if not queries:
            return []
        batch = self._predict(queries)
        return self._rankings(batch)

    def _predict(self, queries: Sequence[Any]) -> PredictionBatch:
        if isinstance(self.classifier, SmallModel):
            return self.classifier.predict_batch(queries)
        return PredictionBatch.stack([_checked(one) for one in self.classifier.batch(list(queries))])

    def shortlists(self, batch: PredictionBatch) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which tools stay, shape `[n, k]`.

        Raises:
            ConfigurationError: The mode is "conformal" and nothing was calibrated.
        """
        p = batch.probabilities
        if self.mode == "soft":
            return np.ones(p.shape, dtype=np.bool_)
        likeliest = np.zeros(p.shape, dtype=np.bool_)
        order = np.argsort(-p, axis=1, kind="stable")[:, : self.keep]
        np.put_along_axis(likeliest, order, True, axis=1)
        if self.mode == "hard":
            return likeliest
        if self.conformal is None or self.conformal.quantile is None:
            raise ConfigurationError(
                "A conformal shortlist needs calibration: ToolRouter(...).calibrate(queries, tools, alpha=0.05), or "
                "use mode='hard' or 'soft'."
            )
        kept = 1.0 - p <= self.conformal.quantile
        empty = ~kept.any(axis=1)
        kept[empty] = likeliest[empty]
        return np.asarray(kept)

    def _rankings(self, batch: PredictionBatch) -> list[ToolRanking]:
        order = np.argsort(-batch.probabilities, axis=1, kind="stable")
        kept = self.shortlists(batch)
        names = np.array(batch.labels, dtype=object)
        found = []
        for i, prediction in enumerate(batch):
            tools = names[order[i]]
            shortlist = tools[kept[i][order[i]]]
            found.append(ToolRanking(tuple(tools), batch.probabilities[i][order[i]], tuple(shortlist), prediction))
        return found

    # Runnable

    def _rank_one(self, query: Any, config: RunnableConfig) -> ToolRanking:
        prediction = _checked(self.classifier.invoke(query, config))
        return self._rankings(prediction.as_batch())[0]

    @override
    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> ToolRanking:
        def rank(value: Any, run_manager: Any, config: RunnableConfig) -> ToolRanking:
            return self._rank_one(value, {**config, "callbacks": run_manager.get_child()})

        return self._call_with_config(rank, input, config)

    @override
    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> ToolRanking:
        async def rank(value: Any, run_manager: Any, config: RunnableConfig) -> ToolRanking:
            child = RunnableConfig(**{**config, "callbacks": run_manager.get_child()})
            prediction = _checked(await self.classifier.ainvoke(value, child))
            return self._rankings(prediction.as_batch())[0]

        return await self._acall_with_config(rank, input, config)

    @override
    def batch(
        self, inputs: list[Any], config: Any = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> list[ToolRanking]:
        def rank(values: list[Any], run_manager: list[Any], config: list[RunnableConfig]) -> list[Any]:
            answers = self.classifier.batch(values, _children(config, run_manager))
            return list(self._rankings(PredictionBatch.stack(list(map(_checked, answers)))))

        if return_exceptions:  # one that fails, fails alone
            return super().batch(inputs, config, return_exceptions=True, **kwargs)
        return self._batch_with_config(rank, inputs, config)

    @override
    async def abatch(
        self, inputs: list[Any], config: Any = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> list[ToolRanking]:
        async def rank(values: list[Any], run_manager: list[Any], config: list[RunnableConfig]) -> list[Any]:
            answers = await self.classifier.abatch(values, _children(config, run_manager))
            return list(self._rankings(PredictionBatch.stack(list(map(_checked, answers)))))

        if return_exceptions:
            return await super().abatch(inputs, config, return_exceptions=True, **kwargs)
        return await self._abatch_with_config(rank, inputs, config)


def _children(configs: Sequence[RunnableConfig], managers: Sequence[Any]) -> list[RunnableConfig]:
    return [
        patch_config(config, callbacks=manager.get_child()) for config, manager in zip(configs, managers, strict=True)
    ]


def _checked(answer: Any) -> Prediction:
    found = checked_prediction(answer)
    if isinstance(found, Exception):
        raise found
    return found
