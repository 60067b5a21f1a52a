"""PrivacyGuard: the only way to a large model. What must not leave stays; what is replaced comes back restored."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass
from typing import Any, Literal

from langchain_core.runnables import Runnable, RunnableConfig
from pydantic import ConfigDict, Field
from typing_extensions import override

from langchain_datashunt._utils.settings import Configured
from langchain_datashunt._utils.sync_async import raise_first_error
from langchain_datashunt.exceptions import ConfigurationError, LocalOnlyError
from langchain_datashunt.prediction import Prediction
from langchain_datashunt.privacy.budget import DisclosureBudget, LocalLedger
from langchain_datashunt.privacy.detectors import DETECTORS, Detector
from langchain_datashunt.privacy.redaction import Placeholders, StreamRestorer

SUBJECT_KEY = "shunt_subject"
"""The key of `config["configurable"]` that says whose data an input is."""


@dataclass(frozen=True)
class AbstainedLocally:
    """The answer to an input that must not leave this machine and that no small model may answer.

    Attributes:
        reason: Why it stays, in words; never the input itself.
        kinds: The kinds of entities that keep it here.
        prediction: What the small model thought, where it thought something.
    """

    reason: str
    kinds: tuple[str, ...] = ()
    prediction: Prediction | None = None

    def __str__(self) -> str:
        return f"No answer: this input stays on this machine, since {self.reason}."


class PrivacyGuard(Configured):
    """What may leave this machine, and how.

    ```python
    guard = PrivacyGuard(local_kinds={"IBAN", "API_KEY"}, local_labels={"medical"})
    shunt = ShuntRunnable(small=small, large=prompt | ChatOpenAI() | StrOutputParser(), guard=guard)
    ```

    Everything that a shunt hands to its large side passes: the input, the history, and what the small model thinks.
    Entities are replaced by placeholders such as `<EMAIL_1>`, the same text by the same one, and the answer, streamed
    or not, has the texts again. What is local never leaves. A detector or a rule that fails keeps the input here. Texts
    of the prompt template itself are yours and are not looked at.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", frozen=True)

    detectors: tuple[Any, ...] = Field(default=DETECTORS, exclude=True, repr=False)
    """What to look for. Names need a recogniser of named entities: see `PresidioDetector`."""

    redact: frozenset[str] | Literal["all", "none"] = "all"
    """Kinds that are replaced by placeholders."""

    local_kinds: frozenset[str] = frozenset()
    """Kinds that never leave: an input that holds one stays here."""

    local_labels: frozenset[str] = frozenset()
    """What the small model takes for one of these labels stays here, sure or not."""

    local_where: Callable[[str], bool] | None = Field(default=None, exclude=True, repr=False)
    """Texts for which this is true never leave."""

    allow_binary: bool = False
    """Whether images, sound and files may leave, in which no detector looks."""

    on_local: Literal["small", "abstain", "raise"] = "small"
    """What is answered to an input that stays: what the small model thinks (where it thinks nothing, as "abstain"), an
    `AbstainedLocally`, or nothing, with a `LocalOnlyError` raised."""

    budget: DisclosureBudget | None = None
    """How much may leave; None for no bound."""

    def model_post_init(self, context: Any, /) -> None:
        """Check that the detectors know the kinds."""
        super().model_post_init(context)
        for detector in self.detectors:
            if not isinstance(detector, Detector):
                raise ConfigurationError(
                    f"A {type(detector).__name__} is no detector: it needs `kinds` and `find(text)`."
                )
        known = {kind for detector in self.detectors for kind in detector.kinds}
        wanted = self.local_kinds | (self.redact if isinstance(self.redact, frozenset) else frozenset())
        if unknown := sorted(wanted - known):
            raise ConfigurationError(
                f"No detector finds {', '.join(unknown)}; found are: {', '.join(sorted(known))}. Add a detector."
            )

    def check_without_labels(self, where: str) -> None:
        """Refuse labels that stay where no small model is asked.

        Raises:
            ConfigurationError: The guard has `local_labels`.
        """
        if self.local_labels:
            raise ConfigurationError(
                f"The guard has local_labels ({', '.join(sorted(self.local_labels))}), and {where} has no small "
                f"model to tell them. Use local_kinds or local_where here."
            )

    def check_prediction(self, prediction: Prediction | None) -> LocalOnlyError | None:
        """Why an input stays because of what the small model takes it for; None where it may leave."""
        if prediction is not None and prediction.answer is None and prediction.label in self.local_labels:
            return LocalOnlyError(f"the small model takes it for {prediction.label!r}")
        if self.local_labels and prediction is None:
            return LocalOnlyError("the small model failed, so nobody knows whether its label is a local one")
        return None

    def check_predictions(self, predictions: Sequence[Prediction | None]) -> LocalOnlyError | None:
        """The first reason why an input stays because of what small models take it for; None where it may leave."""
        if not self.local_labels:
            return None
        return next((found for one in predictions if (found := self.check_prediction(one)) is not None), None)

    def outbound(self, value: Any, subject: str | None = None) -> tuple[Any, Placeholders]:
        """What leaves of a value, and what was replaced in it; counted by the budget.

        Args:
            value: What a large model is to be asked.
            subject: Whose data it is.

        Raises:
            LocalOnlyError: It must not leave, or a detector or rule failed.
        """
        kinds = frozenset[str]() if self.redact == "none" else None if self.redact == "all" else self.redact
        found = Placeholders(
            self.detectors, kinds=kinds, local=self.local_kinds, allow_binary=self.allow_binary,
            local_where=self.local_where,
        )  # fmt: skip
        try:
            found.reserve(value)
            out = found.redact(value)
            if self.budget is not None:
                self.budget.spend(found, subject)
            return out, found
        except LocalOnlyError:
            raise
        except Exception as error:  # whatever a detector raises: nothing leaves that was not looked at
            raise LocalOnlyError(f"looking at it failed ({type(error).__name__})") from error

    @override
    def to_json(self) -> Any:
        """Detectors and rules of one's own cannot be written down, so that a guard with some is not."""
        own = tuple(self.detectors) != DETECTORS or self.local_where is not None
        if own or (self.budget is not None and not isinstance(self.budget.ledger, LocalLedger)):
            return self.to_json_not_implemented()
        plain: Any = super().to_json()
        plain["kwargs"] = {k: sorted(v) if isinstance(v, frozenset) else v for k, v in plain["kwargs"].items()}
        return plain

    def around(self, large: Runnable[Any, Any]) -> GuardedModel:
        """A large model behind this guard."""
        return GuardedModel(large, self)

    def abstained(self, error: LocalOnlyError, prediction: Prediction | None) -> AbstainedLocally:
        """The answer where nobody may answer."""
        return AbstainedLocally(error.reason, error.kinds, prediction)


