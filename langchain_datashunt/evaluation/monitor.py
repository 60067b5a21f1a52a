"""Monitor: whether the small model is still as good as it was. It watches and gives alarm; it routes nothing."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from langchain_datashunt._utils.optional import require
from langchain_datashunt.evaluation.betting import ConfidenceSequence
from langchain_datashunt.exceptions import ConfigurationError
from langchain_datashunt.prediction import FloatArray

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Alarm:
    """What a monitor found.

    Attributes:
        kind: "error" or "drift".
        message: In words.
        value: The lower bound of the error, or the p-value.
    """

    kind: str
    message: str
    value: float


class Monitor:
    """Estimates the small model's error from audits and true labels, and tests its confidence for drift.

    Audits are a random part of what the small model answers, so their mean is an unbiased estimate of its error there;
    the interval holds at all times at once (a confidence sequence), so one may look as often as one likes. An audit
    compares with the large model's answer: it bounds disagreement, a true label bounds error.

    Args:
        max_error: Error among the kept that is still acceptable; alarm when the interval lies above. None for never.
        level: Confidence of the interval; and one less the chance of a false alarm for drift, over all time.
        reference: Confidences on calibration data, to test drift against; None takes the first `window`.
        window: Confidences in each test for drift.
        on_alarm: Called with an `Alarm`; an error that it raises is logged.
    """

    def __init__(
        self,
        *,
        max_error: float | None = None,
        level: float = 0.95,
        reference: Sequence[float] | FloatArray | None = None,
        window: int = 500,
        on_alarm: Callable[[Alarm], Any] | None = None,
    ) -> None:
        if max_error is not None and not 0.0 < max_error < 1.0:
            raise ConfigurationError(f"max_error is {max_error}; give a share between 0 and 1, for example 0.05.")
        if window < 20:
            raise ConfigurationError(f"A window of {window} confidences shows no drift; give 20 or more.")
        self.max_error, self.level, self.window, self.on_alarm = max_error, level, window, on_alarm
        self._stats = require("scipy.stats", "calibration")
        self._given = None if reference is None else np.asarray(reference, dtype=np.float64)
        if self._given is not None and (not self._given.size or not np.isfinite(self._given).all()):
            raise ConfigurationError(
                f"The reference has {self._given.size} confidences, and must have some, none of them NaN: those of the "
                f"examples that the threshold was chosen on."
            )
        self.reference = self._given
        self.disagreement, self.error = ConfidenceSequence(level), ConfidenceSequence(level)
        self.alarms: list[Alarm] = []
        self._seen: list[float] = []
        self._tests = 0
        self._lock = threading.Lock()

    @property
    def alarmed(self) -> bool:
        """Whether there was an alarm since the last `reset`."""
        return bool(self.alarms)

    def reset(self) -> None:
        """Begin anew, after the cause of an alarm is mended."""
        with self._lock:
            self.disagreement, self.error = ConfidenceSequence(self.level), ConfidenceSequence(self.level)
            self.alarms, self._seen, self._tests, self.reference = [], [], 0, self._given

    def audited(self, small_label: str, large_label: str | None) -> None:
        """Take in what the large model said of an input that the small model had answered."""
        self._wrong(self.disagreement, small_label != large_label, "disagreement with the large model")

    def labelled(self, small_label: str, true_label: str) -> None:
        """Take in the true label of an input that the small model had answered, chosen without regard to it."""
        self._wrong(self.error, small_label != true_label, "error")

    def _wrong(self, sequence: ConfidenceSequence, wrong: bool, what: str) -> None:
        with self._lock:
            sequence.add(float(wrong))
            low, high = sequence.interval
            known = any(alarm.kind == "error" for alarm in self.alarms)
            over = self.max_error is not None and low > self.max_error and not known
            alarm = Alarm(
                "error",
                f"The small model's {what} among what it answers is between {100 * low:.1f}% and {100 * high:.1f}% "
                f"({sequence.n} checked), and {100 * (self.max_error or 0):g}% are acceptable. Distil, retrain, or "
                f"raise the threshold.",
                low,
            )
        if over:
            self._raise(alarm)

    def saw(self, confidences: Sequence[float] | FloatArray) -> None:
        """Take in the confidence of inputs as they come."""
        alarms = []
        with self._lock:
            self._seen.extend(np.asarray(confidences, dtype=np.float64).tolist())
            while len(self._seen) >= self.window:
                now, self._seen = np.array(self._seen[: self.window]), self._seen[self.window :]
                if self.reference is None:
                    self.reference = now
                elif (alarm := self._drift(now)) is not None:
                    alarms.append(alarm)
        for alarm in alarms:
            self._raise(alarm)

    def _drift(self, now: FloatArray) -> Alarm | None:
        """Kolmogorov and Smirnov's two-sample test; the j-th test has the level a / (j (j + 1)), a in all."""
        self._tests += 1
        found = self._stats.ks_2samp(self.reference, now)
        p = float(found.pvalue)
        if p > (1.0 - self.level) / (self._tests * (self._tests + 1)) or any(a.kind == "drift" for a in self.alarms):
            return None
        assert self.reference is not None
        return Alarm(
            "drift",
            f"The small model's confidence has changed: median {np.median(now):.3f} in the last {self.window} inputs, "
            f"{np.median(self.reference):.3f} before (p = {p:.1g}). Inputs may be of another kind now; check a sample.",
            p,
        )

    def _raise(self, alarm: Alarm) -> None:
        self.alarms.append(alarm)
        logger.warning("%s", alarm.message)
        if self.on_alarm is not None:
            try:
                self.on_alarm(alarm)
            except Exception:
                logger.exception("on_alarm failed.")

    def report(self) -> dict[str, Any]:
        """The estimates so far, JSON-ready."""

        def told(sequence: ConfidenceSequence) -> dict[str, Any]:
            low, high = sequence.interval
            mean = None if math.isnan(sequence.mean) else sequence.mean
            return {"n": sequence.n, "mean": mean, "low": low, "high": high}

        with self._lock:
            return {
                "disagreement": told(self.disagreement),
                "error": told(self.error),
                "drift_tests": self._tests,
                "alarms": [vars(alarm) for alarm in self.alarms],
            }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_stats": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({**state, "_lock": threading.Lock(), "_stats": require("scipy.stats", "calibration")})
