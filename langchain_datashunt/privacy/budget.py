"""Disclosure budgets: limits on the data sent to the LLM per request, per subject and in total, with an audit trail."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from pydantic import ConfigDict, Field, PrivateAttr

from langchain_datashunt._utils.settings import Configured
from langchain_datashunt.exceptions import ConfigurationError, LocalOnlyError
from langchain_datashunt.privacy.redaction import Placeholders


class Disclosure(NamedTuple):
    """Entry of the audit trail: counts and hashes, never text.

    Attributes:
        time: Seconds since 1970 UTC.
        budget: Name of the budget.
        subject: Hash of the data subject's id, 16 bytes, or None if the call names no subject.
        digest: Hash of the text that was sent or refused, 16 bytes.
        characters: Number of characters of that text.
        replaced: Number of entities replaced by placeholders, by kind.
        plain: Number of entities left unchanged, by kind.
        refused: Name of the limit that was exceeded, or "" if the text was sent.
    """

    time: float
    budget: str
    subject: bytes | None
    digest: bytes
    characters: int
    replaced: Mapping[str, int]
    plain: Mapping[str, int]
    refused: str


@runtime_checkable
class Ledger(Protocol):
    """Storage for the amounts spent and for the audit trail."""

    def spend(self, amounts: Mapping[str, tuple[float, float]]) -> str | None:
        """Add all amounts to those already spent, unless one of them would exceed its limit.

        Args:
            amounts: Pairs of amount and limit, by name.

        Returns:
            Name of the first exceeded limit (nothing is added then), or None.
        """

    def note(self, entry: Disclosure) -> None:
        """Append an entry to the audit trail."""


class LocalLedger:
    """Ledger in the memory of this process.

    Args:
        keep: Maximum number of entries in the audit trail. Older ones are dropped.
    """

    def __init__(self, keep: int = 10_000) -> None:
        self._lock = threading.Lock()
        self._spent: dict[str, float] = {}
        self._room = 100_000
        self.trail: deque[Disclosure] = deque(maxlen=keep)

    def spend(self, amounts: Mapping[str, tuple[float, float]]) -> str | None:
        """Add all amounts to those already spent, unless one of them would exceed its limit.

        Returns:
            Name of the first exceeded limit (nothing is added then), or None.
        """
        with self._lock:
            for name, (amount, bound) in amounts.items():
                if self._spent.get(name, 0.0) + amount > bound:
                    return name
            for name, (amount, _) in amounts.items():
                self._spent[name] = self._spent.get(name, 0.0) + amount
            if len(self._spent) > self._room:
                self._forget(next(iter(amounts)))
        return None

    def _forget(self, newest: str) -> None:
        """Drop the amounts of other periods of the budget that `newest` belongs to."""
        budget, period = newest.split(":")[1:3]
        self._spent = {
            name: spent
            for name, spent in self._spent.items()
            if name.split(":")[1] != budget or name.split(":")[2] == period
        }
        self._room = 2 * max(50_000, len(self._spent))

    def note(self, entry: Disclosure) -> None:
        """Append an entry to the audit trail."""
        self.trail.append(entry)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as an empty ledger, because each process counts separately."""
        return LocalLedger, (self.trail.maxlen,)


_ROUNDING = 1e-9
"""Relative tolerance of limits, so that ten times 0.1 fits a limit of 1.0 despite binary rounding."""


