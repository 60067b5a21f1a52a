"""Route each request to a small local classifier when it is confident, and to an LLM when it is not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from langchain_datashunt._utils.lazy import lazy_names
from langchain_datashunt._version import __version__

if TYPE_CHECKING:
    from langchain_datashunt.chat.answers import ToolAnswer
    from langchain_datashunt.chat.model import ShuntChatModel
    from langchain_datashunt.chat.small_model import ChatModelSmallModel
    from langchain_datashunt.decision import Latency, ShuntDecision, ShuntResult
    from langchain_datashunt.evaluation.monitor import Alarm, Monitor
    from langchain_datashunt.exceptions import ShuntError, UnparsableAnswer
    from langchain_datashunt.images import ImageReader, Picture
    from langchain_datashunt.large_models.circuit_breaker import CircuitBreaker
    from langchain_datashunt.large_models.prompt_pruning import (
        ConformalPrompt,
        HardPrompt,
        NoHint,
        Pruning,
        SoftPrompt,
        TopHint,
        measure_proficiency,
    )
    from langchain_datashunt.large_models.retry import Retry
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
    from langchain_datashunt.prediction import Prediction, PredictionBatch
    from langchain_datashunt.privacy.guard import OutboundGate
    from langchain_datashunt.routing.label_router import ConfidenceRouterChain
    from langchain_datashunt.routing.shunt import ShuntRunnable
    from langchain_datashunt.routing.subtask_questions import Subtask
    from langchain_datashunt.routing.subtask_results import SubtaskResult
    from langchain_datashunt.routing.subtasks import SubtaskShunt
    from langchain_datashunt.small_models.base import SmallModel
    from langchain_datashunt.small_models.bundles.loading import BundledSmallModel, load_small_model
    from langchain_datashunt.small_models.kinds.cold_start import CollectingModel
    from langchain_datashunt.small_models.kinds.contrastive import ContrastiveClassifier
    from langchain_datashunt.small_models.kinds.embedding import EmbeddingClassifier
    from langchain_datashunt.small_models.kinds.ensemble import EnsembleClassifier
    from langchain_datashunt.small_models.kinds.image_classifier import ImageClassifier
    from langchain_datashunt.small_models.kinds.neighbours import NeighbourClassifier
    from langchain_datashunt.small_models.kinds.predict_proba import PredictProbaClassifier
    from langchain_datashunt.small_models.kinds.transformers_classifier import TransformersClassifier
    from langchain_datashunt.small_models.kinds.transformers_generator import TransformersGenerator
    from langchain_datashunt.small_models.kinds.word_networks import LSTMClassifier, TextCNN
    from langchain_datashunt.small_models.training.training import TrainingSettings

_MODULE_OF = {
    "Alarm": "evaluation.monitor",
    "AlwaysLarge": "policies.thresholds",
    "AlwaysSmall": "policies.thresholds",
    "AnswerFusion": "policies.fusion",
    "BundledSmallModel": "small_models.bundles.loading",
    "ChatModelSmallModel": "chat.small_model",
    "CircuitBreaker": "large_models.circuit_breaker",
    "CollectingModel": "small_models.kinds.cold_start",
    "ConfidenceRouterChain": "routing.label_router",
    "ConfidenceScore": "policies.scores",
    "ConformalPrompt": "large_models.prompt_pruning",
    "ContrastiveClassifier": "small_models.kinds.contrastive",
    "CostBudget": "policies.budgets",
    "EmbeddingClassifier": "small_models.kinds.embedding",
    "EnsembleClassifier": "small_models.kinds.ensemble",
    "Entropy": "policies.scores",
    "HardPrompt": "large_models.prompt_pruning",
    "ImageClassifier": "small_models.kinds.image_classifier",
    "ImageReader": "images",
    "LSTMClassifier": "small_models.kinds.word_networks",
    "Latency": "decision",
    "LearnedDeferral": "policies.learned_deferral",
    "LeastTokenProbability": "policies.scores",
    "LengthNormalizedProbability": "policies.scores",
    "Margin": "policies.scores",
    "MaxProbability": "policies.scores",
    "MeanTokenProbability": "policies.scores",
    "Monitor": "evaluation.monitor",
    "NeighbourClassifier": "small_models.kinds.neighbours",
    "NoHint": "large_models.prompt_pruning",
    "OnlyLabels": "policies.thresholds",
    "OutboundGate": "privacy.guard",
    "PerLabelThreshold": "policies.thresholds",
    "Picture": "images",
    "Policy": "policies.thresholds",
    "PredictProbaClassifier": "small_models.kinds.predict_proba",
    "Prediction": "prediction",
    "PredictionBatch": "prediction",
    "Pruning": "large_models.prompt_pruning",
    "QueryBudget": "policies.budgets",
    "Retry": "large_models.retry",
    "ShuntChatModel": "chat.model",
    "ShuntDecision": "decision",
    "ShuntError": "exceptions",
    "ShuntResult": "decision",
    "ShuntRunnable": "routing.shunt",
    "SmallModel": "small_models.base",
    "SoftPrompt": "large_models.prompt_pruning",
    "Subtask": "routing.subtask_questions",
    "SubtaskResult": "routing.subtask_results",
    "SubtaskShunt": "routing.subtasks",
    "TextCNN": "small_models.kinds.word_networks",
    "Threshold": "policies.thresholds",
    "TokenQuantile": "policies.scores",
    "ToolAnswer": "chat.answers",
    "TopHint": "large_models.prompt_pruning",
    "TrainingSettings": "small_models.training.training",
    "TransformersClassifier": "small_models.kinds.transformers_classifier",
    "TransformersGenerator": "small_models.kinds.transformers_generator",
    "UnparsableAnswer": "exceptions",
    "ValueOfAsking": "policies.thresholds",
    "load_small_model": "small_models.bundles.loading",
    "measure_proficiency": "large_models.prompt_pruning",
}

__all__ = [
    "Alarm",
    "AlwaysLarge",
    "AlwaysSmall",
    "AnswerFusion",
    "BundledSmallModel",
    "ChatModelSmallModel",
    "CircuitBreaker",
    "CollectingModel",
    "ConfidenceRouterChain",
    "ConfidenceScore",
    "ConformalPrompt",
    "ContrastiveClassifier",
    "CostBudget",
    "EmbeddingClassifier",
    "EnsembleClassifier",
    "Entropy",
    "HardPrompt",
    "ImageClassifier",
    "ImageReader",
    "LSTMClassifier",
    "Latency",
    "LearnedDeferral",
    "LeastTokenProbability",
    "LengthNormalizedProbability",
    "Margin",
    "MaxProbability",
    "MeanTokenProbability",
    "Monitor",
    "NeighbourClassifier",
    "NoHint",
    "OnlyLabels",
    "OutboundGate",
    "PerLabelThreshold",
    "Picture",
    "Policy",
    "PredictProbaClassifier",
    "Prediction",
    "PredictionBatch",
    "Pruning",
    "QueryBudget",
    "Retry",
    "ShuntChatModel",
    "ShuntDecision",
    "ShuntError",
    "ShuntResult",
    "ShuntRunnable",
    "SmallModel",
    "SoftPrompt",
    "Subtask",
    "SubtaskResult",
    "SubtaskShunt",
    "TextCNN",
    "Threshold",
    "TokenQuantile",
    "ToolAnswer",
    "TopHint",
    "TrainingSettings",
    "TransformersClassifier",
    "TransformersGenerator",
    "UnparsableAnswer",
    "ValueOfAsking",
    "__version__",
    "load_small_model",
    "measure_proficiency",
]

__getattr__, __dir__ = lazy_names(__name__, _MODULE_OF)
