"""A small local model answers what it is sure of; a large model, told what the small one thinks, answers the rest.

Names are loaded when they are first used, so that importing the package is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from langchain_datashunt._version import __version__

if TYPE_CHECKING:
    from langchain_datashunt.answers import ToolAnswer
    from langchain_datashunt.chat_model import ShuntChatModel
    from langchain_datashunt.chat_small_model import ChatModelSmallModel
    from langchain_datashunt.circuit import CircuitBreaker
    from langchain_datashunt.confidence import (
        ConfidenceScore,
        Entropy,
        LeastTokenProbability,
        LengthNormalizedProbability,
        Margin,
        MaxProbability,
        MeanTokenProbability,
        TokenQuantile,
    )
    from langchain_datashunt.decisions import Latency, ShuntDecision, ShuntResult
    from langchain_datashunt.exceptions import ShuntError, UnparsableAnswer
    from langchain_datashunt.fusion import AnswerFusion
    from langchain_datashunt.image_text import ImageTextModel
    from langchain_datashunt.images import ImageReader, Picture
    from langchain_datashunt.learned_deferral import LearnedDeferral
    from langchain_datashunt.local_large import LocalLargeModel
    from langchain_datashunt.monitoring import Alarm, Monitor
    from langchain_datashunt.online_control import CostBudget, QueryBudget
    from langchain_datashunt.policies import (
        AlwaysLarge,
        AlwaysSmall,
        OnlyLabels,
        PerLabelThreshold,
        Policy,
        Threshold,
        ValueOfAsking,
    )
    from langchain_datashunt.predictions import Prediction, PredictionBatch
    from langchain_datashunt.privacy import OutboundGate
    from langchain_datashunt.pruning import (
        ConformalPrompt,
        HardPrompt,
        NoHint,
        Pruning,
        SoftPrompt,
        TopHint,
        measure_proficiency,
    )
    from langchain_datashunt.retries import Retry
    from langchain_datashunt.router_chain import ConfidenceRouterChain
    from langchain_datashunt.shunt import ShuntRunnable
    from langchain_datashunt.small_models import (
        BundledSmallModel,
        CaptionModel,
        CollectingModel,
        ContrastiveClassifier,
        EmbeddingClassifier,
        EnsembleClassifier,
        ImageClassifier,
        LSTMClassifier,
        NeighbourClassifier,
        PredictProbaClassifier,
        SmallModel,
        TextCNN,
        TrainingSettings,
        TransformersClassifier,
        TransformersGenerator,
        load_small_model,
    )
    from langchain_datashunt.subtask_questions import Subtask
    from langchain_datashunt.subtask_results import SubtaskResult
    from langchain_datashunt.subtasks import SubtaskShunt

_WHERE = {
    "confidence": (
        "ConfidenceScore",
        "Entropy",
        "LeastTokenProbability",
        "LengthNormalizedProbability",
        "Margin",
        "MaxProbability",
        "MeanTokenProbability",
        "TokenQuantile",
    ),
    "exceptions": ("ShuntError", "UnparsableAnswer"),
    "answers": ("ToolAnswer",),
    "chat_model": ("ShuntChatModel",),
    "chat_small_model": ("ChatModelSmallModel",),
    "circuit": ("CircuitBreaker",),
    "privacy": ("OutboundGate",),
    "image_text": ("ImageTextModel",),
    "images": ("ImageReader", "Picture"),
    "local_large": ("LocalLargeModel",),
    "subtask_questions": ("Subtask",),
    "subtask_results": ("SubtaskResult",),
    "subtasks": ("SubtaskShunt",),
    "policies": (
        "AlwaysLarge",
        "AlwaysSmall",
        "OnlyLabels",
        "PerLabelThreshold",
        "Policy",
        "Threshold",
        "ValueOfAsking",
    ),
    "fusion": ("AnswerFusion",),
    "monitoring": ("Alarm", "Monitor"),
    "online_control": ("CostBudget", "QueryBudget"),
    "learned_deferral": ("LearnedDeferral",),
    "decisions": ("Latency", "ShuntDecision", "ShuntResult"),
    "predictions": ("Prediction", "PredictionBatch"),
    "pruning": (
        "ConformalPrompt",
        "HardPrompt",
        "NoHint",
        "Pruning",
        "SoftPrompt",
        "TopHint",
        "measure_proficiency",
    ),
    "retries": ("Retry",),
    "router_chain": ("ConfidenceRouterChain",),
    "shunt": ("ShuntRunnable",),
    "small_models": (
        "BundledSmallModel",
        "CaptionModel",
        "CollectingModel",
        "ContrastiveClassifier",
        "EmbeddingClassifier",
        "EnsembleClassifier",
        "ImageClassifier",
        "LSTMClassifier",
        "NeighbourClassifier",
        "PredictProbaClassifier",
        "SmallModel",
        "TextCNN",
        "TrainingSettings",
        "TransformersClassifier",
        "TransformersGenerator",
        "load_small_model",
    ),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "Alarm",
    "AlwaysLarge",
    "AlwaysSmall",
    "AnswerFusion",
    "BundledSmallModel",
    "CaptionModel",
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
    "ImageTextModel",
    "LSTMClassifier",
    "Latency",
    "LearnedDeferral",
    "LeastTokenProbability",
    "LengthNormalizedProbability",
    "LocalLargeModel",
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


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
