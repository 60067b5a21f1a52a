"""Monitor: alarms about excess error or drift of the small model in production."""

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
    """Alarm of a monitor.

    Attributes:
        kind: "error" or "drift".
        message: Finding and remedy as a text.
        value: Lower bound of the error, or p-value of the drift test.
    """

    kind: str
    message: str
    value: float


class Monitor:
    """Estimate the small model's error from audits and true labels, and test its confidence for drift.

    Audits compare a random sample of local answers with the large model, so they estimate disagreement without bias.
    True labels estimate error. The intervals are confidence sequences, which hold at all times at once and may be
    checked at any time. The monitor does not change routes by itself.

    Args:
        max_error: Acceptable selective risk. An alarm is raised if the interval lies above it. None disables the alarm.
        level: Confidence level of the intervals. False drift alarms have a probability of at most 1 - `level` over all
            time.
        reference: Confidences on calibration data, the reference for drift. None means the first `window` confidences.
        window: Number of confidences in each drift test, at least 20.
        on_alarm: Callback that receives each `Alarm`. Its exceptions are logged. None means no callback.

    Raises:
        ConfigurationError: `max_error`, `window` or `reference` is invalid.
        MissingExtraError: SciPy is not installed.
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
            raise ConfigurationError(
                f"Expected a number between 0 and 1 for `max_error`, got {max_error}. Pass 0.05, for example."
            )
        if window < 20:
            raise ConfigurationError(f"Expected at least 20 for `window`, got {window}. Pass a larger window.")
        self.max_error, self.level, self.window, self.on_alarm = max_error, level, window, on_alarm
        self._stats = require("scipy.stats", "calibration")
        self._given = None if reference is None else np.asarray(reference, dtype=np.float64)
        if self._given is not None and (not self._given.size or not np.isfinite(self._given).all()):
            raise ConfigurationError(
                f"Expected at least one confidence for `reference`, without NaN or infinity, got "
                f"{self._given.size} values. Pass the confidences of the calibration examples."
            )
        self.reference = self._given
        self.disagreement, self.error = ConfidenceSequence(level), ConfidenceSequence(level)
        self.alarms: list[Alarm] = []
        self._seen: list[float] = []
        self._tests = 0
        self._lock = threading.Lock()

    @property
    def alarmed(self) -> bool:
        """Whether there has been an alarm since the last `reset`."""
        return bool(self.alarms)

    def reset(self) -> None:
        """Clear all estimates and alarms, for example after the cause of an alarm is fixed."""
        with self._lock:
            self.disagreement, self.error = ConfidenceSequence(self.level), ConfidenceSequence(self.level)
            self.alarms, self._seen, self._tests, self.reference = [], [], 0, self._given

    def audited(self, small_label: str, large_label: str | None) -> None:
        """Record the large model's answer to an audited input that was answered locally.

        Args:
            small_label: Local answer of the small model.
            large_label: Answer of the large model, or None if unparsable, which counts as disagreement.
        """
        self._wrong(self.disagreement, small_label != large_label, "disagreement with the large model")

    def labelled(self, small_label: str, true_label: str) -> None:
        """Record the true label of an input that was answered locally.

        The estimate is unbiased only if the inputs to label are chosen regardless of their labels.
        """
        self._wrong(self.error, small_label != true_label, "error")

    def _wrong(self, sequence: ConfidenceSequence, wrong: bool, what: str) -> None:
        with self._lock:
            sequence.add(float(wrong))
            low, high = sequence.interval
            known = any(alarm.kind == "error" for alarm in self.alarms)  # one alarm of a kind until `reset`
            over = self.max_error is not None and low > self.max_error and not known
            alarm = Alarm(
                "error",
                f"The small model's {what} among local answers is between {100 * low:.1f}% and {100 * high:.1f}% "
                f"({sequence.n} checked), but at most {100 * (self.max_error or 0):g}% is acceptable. Distil, retrain, "
                f"or raise the threshold.",
                low,
            )
        if over:
            self._raise(alarm)

    def saw(self, confidences: Sequence[float] | FloatArray) -> None:
        """Record the confidences of new inputs, and test each full window for drift."""
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
        """Return an alarm if the two-sample Kolmogorov-Smirnov test finds drift in a window, else None.

        The j-th test has level a / (j (j + 1)), so that all tests together have level a = 1 - `level`.
        """
        self._tests += 1
        found = self._stats.ks_2samp(self.reference, now)
        p = float(found.pvalue)
        if p > (1.0 - self.level) / (self._tests * (self._tests + 1)) or any(a.kind == "drift" for a in self.alarms):
            return None
        assert self.reference is not None
        return Alarm(
            "drift",
            f"The small model's confidence has drifted: the median is {np.median(now):.3f} in the last {self.window} "
            f"inputs, and was {np.median(self.reference):.3f} before (p = {p:.1g}). Check a sample of recent inputs.",
            p,
        )

    def _raise(self, alarm: Alarm) -> None:
        self.alarms.append(alarm)
        logger.warning("%s", alarm.message)
        if self.on_alarm is not None:
            try:
                self.on_alarm(alarm)
            except Exception:  # a failing callback must not fail the call that was audited
                logger.exception("The `on_alarm` callback failed.")

    def report(self) -> dict[str, Any]:
        """Return the estimates so far as a JSON-serialisable dictionary."""

        def as_dict(sequence: ConfidenceSequence) -> dict[str, Any]:
            low, high = sequence.interval
            mean = None if math.isnan(sequence.mean) else sequence.mean
            return {"n": sequence.n, "mean": mean, "low": low, "high": high}

        with self._lock:
            return {
                "disagreement": as_dict(self.disagreement),
                "error": as_dict(self.error),
                "drift_tests": self._tests,
                "alarms": [vars(alarm) for alarm in self.alarms],
            }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_stats": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({**state, "_lock": threading.Lock(), "_stats": require("scipy.stats", "calibration")})
