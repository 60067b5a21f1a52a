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
from typing import Any, NamedTuple, Protocol, runtime_checkable

from pydantic import ConfigDict, Field

from langchain_datashunt.configured import Configured
from langchain_datashunt.exceptions import ConfigurationError, StaysLocal
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
        self.trail: deque[Disclosure] = deque(maxlen=keep)

    def spend(self, amounts: Mapping[str, tuple[float, float]]) -> str | None:
        """As `Ledger.spend`."""
        with self._lock:
            for name, (amount, bound) in amounts.items():
                if self._spent.get(name, 0.0) + amount > bound:
                    return name
            for name, (amount, _) in amounts.items():
                self._spent[name] = self._spent.get(name, 0.0) + amount
            if len(self._spent) > 100_000:  # of periods that are over
                self._spent = {name: self._spent[name] for name in amounts}
        return None

    def note(self, entry: Disclosure) -> None:
        """As `Ledger.note`."""
        self.trail.append(entry)


_BOUNDS = (
    "request_characters", "request_entities", "subject_characters", "subject_entities", "subject_calls", "characters",
    "entities", "calls",
)  # fmt: skip


class DisclosureBudget(Configured):
    """Bounds on what leaves for the large model; what would go above one stays here.

    ```python
    gate = OutboundGate(budget=DisclosureBudget(request_characters=4000, subject_calls=50, calls=10_000))
    shunt.invoke(text, {"configurable": {"shunt_subject": "jane"}})
    ```

    Characters are those after redaction; entities are those that leave as they are, since a placeholder discloses none.
    Bounds of a subject hold for calls that say whose data they are. A ledger that cannot be reached keeps the input
    here. Each attempt of a retried call counts.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", frozen=True)

    name: str = Field(default="default", pattern=r"^[\w.-]{1,60}$")
    """Of this budget; processes that share a ledger and a name share what was spent."""

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
        if all(getattr(self, bound) is None for bound in _BOUNDS):
            raise ConfigurationError(
                f"A DisclosureBudget without a bound does nothing; give one of {', '.join(_BOUNDS)}."
            )

    def spend(self, found: Placeholders, subject: str | None) -> None:
        """Count what is about to leave, and note it in the trail.

        Args:
            found: What was replaced and what was not.
            subject: Whose data it is.

        Raises:
            StaysLocal: It would go above a bound, or the ledger cannot be reached.
        """
        now, plain = self.clock(), sum(found.plain.values())
        person = None if subject is None else hashlib.sha256(b"subject\0" + subject.encode()).digest()[:16]
        refused = self._refused(found.characters, plain, person, int(now // self.period_seconds))
        entry = Disclosure(
            now, self.name, person, found.digest, found.characters, dict(found.counts), dict(found.plain), refused
        )
        try:
            self.ledger.note(entry)
        except Exception as error:
            raise StaysLocal(f"what leaves cannot be noted ({type(error).__name__})") from error
        if refused:
            raise StaysLocal(f"the bound {refused!r} of the budget {self.name!r} is reached")

    def _refused(self, characters: int, entities: int, person: bytes | None, period: int) -> str:
        """Which bound this request is above; empty for none, and then it is counted."""
        for bound, amount in (("request_characters", characters), ("request_entities", entities)):
            most = getattr(self, bound)
            if most is not None and amount > most:
                return bound
        amounts = {"characters": characters, "entities": entities, "calls": 1}
        wanted = {bound: amount for bound, amount in amounts.items() if getattr(self, bound) is not None}
        if person is not None:
            own = {f"subject_{bound}": amount for bound, amount in amounts.items()}
            wanted |= {bound: amount for bound, amount in own.items() if getattr(self, bound) is not None}
        names: dict[str, str] = {}
        for bound in wanted:
            whose = f":{person.hex()}" if person is not None and bound.startswith("subject") else ""
            names[f"spent:{self.name}:{period}:{bound}{whose}"] = bound
        if not names:
            return ""
        try:
            above = self.ledger.spend({name: (float(wanted[b]), float(getattr(self, b))) for name, b in names.items()})
        except Exception as error:  # a database that is away: nothing leaves that cannot be counted
            raise StaysLocal(f"the budget {self.name!r} cannot be counted ({type(error).__name__})") from error
        return "" if above is None else names[above]
