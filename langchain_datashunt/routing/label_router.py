"""ConfidenceRouterChain: a shunt for classification tasks, with a ready-made prompt and label parser."""

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
    """Route classification requests between a small model and a chat model, which both answer with a label.

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
        """Create a chain from a small model and a chat model.

        Args:
            small: The small model.
            chat_model: Any chat model.
            labels: All labels, as a list, or as a mapping to descriptions for the prompt. None uses the small
                model's.
            aliases: Other accepted wordings, by label.
            prompt: Template that uses `input` and at least one variable of the pruning strategy. None uses the
                default prompt.
            pruning: Strategy that puts the small model's probabilities into the prompt. None uses `SoftPruning()`, or
                `NoPruning()` if a `fusion` is set or `small` is only a placeholder.
            policy: Decides which predictions are confident. None uses the small model's policy, then its threshold,
                then `Threshold(0.9)`.
            answer_format: "structured" requests structured output with the labels as an enumeration, which providers
                bill as input tokens. "text" requests plain text. "auto" is "structured" if the model offers it.
            max_reasks: Maximum follow-up calls after an answer that is not a label.
            **settings: Any other field of `ShuntRunnable`.

        Raises:
            ConfigurationError: The labels are unknown, or the parts do not fit together.
        """
        names = tuple(labels) if labels is not None else tuple(getattr(small, "labels", ()))
        if not names:
            raise ConfigurationError(
                f"The labels of {type(small).__name__} are unknown before its first call. Pass labels=[...]."
            )
        descriptions = dict(labels) if isinstance(labels, Mapping) else {}
        # fusion already uses the small model's probabilities, and a placeholder has none
        quiet = settings.get("fusion") is not None or getattr(small, "is_placeholder", False)
        strategy = pruning if pruning is not None else NoPruning() if quiet else SoftPruning()
        key = settings.get("input_key", getattr(small, "input_key", DEFAULT_INPUT_KEY))
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
