"""DisclosureBudget: how much may leave, for one request, one person and all together; with a trail of what did.

In the sense of maximising quality subject to bounds on what is disclosed: the bounds stand here, the policy sees to
quality.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from pydantic import ConfigDict, Field

from langchain_datashunt._utils.settings import Configured
from langchain_datashunt.exceptions import ConfigurationError, LocalOnlyError
from langchain_datashunt.privacy.redaction import Placeholders


class Disclosure(NamedTuple):
    """One line of the trail: counts and hashes, never a text.

    Attributes:
        time: Seconds since 1970 UTC.
        budget: The budget's name.
        subject: Stands for whose data it is, 16 bytes; None where nobody said.
        digest: Stands for what left, or would have, 16 bytes.
        characters: How much that was.
        replaced: Entities that left as placeholders, by kind.
        plain: Entities that left as they were, by kind.
        refused: Which bound kept it here; empty where it left.
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
    """Where budgets are counted."""

    def spend(self, amounts: Mapping[str, tuple[float, float]]) -> str | None:
        """Add amounts to what was spent under their names, all or none; the name of the first that is above its bound.

        Args:
            amounts: By name the amount and the bound.
        """

    def note(self, entry: Disclosure) -> None:
        """Write a line of the trail."""


class LocalLedger:
    """Counts in this process.

    Args:
        keep: Lines of the trail that are kept.
    """

    def __init__(self, keep: int = 10_000) -> None:
        self._lock = threading.Lock()
        self._spent: dict[str, float] = {}
        self._room = 100_000
        self.trail: deque[Disclosure] = deque(maxlen=keep)

    def spend(self, amounts: Mapping[str, tuple[float, float]]) -> str | None:
        """As `Ledger.spend`."""
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
        """Forget what was spent in other periods of this name's budget."""
        budget, period = newest.split(":")[1:3]
        self._spent = {
            name: spent
            for name, spent in self._spent.items()
            if name.split(":")[1] != budget or name.split(":")[2] == period
        }
        self._room = 2 * max(50_000, len(self._spent))

    def note(self, entry: Disclosure) -> None:
        """As `Ledger.note`."""
        self.trail.append(entry)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process counts for itself."""
        return LocalLedger, (self.trail.maxlen,)


_ROUNDING = 1e-9
"""Ten times 0.1 is 1.0 here, whatever binary numbers make of it."""


class PeriodBudget(Configured):
    """Amounts that are bounded in each period, counted in a ledger. The base of budgets; it knows no amounts itself."""

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", frozen=True)

    bounds: ClassVar[tuple[str, ...]] = ()
    """The settings that are bounds; those that begin with "subject_" are a person's."""

    name: str = Field(default="default", pattern=r"^[\w.-]{1,60}$")
    """Of this budget; processes that share a ledger and a name share what was spent."""

    period_seconds: float = Field(default=86_400.0, gt=0.0)
    """Length of a period; the first began in 1970, UTC."""

    ledger: Any = Field(default_factory=LocalLedger, exclude=True, repr=False)
    """Where it is counted: in this process, or for all processes with a `distillation.SharedLedger`."""

    clock: Callable[[], float] = Field(default=time.time, exclude=True, repr=False)
    """Seconds since 1970 UTC."""

    def model_post_init(self, context: Any, /) -> None:
        """Check the ledger."""
        super().model_post_init(context)
        if not isinstance(self.ledger, Ledger):
            raise ConfigurationError(f"A {type(self.ledger).__name__} is no ledger: it needs `spend` and `note`.")
        if all(getattr(self, bound) is None for bound in self.bounds):
            raise ConfigurationError(
                f"A {type(self).__name__} without a bound does nothing; give one of {', '.join(self.bounds)}."
            )

    def above(self, amounts: Mapping[str, float], person: bytes | None) -> str:
        """Count amounts in the period of now; the first bound that they are above, and then nothing is counted.

        Args:
            amounts: By the name of their bound among all together, such as "calls"; a person's are the same amounts.
            person: Stands for whose data it is; None where nobody said.

        Returns:
            The bound; empty for none.
        """
        told = {**amounts, **({} if person is None else {f"subject_{name}": n for name, n in amounts.items()})}
        wanted = {bound: amount for bound, amount in told.items() if getattr(self, bound, None) is not None}
        period, names = int(self.clock() // self.period_seconds), dict[str, str]()
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
    """Bounds on what leaves for the large model; what would go above one stays here.

    ```python
    guard = PrivacyGuard(budget=DisclosureBudget(request_characters=4000, subject_calls=50, usd=20, usd_per_call=0.01))
    shunt.invoke(text, {"configurable": {"shunt_subject": "jane"}})
    ```

    Characters are those after redaction; entities are those that leave as they are, since a placeholder discloses none.
    Bounds of a subject hold for calls that say whose data they are. A ledger that cannot be reached keeps the input
    here. Each attempt of a retried call counts. Money is counted before a call, when its price is not known yet: as
    `usd_per_call` and `usd_per_1000_characters` of what leaves, which you choose so that they cover the answer too.
    """

    bounds: ClassVar[tuple[str, ...]] = (
        "request_characters", "request_entities", "subject_characters", "subject_entities", "subject_calls",
        "subject_usd", "characters", "entities", "calls", "usd",
    )  # fmt: skip

    request_characters: int | None = Field(default=None, ge=0)
    """In one request at the most; None for no bound, as for all that follow."""

    request_entities: int | None = Field(default=None, ge=0)
    """In one request."""

    subject_characters: int | None = Field(default=None, ge=0)
    """Of one person in a period."""

    subject_entities: int | None = Field(default=None, ge=0)
    """Of one person in a period."""

    subject_calls: int | None = Field(default=None, ge=0)
    """About one person in a period."""

    characters: int | None = Field(default=None, ge=0)
    """Of all together in a period."""

    entities: int | None = Field(default=None, ge=0)
    """Of all together in a period."""

    calls: int | None = Field(default=None, ge=0)
    """Of all together in a period."""

    subject_usd: float | None = Field(default=None, ge=0.0)
    """For one person's calls in a period."""

    usd: float | None = Field(default=None, ge=0.0)
    """For all calls together in a period."""

    usd_per_call: float = Field(default=0.0, ge=0.0)
    """What a call is counted as."""

    usd_per_1000_characters: float = Field(default=0.0, ge=0.0)
    """And for 1,000 characters that leave."""

    def model_post_init(self, context: Any, /) -> None:
        """Check that money can be counted."""
        super().model_post_init(context)
        if (self.usd, self.subject_usd) != (None, None) and not self.usd_per_call + self.usd_per_1000_characters:
            raise ConfigurationError(
                "A bound in USD needs to know what a call costs: give usd_per_call or usd_per_1000_characters."
            )

    def spend(self, found: Placeholders, subject: str | None) -> None:
        """Count what is about to leave, and note it in the trail.

        Args:
            found: What was replaced and what was not.
            subject: Whose data it is.

        Raises:
            LocalOnlyError: It would go above a bound, or the ledger cannot be reached.
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
            raise LocalOnlyError(f"what leaves cannot be noted ({type(error).__name__})") from error
        if refused:
            raise LocalOnlyError(f"the bound {refused!r} of the budget {self.name!r} is reached")

    def _refused(self, characters: int, entities: int, person: bytes | None) -> str:
        """Which bound this request is above; empty for none, and then it is counted."""
        for bound, amount in (("request_characters", characters), ("request_entities", entities)):
            most = getattr(self, bound)
            if most is not None and amount > most:
                return bound
        usd = self.usd_per_call + self.usd_per_1000_characters * characters / 1000.0
        amounts = {"characters": characters, "entities": entities, "calls": 1, "usd": usd}
        try:
            return self.above(amounts, person)
        except Exception as error:  # a database that is away: nothing leaves that cannot be counted
            raise LocalOnlyError(f"the budget {self.name!r} cannot be counted ({type(error).__name__})") from error