class PeriodBudget(Configured):
    """Base class of budgets that limit amounts per period. Subclasses define the amounts."""

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", frozen=True)

    bounds: ClassVar[tuple[str, ...]] = ()
    """Names of the settings that are limits. Those that begin with "subject_" apply to each data subject."""

    name: str = Field(default="default", pattern=r"^[\w.-]{1,60}$")
    """Name of the budget. Processes with the same ledger and name share the amounts spent."""

    period_seconds: float = Field(default=86_400.0, gt=0.0)
    """Length of a period in seconds. Periods are counted from 1970 UTC."""

    ledger: Any = Field(default_factory=LocalLedger, exclude=True, repr=False)
    """Storage of the amounts: this process, or all processes with a `call_log.SharedLedger`."""

    clock: Callable[[], float] = Field(default=time.time, exclude=True, repr=False)
    """Clock that returns seconds since 1970 UTC."""

    _period: int = PrivateAttr(default=0)

    def model_post_init(self, context: Any, /) -> None:
        """Check that the ledger is usable and that at least one limit is set."""
        super().model_post_init(context)
        if not isinstance(self.ledger, Ledger):
            raise ConfigurationError(
                f"Expected a `ledger` with the methods `spend` and `note`, got {type(self.ledger).__name__}. Pass "
                f"LocalLedger() or a SharedLedger."
            )
        if all(getattr(self, bound) is None for bound in self.bounds):
            raise ConfigurationError(
                f"Expected at least one limit for {type(self).__name__}, got none. Set one of {', '.join(self.bounds)}."
            )

    def above(self, amounts: Mapping[str, float], person: bytes | None) -> str:
        """Add amounts to the current period, unless one of them would exceed its limit.

        Args:
            amounts: Amounts by the name of their limit, such as "calls". The subject's limits use the same amounts.
            person: Hash of the data subject's id, or None if the call names no subject.

        Returns:
            Name of the first exceeded limit (nothing is added then), or "".
        """
        all_amounts = {**amounts, **({} if person is None else {f"subject_{name}": n for name, n in amounts.items()})}
        wanted = {bound: amount for bound, amount in all_amounts.items() if getattr(self, bound, None) is not None}
        names = dict[str, str]()
        # a clock that is set back must not open a period again whose amounts are spent
        period = self._period = max(self._period, int(self.clock() // self.period_seconds))
        for bound in wanted:
            whose = f":{person.hex()}" if person is not None and bound.startswith("subject") else ""
            names[f"spent:{self.name}:{period}:{bound}{whose}"] = bound
        if not names:
            return ""
        above = self.ledger.spend(
            {name: (float(wanted[b]), getattr(self, b) * (1.0 + _ROUNDING)) for name, b in names.items()}
        )
        return "" if above is None else names[above]


class DisclosureBudget(PeriodBudget):
    """Limit the data sent to the large model. An input that would exceed a limit stays on this machine.

    ```python
    guard = PrivacyGuard(budget=DisclosureBudget(request_characters=4000, subject_calls=50, usd=20, usd_per_call=0.01))
    shunt.invoke(text, {"configurable": {"shunt_subject": "jane"}})
    ```

    Characters are counted after redaction. Entities are counted only if they are sent unchanged, because a placeholder
    discloses none. Limits per subject apply to calls that name the data subject in their config. Each attempt of a
    retried call counts.

    Costs are counted before the call, when its price is still unknown. The estimate is `usd_per_call` plus
    `usd_per_1000_characters` of the text sent. Choose values that cover the answer too.

    If the ledger is unavailable, the input stays on this machine.
    """

    bounds: ClassVar[tuple[str, ...]] = (
        "request_characters", "request_entities", "subject_characters", "subject_entities", "subject_calls",
        "subject_usd", "characters", "entities", "calls", "usd",
    )  # fmt: skip

    request_characters: int | None = Field(default=None, ge=0)
    """Maximum characters in one request. None means no limit, as for all limits below."""

    request_entities: int | None = Field(default=None, ge=0)
    """Maximum unreplaced entities in one request."""

    subject_characters: int | None = Field(default=None, ge=0)
    """Maximum characters per subject and period."""

    subject_entities: int | None = Field(default=None, ge=0)
    """Maximum unreplaced entities per subject and period."""

    subject_calls: int | None = Field(default=None, ge=0)
    """Maximum LLM calls per subject and period."""

    characters: int | None = Field(default=None, ge=0)
    """Maximum characters per period."""

    entities: int | None = Field(default=None, ge=0)
    """Maximum unreplaced entities per period."""

    calls: int | None = Field(default=None, ge=0)
    """Maximum LLM calls per period."""

    subject_usd: float | None = Field(default=None, ge=0.0)
    """Maximum estimated cost per subject and period, in USD."""

    usd: float | None = Field(default=None, ge=0.0)
    """Maximum estimated cost per period, in USD."""

    usd_per_call: float = Field(default=0.0, ge=0.0)
    """Estimated cost of one call, in USD."""

    usd_per_1000_characters: float = Field(default=0.0, ge=0.0)
    """Estimated additional cost of 1,000 characters sent, in USD."""

    def model_post_init(self, context: Any, /) -> None:
        """Check that a limit in USD comes with a cost estimate."""
        super().model_post_init(context)
        if (self.usd, self.subject_usd) != (None, None) and not self.usd_per_call + self.usd_per_1000_characters:
            raise ConfigurationError(
                "A limit in USD requires a cost estimate. Set `usd_per_call` or `usd_per_1000_characters`."
            )

    def spend(self, found: Placeholders, subject: str | None) -> None:
        """Count a request before it is sent and append it to the audit trail.

        Args:
            found: Result of the redaction.
            subject: Id of the data subject. None applies no limits per subject.

        Raises:
            LocalOnlyError: The request would exceed a limit, or the ledger is unavailable.
        """
        now, plain = self.clock(), sum(found.plain.values())
        person = None if subject is None else hashlib.sha256(b"subject\0" + subject.encode()).digest()[:16]
        refused = self._refused(found.characters, plain, person)
        entry = Disclosure(
            now, self.name, person, found.digest, found.characters, dict(found.counts), dict(found.plain), refused
        )
        try:
            self.ledger.note(entry)
        except Exception as error:
            raise LocalOnlyError(f"the disclosure cannot be logged ({type(error).__name__})") from error
        if refused:
            raise LocalOnlyError(f"the limit {refused!r} of the budget {self.name!r} is reached")

    def _refused(self, characters: int, entities: int, person: bytes | None) -> str:
        """Return the name of the limit that this request would exceed, or count the request and return ""."""
        for bound, amount in (("request_characters", characters), ("request_entities", entities)):
            most = getattr(self, bound)
            if most is not None and amount > most:
                return bound
        usd = self.usd_per_call + self.usd_per_1000_characters * characters / 1000.0
        amounts = {"characters": characters, "entities": entities, "calls": 1, "usd": usd}
        try:
            return self.above(amounts, person)
        except Exception as error:  # an unavailable database: fail closed
            raise LocalOnlyError(f"the budget {self.name!r} cannot be counted ({type(error).__name__})") from error
