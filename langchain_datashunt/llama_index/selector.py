"""ShuntSelector: a small model chooses the query engine, retriever or tool; where it is not sure, an LLM is asked."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llama_index.core.base.base_selector import BaseSelector, SelectorResult, SingleSelection
from llama_index.core.bridge.pydantic import Field
from llama_index.core.prompts.mixin import PromptDictType, PromptMixinType
from llama_index.core.schema import QueryBundle
from llama_index.core.tools.types import ToolMetadata

from langchain_datashunt.decision import ShuntDecision
from langchain_datashunt.exceptions import ConfigurationError, UnparsableAnswerError
from langchain_datashunt.large_models.prompt_pruning import Pruning
from langchain_datashunt.llama_index.deciding import Decider
from langchain_datashunt.policies.thresholds import Policy
from langchain_datashunt.prediction import Prediction


class ShuntSelection(SelectorResult):
    """A selection with what the small model thought of each choice.

    Attributes:
        scores: Probability of each choice, 0.0 for those that the small model does not know; empty where it failed.
        decision: Where the question went, and why; see `ShuntDecision.to_metadata`.
        candidates: Positions of the choices that the LLM was shown; empty where it was not asked.
    """

    scores: list[float] = Field(default_factory=list)
    decision: dict[str, Any] = Field(default_factory=dict)
    candidates: list[int] = Field(default_factory=list)


class ShuntSelector(BaseSelector):
    """For `RouterQueryEngine`, `RouterRetriever` and whatever takes a selector.

    ```python
    selector = ShuntSelector(small, LLMSingleSelector.from_defaults(llm=llm), policy=Threshold(0.8), keep=3)
    engine = RouterQueryEngine(selector=selector, query_engine_tools=tools)
    ```

    A choice belongs to the label that is its name. Choices that the small model does not know are shown to the LLM
    always, and all of them where its label is no choice. Where its own is the only candidate left, it is chosen
    without asking.

    Args:
        small: The small model; its labels are names of choices.
        large: The selector that is asked where it is not sure.
        policy: When its choice is kept; None for the small model's own, or a threshold of 0.9.
        keep: How many choices the LLM is shown: the likeliest; None for all, or those that `pruning` keeps.
        pruning: A strategy that narrows the candidates, for example a fitted `ConformalPruning`.
        names: Name of the choice by label, where they differ.
        recorder: A `distillation.Recorder` that keeps what the LLM chose, for the small model to learn.
    """

    def __init__(
        self,
        small: Any,
        large: BaseSelector,
        *,
        policy: Policy | None = None,
        keep: int | None = None,
        pruning: Pruning | None = None,
        names: Mapping[str, str] | None = None,
        recorder: Any = None,
    ) -> None:
        if keep is not None and keep < 1:
            raise ConfigurationError(f"keep={keep} leaves no choice; give 1 or more, or None for all.")
        if keep is not None and pruning is not None:
            raise ConfigurationError("Give `keep` or `pruning`, not both: each narrows the candidates.")
        self._decider = Decider(small, policy, recorder)
        self._large, self._keep, self._pruning, self._names = large, keep, pruning, dict(names or {})

    def _get_prompts(self) -> dict[str, Any]:
        return {}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        pass

    def _get_prompt_modules(self) -> PromptMixinType:
        return {"large": self._large}

    def _select(self, choices: Sequence[ToolMetadata], query: QueryBundle) -> SelectorResult:
        decision, seconds = self._decider.decide(query.query_str)
        kept, candidates, decision = self._narrowed(choices, decision)
        if kept is not None:
            self._decider.record(self._decider.finished(query.query_str, decision, None, "", (seconds, 0.0)))
            return kept
        started = time.perf_counter()
        found = self._large.select([choices[i] for i in candidates], query)
        result = self._asked(found, candidates, choices, decision)
        took = (seconds, time.perf_counter() - started)
        self._decider.record(self._log(result, choices, query, decision, took))
        return result

    async def _aselect(self, choices: Sequence[ToolMetadata], query: QueryBundle) -> SelectorResult:
        decision, seconds = await self._decider.adecide(query.query_str)
        kept, candidates, decision = self._narrowed(choices, decision)
        if kept is not None:
            log = self._decider.finished(query.query_str, decision, None, "", (seconds, 0.0))
            await self._decider.arecord(log)
            return kept
        started = time.perf_counter()
        found = await self._large.aselect([choices[i] for i in candidates], query)
        result = self._asked(found, candidates, choices, decision)
        took = (seconds, time.perf_counter() - started)
        await self._decider.arecord(self._log(result, choices, query, decision, took))
        return result

    def _narrowed(
        self, choices: Sequence[ToolMetadata], decision: ShuntDecision
    ) -> tuple[ShuntSelection | None, list[int], ShuntDecision]:
        """The small model's selection where it stands, else the choices that the LLM is shown; the decision so far."""
        if not choices:
            raise ConfigurationError(
                "There is nothing to choose from: the selector was given no choices. Give it query engine tools."
            )
        prediction, everything = decision.prediction, list(range(len(choices)))
        place = self._places(choices, prediction)
        best = None if prediction is None else place.get(prediction.label)
        if prediction is None or best is None:  # it failed, or means something that cannot be chosen here
            return None, everything, self._decider.deferred(decision)
        candidates = self._candidates(prediction, place, len(choices))
        if decision.route != "small" and candidates == [best]:
            words = f"{decision.policy}; no other candidate was left"
            decision = replace(decision, route="small", reason="confident", policy=words)
        if decision.route != "small":
            return None, candidates, decision
        told = self._decider.tell(decision)
        return self._selection(prediction, place, len(choices), best, told), [], decision

    def _places(self, choices: Sequence[ToolMetadata], prediction: Prediction | None) -> dict[str, int]:
        """Position of each label's choice, for the labels that the small model is known to have.

        Raises:
            ConfigurationError: No label is the name of a choice.
        """
        names = [choice.name or choice.description for choice in choices]
        by_name = {name: i for i, name in enumerate(names)}
        if len(by_name) < len(names):
            raise ConfigurationError(
                f"Several choices have one name ({', '.join(sorted({n for n in names if names.count(n) > 1}))}); give "
                f"each its own, for example QueryEngineTool.from_defaults(engine, name=...)."
            )
        labels = self._decider.labels or (() if prediction is None else prediction.labels)
        found = {
            label: by_name[self._names.get(label, label)]
            for label in labels
            if self._names.get(label, label) in by_name
        }
        if labels and not found:
            raise ConfigurationError(
                f"No label of the small model ({', '.join(labels[:5])}) is the name of a choice "
                f"({', '.join(names[:5])}). Name the choices after the labels, or give `names`."
            )
        return found

    def _candidates(self, prediction: Prediction, place: Mapping[str, int], n: int) -> list[int]:
        """Choices that stay: those that are likely, and those that the small model does not know."""
        unknown = set(range(n)) - set(place.values())
        likely = [place[label] for label, _ in prediction.top(len(prediction.labels)) if label in place]
        if self._pruning is not None:
            (variables,) = self._pruning.prepare(prediction.as_batch())
            likely = [place[label] for label in variables["candidates"] if label in place] or likely
        elif self._keep is not None:
            likely = likely[: self._keep]
        return sorted({*likely, *unknown})

    def _scores(self, prediction: Prediction | None, place: Mapping[str, int], n: int) -> list[float]:
        if prediction is None:
            return []
        scores = [0.0] * n
        for label, position in place.items():
            scores[position] += prediction.probability(label)
        return scores

    def _selection(
        self, prediction: Prediction, place: Mapping[str, int], n: int, chosen: int, told: dict[str, Any]
    ) -> ShuntSelection:
        scores = self._scores(prediction, place, n)
        reason = f"The small model {prediction.model_id} chose it with probability {scores[chosen]:.2f}."
        return ShuntSelection(selections=[SingleSelection(index=chosen, reason=reason)], scores=scores, decision=told)

    def _asked(
        self, found: SelectorResult, candidates: list[int], choices: Sequence[ToolMetadata], decision: ShuntDecision
    ) -> ShuntSelection:
        """What the LLM chose, by positions among all choices."""
        known = [0 <= one.index < len(candidates) for one in found.selections]
        if not known or not all(known):
            names = tuple(choices[i].name or choices[i].description for i in candidates)
            raise UnparsableAnswerError(str([one.index + 1 for one in found.selections]), names)
        place = self._places(choices, decision.prediction)
        return ShuntSelection(
            selections=[SingleSelection(index=candidates[one.index], reason=one.reason) for one in found.selections],
            scores=self._scores(decision.prediction, place, len(choices)),
            decision=self._decider.tell(decision),
            candidates=candidates,
        )

    def _log(
        self, result: ShuntSelection, choices: Sequence[ToolMetadata], query: QueryBundle, decision: ShuntDecision,
        seconds: tuple[float, float],
    ) -> list[Any]:  # fmt: skip
        if len(result.selections) != 1:
            return []
        label_of = {position: label for label, position in self._places(choices, decision.prediction).items()}
        said = label_of.get(result.selections[0].index)
        model = type(self._large).__name__
        return [] if said is None else self._decider.finished(query.query_str, decision, said, model, seconds)
