"""ShuntSelector: choose query engines, retrievers or tools with a small model, and defer to an LLM selector."""

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
    """Selection with the small model's probabilities and the routing decision.

    Attributes:
        scores: Probability of each choice, 0.0 for choices unknown to the small model. Empty if it failed.
        decision: Routing decision, see `ShuntDecision.to_metadata`.
        candidates: Positions of the choices shown to the LLM. Empty if it was not called.
    """

    scores: list[float] = Field(default_factory=list)
    decision: dict[str, Any] = Field(default_factory=dict)
    candidates: list[int] = Field(default_factory=list)


class ShuntSelector(BaseSelector):
    """Select with a small model if it is confident, and with an LLM selector otherwise.

    ```python
    selector = ShuntSelector(small, LLMSingleSelector.from_defaults(llm=llm), policy=Threshold(0.8), keep=3)
    engine = RouterQueryEngine(selector=selector, query_engine_tools=tools)
    ```

    It fits `RouterQueryEngine`, `RouterRetriever` and other components that take a selector. Choices are matched to
    labels by name. The LLM always sees the choices unknown to the small model, and it sees all choices if the
    predicted label is not among them. If the predicted choice is the only candidate, it is selected without an LLM
    call.

    Args:
        small: Small model whose labels are names of choices.
        large: Selector for deferred questions.
        policy: Policy that decides when to use the small model's choice. None uses the small model's own, or a
            threshold of 0.9.
        keep: Number of most likely choices shown to the LLM. None shows all, or those kept by `pruning`.
        pruning: Strategy that narrows the candidates, for example a fitted `ConformalPruning`.
        names: Name of the choice for each label, if they differ.
        recorder: `call_log.Recorder` that logs the LLM's choices, to train the small model on.

    Raises:
        ConfigurationError: `keep` is less than 1, or both `keep` and `pruning` are given.
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
            raise ConfigurationError(f"Expected at least 1 for `keep`, got keep={keep}. Pass None to show all choices.")
        if keep is not None and pruning is not None:
            raise ConfigurationError("`keep` and `pruning` both narrow the candidates. Pass one of them, not both.")
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
        """Return the local selection or None, the candidates for the LLM, and the updated decision."""
        if not choices:
            raise ConfigurationError(
                "The selector received no choices, so there is nothing to choose from. "
                "Pass at least one query engine tool."
            )
        prediction, everything = decision.prediction, list(range(len(choices)))
        place = self._places(choices, prediction)
        best = None if prediction is None else place.get(prediction.label)
        if prediction is None or best is None:  # the small model failed, or its label is not a choice here
            return None, everything, self._decider.deferred(decision)
        candidates = self._candidates(prediction, place, len(choices))
        if decision.route != "small" and candidates == [best]:
            words = f"{decision.policy}; no other candidate was left"
            decision = replace(decision, route="small", reason="confident", policy=words)
        if decision.route != "small":
            return None, candidates, decision
        metadata = self._decider.tell(decision)
        return self._selection(prediction, place, len(choices), best, metadata), [], decision

    def _places(self, choices: Sequence[ToolMetadata], prediction: Prediction | None) -> dict[str, int]:
        """Return the position of the choice for each known label of the small model.

        Raises:
            ConfigurationError: Several choices share a name, or no label is the name of a choice.
        """
        names = [choice.name or choice.description for choice in choices]
        by_name = {name: i for i, name in enumerate(names)}
        if len(by_name) < len(names):
            raise ConfigurationError(
                f"Expected unique names, but several choices share a name: "
                f"{', '.join(sorted({n for n in names if names.count(n) > 1}))}. Name "
                f"each choice, for example QueryEngineTool.from_defaults(engine, name=...)."
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
                f"({', '.join(names[:5])}). Name the choices after the labels, or pass `names`."
            )
        return found

    def _candidates(self, prediction: Prediction, place: Mapping[str, int], n: int) -> list[int]:
        """Return the positions of the likely choices and of those unknown to the small model."""
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
        self, prediction: Prediction, place: Mapping[str, int], n: int, chosen: int, metadata: dict[str, Any]
    ) -> ShuntSelection:
        scores = self._scores(prediction, place, n)
        reason = f"The small model {prediction.model_id} chose it with probability {scores[chosen]:.2f}."
        return ShuntSelection(
            selections=[SingleSelection(index=chosen, reason=reason)], scores=scores, decision=metadata
        )

    def _asked(
        self, found: SelectorResult, candidates: list[int], choices: Sequence[ToolMetadata], decision: ShuntDecision
    ) -> ShuntSelection:
        """Return the LLM's selection, by positions among all choices."""
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
        chosen = label_of.get(result.selections[0].index)
        model = type(self._large).__name__
        return [] if chosen is None else self._decider.finished(query.query_str, decision, chosen, model, seconds)
