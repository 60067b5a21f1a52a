"""Policies that follow traffic: budgets kept by moving the threshold, shadow mode, and the fail-safe of a monitor."""

from __future__ import annotations

import math
import threading
import time
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from pydantic import Field, PrivateAttr
from typing_extensions import override

from langchain_datashunt.policies.scores import ConfidenceScore, MaxProbability
from langchain_datashunt.policies.thresholds import Policy, PolicyDecision
from langchain_datashunt.prediction import FloatArray, PredictionBatch

STEP_ROWS = 32
"""Rows that are decided with one threshold before it moves."""


class Control(Protocol):
    """A number that several callers read and move; `distillation.SharedThreshold` shares it between processes."""

    def get(self, start: float) -> float:
        """Its value; `start` where it has none yet."""

    def add(self, start: float, change: float) -> float:
        """Move it, at once for all; its new value."""


class LocalControl:
    """A number shared by the threads of one process; a copy goes its own way."""

    def __init__(self) -> None:
        self._lock, self._value = threading.Lock(), math.nan

    def __getstate__(self) -> float:
        with self._lock:
            return self._value

    def __setstate__(self, value: float) -> None:
        self._lock, self._value = threading.Lock(), value

    def __eq__(self, other: object) -> bool:
        """Policies are compared by their settings; where a threshold happens to stand is none."""
        return isinstance(other, LocalControl)

    def __hash__(self) -> int:
        return hash(LocalControl)

    def swap(self, value: float) -> float:
        """Set it; what it was before, NaN for nothing."""
        with self._lock:
            before, self._value = self._value, value
            return before

    def get(self, start: float) -> float:
        """Its value; `start` where it has none yet."""
        with self._lock:
            return start if math.isnan(self._value) else self._value

    def add(self, start: float, change: float) -> float:
        """Move it, at once for all threads; its new value."""
        with self._lock:
            self._value = (start if math.isnan(self._value) else self._value) + change
            return self._value


