"""Policies decide which predictions are confident enough: scores, thresholds, budgets, fusion, learned deferral."""

from __future__ import annotations

from typing import TYPE_CHECKING

from langchain_datashunt._utils.lazy import lazy_names

if TYPE_CHECKING:
    from langchain_datashunt.policies.budgets import CostBudget, DeferralBudget
    from langchain_datashunt.policies.fusion import AnswerFusion
    from langchain_datashunt.policies.learned_deferral import LearnedDeferral
    from langchain_datashunt.policies.scores import (
        ConfidenceScore,
        Entropy,
        LengthNormalizedProbability,
        Margin,
        MaxProbability,
        MeanTokenProbability,
        MinTokenProbability,
        TokenQuantile,
    )
    from langchain_datashunt.policies.thresholds import (
        AlwaysLarge,
        AlwaysSmall,
        OnlyLabels,
        PerLabelThreshold,
        Policy,
        PolicyDecision,
        Threshold,
        ValueOfInformation,
    )

_MODULE_OF = {
    "AlwaysLarge": "thresholds",
    "AlwaysSmall": "thresholds",
    "AnswerFusion": "fusion",
    "ConfidenceScore": "scores",
    "CostBudget": "budgets",
    "DeferralBudget": "budgets",
    "Entropy": "scores",
    "LearnedDeferral": "learned_deferral",
    "LengthNormalizedProbability": "scores",
    "Margin": "scores",
    "MaxProbability": "scores",
    "MeanTokenProbability": "scores",
    "MinTokenProbability": "scores",
    "OnlyLabels": "thresholds",
    "PerLabelThreshold": "thresholds",
    "Policy": "thresholds",
    "PolicyDecision": "thresholds",
    "Threshold": "thresholds",
    "TokenQuantile": "scores",
    "ValueOfInformation": "thresholds",
}

__all__ = [
    "AlwaysLarge",
    "AlwaysSmall",
    "AnswerFusion",
    "ConfidenceScore",
    "CostBudget",
    "DeferralBudget",
    "Entropy",
    "LearnedDeferral",
    "LengthNormalizedProbability",
    "Margin",
    "MaxProbability",
    "MeanTokenProbability",
    "MinTokenProbability",
    "OnlyLabels",
    "PerLabelThreshold",
    "Policy",
    "PolicyDecision",
    "Threshold",
    "TokenQuantile",
    "ValueOfInformation",
]

__getattr__, __dir__ = lazy_names(__name__, _MODULE_OF)
