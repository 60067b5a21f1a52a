"""Adaptive policies: deferral and cost budgets, shadow mode, and a fail-safe for monitors."""

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
"""Number of rows that are decided with one threshold before it moves."""


class Control(Protocol):
    """A number that several callers read and change, such as `call_log.SharedThreshold` between processes."""

    def get(self, start: float) -> float:
        """Return the value, or `start` if none is set yet."""

    def add(self, start: float, change: float) -> float:
        """Add `change` atomically and return the new value. An unset value starts from `start`."""


class LocalControl:
    """A number shared by the threads of one process. Copies are independent."""

    def __init__(self) -> None:
        self._lock, self._value = threading.Lock(), math.nan

    def __getstate__(self) -> float:
        with self._lock:
            return self._value

    def __setstate__(self, value: float) -> None:
        self._lock, self._value = threading.Lock(), value

    def __eq__(self, other: object) -> bool:
        """Return True for any `LocalControl`, because policies compare by settings and the value is not one."""
        return isinstance(other, LocalControl)

    def __hash__(self) -> int:
        return hash(LocalControl)

    def swap(self, value: float) -> float:
        """Set the value and return the previous one, or NaN if none was set."""
        with self._lock:
            before, self._value = self._value, value
            return before

    def get(self, start: float) -> float:
        """Return the value, or `start` if none is set yet."""
        with self._lock:
            return start if math.isnan(self._value) else self._value

    def add(self, start: float, change: float) -> float:
        """Add `change` under a lock and return the new value. An unset value starts from `start`."""
        with self._lock:
            self._value = (start if math.isnan(self._value) else self._value) + change
            return self._value


class _Controlled(Policy):
    """Answer locally if the score reaches a threshold that adapts to the observed number of deferrals."""

    start: float = 0.9
    """Initial threshold."""

    gain: float = Field(default=0.02, gt=0.0, le=1.0)
    """Threshold change per decision, as a fraction of the score's range. Larger values react faster but vary more."""

    score: ConfidenceScore = Field(default_factory=MaxProbability)
    """Confidence score. Defaults to the probability of the predicted label."""

    control: Any = Field(default=None, exclude=True, repr=False)
    """Storage of the threshold, a `Control`. None keeps it in this process."""

    _control: Any = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Create a `LocalControl` if no control was given."""
        super().model_post_init(context)
        self._control = self.control if self.control is not None else LocalControl()

    @abstractmethod
    def _allowed(self, rows: int) -> float:
        """Return how many of `rows` inputs may be deferred now, and account for their arrival."""

    def _expected(self, rows: int) -> float:
        """Return how many of `rows` inputs may be deferred within a batch, without accounting for them."""
        return 0.0

    @override
    def evaluate(self, batch: PredictionBatch, threshold: FloatArray | None = None) -> PolicyDecision:
        """Answer locally the rows whose score reaches the adaptive threshold.

        In a long batch, the threshold's movement is simulated every `STEP_ROWS` rows. The stored threshold does not
        change here. `observe` moves it when the final number of deferrals is known.
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
        """Move the threshold by the deferrals of one call, at most as far as `STEP_ROWS` such inputs would."""
        limit, part = self._control.get(self.start), min(1.0, STEP_ROWS / max(1, total))
        low, high = self.score.bounds(None)
        furthest = STEP_ROWS * self.gain * (high - low)  # bounds windup by deferrals that the threshold did not cause
        moved = limit + self._move(limit, part * (asked - self._allowed(total)))
        self._control.add(self.start, min(max(moved, low - furthest), high + furthest) - limit)

    def _move(self, limit: float, surplus: float) -> float:
        """Return the threshold change for `surplus` deferrals above the allowance."""
        low, high = self.score.bounds(None)
        return -self.gain * (high - low) * surplus

    @property
    def current(self) -> float:
        """Current threshold."""
        return float(self._control.get(self.start))


