"""HintedModel: a chat model whose system message carries the small model's prediction."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing
from typing import Any

from langchain_core.messages import BaseMessage, SystemMessage
from langchain_core.prompts import PromptTemplate
from langchain_core.runnables import Runnable, RunnableConfig
from typing_extensions import override

from langchain_datashunt.exceptions import ConfigurationError
from langchain_datashunt.large_models.prompt_pruning import PRUNING_VARIABLES, Pruning
from langchain_datashunt.prediction import Prediction

_ABOUT = "About the user's last message:"


class Hint:
    """Paragraph of the large model's prompt about the small model's prediction.

    Args:
        pruning: Prompt Pruning strategy that provides the variables.
        template: Template over the variables of `pruning`. None uses the strategy's own paragraph.

    Raises:
        ConfigurationError: The template uses unknown variables.
    """

    def __init__(self, pruning: Pruning, template: str | None = None) -> None:
        words = pruning.paragraph or ("Possible meanings:\n{candidates}" if "candidates" in pruning.variables else "")
        self.pruning = pruning
        self.template = PromptTemplate.from_template(
            template if template is not None else words and f"{_ABOUT}\n{words}"
        )
        if strange := sorted(set(self.template.input_variables) - set(PRUNING_VARIABLES)):
            raise ConfigurationError(
                f"`hint` uses unknown variables: {', '.join(strange)}. Available: {', '.join(PRUNING_VARIABLES)}."
            )

    def text(self, variables: Mapping[str, Any]) -> str:
        """Return the hint for one input, or an empty string if the template is empty or the small model failed."""
        failed = not variables["candidate_probabilities"] and variables["small_label"] == "unknown"
        if failed or not self.template.template:
            return ""
        return self.template.format(**{name: variables[name] for name in self.template.input_variables})

    def paragraph_for(self, prediction: Prediction | None) -> str:
        """Return the hint for a prediction, or an empty string for None."""
        return "" if prediction is None else self.text(self.pruning.prepare(prediction.as_batch())[0])


class HintedModel(Runnable[Any, Any]):
    """Large chat model whose system message carries the small model's prediction.

    Its input is the mapping that a shunt passes to its large side, with the conversation under "messages".

    Args:
        model: Chat model, optionally with bound tools or structured output.
        pruning: Prompt Pruning strategy that provides the variables.
        hint: Template of the hint. None uses the strategy's own paragraph.
    """

    def __init__(self, model: Runnable[Any, Any], pruning: Pruning, hint: str | None = None) -> None:
        self.model, self.hint = model, Hint(pruning, hint)

    def messages(self, asked: dict[str, Any]) -> list[BaseMessage]:
        """Return the conversation with the hint added to its system message.

        Without a hint, for example because the small model failed, the conversation is unchanged.
        """
        messages: list[BaseMessage] = list(asked["messages"])
        if not (paragraph := self.hint.text(asked)):
            return messages
        first = messages[0] if messages else None
        if isinstance(first, SystemMessage):
            blocks = [first.content] if isinstance(first.content, str) else list(first.content)
            content: Any = (
                f"{first.content}\n\n{paragraph}"
                if isinstance(first.content, str)
                else [*blocks, {"type": "text", "text": paragraph}]
            )
            return [first.model_copy(update={"content": content}), *messages[1:]]
        return [SystemMessage(paragraph), *messages]

    @override
    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        return self.model.invoke(self.messages(input), config, **kwargs)

    @override
    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        return await self.model.ainvoke(self.messages(input), config, **kwargs)

    @override
    def stream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[Any]:
        yield from self.model.stream(self.messages(input), config, **kwargs)

    @override
    async def astream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> AsyncIterator[Any]:
        async with aclosing(self.model.astream(self.messages(input), config, **kwargs)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                yield chunk

    @override
    def batch(self, inputs: list[Any], config: Any = None, **kwargs: Any) -> list[Any]:
        return self.model.batch([self.messages(one) for one in inputs], config, **kwargs)

    @override
    async def abatch(self, inputs: list[Any], config: Any = None, **kwargs: Any) -> list[Any]:
        return await self.model.abatch([self.messages(one) for one in inputs], config, **kwargs)
