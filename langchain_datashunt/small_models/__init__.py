"""Small models: Runnables from an input to a `Prediction`, on the user's own machine."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from langchain_datashunt.small_models.base import SmallModel
from langchain_datashunt.small_models.loading import (
    KINDS,
    BundledSmallModel,
    load_small_model,
    small_model_class,
)
from langchain_datashunt.small_models.micro_batching import MicroBatching
from langchain_datashunt.small_models.scores import Scores

if TYPE_CHECKING:
    from langchain_datashunt.small_models.caption_model import CaptionModel
    from langchain_datashunt.small_models.collecting import CollectingModel
    from langchain_datashunt.small_models.contrastive import ContrastiveClassifier
    from langchain_datashunt.small_models.embedding import EmbeddingClassifier
    from langchain_datashunt.small_models.encoder import CachedEmbeddings, SentenceEncoder
    from langchain_datashunt.small_models.ensemble import EnsembleClassifier
    from langchain_datashunt.small_models.image_classifier import ImageClassifier
    from langchain_datashunt.small_models.neighbours import NeighbourClassifier
    from langchain_datashunt.small_models.predict_proba import PredictProbaClassifier
    from langchain_datashunt.small_models.training import TrainingSettings
    from langchain_datashunt.small_models.transformers_classifier import TransformersClassifier
    from langchain_datashunt.small_models.transformers_generator import TransformersGenerator
    from langchain_datashunt.small_models.word_networks import LSTMClassifier, TextCNN

_LAZY = {name: module for module, name in KINDS.values()} | {
    "CachedEmbeddings": "langchain_datashunt.small_models.encoder",
    "SentenceEncoder": "langchain_datashunt.small_models.encoder",
    "TrainingSettings": "langchain_datashunt.small_models.training",
}

__all__ = [
    "BundledSmallModel",
    "CachedEmbeddings",
    "CaptionModel",
    "CollectingModel",
    "ContrastiveClassifier",
    "EmbeddingClassifier",
    "EnsembleClassifier",
    "ImageClassifier",
    "LSTMClassifier",
    "MicroBatching",
    "NeighbourClassifier",
    "PredictProbaClassifier",
    "Scores",
    "SentenceEncoder",
    "SmallModel",
    "TextCNN",
    "TrainingSettings",
    "TransformersClassifier",
    "TransformersGenerator",
    "load_small_model",
    "small_model_class",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