class GuardedModel(Runnable[Any, Any]):
    """A large model behind a guard. It makes no runs of its own: what tracers see of the model is what left.

    Args:
        large: The model.
        guard: What may leave.
    """

    def __init__(self, large: Runnable[Any, Any], guard: PrivacyGuard) -> None:
        self.large, self.guard = large, guard

    @override
    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        asked, placeholders = self.guard.outbound(input, subject_of(config))
        return placeholders.restore(self.large.invoke(asked, config, **kwargs))

    @override
    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        asked, placeholders = self.guard.outbound(input, subject_of(config))
        return placeholders.restore(await self.large.ainvoke(asked, config, **kwargs))

    @override
    def batch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        results, rows, asked, each, found = self._sorted(inputs, config)
        if rows:
            answers = self.large.batch(asked, each, return_exceptions=return_exceptions, **kwargs)
            self._take(results, rows, answers, found)
        return raise_first_error(results, return_exceptions)

    @override
    async def abatch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        results, rows, asked, each, found = self._sorted(inputs, config)
        if rows:
            answers = await self.large.abatch(asked, each, return_exceptions=return_exceptions, **kwargs)
            self._take(results, rows, answers, found)
        return raise_first_error(results, return_exceptions)

    def _sorted(
        self, inputs: list[Any], config: RunnableConfig | list[RunnableConfig] | None
    ) -> tuple[list[Any], list[int], list[Any], Any, list[Placeholders]]:
        """Which inputs may leave, as what, with which configs; errors stand in the results already."""
        results: list[Any] = [None] * len(inputs)
        rows: list[int] = []
        asked: list[Any] = []
        found: list[Placeholders] = []
        for i, value in enumerate(inputs):
            try:
                own = config[i] if isinstance(config, list) else config
                out, placeholders = self.guard.outbound(value, subject_of(own))
            except LocalOnlyError as error:
                results[i] = error
                continue
            rows.append(i)
            asked.append(out)
            found.append(placeholders)
        each = [config[i] for i in rows] if isinstance(config, list) else config
        return results, rows, asked, each, found

    @staticmethod
    def _take(results: list[Any], rows: list[int], answers: list[Any], found: list[Placeholders]) -> None:
        for i, answer, placeholders in zip(rows, answers, found, strict=True):
            results[i] = answer if isinstance(answer, Exception) else placeholders.restore(answer)

    @override
    def stream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[Any]:
        asked, placeholders = self.guard.outbound(input, subject_of(config))
        restorer = StreamRestorer(placeholders)
        with closing(self.large.stream(asked, config, **kwargs)) as chunks:  # type: ignore[type-var]
            for chunk in chunks:
                yield restorer.feed(chunk)
        yield from restorer.rest()

    @override
    async def astream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> AsyncIterator[Any]:
        asked, placeholders = self.guard.outbound(input, subject_of(config))
        restorer = StreamRestorer(placeholders)
        async with aclosing(self.large.astream(asked, config, **kwargs)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                yield restorer.feed(chunk)
        for chunk in restorer.rest():
            yield chunk


def subject_of(config: RunnableConfig | None) -> str | None:
    """Whose data a call is about, where its config says so."""
    told = ((config or {}).get("configurable") or {}).get(SUBJECT_KEY)
    return None if told is None else str(told)
