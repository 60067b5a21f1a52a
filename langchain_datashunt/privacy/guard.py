"""PrivacyGuard: redact the data sent to the large model, restore it in answers, and keep inputs local if required."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal

from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import run_in_executor
from pydantic import ConfigDict, Field
from typing_extensions import override

from langchain_datashunt._utils.control_flow import raise_first_error
from langchain_datashunt._utils.settings import Configured
from langchain_datashunt.exceptions import ConfigurationError, LocalOnlyError
from langchain_datashunt.prediction import ANSWER_LABELS, Prediction
from langchain_datashunt.privacy.budget import DisclosureBudget, LocalLedger
from langchain_datashunt.privacy.detectors import DETECTORS, Detector
from langchain_datashunt.privacy.redaction import CallKeywords, Placeholders, StreamRestorer, human_texts, texts_in

SUBJECT_KEY = "shunt_subject"
"""Key in `config["configurable"]` for the id of the person whose data the input contains."""


@dataclass(frozen=True)
class AbstainedLocally:
    """Answer to an input that must not leave this machine and that the small model may not answer.

    Attributes:
        reason: Reason as a clause, such as "it contains IBAN". Never quotes the input.
        kinds: Kinds of the entities that caused it. Empty if the reason is another one.
        prediction: Prediction of the small model, or None if it failed or was not called.
    """

    reason: str
    kinds: tuple[str, ...] = ()
    prediction: Prediction | None = None

    def __str__(self) -> str:
        return f"No answer: this input stays on this machine, because {self.reason}."


class PrivacyGuard(Configured):
    """Decide which data may be sent to the large model, and redact it.

    ```python
    guard = PrivacyGuard(local_kinds={"IBAN", "API_KEY"}, local_labels={"medical"})
    shunt = ShuntRunnable(small=small, large=prompt | ChatOpenAI() | StrOutputParser(), guard=guard)
    ```

    The guard processes everything that a shunt sends to its large side: the input, the history and the small model's
    prediction. Entities are replaced by placeholders such as `<EMAIL_1>`, equal texts by the same placeholder. Answers,
    streamed or not, contain the original texts again. The text of the prompt template itself is not checked.

    An input that contains local data is never sent. If a detector or a rule fails, the input stays on this machine too.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", frozen=True)

    detectors: tuple[Any, ...] = Field(default=DETECTORS, exclude=True, repr=False)
    """Detectors to apply. Names require named entity recognition (see `PresidioDetector`)."""

    redact: frozenset[str] | Literal["all", "none"] = "all"
    """Kinds that are replaced by placeholders."""

    local_kinds: frozenset[str] = frozenset()
    """Kinds that must not leave this machine. An input that contains one is not sent."""

    local_labels: frozenset[str] = frozenset()
    """Labels that must not leave this machine. An input predicted as one is not sent, at any confidence. Neither is one
    whose conversation has an earlier message predicted as one."""

    local_probability: float = Field(default=0.4, gt=0.0, le=1.0)
    """Probability of all local labels together from which an input is not sent, even if another label is likelier."""

    local_where: Callable[[str], bool] | None = Field(default=None, exclude=True, repr=False)
    """Rule that returns True for texts that must not leave this machine."""

    allow_binary: bool = False
    """Whether images, audio and files may be sent, although detectors cannot check them."""

    on_local: Literal["small", "abstain", "raise"] = "small"
    """Output for an input that is not sent.

    "small" returns the small model's answer, or abstains if it has none. "abstain" returns an `AbstainedLocally`.
    "raise" raises a `LocalOnlyError`.
    """

    budget: DisclosureBudget | None = None
    """Limits on the data sent. None means no limits."""

    def model_post_init(self, context: Any, /) -> None:
        """Check that the detectors find every configured kind."""
        super().model_post_init(context)
        for detector in self.detectors:
            if not isinstance(detector, Detector):
                raise ConfigurationError(
                    f"Expected a detector with `kinds` and `find(text)`, got {type(detector).__name__}. Pass a "
                    f"PatternDetector, a PresidioDetector or a class of your own."
                )
        known = {kind for detector in self.detectors for kind in detector.kinds}
        wanted = self.local_kinds | (self.redact if isinstance(self.redact, frozenset) else frozenset())
        if unknown := sorted(wanted - known):
            raise ConfigurationError(
                f"No detector finds {', '.join(unknown)}. Add a detector, or use these kinds: "
                f"{', '.join(sorted(known))}."
            )

    def check_without_labels(self, where: str) -> None:
        """Raise if the guard needs predicted labels, for callers without a small model.

        Raises:
            ConfigurationError: The guard has `local_labels`.
        """
        if self.local_labels:
            raise ConfigurationError(
                f"The guard has local_labels ({', '.join(sorted(self.local_labels))}), but {where} has no small "
                f"model to predict them. Use local_kinds or local_where instead."
            )

    def check_prediction(self, prediction: Prediction | None) -> LocalOnlyError | None:
        """Return the error for an input that must stay local because of its predicted label, or None if it may be sent.

        If the guard has `local_labels` and the prediction is missing, the input stays local.
        """
        if prediction is not None and prediction.answer is None and self.local_labels:
            if prediction.label in self.local_labels:
                return LocalOnlyError(f"the small model predicts the local label {prediction.label!r}")
            likely = sum(prediction.probability(label) for label in self.local_labels)
            if likely >= self.local_probability:
                return LocalOnlyError(f"the small model gives local labels a probability of {likely:.2f}")
        if self.local_labels and prediction is None:
            return LocalOnlyError("the small model failed, so its label may be a local one")
        return None

    def check_predictions(self, predictions: Sequence[Prediction | None]) -> LocalOnlyError | None:
        """Return the first error that `check_prediction` returns for several predictions, or None."""
        if not self.local_labels:
            return None
        return next((found for one in predictions if (found := self.check_prediction(one)) is not None), None)

    def outbound(self, value: Any, subject: str | None = None) -> tuple[Any, Placeholders]:
        """Return the redacted value and its placeholders, and count it in the budget.

        Args:
            value: Input of the large model, of any structure.
            subject: Id of the data subject.

        Raises:
            LocalOnlyError: The value must not leave this machine, or a detector or rule failed.
        """
        found = self.placeholders()
        try:
            found.reserve(value)
            out = found.redact(value)
            if self.budget is not None:
                self.budget.spend(found, subject)
            return out, found
        except LocalOnlyError:
            raise
        except Exception as error:  # fail closed: nothing unchecked is sent
            raise LocalOnlyError(f"a detector or rule failed ({type(error).__name__})") from error

    def placeholders(self) -> Placeholders:
        """Return new placeholders with this guard's rules, for one call."""
        kinds = frozenset[str]() if self.redact == "none" else None if self.redact == "all" else self.redact
        return Placeholders(
            self.detectors, kinds=kinds, local=self.local_kinds, allow_binary=self.allow_binary,
            local_where=self.local_where,
        )  # fmt: skip

    @override
    def to_json(self) -> Any:
        """Serialise the guard, if it has neither custom detectors nor a rule nor a shared ledger."""
        own = tuple(self.detectors) != DETECTORS or self.local_where is not None
        if own or (self.budget is not None and not isinstance(self.budget.ledger, LocalLedger)):
            return self.to_json_not_implemented()
        plain: Any = super().to_json()
        plain["kwargs"] = {k: sorted(v) if isinstance(v, frozenset) else v for k, v in plain["kwargs"].items()}
        return plain

    def around(self, large: Runnable[Any, Any], small: Runnable[Any, Any] | None = None) -> GuardedModel:
        """Return a large model behind this guard.

        Args:
            large: The large model.
            small: Small model that predicts the labels of all messages that would leave. None skips this check.
        """
        writes = tuple(getattr(small, "labels", None) or ()) == ANSWER_LABELS
        return GuardedModel(large, self, small if self.local_labels and not writes else None)

    @property
    def is_local(self) -> bool:
        """Whether the guard needs no other machine or process, such as a shared ledger."""
        return self.budget is None or isinstance(self.budget.ledger, LocalLedger)

    def abstained(self, error: LocalOnlyError, prediction: Prediction | None) -> AbstainedLocally:
        """Return the answer for an input that no model may answer."""
        return AbstainedLocally(error.reason, error.kinds, prediction)


