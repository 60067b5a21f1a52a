"""Promotion gate: a statistical test of whether a candidate may replace the model in service."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import TypeAlias

import numpy as np

from langchain_datashunt.distillation.teacher import TeacherCheckResult
from langchain_datashunt.exceptions import DataError
from langchain_datashunt.prediction import BoolArray
from langchain_datashunt.small_models.base import SmallModel

Labels: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.object_]]


@dataclass(frozen=True)
class PromotionResult:
    """Result of a promotion test.

    Attributes:
        passed: Whether the candidate may be promoted.
        reason: Explanation of the result.
        n: Number of held-out examples.
        old_accuracy: Accuracy of the model in service.
        new_accuracy: Accuracy of the candidate.
        lower_bound: One-sided lower confidence bound of `new_accuracy - old_accuracy`.
        proficient_lower_bound: The same bound over examples of proficient labels, or None without such labels.
        forgotten: Loss in accuracy of each proficient label that lost more than `label_margin`.
        teacher: Result of the check of the candidate's training answers, or None without a check.
    """

    passed: bool
    reason: str
    n: int
    old_accuracy: float
    new_accuracy: float
    lower_bound: float
    proficient_lower_bound: float | None = None
    forgotten: dict[str, float] = field(default_factory=dict)
    teacher: TeacherCheckResult | None = None


@dataclass(frozen=True)
class PromotionGate:
    """Non-inferiority test on held-out examples, overall and on labels that the old model predicts well.

    A label is proficient if the old model predicts it with an accuracy of at least `proficiency`. A candidate passes
    if the one-sided lower confidence bound of its accuracy minus the old model's is above `-margin` over all examples.
    The bound must also be above `-proficient_margin` over the examples of proficient labels, and no proficient label
    may lose more than `label_margin` beyond chance.

    The test is conservative: without enough evidence a candidate is rejected. If both models are equally accurate and
    5% of the answers change, a margin of 0.01 needs about 3,000 held-out examples. Proficient labels cover only part of
    the examples, so their margin is wider.

    A candidate is also rejected if a `TeacherCheck` found that its training answers differ from the large model's
    held-out answers.

    Attributes:
        margin: Accuracy that may be lost over all examples, in [0, 1].
        proficient_margin: Accuracy that may be lost over the examples of proficient labels, in [0, 1].
        level: Confidence level of the bounds.
        proficiency: Minimum accuracy of the old model on a proficient label.
        min_examples: Minimum number of held-out examples for a test of a single label.
        label_margin: Accuracy that a single proficient label may lose, in [0, 1].
    """

    margin: float = 0.01
    proficient_margin: float = 0.03
    level: float = 0.95
    proficiency: float = 0.9
    min_examples: int = 10
    label_margin: float = 0.15

    def test(
        self,
        old: SmallModel,
        new: SmallModel,
        texts: Sequence[str],
        labels: Sequence[str],
        *,
        teacher: TeacherCheckResult | None = None,
    ) -> PromotionResult:
        """Compare two models on the same held-out examples.

        Args:
            old: Model in service.
            new: Candidate.
            texts: `n` held-out inputs.
            labels: Their true labels.
            teacher: Result of a `TeacherCheck` of the candidate's training answers.

        Raises:
            DataError: If there are no examples, if none has a label of the old model, or if a model generates its
                answers, which labels cannot score.
        """
        if not texts or len(texts) != len(labels):
            raise DataError(
                f"Expected one label for each held-out text and at least one text, got {len(texts)} texts and "
                f"{len(labels)} labels. Pass held-out labelled examples."
            )
        truth = np.array(labels, dtype=object)
        predicted = old.predict_batch(texts), new.predict_batch(texts)
        if any(batch.answers is not None for batch in predicted):
            raise DataError(
                "The gate cannot score a model that generates its answers. Review the candidate manually, and promote "
                "it with registry.promote(number)."
            )
        if not set(labels) & set(predicted[0].labels):
            raise DataError(
                f"Expected held-out labels of the model in service, such as "
                f"{', '.join(map(repr, predicted[0].labels[:3]))}, got "
                f"{', '.join(map(repr, sorted(set(map(str, labels)))[:3]))}. Check the spelling of the labels."
            )
        before, after = (np.array(batch.label_names(), dtype=object) == truth for batch in predicted)
        forgotten = self._forgotten(truth, before, after)
        lower = self.lower_bound(before, after)
        among = self._among_proficient(truth, before)
        lower_proficient = self.lower_bound(before[among], after[among]) if among.any() else None
        reason = self._reason(lower, lower_proficient, forgotten)
        if not reason and teacher is not None and not teacher.passed:
            reason = teacher.reason
        return PromotionResult(
            not reason,
            reason or f"non-inferior within a margin of {self.margin:.3f} at {100 * self.level:.0f}% confidence",
            len(texts),
            float(before.mean()),
            float(after.mean()),
            lower,
            lower_proficient,
            forgotten,
            teacher,
        )

    def lower_bound(self, before: BoolArray, after: BoolArray) -> float:
        """Return the one-sided lower bound of the paired difference in accuracy.

        This is Tango's score interval (1998), found by bisection.

        Args:
            before: Whether the old model is correct, shape `[n]`.
            after: Whether the candidate is correct, shape `[n]`.
        """
        n, won, lost = len(before), int((after & ~before).sum()), int((before & ~after).sum())
        low, high, z = -1.0, (won - lost) / n, NormalDist().inv_cdf(self.level)
        while high - low > 1e-7:
            middle = (low + high) / 2
            low, high = (middle, high) if _score(n, won, lost, middle) > z else (low, middle)
        return low

    def _among_proficient(self, truth: Labels, before: BoolArray) -> BoolArray:
        """Return which examples have a proficient label, shape `[n]`.

        Each half of a label's examples is selected by the accuracy on the other half. If a label were selected and
        tested on the same examples, the old model's luck on them would count against every candidate.
        """
        among = np.zeros(len(truth), dtype=np.bool_)
        for label in set(truth.tolist()):
            mine = np.flatnonzero(truth == label)
            even, odd = mine[mine % 2 == 0], mine[mine % 2 == 1]
            if not (len(even) and len(odd)):  # with alternating labels, all positions of a label have one parity
                even, odd = mine[::2], mine[1::2]
            for half, other in ((even, odd), (odd, even)):
                if len(other) and before[other].mean() >= self.proficiency:
                    among[half] = True
        return among

    def _forgotten(self, truth: Labels, before: BoolArray, after: BoolArray) -> dict[str, float]:
        """Return the proficient labels that lost more than `label_margin`, beyond chance, with their loss.

        Chance is excluded by a one-sided sign test on the label's changed answers, with Bonferroni correction for the
        number of labels tested.
        """
        looked_at: dict[str, tuple[float, float]] = {}
        for label in sorted(set(truth.tolist())):
            mine = truth == label
            if mine.sum() >= self.min_examples and before[mine].mean() >= self.proficiency:
                lost, won = int((before & ~after & mine).sum()), int((after & ~before & mine).sum())
                looked_at[label] = (lost - won) / int(mine.sum()), _sign_test(lost, won)
        limit = (1.0 - self.level) / max(1, len(looked_at))
        return {
            label: round(loss, 4) for label, (loss, p) in looked_at.items() if loss > self.label_margin and p <= limit
        }

    def _reason(self, lower: float, lower_proficient: float | None, forgotten: dict[str, float]) -> str:
        if lower <= -self.margin:
            return f"overall accuracy may have fallen by {-lower:.3f}, and the limit is {self.margin:.3f}"
        if lower_proficient is not None and lower_proficient <= -self.proficient_margin:
            return (
                f"accuracy on labels that the old model predicts well may have fallen by {-lower_proficient:.3f}, "
                f"and the limit is {self.proficient_margin:.3f}"
            )
        if forgotten:
            worst = max(forgotten, key=lambda label: forgotten[label])
            return (
                f"accuracy on the label {worst!r} fell by {forgotten[worst]:.2f}, "
                f"and the limit is {self.label_margin:.2f}"
            )
        return ""


def _score(n: int, won: int, lost: int, difference: float) -> float:
    """Return Tango's statistic for p(won) - p(lost) = `difference`, standard normal under this hypothesis."""
    b = -won - lost + (2 * n - won + lost) * difference
    c = -lost * difference * (1.0 - difference)
    losing = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)
    spread = math.sqrt(max(0.0, n * (2 * losing + difference * (1.0 - difference))))
    distance = won - lost - n * difference
    return distance / spread if spread > 1e-12 else math.copysign(math.inf, distance)


def _sign_test(lost: int, won: int) -> float:
    """Return the probability of `lost` or more losses if losses and wins were equally likely."""
    n = lost + won
    return sum(math.comb(n, k) for k in range(lost, n + 1)) / 2.0**n
