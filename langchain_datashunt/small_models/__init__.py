"""Small models: Runnables from an input to a `Prediction`, on the user's own machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from langchain_datashunt._utils.lazy import lazy_names

if TYPE_CHECKING:
    from langchain_datashunt.small_models.base import SmallModel
    from langchain_datashunt.small_models.bundles.loading import BundledSmallModel, load_small_model, small_model_class
    from langchain_datashunt.small_models.kinds.cold_start import ColdStartModel
    from langchain_datashunt.small_models.kinds.contrastive import ContrastiveClassifier
    from langchain_datashunt.small_models.kinds.embedding import EmbeddingClassifier
    from langchain_datashunt.small_models.kinds.encoder import CachedEmbeddings, SentenceEncoder
    from langchain_datashunt.small_models.kinds.ensemble import EnsembleClassifier
    from langchain_datashunt.small_models.kinds.image_classifier import ImageClassifier
    from langchain_datashunt.small_models.kinds.neighbours import NeighbourClassifier
    from langchain_datashunt.small_models.kinds.predict_proba import PredictProbaClassifier
    from langchain_datashunt.small_models.kinds.transformers_classifier import TransformersClassifier
    from langchain_datashunt.small_models.kinds.transformers_generator import TransformersGenerator
    from langchain_datashunt.small_models.kinds.word_networks import LSTMClassifier, TextCNN
    from langchain_datashunt.small_models.scores import Scores
    from langchain_datashunt.small_models.serving.dynamic_batching import DynamicBatching
    from langchain_datashunt.small_models.training.training import TrainingSettings

_MODULE_OF = {
    "BundledSmallModel": "bundles.loading",
    "CachedEmbeddings": "kinds.encoder",
    "ColdStartModel": "kinds.cold_start",
    "ContrastiveClassifier": "kinds.contrastive",
    "DynamicBatching": "serving.dynamic_batching",
    "EmbeddingClassifier": "kinds.embedding",
    "EnsembleClassifier": "kinds.ensemble",
    "ImageClassifier": "kinds.image_classifier",
    "LSTMClassifier": "kinds.word_networks",
    "NeighbourClassifier": "kinds.neighbours",
    "PredictProbaClassifier": "kinds.predict_proba",
    "Scores": "scores",
    "SentenceEncoder": "kinds.encoder",
    "SmallModel": "base",
    "TextCNN": "kinds.word_networks",
    "TrainingSettings": "training.training",
    "TransformersClassifier": "kinds.transformers_classifier",
    "TransformersGenerator": "kinds.transformers_generator",
    "load_small_model": "bundles.loading",
    "small_model_class": "bundles.loading",
}

__all__ = [
    "BundledSmallModel",
    "CachedEmbeddings",
    "ColdStartModel",
    "ContrastiveClassifier",
    "DynamicBatching",
    "EmbeddingClassifier",
    "EnsembleClassifier",
    "ImageClassifier",
    "LSTMClassifier",
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

__getattr__, __dir__ = lazy_names(__name__, _MODULE_OF)
