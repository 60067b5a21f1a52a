"""Whether the answers that taught a candidate are those of the large model as it was known. Nothing is decided here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from langchain_datashunt.call_log.record import CallRecord
from langchain_datashunt.exceptions import DataError
from langchain_datashunt.prediction import BoolArray, FloatArray
from langchain_datashunt.small_models.base import SmallModel


@dataclass(frozen=True)
class TeacherCheckResult:
    """What is to be thought of the answers that taught a candidate.

    Attributes:
        passed: Whether nothing speaks against them.
        reason: Why, in words.
        taught: Logged answers that were looked at.
        held_out: Held-out answers that they were compared with.
        surprising: Share of the logged answers that surprised the small model; NaN where nothing was compared.
        expected: The same of the held-out answers.
        lower_bound: One-sided lower bound of the difference between inputs of which the small model was equally sure.
    """

    passed: bool
    reason: str
    taught: int
    held_out: int
    surprising: float = math.nan
    expected: float = math.nan
    lower_bound: float = math.nan


@dataclass(frozen=True)
class TeacherCheck:
    """Compares the large model's answers in the log with those on held-out examples, as the small model sees them.

    An answer is surprising where the small model gives it less than a guess would, 1/k. Among inputs of which it is
    equally unsure, the large model's answers surprise it about equally often, whoever is right; where they do so
    clearly more often, the model, its prompt or the log has changed, and what is learnt from them may be wrong even
    though the small model that weighed them with its own opinion has not suffered yet. No true label is needed.

    The difference is Mantel's and Haenszel's over strata of equal confidence, its variance Sato's (1989).

    Attributes:
        margin: How much more often answers may be surprising, in [0, 1].
        level: Confidence of the bound.
        strata: Groups of equal confidence.
        min_examples: With fewer answers on either side nothing is compared.
    """

    margin: float = 0.02
    level: float = 0.95
    strata: int = 4
    min_examples: int = 50

    def test(
        self, small: SmallModel, calls: Iterable[CallRecord], texts: Sequence[str], answers: Sequence[str | None]
    ) -> TeacherCheckResult:
        """Compare.

        Args:
            small: The small model that the calls were recorded with, for the held-out examples.
            calls: Recorded calls; those in which the large model gave a label after the small one was unsure count.
            texts: `n` held-out inputs.
            answers: The large model's answers to them; None or a name outside the label set counts for nothing.

        Raises:
            DataError: Texts and answers are not equally many.
        """
        if len(texts) != len(answers):
            raise DataError(f"{len(texts)} held-out texts and {len(answers)} large answers: give one for each.")
        taught = np.array([row for call in calls if (row := _of_call(call)) is not None]).reshape(-1, 2)
        known = [i for i, answer in enumerate(answers) if answer in small.labels]
        if len(taught) < self.min_examples or len(known) < self.min_examples:
            return self._nothing(len(taught), len(known))
        held = _of_examples(small, [texts[i] for i in known], [str(answers[i]) for i in known])
        limits = np.quantile(taught[:, 0], np.linspace(0.0, 1.0, self.strata + 1)[1:])
        held = held[held[:, 0] <= limits[-1]]  # the others would not have been asked
        if len(held) < self.min_examples:
            return self._nothing(len(taught), len(held))
        if (found := _stratified(taught, held, limits)) is None:
            return self._nothing(len(taught), 0)
        difference, deviation = found
        lower = difference - NormalDist().inv_cdf(self.level) * deviation
        surprising, expected = float(taught[:, 1].mean()), float(held[:, 1].mean())
        told = f"{100 * surprising:.0f}% of the large model's answers surprise the small one, {100 * expected:.0f}% of "
        told += "its answers to held-out examples do"
        passed = not lower > self.margin
        if not passed:
            told += (
                ": the model, its prompt or the log has changed since. Look at the answers, record held-out ones anew, "
                "or distil without large answers for the held-out examples"
            )
        return TeacherCheckResult(passed, told, len(taught), len(held), surprising, expected, lower)

    def _nothing(self, taught: int, held: int) -> TeacherCheckResult:
        words = f"{taught} logged and {held} held-out answers are too few to compare; {self.min_examples} are needed"
        return TeacherCheckResult(True, words, taught, held)


def _of_call(call: CallRecord) -> tuple[float, bool] | None:
    """Confidence, and whether the answer is surprising; None where the call says nothing of that."""
    p = call.probabilities
    if call.audit or call.reason != "deferred" or not p or call.small_answer is not None:
        return None
    if call.label not in call.labels:
        return None
    return max(p), p[call.labels.index(call.label)] < 1.0 / len(p)


def _of_examples(small: SmallModel, texts: Sequence[str], answers: Sequence[str]) -> FloatArray:
    """The same of held-out examples, shape `[n, 2]`."""
    p = small.predict_batch(texts).probabilities
    said = p[np.arange(len(texts)), [small.labels.index(answer) for answer in answers]]
    return np.column_stack([p.max(axis=1), said < 1.0 / p.shape[1]])


def _stratified(taught: FloatArray, held: FloatArray, limits: FloatArray) -> tuple[float, float] | None:
    """Mantel-Haenszel difference of the shares over strata of confidence, and its standard deviation (Sato 1989).

    None where no stratum has both.
    """
    weights = difference = first = second = 0.0
    for rows, others in zip(_strata(taught, limits), _strata(held, limits), strict=True):
        a, m, b, n = rows.sum(), len(rows), others.sum(), len(others)
        if not m or not n:
            continue
        weights += m * n / (m + n)
        difference += (a * n - b * m) / (m + n)
        first += (m**2 * b - n**2 * a + m * n * (n - m) / 2) / (m + n) ** 2
        second += (a * (n - b) + b * (m - a)) / (2 * (m + n))
    if not weights:
        return None
    found = difference / weights
    return float(found), math.sqrt(max(0.0, found * first + second)) / weights


def _strata(rows: FloatArray, limits: FloatArray) -> list[BoolArray]:
    """Whether answers are surprising, by stratum of confidence."""
    stratum = np.minimum(np.searchsorted(limits, rows[:, 0]), len(limits) - 1)
    return [rows[stratum == i, 1].astype(np.bool_) for i in range(len(limits))]
