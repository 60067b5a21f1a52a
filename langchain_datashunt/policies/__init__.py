"""Policies decide which predictions are confident enough: scores, thresholds, budgets, fusion, learned deferral."""

from __future__ import annotations

from typing import TYPE_CHECKING

from langchain_datashunt._utils.lazy import lazy_names

if TYPE_CHECKING:
    from langchain_datashunt.policies.budgets import CostBudget, QueryBudget
    from langchain_datashunt.policies.fusion import AnswerFusion
    from langchain_datashunt.policies.learned_deferral import LearnedDeferral
    from langchain_datashunt.policies.scores import (
        ConfidenceScore,
        Entropy,
        LeastTokenProbability,
        LengthNormalizedProbability,
        Margin,
        MaxProbability,
        MeanTokenProbability,
        TokenQuantile,
    )
    from langchain_datashunt.policies.thresholds import (
        AlwaysLarge,
        AlwaysSmall,
        OnlyLabels,
        PerLabelThreshold,
        Policy,
        Threshold,
        ValueOfAsking,
    )

_MODULE_OF = {
    "AlwaysLarge": "thresholds",
    "AlwaysSmall": "thresholds",
    "AnswerFusion": "fusion",
    "ConfidenceScore": "scores",
    "CostBudget": "budgets",
    "Entropy": "scores",
    "LearnedDeferral": "learned_deferral",
    "LeastTokenProbability": "scores",
    "LengthNormalizedProbability": "scores",
    "Margin": "scores",
    "MaxProbability": "scores",
    "MeanTokenProbability": "scores",
    "OnlyLabels": "thresholds",
    "PerLabelThreshold": "thresholds",
    "Policy": "thresholds",
    "QueryBudget": "budgets",
    "Threshold": "thresholds",
    "TokenQuantile": "scores",
    "ValueOfAsking": "thresholds",
}

__all__ = [
    "AlwaysLarge",
    "AlwaysSmall",
    "AnswerFusion",
    "ConfidenceScore",
    "CostBudget",
    "Entropy",
    "LearnedDeferral",
    "LeastTokenProbability",
    "LengthNormalizedProbability",
    "Margin",
    "MaxProbability",
    "MeanTokenProbability",
    "OnlyLabels",
    "PerLabelThreshold",
    "Policy",
    "QueryBudget",
    "Threshold",
    "TokenQuantile",
    "ValueOfAsking",
]

__getattr__, __dir__ = lazy_names(__name__, _MODULE_OF)
