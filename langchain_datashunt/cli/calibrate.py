"""`datashunt calibrate` and `datashunt evaluate`: from labelled files to a policy, and to figures of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from langchain_datashunt._utils.table_files import labelled_texts, read_rows, require_columns
from langchain_datashunt.calibration import (
    MatchLarge,
    MaxAccuracy,
    MaxCost,
    MaxDeferralRate,
    Objective,
    RiskControl,
    fit_temperature,
    select_threshold,
)
from langchain_datashunt.evaluation import Evaluation, evaluate
from langchain_datashunt.evaluation.metrics import expected_calibration_error
from langchain_datashunt.exceptions import ConfigurationError, DataError
from langchain_datashunt.policies.fusion import AnswerFusion
from langchain_datashunt.policies.scores import MaxProbability
from langchain_datashunt.policies.thresholds import Threshold
from langchain_datashunt.routing.settings import policy_for
from langchain_datashunt.small_models import SmallModel, load_small_model
from langchain_datashunt.small_models.training.training import seen_in_training

OBJECTIVES = "max-accuracy, match-large[=MARGIN], deferral=RATE, cost=USD_PER_1000 or risk=ALPHA"


@dataclass(frozen=True)
class LabelledFile:
    """Columns of a file with labelled texts.

    Attributes:
        data: The file.
        text: Column with the text.
        label: Column with the true label.
        large_label: Column with the large model's answer.
        large_cost: Column with what asking costs, in USD, or a number.
    """

    data: Path
    text: str
    label: str
    large_label: str | None = None
    large_cost: str | None = None

    def read(self) -> tuple[list[str], list[str], list[str | None] | None, Any]:
        """Texts, labels, large answers and costs.

        Raises:
            DataError: The file or a column cannot be used.
        """
        texts, labels = labelled_texts(self.data, self.text, self.label)
        fixed = _number(self.large_cost)
        more = [self.large_label] if self.large_label is not None else []
        more += [self.large_cost] if self.large_cost is not None and fixed is None else []
        require_columns(self.data, *more)
        answers: list[str | None] = []
        costs: list[float] = []
        for i, row in enumerate(read_rows(self.data) if more else (), start=1):
            if self.large_label is not None:
                said = row.get(self.large_label)
                answers.append(None if said is None or not str(said).strip() else str(said).strip())
            if self.large_cost in more:
                usd = _number(row.get(self.large_cost))
                if usd is None:
                    raise DataError(
                        f"{self.data.name}, row {i}: column {self.large_cost!r} is {row.get(self.large_cost)!r}; "
                        f"give USD as a number in every row."
                    )
                costs.append(usd)
        return texts, labels, answers if self.large_label is not None else None, costs or fixed


def objective_of(words: str, confidence: float) -> Objective:
    """The objective that the command line names.

    Raises:
        ConfigurationError: There is none like it.
    """
    name, _, value = words.partition("=")
    number = _number(value)
    needs = {"deferral": "rate", "cost": "usd_per_1000", "risk": "alpha"}
    if value and number is None or name in needs and number is None:
        raise ConfigurationError(f"--objective {words!r} needs a number, for example {name}=0.05.")
    if name == "max-accuracy":
        return MaxAccuracy()
    if name == "match-large":
        return MatchLarge(margin=number or 0.0)
    if name == "deferral":
        return MaxDeferralRate(rate=number)
    if name == "cost":
        return MaxCost(usd_per_1000=number)
    if name == "risk":
        return RiskControl(alpha=number, confidence=confidence)
    raise ConfigurationError(f"--objective {words!r} is not known; use {OBJECTIVES}.")


def calibrate_bundle(
    bundle: Path, file: LabelledFile, objective: str, *, confidence: float, fusion: bool, unknown_labels: str
) -> dict[str, Any]:
    """Fit temperature, fusion and policy on labelled examples, and write them into the bundle; JSON-ready.

    The temperature stays as it was trained for an objective with a guarantee: that holds only for scores that do not
    depend on the labels it is shown on.

    Raises:
        DataError: The examples cannot be used, or were trained on; the message says what to do.
        ConfigurationError: The objective is not known, or lacks what it needs.
    """
    aim, small = objective_of(objective, confidence), load_small_model(bundle)
    texts, labels, large, cost = file.read()
    _refuse_training_texts(small, texts, file.data)
    if fusion and large is None:
        raise ConfigurationError("--fusion counts the large model's answers; give --large-label.")
    known = [i for i, label in enumerate(labels) if label in small.labels]
    predictions = small.predict_batch(texts)
    ece_before = _ece(small, predictions.take(known), [labels[i] for i in known])
    if not isinstance(aim, RiskControl) and known:
        truth = np.array([small.labels.index(labels[i]) for i in known])
        logits = small.predict_scores([texts[i] for i in known]).logits
        small.temperature = fit_temperature(np.asarray(logits, np.float64), truth)
        predictions = small.predict_batch(texts)
    fitted = None
    if fusion and large is not None:
        fitted = AnswerFusion.fit(small.labels, [labels[i] for i in known], [large[i] for i in known])
    choice = select_threshold(
        predictions, labels, large=large, objective=aim, fusion=fitted, large_cost=cost,
        unknown_labels="wrong" if unknown_labels == "wrong" else "raise",
    )  # fmt: skip
    small.policy, small.fusion = choice.policy, fitted
    plain = isinstance(choice.policy, Threshold) and isinstance(choice.policy.score, MaxProbability)
    small.threshold = choice.threshold if plain else None
    told = choice.to_dict()
    ece_after = _ece(small, predictions.take(known), [labels[i] for i in known])
    summary = {
        **told, "temperature": small.temperature, "ece_before": ece_before, "ece_after": ece_after,
        "fusion": fitted is not None, "bundle": str(bundle),
    }  # fmt: skip
    small.lineage = {**small.lineage, "calibration": {**told, "data": file.data.name}}
    small.save(bundle)
    return summary


def evaluate_bundle(
    bundle: Path, file: LabelledFile, *, threshold: float | None, small_cost: float
) -> tuple[Evaluation, list[str]]:
    """Score a bundle with its own policy and fusion on recorded answers; the figures, and the texts for a report.

    Raises:
        DataError: The examples cannot be used, or were trained on.
    """
    small = load_small_model(bundle)
    texts, labels, large, cost = file.read()
    _refuse_training_texts(small, texts, file.data)
    calibration = small.lineage.get("calibration", {})
    found = evaluate(
        small.predict_batch(texts), labels, policy_for(small, None if threshold is None else Threshold(threshold)),
        large=large, fusion=small.fusion, large_cost=cost, small_cost_usd=small_cost,
        guarantee=str(calibration.get("guarantee", "")) if threshold is None else "",
    )  # fmt: skip
    return found, texts


def _refuse_training_texts(small: SmallModel, texts: list[str], file: Path) -> None:
    if rows := seen_in_training(small.lineage, texts):
        raise DataError(
            f"{len(rows)} of the {len(texts)} texts of {file} were trained on (row {rows[0] + 1} first), so the model "
            f"is surer of them than of new ones. Give examples that it was not trained on."
        )


def _ece(small: SmallModel, predictions: Any, labels: list[str]) -> float | None:
    if not labels:
        return None
    right = np.array([a == b for a, b in zip(predictions.label_names(), labels, strict=True)])
    return expected_calibration_error(predictions.confidence, right)


def _number(text: Any) -> float | None:
    try:
        return None if text is None else float(text)
    except (TypeError, ValueError):
        return None
