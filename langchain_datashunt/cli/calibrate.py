"""`datashunt calibrate` and `datashunt evaluate`: choose and evaluate a policy on labelled files."""

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
    """File of labelled texts, and the names of its columns.

    Attributes:
        data: Path of the file.
        text: Column with the text.
        label: Column with the true label.
        large_label: Column with the large model's answer, or None.
        large_cost: Column with the cost of an LLM call in USD, or a fixed number, or None.
    """

    data: Path
    text: str
    label: str
    large_label: str | None = None
    large_cost: str | None = None

    def read(self) -> tuple[list[str], list[str], list[str | None] | None, Any]:
        """Return texts, labels, answers of the large model, and costs.

        Raises:
            DataError: If the file or a column cannot be used.
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
                value = row.get(self.large_label)
                answers.append(None if value is None or not str(value).strip() else str(value).strip())
            if self.large_cost in more:
                usd = _number(row.get(self.large_cost))
                if usd is None:
                    raise DataError(
                        f"Expected USD as a number in column {self.large_cost!r} of {self.data.name}, got "
                        f"{row.get(self.large_cost)!r} in row {i}. Correct the row, or pass one number as --large-cost."
                    )
                costs.append(usd)
        return texts, labels, answers if self.large_label is not None else None, costs or fixed


def objective_of(words: str, confidence: float) -> Objective:
    """Return the objective of the --objective option.

    Raises:
        ConfigurationError: If the objective is unknown, or lacks a number.
    """
    name, _, value = words.partition("=")
    number = _number(value)
    needs = {"deferral": "rate", "cost": "usd_per_1000", "risk": "alpha"}
    if value and number is None or name in needs and number is None:
        raise ConfigurationError(f"Expected a number for --objective, got {words!r}. Write it like {name}=0.05.")
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
    raise ConfigurationError(f"Expected {OBJECTIVES} for --objective, got {words!r}.")


def calibrate_bundle(
    bundle: Path, file: LabelledFile, objective: str, *, confidence: float, fusion: bool, unknown_labels: str
) -> dict[str, Any]:
    """Fit temperature, fusion and policy on labelled examples, and save them in the bundle.

    An objective with a guarantee keeps the temperature from training, because the guarantee requires scores that do not
    depend on the calibration labels.

    Returns:
        Summary of the calibration, JSON-ready.

    Raises:
        DataError: If the examples cannot be used, or were used in training.
        ConfigurationError: If the objective is unknown, or requires an option that is missing.
    """
    aim, small = objective_of(objective, confidence), load_small_model(bundle)
    texts, labels, large, cost = file.read()
    _refuse_training_texts(small, texts, file.data)
    if fusion and large is None:
        raise ConfigurationError("--fusion requires the large model's answers. Pass --large-label.")
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
    # `small.threshold` applies to the maximum probability, so a threshold on another score is not stored in it.
    plain = isinstance(choice.policy, Threshold) and isinstance(choice.policy.score, MaxProbability)
    small.threshold = choice.threshold if plain else None
    settings = choice.to_dict()
    ece_after = _ece(small, predictions.take(known), [labels[i] for i in known])
    summary = {
        **settings, "temperature": small.temperature, "ece_before": ece_before, "ece_after": ece_after,
        "fusion": fitted is not None, "bundle": str(bundle),
    }  # fmt: skip
    small.lineage = {**small.lineage, "calibration": {**settings, "data": file.data.name}}
    small.save(bundle)
    return summary


def evaluate_bundle(
    bundle: Path, file: LabelledFile, *, threshold: float | None, small_cost: float
) -> tuple[Evaluation, list[str]]:
    """Evaluate a bundle's policy and fusion on recorded answers.

    Returns:
        Figures, and the texts for a report.

    Raises:
        DataError: If the examples cannot be used, or were used in training.
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
            f"{len(rows)} of the {len(texts)} texts of {file} were used in training (first in row {rows[0] + 1}), so "
            f"the model is overconfident on them. Pass examples that were not used in training."
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