class _Controlled(Policy):
    """Keep where the score reaches a threshold that moves with what was asked."""

    start: float = 0.9
    """The threshold to begin with."""

    gain: float = Field(default=0.02, gt=0.0, le=1.0)
    """How far one decision moves the threshold, as a part of the score's range: small is steady, large is quick."""

    score: ConfidenceScore = Field(default_factory=MaxProbability)
    """How sureness is measured."""

    control: Any = Field(default=None, exclude=True, repr=False)
    """Where the threshold lives; None for this process alone."""

    _control: Any = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Take a control of its own where none is given."""
        super().model_post_init(context)
        self._control = self.control if self.control is not None else LocalControl()

    @abstractmethod
    def _allowed(self, rows: int) -> float:
        """How many of so many inputs may be asked now; takes note that they came."""

    def _expected(self, rows: int) -> float:
        """The same, for the rows of one batch, of which nothing is noted yet."""
        return 0.0

    @override
    def evaluate(self, batch: PredictionBatch, threshold: FloatArray | None = None) -> PolicyDecision:
        """Decide by the threshold now; in a long batch it moves every `STEP_ROWS` rows as it will be moved.

        Nothing is noted: that is `observe`'s, which a shunt calls when it knows what was asked in the end.
        """
        score, n = self.score(batch), len(batch)
        limit, limits = self._control.get(self.start), np.empty(n)
        for start in range(0, n, STEP_ROWS):
            rows = slice(start, min(n, start + STEP_ROWS))
            limits[rows] = limit
            asked = float((score[rows] < limit).sum())
            limit += self._move(limit, asked - self._expected(rows.stop - start))
        if threshold is not None:
            limits = np.where(np.isnan(threshold), limits, threshold)
        return PolicyDecision(score >= limits, score, limits)

    @override
    def observe(self, asked: int, total: int) -> None:
        """Move the threshold by what was asked; by a long batch no further than by `STEP_ROWS` inputs like it."""
        limit, part = self._control.get(self.start), min(1.0, STEP_ROWS / max(1, total))
        low, high = self.score.bounds(None)
        furthest = STEP_ROWS * self.gain * (high - low)  # what did not come from the threshold it does not pay for
        moved = limit + self._move(limit, part * (asked - self._allowed(total)))
        self._control.add(self.start, min(max(moved, low - furthest), high + furthest) - limit)

    def _move(self, limit: float, surplus: float) -> float:
        """How far the threshold moves for so many asked too many."""
        low, high = self.score.bounds(None)
        return -self.gain * (high - low) * surplus

    @property
    def current(self) -> float:
        """The threshold now."""
        return float(self._control.get(self.start))


class DeferralBudget(_Controlled):
    """Ask a given share of the inputs in the long run, however traffic drifts.

    After each decision the threshold moves by gain * (share - asked), as in adaptive conformal inference (Gibbs &
    Candes 2021): over T decisions the share asked is off by at most about 1 / (gain * T), whatever the inputs are.

    Attributes:
        rate: In [0, 1].
    """

    rate: float = Field(ge=0.0, le=1.0)

    @override
    def _allowed(self, rows: int) -> float:
        return self.rate * rows

    @override
    def _expected(self, rows: int) -> float:
        return self.rate * rows


class CostBudget(_Controlled):
    """Spend so many USD an hour on the large model in the long run.

    What may be asked grows with time; unused budget is saved up for `burst_seconds` at the most.

    Attributes:
        usd_per_hour: The budget.
        usd_per_call: What one call costs, on average.
        processes: How many processes spend it together; each allows itself its part, also with a shared `control`.
        burst_seconds: How long unused budget is kept.
        clock: Seconds that never go back; for tests.
    """

    usd_per_hour: float = Field(gt=0.0)
    usd_per_call: float = Field(gt=0.0)
    processes: int = Field(default=1, ge=1)
    burst_seconds: float = Field(default=60.0, gt=0.0)
    clock: Callable[[], float] = Field(default=time.monotonic, exclude=True, repr=False)

    _last: LocalControl = PrivateAttr(default_factory=LocalControl)

    @override
    def observe(self, asked: int, total: int) -> None:
        """Move the threshold by what was asked: all of it was paid, whatever it came from."""
        limit = self._control.get(self.start)
        self._control.add(self.start, self._move(limit, asked - self._allowed(total)))

    @override
    def _move(self, limit: float, surplus: float) -> float:
        """Not further up where everything is asked already: too little traffic to spend it all is no debt."""
        return 0.0 if surplus < 0 and limit > self.score.bounds(None)[1] else super()._move(limit, surplus)

    @override
    def _allowed(self, rows: int) -> float:
        now = self.clock()
        before = self._last.swap(now)
        passed = 0.0 if math.isnan(before) else min(self.burst_seconds, max(0.0, now - before))
        return passed * self.usd_per_hour / 3600.0 / self.usd_per_call / self.processes


class ShadowOf(Policy):
    """Defer everything, but note what another policy would have done: its score and threshold are in the decision."""

    policy: Policy

    def evaluate(self, batch: PredictionBatch, threshold: FloatArray | None = None) -> PolicyDecision:
        """Keep none."""
        verdict = self.policy.evaluate(batch, threshold)
        return verdict._replace(keep=np.zeros(len(batch), dtype=np.bool_))

    def observe(self, asked: int, total: int) -> None:
        """Tell the policy what it would have had asked; see `Plan.would_ask`."""
        self.policy.observe(asked, total)

    def check(self, labels: tuple[str, ...] | None) -> None:
        """Check the policy itself."""
        self.policy.check(labels)


class FailSafe(Policy):
    """Another policy as long as a monitor is content; everything deferred once it has given an alarm."""

    policy: Policy
    monitor: Any = Field(exclude=True, repr=False)

    def evaluate(self, batch: PredictionBatch, threshold: FloatArray | None = None) -> PolicyDecision:
        """As the policy, or keep none."""
        verdict = self.policy.evaluate(batch, threshold)
        return verdict if not self.monitor.alarmed else verdict._replace(keep=np.zeros(len(batch), dtype=np.bool_))

    def observe(self, asked: int, total: int) -> None:
        """Tell the policy itself."""
        self.policy.observe(asked, total)

    def check(self, labels: tuple[str, ...] | None) -> None:
        """Check the policy itself."""
        self.policy.check(labels)