_LONG = 8_192
"""Characters from which a payload is checked in a thread if async, so that the event loop is not held."""


class GuardedModel(Runnable[Any, Any]):
    """Large model behind a guard. All that leaves passes this door: inputs, history, and keyword arguments.

    It creates no runs of its own, so that traces of the model contain the redacted inputs.

    Args:
        large: Large model.
        guard: Guard that processes its inputs and answers.
        small: Small model that predicts the labels of human messages. None checks no labels.
    """

    def __init__(self, large: Runnable[Any, Any], guard: PrivacyGuard, small: Runnable[Any, Any] | None = None) -> None:
        self.large, self.guard, self.small = large, guard, small

    @override
    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        asked, placeholders, kwargs = self._outbound(input, config, kwargs)
        return placeholders.restore(self.large.invoke(asked, config, **kwargs))

    @override
    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        asked, placeholders, kwargs = await self._aoutbound(input, config, kwargs)
        return placeholders.restore(await self.large.ainvoke(asked, config, **kwargs))

    def _outbound(
        self, value: Any, config: RunnableConfig | None, kwargs: dict[str, Any]
    ) -> tuple[Any, Placeholders, dict[str, Any]]:
        """Return the redacted input, its placeholders and the redacted keyword arguments.

        Raises:
            LocalOnlyError: Some of it must not leave this machine.
        """
        if self.small is not None:
            self._check_labels(value, self.small)
        payload, placeholders = self.guard.outbound((value, CallKeywords(kwargs)), subject_of(config))
        return payload[0], placeholders, payload[1]

    async def _aoutbound(
        self, value: Any, config: RunnableConfig | None, kwargs: dict[str, Any]
    ) -> tuple[Any, Placeholders, dict[str, Any]]:
        work = partial(self._outbound, value, config, kwargs)
        long = sum(islice(map(len, texts_in(value)), 1000)) > _LONG
        if long or self.small is not None or not self.guard.is_local:
            return await run_in_executor(config, work)
        return work()

    def _check_labels(self, value: Any, small: Runnable[Any, Any]) -> None:
        """Check the predicted labels of all human messages that would leave.

        Raises:
            LocalOnlyError: One of them has a local label, or cannot be predicted.
        """
        texts = list(dict.fromkeys(text for text in human_texts(value) if text.strip()))
        for answer in small.batch(texts, return_exceptions=True) if texts else ():
            prediction = answer if isinstance(answer, Prediction) else None
            if (error := self.guard.check_prediction(prediction)) is not None:
                raise error

    @override
    def batch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        results, rows, asked, each, found = self._sorted(inputs, config, kwargs)
        if rows:
            answers = self.large.batch(asked, each, return_exceptions=return_exceptions, **self._settings(kwargs))
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
        work = partial(self._sorted, inputs, config, kwargs)
        results, rows, asked, each, found = await run_in_executor(None, work)
        if rows:
            answers = await self.large.abatch(
                asked, each, return_exceptions=return_exceptions, **self._settings(kwargs)
            )
            self._take(results, rows, answers, found)
        return raise_first_error(results, return_exceptions)

    def _settings(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the redacted keyword arguments of a batch, without counting them a second time."""
        return dict(self.guard.placeholders().redact(CallKeywords(kwargs))) if kwargs else kwargs

    def _sorted(
        self, inputs: list[Any], config: RunnableConfig | list[RunnableConfig] | None, kwargs: dict[str, Any]
    ) -> tuple[list[Any], list[int], list[Any], Any, list[Placeholders]]:
        """Redact the inputs, and return the rows to send with their values, configs and placeholders.

        The results already contain the errors of the other rows.
        """
        results: list[Any] = [None] * len(inputs)
        rows: list[int] = []
        asked: list[Any] = []
        found: list[Placeholders] = []
        for i, value in enumerate(inputs):
            try:
                own = config[i] if isinstance(config, list) else config
                out, placeholders, _ = self._outbound(value, own, kwargs)
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
        asked, placeholders, kwargs = self._outbound(input, config, kwargs)
        restorer = StreamRestorer(placeholders)
        with closing(self.large.stream(asked, config, **kwargs)) as chunks:  # type: ignore[type-var]
            for chunk in chunks:
                yield restorer.feed(chunk)
        yield from restorer.rest()

    @override
    async def astream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> AsyncIterator[Any]:
        asked, placeholders, kwargs = await self._aoutbound(input, config, kwargs)
        restorer = StreamRestorer(placeholders)
        async with aclosing(self.large.astream(asked, config, **kwargs)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                yield restorer.feed(chunk)
        for chunk in restorer.rest():
            yield chunk


def subject_of(config: RunnableConfig | None) -> str | None:
    """Return the id of the data subject from a call's config, or None if it has none."""
    subject = ((config or {}).get("configurable") or {}).get(SUBJECT_KEY)
    return None if subject is None else str(subject)
