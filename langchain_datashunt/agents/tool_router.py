"""ToolRouter: rank tools by calibrated probability and shortlist them, without an agent."""

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
from langchain_datashunt._utils.short_repr import short_repr
from langchain_datashunt.exceptions import ConfigurationError
from langchain_datashunt.large_models.prompt_pruning import ConformalPruning
from langchain_datashunt.prediction import FloatArray, Prediction, PredictionBatch
from langchain_datashunt.routing.plan import checked_prediction
from langchain_datashunt.small_models.base import SmallModel

Mode: TypeAlias = Literal["soft", "hard", "conformal"]
"""Shortlisting mode: all tools with their probabilities, the most likely ones, or a conformal set."""


@dataclass(frozen=True, slots=True)
class ToolRanking:
    """Tools ranked for one query.

    Attributes:
        tools: All tools known to the classifier, most likely first.
        probabilities: Probability of each of `tools`, shape `[k]`.
        shortlist: Shortlisted tools, most likely first.
        prediction: Prediction of the classifier.
    """

    tools: tuple[str, ...]
    probabilities: FloatArray
    shortlist: tuple[str, ...]
    prediction: Prediction

    __repr__ = short_repr

    @property
    def best(self) -> str:
        """The most likely tool."""
        return self.tools[0]

    @property
    def confidence(self) -> float:
        """Probability of the most likely tool, in [0, 1]."""
        return float(self.probabilities[0])

    def top(self, n: int) -> list[tuple[str, float]]:
        """Return the `n` most likely tools with their probabilities."""
        return list(zip(self.tools[:n], self.probabilities[:n].tolist(), strict=True))


class ToolRouter(Configured, RunnableSerializable[Any, ToolRanking]):
    """Rank tools with a small model whose labels are tool names.

    ```python
    router = ToolRouter(classifier=load_small_model("tools")).calibrate(queries, names, alpha=0.05)
    router.invoke("What will the weather be?").shortlist  # ("WeatherTool",)
    ```
    """

    classifier: Runnable[Any, Any]
    """Small model whose labels are tool names."""

    mode: Mode = "conformal"
    """Shortlisting mode. "conformal" keeps a set that contains the right tool with probability at least `1 - alpha`,
    "hard" keeps the `keep` most likely tools, "soft" keeps all."""

    keep: int = Field(default=5, ge=1)
    """Size of a "hard" shortlist, and of a conformal shortlist that would be empty."""

    conformal: ConformalPruning | None = None
    """Fitted conformal strategy, set by `calibrate`."""

    @field_validator("classifier", mode="before")
    @classmethod
    def _runnable(cls, value: Any) -> Any:
        try:
            return coerce_to_runnable(value)
        except TypeError as error:
            raise ConfigurationError(
                f"Expected a Runnable for `classifier`, got {type(value).__name__}. Pass a small model."
            ) from error

    @model_validator(mode="after")
    def _is_calibrated(self) -> Self:
        if self.conformal is not None and self.conformal.quantile is None:
            raise ConfigurationError("`conformal` is not fitted. Call ToolRouter.calibrate(queries, tools, alpha).")
        return self

    def calibrate(self, queries: Sequence[Any], tools: Sequence[str], *, alpha: float = 0.05) -> Self:
        """Return a copy with conformal shortlists at error rate `alpha`.

        On average over queries like these, a shortlist lacks the right tool for at most a share `alpha` of them.

        Args:
            queries: `n` queries that the classifier was not trained on.
            tools: Right tool of each query, `n` names.
            alpha: Accepted share of queries whose shortlist lacks the right tool, in (0, 1).

        Raises:
            ConfigurationError: `queries` and `tools` differ in length, or a tool is not among the classifier's labels.
        """
        fitted = ConformalPruning(alpha=alpha).fit(self._predict(queries), tools)
        return self.model_copy(update={"mode": "conformal", "conformal": fitted})

    def rank_batch(self, queries: Sequence[Any]) -> list[ToolRanking]:
        """Rank the tools for `n` queries in one vectorised call.

        Raises:
            InputError: A query cannot be read.
            PredictionError: The classifier failed on a query.
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
        """Return a mask of the shortlisted tools, shape `[n, k]`.

        Raises:
            ConfigurationError: The mode is "conformal" and the router is not calibrated.
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
                "A conformal shortlist needs calibration. Call ToolRouter(...).calibrate(queries, tools, alpha=0.05), "
                "or use mode='hard' or mode='soft'."
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

        if return_exceptions:  # one call per query, so that a failure affects its own query only
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
