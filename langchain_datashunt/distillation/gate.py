"""The gate: whether a candidate may take over. It tests; it changes nothing."""

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
    """What the gate found.

    Attributes:
        passed: Whether the candidate may take over.
        reason: Why, in words.
        n: Held-out examples.
        old_accuracy: Of the model in service.
        new_accuracy: Of the candidate.
        lower_bound: One-sided lower bound of new less old accuracy.
        proficient_lower_bound: The same over the labels that the old model was proficient in; None without such.
        forgotten: Proficient labels that lost more than they may, with their loss.
        teacher: What was found of the answers that taught the candidate; None where nothing was looked at.
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
    """Non-inferiority on held-out examples, overall and where the old model was good.

    A candidate passes if the one-sided lower confidence bound of its accuracy less the old one's, from paired
    answers, is above `-margin`: over all examples, and above `-proficient_margin` over those whose true label the old
    model was proficient in. No proficient label may lose more than `label_margin` beyond chance.

    What cannot be shown is rejected: where both models are equally good and one in twenty answers changes, a margin
    of 0.01 needs some 3,000 held-out examples. Labels that the old model is good at are a part of the examples only,
    so their margin is wider.

    A candidate is also rejected where a `TeacherCheck` found that the answers which taught it are not as the large
    model's were.

    Attributes:
        margin: Accuracy that may be lost over all examples, in [0, 1].
        proficient_margin: The same over the examples of proficient labels.
        level: Confidence of the bounds.
        proficiency: Share of a label's examples that the old model has right to be called proficient.
        min_examples: With fewer held-out examples a label is not looked at alone.
        label_margin: Share of one proficient label's examples that may be lost.
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
            old: The model in service.
            new: The candidate.
            texts: `n` held-out inputs.
            labels: Their true labels.
            teacher: What a `TeacherCheck` found of the answers that taught the candidate.

        Raises:
            DataError: There are no examples, none has a label that the old model knows, or a model writes its answers,
                of which no label tells whether they are right.
        """
        if not texts or len(texts) != len(labels):
            raise DataError(f"{len(texts)} texts and {len(labels)} labels: the gate needs held-out labelled examples.")
        truth = np.array(labels, dtype=object)
        predicted = old.predict_batch(texts), new.predict_batch(texts)
        if any(batch.answers is not None for batch in predicted):
            raise DataError(
                "A model that writes its answers cannot be tested by labels. Judge the candidate yourself, and put it "
                "into service by registry.promote(number)."
            )
        if not set(labels) & set(predicted[0].labels):
            raise DataError(
                f"No held-out example has a label that the model in service knows: they have "
                f"{', '.join(map(repr, sorted(set(map(str, labels)))[:3]))}, and it knows "
                f"{', '.join(map(repr, predicted[0].labels[:3]))}. Check how labels are written."
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
            reason or f"not inferior by more than {self.margin:.3f} at {100 * self.level:.0f}% confidence",
            len(texts),
            float(before.mean()),
            float(after.mean()),
            lower,
            lower_proficient,
            forgotten,
            teacher,
        )

    def lower_bound(self, before: BoolArray, after: BoolArray) -> float:
        """One-sided lower bound of the paired difference in accuracy: Tango's score interval (1998), by bisection."""
        n, won, lost = len(before), int((after & ~before).sum()), int((before & ~after).sum())
        low, high, z = -1.0, (won - lost) / n, NormalDist().inv_cdf(self.level)
        while high - low > 1e-7:
            middle = (low + high) / 2
            low, high = (middle, high) if _score(n, won, lost, middle) > z else (low, middle)
        return low

    def _among_proficient(self, truth: Labels, before: BoolArray) -> BoolArray:
        """Which examples have a label that the old model was good at, shape `[n]`.

        Each half of a label's examples is judged by the other: were a label chosen and tested on the same examples, the
        old model's luck on them would count against every candidate.
        """
        among = np.zeros(len(truth), dtype=np.bool_)
        for label in set(truth.tolist()):
            mine = np.flatnonzero(truth == label)
            even, odd = mine[mine % 2 == 0], mine[mine % 2 == 1]
            if not (len(even) and len(odd)):  # labels that come in turn
                even, odd = mine[::2], mine[1::2]
            for half, other in ((even, odd), (odd, even)):
                if len(other) and before[other].mean() >= self.proficiency:
                    among[half] = True
        return among

    def _forgotten(self, truth: Labels, before: BoolArray, after: BoolArray) -> dict[str, float]:
        """Labels that the old model was good at and that lost more than they may, beyond chance.

        Chance: the one-sided sign test on the label's changed answers, with Bonferroni's correction for their number.
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
            return f"overall accuracy may have fallen by {-lower:.3f}, and {self.margin:.3f} are allowed"
        if lower_proficient is not None and lower_proficient <= -self.proficient_margin:
            return (
                f"accuracy on labels that the old model was good at may have fallen by {-lower_proficient:.3f}, "
                f"and {self.proficient_margin:.3f} are allowed"
            )
        if forgotten:
            worst = max(forgotten, key=lambda label: forgotten[label])
            return f"the label {worst!r} lost {forgotten[worst]:.2f}, and {self.label_margin:.2f} are allowed"
        return ""


def _score(n: int, won: int, lost: int, difference: float) -> float:
    """Tango's statistic for the hypothesis that p(won) - p(lost) is `difference`: standard normal under it."""
    b = -won - lost + (2 * n - won + lost) * difference
    c = -lost * difference * (1.0 - difference)
    losing = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)
    spread = math.sqrt(max(0.0, n * (2 * losing + difference * (1.0 - difference))))
    distance = won - lost - n * difference
    return distance / spread if spread > 1e-12 else math.copysign(math.inf, distance)


def _sign_test(lost: int, won: int) -> float:
    """Probability of so many losses or more among the changed answers, were losses and wins equally likely."""
    n = lost + won
    return sum(math.comb(n, k) for k in range(lost, n + 1)) / 2.0**n
