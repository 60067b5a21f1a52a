"""Teacher check: compare the large model's logged answers with its answers to held-out examples."""

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
    """Result of a teacher check.

    Attributes:
        passed: Whether the logged answers are consistent with the held-out ones.
        reason: Explanation of the result.
        taught: Number of logged answers compared.
        held_out: Number of held-out answers compared.
        surprising: Fraction of surprising answers in the log, or NaN without a comparison.
        expected: Fraction of surprising answers among the held-out ones, or NaN without a comparison.
        lower_bound: One-sided lower bound of the difference at equal confidence, or NaN without a comparison.
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
    """Test of whether the large model's logged answers are consistent with its answers to held-out examples.

    An answer is surprising if the small model assigns it a probability below 1/k, that of a random guess. At equal
    confidence of the small model, the large model's answers are surprising about equally often, regardless of which
    model is right. A clearly higher rate in the log means that the large model, its prompt or the log has changed.
    Training on such answers can do harm even if the candidate has not lost accuracy yet, because the small model's own
    probabilities outweigh some of them. The check needs no true labels.

    The difference is the Mantel-Haenszel estimate over strata of confidence, with Sato's variance (1989).

    Attributes:
        margin: Tolerated increase in the rate of surprising answers, in [0, 1].
        level: Confidence level of the bound.
        strata: Number of strata of confidence.
        min_examples: Minimum number of logged and of held-out answers for a comparison.
    """

    margin: float = 0.02
    level: float = 0.95
    strata: int = 4
    min_examples: int = 50

    def test(
        self, small: SmallModel, calls: Iterable[CallRecord], texts: Sequence[str], answers: Sequence[str | None]
    ) -> TeacherCheckResult:
        """Compare the answers of logged calls with the answers to held-out texts.

        Args:
            small: Small model of the logged calls, which also scores the held-out examples.
            calls: Call records. Only deferred calls with a label and the small model's probabilities count.
            texts: `n` held-out inputs.
            answers: `n` answers of the large model to them. None and names outside the label set are ignored.

        Raises:
            DataError: If `texts` and `answers` differ in length.
        """
        if len(texts) != len(answers):
            raise DataError(
                f"Expected one answer of the large model for each held-out text, got {len(answers)} answers and "
                f"{len(texts)} texts. Pass None for a missing answer."
            )
        taught = np.array([row for call in calls if (row := _of_call(call)) is not None]).reshape(-1, 2)
        known = [i for i, answer in enumerate(answers) if answer in small.labels]
        if len(taught) < self.min_examples or len(known) < self.min_examples:
            return self._nothing(len(taught), len(known))
        held = _of_examples(small, [texts[i] for i in known], [str(answers[i]) for i in known])
        limits = np.quantile(taught[:, 0], np.linspace(0.0, 1.0, self.strata + 1)[1:])
        held = held[held[:, 0] <= limits[-1]]  # more confident inputs are answered locally and never logged here
        if len(held) < self.min_examples:
            return self._nothing(len(taught), len(held))
        if (found := _stratified(taught, held, limits)) is None:
            return self._nothing(len(taught), 0)
        difference, deviation = found
        lower = difference - NormalDist().inv_cdf(self.level) * deviation
        surprising, expected = float(taught[:, 1].mean()), float(held[:, 1].mean())
        reason = (
            f"{100 * surprising:.0f}% of the large model's logged answers and {100 * expected:.0f}% of its held-out "
        )
        reason += "answers surprise the small model"
        passed = not lower > self.margin
        if not passed:
            reason += (
                ": the large model, its prompt or the log has changed. Review the logged answers, collect the held-out "
                "answers again, or distil without held-out answers of the large model"
            )
        return TeacherCheckResult(passed, reason, len(taught), len(held), surprising, expected, lower)

    def _nothing(self, taught: int, held: int) -> TeacherCheckResult:
        words = (
            f"too few answers to compare: {taught} logged and {held} held-out, "
            f"and at least {self.min_examples} of each are needed"
        )
        return TeacherCheckResult(True, words, taught, held)


def _of_call(call: CallRecord) -> tuple[float, bool] | None:
    """Return the confidence and whether the answer is surprising, or None if the call does not count."""
    p = call.probabilities
    if call.audit or call.reason != "deferred" or not p or call.small_answer is not None:
        return None
    if call.answer_label not in call.labels:
        return None
    return max(p), p[call.labels.index(call.answer_label)] < 1.0 / len(p)


def _of_examples(small: SmallModel, texts: Sequence[str], answers: Sequence[str]) -> FloatArray:
    """Return the confidence and whether the answer is surprising for held-out examples, shape `[n, 2]`."""
    p = small.predict_batch(texts).probabilities
    of_answer = p[np.arange(len(texts)), [small.labels.index(answer) for answer in answers]]
    return np.column_stack([p.max(axis=1), of_answer < 1.0 / p.shape[1]])


def _stratified(taught: FloatArray, held: FloatArray, limits: FloatArray) -> tuple[float, float] | None:
    """Return the Mantel-Haenszel difference over strata of confidence, and its standard deviation (Sato 1989).

    Returns None if no stratum has both logged and held-out answers.
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
    """Return whether answers are surprising, one array for each stratum of confidence."""
    stratum = np.minimum(np.searchsorted(limits, rows[:, 0]), len(limits) - 1)
    return [rows[stratum == i, 1].astype(np.bool_) for i in range(len(limits))]