class DeferralBudget(_Controlled):
    """Hold the deferral rate at `rate` in the long run, even if traffic drifts.

    After each decision the threshold moves by gain * (rate - deferred), as in adaptive conformal inference (Gibbs &
    Candes 2021). Over T decisions the deferral rate deviates from `rate` by at most about 1 / (gain * T), for any
    sequence of inputs.

    Attributes:
        rate: Target deferral rate, in [0, 1].
    """

    rate: float = Field(ge=0.0, le=1.0)

    @override
    def _allowed(self, rows: int) -> float:
        return self.rate * rows

    @override
    def _expected(self, rows: int) -> float:
        return self.rate * rows


class CostBudget(_Controlled):
    """Hold the spending on the large model at `usd_per_hour` in the long run.

    The allowance grows with time. Unused allowance accumulates for up to `burst_seconds`.

    Attributes:
        usd_per_hour: Budget in USD per hour, for all processes together.
        usd_per_call: Average cost of one call in USD.
        processes: Number of processes that share the budget. Each one allows itself an equal part, even if they share
            a `control`.
        burst_seconds: Maximum time over which unused allowance accumulates, in seconds.
        clock: Monotonic clock in seconds, replaceable in tests.
    """

    usd_per_hour: float = Field(gt=0.0)
    usd_per_call: float = Field(gt=0.0)
    processes: int = Field(default=1, ge=1)
    burst_seconds: float = Field(default=60.0, gt=0.0)
    clock: Callable[[], float] = Field(default=time.monotonic, exclude=True, repr=False)

    _last: LocalControl = PrivateAttr(default_factory=LocalControl)

    @override
    def observe(self, asked: int, total: int) -> None:
        """Move the threshold by all deferrals of one call. Each one costs money, so the step has no limit per call."""
        limit = self._control.get(self.start)
        self._control.add(self.start, self._move(limit, asked - self._allowed(total)))

    @override
    def _move(self, limit: float, surplus: float) -> float:
        """Return 0.0 for an upward move if every input is already deferred.

        Low traffic that cannot spend the budget must not raise the threshold without bound.
        """
        return 0.0 if surplus < 0 and limit > self.score.bounds(None)[1] else super()._move(limit, surplus)

    @override
    def _allowed(self, rows: int) -> float:
        now = self.clock()
        before = self._last.swap(now)
        passed = 0.0 if math.isnan(before) else min(self.burst_seconds, max(0.0, now - before))
        return passed * self.usd_per_hour / 3600.0 / self.usd_per_call / self.processes


class ShadowOf(Policy):
    """Defer every input, but report the score and threshold that another policy would have used.

    Attributes:
        policy: Policy to run in shadow mode.
    """

    policy: Policy

    def evaluate(self, batch: PredictionBatch, threshold: FloatArray | None = None) -> PolicyDecision:
        """Defer all rows, with the score and threshold of the wrapped policy."""
        verdict = self.policy.evaluate(batch, threshold)
        return verdict._replace(keep=np.zeros(len(batch), dtype=np.bool_))

    def observe(self, asked: int, total: int) -> None:
        """Forward the number of inputs that the wrapped policy would have deferred (see `Plan.count_unconfident`)."""
        self.policy.observe(asked, total)

    def check(self, labels: tuple[str, ...] | None) -> None:
        """Check the wrapped policy."""
        self.policy.check(labels)


class FailSafe(Policy):
    """Apply another policy until a monitor raises an alarm, then defer every input.

    Attributes:
        policy: Policy to apply until the monitor raises an alarm.
        monitor: Monitor with the attribute `alarmed`.
    """

    policy: Policy
    monitor: Any = Field(exclude=True, repr=False)

    def evaluate(self, batch: PredictionBatch, threshold: FloatArray | None = None) -> PolicyDecision:
        """Return the decisions of the wrapped policy, or defer all rows if the monitor is in alarm."""
        verdict = self.policy.evaluate(batch, threshold)
        return verdict if not self.monitor.alarmed else verdict._replace(keep=np.zeros(len(batch), dtype=np.bool_))

    def observe(self, asked: int, total: int) -> None:
        """Forward the counts to the wrapped policy."""
        self.policy.observe(asked, total)

    def check(self, labels: tuple[str, ...] | None) -> None:
        """Check the wrapped policy."""
        self.policy.check(labels)
