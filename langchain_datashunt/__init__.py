"""Route each request to a small local classifier when it is confident, and to an LLM when it is not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from langchain_datashunt._utils.lazy import lazy_names
from langchain_datashunt._version import __version__

if TYPE_CHECKING:
    from langchain_datashunt.chat.model import ShuntChatModel
    from langchain_datashunt.decision import ShuntDecision, ShuntResult
    from langchain_datashunt.exceptions import ShuntError, UnparsableAnswerError
    from langchain_datashunt.large_models.prompt_pruning import (
        ConformalPruning,
        HardPruning,
        NoPruning,
        SoftPruning,
        TopHint,
    )
    from langchain_datashunt.large_models.retry import Retry
    from langchain_datashunt.policies.budgets import CostBudget, DeferralBudget
    from langchain_datashunt.policies.fusion import AnswerFusion
    from langchain_datashunt.policies.thresholds import (
        AlwaysLarge,
        AlwaysSmall,
        PerLabelThreshold,
        Threshold,
        ValueOfInformation,
    )
    from langchain_datashunt.prediction import Prediction
    from langchain_datashunt.privacy.guard import PrivacyGuard
    from langchain_datashunt.routing.label_router import ConfidenceRouterChain
    from langchain_datashunt.routing.shunt import ShuntRunnable
    from langchain_datashunt.routing.subtasks import SubtaskShunt
    from langchain_datashunt.small_models.base import SmallModel
    from langchain_datashunt.small_models.bundles.loading import load_small_model
    from langchain_datashunt.small_models.kinds.embedding import EmbeddingClassifier
    from langchain_datashunt.small_models.kinds.predict_proba import PredictProbaClassifier
    from langchain_datashunt.small_models.kinds.transformers_classifier import TransformersClassifier

_MODULE_OF = {
    "AlwaysLarge": "policies.thresholds",
    "AlwaysSmall": "policies.thresholds",
    "AnswerFusion": "policies.fusion",
    "ConfidenceRouterChain": "routing.label_router",
    "ConformalPruning": "large_models.prompt_pruning",
    "CostBudget": "policies.budgets",
    "DeferralBudget": "policies.budgets",
    "EmbeddingClassifier": "small_models.kinds.embedding",
    "HardPruning": "large_models.prompt_pruning",
    "NoPruning": "large_models.prompt_pruning",
    "PerLabelThreshold": "policies.thresholds",
    "PredictProbaClassifier": "small_models.kinds.predict_proba",
    "Prediction": "prediction",
    "PrivacyGuard": "privacy.guard",
    "Retry": "large_models.retry",
    "ShuntChatModel": "chat.model",
    "ShuntDecision": "decision",
    "ShuntError": "exceptions",
    "ShuntResult": "decision",
    "ShuntRunnable": "routing.shunt",
    "SmallModel": "small_models.base",
    "SoftPruning": "large_models.prompt_pruning",
    "SubtaskShunt": "routing.subtasks",
    "Threshold": "policies.thresholds",
    "TopHint": "large_models.prompt_pruning",
    "TransformersClassifier": "small_models.kinds.transformers_classifier",
    "UnparsableAnswerError": "exceptions",
    "ValueOfInformation": "policies.thresholds",
    "load_small_model": "small_models.bundles.loading",
}

__all__ = [
    "AlwaysLarge",
    "AlwaysSmall",
    "AnswerFusion",
    "ConfidenceRouterChain",
    "ConformalPruning",
    "CostBudget",
    "DeferralBudget",
    "EmbeddingClassifier",
    "HardPruning",
    "NoPruning",
    "PerLabelThreshold",
    "PredictProbaClassifier",
    "Prediction",
    "PrivacyGuard",
    "Retry",
    "ShuntChatModel",
    "ShuntDecision",
    "ShuntError",
    "ShuntResult",
    "ShuntRunnable",
    "SmallModel",
    "SoftPruning",
    "SubtaskShunt",
    "Threshold",
    "TopHint",
    "TransformersClassifier",
    "UnparsableAnswerError",
    "ValueOfInformation",
    "__version__",
    "load_small_model",
]

__getattr__, __dir__ = lazy_names(__name__, _MODULE_OF)
