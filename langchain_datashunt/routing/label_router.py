"""ConfidenceRouterChain: a shunt for labelled tasks, with prompt, chat model and parser put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from langchain_core.runnables import Runnable

from langchain_datashunt.exceptions import ConfigurationError
from langchain_datashunt.inputs import DEFAULT_INPUT_KEY
from langchain_datashunt.large_models.chat_asker import ChatAsker, default_prompt
from langchain_datashunt.large_models.prompt_pruning import NoPruning, Pruning, SoftPruning
from langchain_datashunt.policies.thresholds import Policy
from langchain_datashunt.routing.shunt import ShuntRunnable


class ConfidenceRouterChain(ShuntRunnable):
    """A shunt whose both sides answer with a label.

    ```python
    chain = ConfidenceRouterChain.from_models(load_small_model("bundle"), ChatOpenAI(model="gpt-4o"))
    chain.invoke("Where is my card?")  # "card_arrival"
    ```
    """

    @classmethod
    def from_models(
        cls,
        small: Runnable[Any, Any],
        chat_model: Runnable[Any, Any],
        *,
        labels: Sequence[str] | Mapping[str, str] | None = None,
        aliases: Mapping[str, Sequence[str]] | None = None,
        prompt: Runnable[Any, Any] | None = None,
        pruning: Pruning | None = None,
        policy: Policy | None = None,
        answer_format: Literal["auto", "structured", "text"] = "auto",
        max_reasks: int = 1,
        **settings: Any,
    ) -> Self:
        """Put a chain together.

        Args:
            small: The small model.
            chat_model: Any chat model.
            labels: All labels, as a list or as a mapping to descriptions that stand in the prompt; None takes the
                small model's.
            aliases: Other wordings that are accepted, by label.
            prompt: A template that uses `input` and at least one variable of the pruning strategy; None for the
                default prompt.
            pruning: What the prompt gets of the small model's opinion; None for `SoftPruning()`, with a `fusion`
                or while answers are only collected for `NoPruning()`. To send nothing, say `NoPruning()`.
            policy: When to keep; None for the small model's own threshold, or 0.9.
            answer_format: "structured" asks for structured output with the labels as an enumeration (which the
                provider counts as tokens), "text" for plain text, "auto" structured where the model offers it.
            max_reasks: How often a model is asked again whose answer was no label.
            **settings: Any other field of `ShuntRunnable`.

        Raises:
            ConfigurationError: The labels are not known, or the parts do not fit together.
        """
        names = tuple(labels) if labels is not None else tuple(getattr(small, "labels", ()))
        if not names:
            raise ConfigurationError(
                f"The labels of {type(small).__name__} are not known before its first call; give labels=[...]."
            )
        descriptions = dict(labels) if isinstance(labels, Mapping) else {}
        # fusion counts the small model's opinion itself; a stand-in for one has none
        quiet = settings.get("fusion") is not None or getattr(small, "is_placeholder", False)
        strategy = pruning if pruning is not None else NoPruning() if quiet else SoftPruning()
        key = settings.get("input_key", DEFAULT_INPUT_KEY)
        asker = ChatAsker.from_labels(
            names,
            chat_model,
            prompt if prompt is not None else default_prompt(strategy, key, getattr(small, "reader", None)),
            aliases=aliases,
            answer_format=answer_format,
            max_reasks=max_reasks,
        )
        return cls(
            small=small,
            large=asker,
            policy=policy,
            pruning=strategy,
            labels=names,
            label_descriptions=settings.pop("label_descriptions", descriptions),
            **settings,
        )
