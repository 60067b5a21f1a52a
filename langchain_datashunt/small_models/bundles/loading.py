"""Registry of the kinds of small model, and loading of bundles."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Self

from pydantic import Field, PrivateAttr, model_validator
from typing_extensions import override

from langchain_datashunt._utils.atomic_dir import unless_replaced
from langchain_datashunt._utils.fork import Mutex
from langchain_datashunt._utils.settings import Configured, from_dict
from langchain_datashunt.exceptions import BundleError, ConfigurationError
from langchain_datashunt.inputs import InputReader
from langchain_datashunt.policies.fusion import AnswerFusion
from langchain_datashunt.policies.thresholds import PLAIN_CLASSES, Policy
from langchain_datashunt.small_models.base import SmallModel
from langchain_datashunt.small_models.bundles.bundle import BundleInfo, read_bundle, read_info
from langchain_datashunt.small_models.scores import Scores
from langchain_datashunt.small_models.serving.dynamic_batching import DynamicBatching

_COLD_START = "cold_start"

KINDS: dict[str, tuple[str, str]] = {
    "embedding": ("langchain_datashunt.small_models.kinds.embedding", "EmbeddingClassifier"),
    "textcnn": ("langchain_datashunt.small_models.kinds.word_networks", "TextCNN"),
    "lstm": ("langchain_datashunt.small_models.kinds.word_networks", "LSTMClassifier"),
    "transformers": ("langchain_datashunt.small_models.kinds.transformers_classifier", "TransformersClassifier"),
    "neighbours": ("langchain_datashunt.small_models.kinds.neighbours", "NeighbourClassifier"),
    "ensemble": ("langchain_datashunt.small_models.kinds.ensemble", "EnsembleClassifier"),
    "contrastive": ("langchain_datashunt.small_models.kinds.contrastive", "ContrastiveClassifier"),
    "generator": ("langchain_datashunt.small_models.kinds.transformers_generator", "TransformersGenerator"),
    "image": ("langchain_datashunt.small_models.kinds.image_classifier", "ImageClassifier"),
    _COLD_START: ("langchain_datashunt.small_models.kinds.cold_start", "ColdStartModel"),
    "predict_proba": ("langchain_datashunt.small_models.kinds.predict_proba", "PredictProbaClassifier"),
}
"""Module and class of each kind. Add an entry here to register a new kind."""


def small_model_class(kind: str) -> type[SmallModel]:
    """Return the class of a kind of small model.

    Raises:
        BundleError: If the kind is unknown. The message lists the known kinds.
    """
    if kind not in KINDS:
        raise BundleError(f"Unknown kind of small model {kind!r}. Expected one of: {', '.join(KINDS)}.")
    module, name = KINDS[kind]
    found: type[SmallModel] = getattr(import_module(module), name)
    return found


def load_small_model(folder: str | Path, **overrides: Any) -> SmallModel:
    """Load a bundle of any kind, without running code from it.

    Args:
        folder: Folder written by `SmallModel.save` or `datashunt train`.
        **overrides: Settings that depend on the machine and are not stored in the bundle: `device`, `dtype`,
            `batch_size`, `embeddings`, `engine`, `dynamic_batching`, `cache_size`.

    Raises:
        BundleError: If the bundle is truncated, too new or inconsistent. The message names the problem.
        ConfigurationError: If an override is unknown or not valid.
    """
    path, serving = Path(folder).absolute(), _serving_of(overrides)
    model = unless_replaced(path, lambda: _read(path, overrides))
    return model.model_copy(update=serving) if serving else model


def _read(path: Path, overrides: dict[str, Any]) -> SmallModel:
    info, weights = read_bundle(path)
    try:
        model = small_model_class(info.kind).from_weights(info, weights, path, **overrides)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise BundleError(
            f"The settings of the bundle {path} are not valid ({type(error).__name__}: {str(error)[:200]}). Train or "
            f"copy it again."
        ) from error
    model.policy, model.fusion = chosen_for(info)
    model._bundle = str(path)
    return model


def chosen_for(info: BundleInfo) -> tuple[Policy | None, AnswerFusion | None]:
    """Return the policy and the fusion saved in a bundle, None for each that is absent.

    Raises:
        BundleError: If the bundle's policy or fusion is not valid.
    """
    try:
        policy, fusion = (from_dict(part, PLAIN_CLASSES) for part in (info.policy, info.fusion))
    except ConfigurationError as error:
        raise BundleError(f"The bundle's policy or fusion is not valid: {error}") from error
    if not isinstance(policy, Policy | None) or not isinstance(fusion, AnswerFusion | None):
        raise BundleError(
            f"Expected a Policy and an AnswerFusion in the bundle, got {type(policy).__name__} and "
            f"{type(fusion).__name__}. Calibrate the bundle again."
        )
    return policy, fusion


MACHINE_SETTINGS = ("device", "dtype", "batch_size", "embeddings", "engine")
"""Overrides that depend on the machine. A kind ignores those that it does not use."""


class _Serving(Configured):
    """Serving settings, which every kind has and no bundle stores."""

    dynamic_batching: DynamicBatching | None = DynamicBatching()
    cache_size: int = Field(default=0, ge=0)


def _serving_of(overrides: dict[str, Any]) -> dict[str, Any]:
    """Remove the serving settings from `overrides` and return them validated.

    Raises:
        ConfigurationError: If an override is unknown to every kind, or a serving setting is not valid.
    """
    if unknown := sorted(set(overrides) - {*_Serving.model_fields, *MACHINE_SETTINGS}):
        raise ConfigurationError(
            f"Unknown overrides for loading a bundle: {', '.join(unknown)}. Expected some of: "
            f"{', '.join((*MACHINE_SETTINGS, *_Serving.model_fields))}. "
            f"Change other settings of the loaded model with model_copy(update=...)."
        )
    given = {name: overrides.pop(name) for name in _Serving.model_fields if name in overrides}
    checked = _Serving(**given)
    return {name: getattr(checked, name) for name in given}


def _info(path: str) -> BundleInfo:
    return unless_replaced(Path(path), lambda: read_info(Path(path)))


_CHANGEABLE = ("model_id", "temperature", "threshold", "policy", "fusion", "input_key")
"""Settings of a loaded model that may differ from its bundle."""


class BundledSmallModel(SmallModel):
    """A small model that holds the path of its bundle and loads the weights on first use.

    Its labels and calibration are read at construction. Pickling and serializing it are cheap.
    """

    path: str
    """Folder of the bundle."""

    overrides: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for `load_small_model`, for example `{"device": "cuda"}`."""

    _model: SmallModel | None = PrivateAttr(default=None)
    _lock: Any = PrivateAttr(default_factory=Mutex)

    @classmethod
    def from_folder(cls, folder: str | Path, **overrides: Any) -> Self:
        """Create a model from the folder of a bundle, with the overrides of `load_small_model`."""
        serving = _serving_of(overrides)
        return cls.model_validate({"path": str(Path(folder).absolute()), "overrides": overrides, **serving})

    @model_validator(mode="before")
    @classmethod
    def _read_config(cls, values: dict[str, Any]) -> dict[str, Any]:
        if "labels" in values or "path" not in values:
            return values
        info = _info(values["path"])
        policy, fusion = chosen_for(info)
        return {**info.shared(), "policy": policy, "fusion": fusion, **values}

    @property
    def loaded(self) -> SmallModel:
        """Bundled model, loaded on first access."""
        if self._model is None:
            with self._lock:
                if self._model is None:
                    self._model = load_small_model(self.path, **self.overrides)
        return self._model

    @property
    @override
    def is_placeholder(self) -> bool:
        """Whether the bundled model is an untrained placeholder, determined without loading its weights."""
        return self._model.is_placeholder if self._model is not None else _info(self.path).kind == _COLD_START

    @property
    @override
    def reader(self) -> InputReader:
        """Input reader of the bundled model. Loads the weights only if the bundle's settings do not determine it."""
        if self._model is None:
            info = _info(self.path)
            if (own := small_model_class(info.kind).reader_of(info)) is not None:
                return own.model_copy(update={"input_key": self.input_key})
        return self.loaded.reader.model_copy(update={"input_key": self.input_key})

    @override
    def workers(self) -> int:
        return self.loaded.workers()

    @override
    def predict_scores(self, texts: Sequence[str]) -> Scores:
        return self.loaded.predict_scores(texts)

    @override
    def to_json(self) -> Any:
        """Serialize as the path, the overrides, and the settings that may differ from the bundle."""
        names = ("path", "overrides", *_CHANGEABLE)
        kwargs = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {"lc": 1, "type": "constructor", "id": self.lc_id(), "kwargs": kwargs}

    @override
    def save(self, folder: str | Path) -> Path:
        changed = {name: getattr(self, name) for name in _CHANGEABLE}
        return self.loaded.model_copy(update=changed).save(folder)

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        private = dict(state["__pydantic_private__"] or {})
        return {**state, "__pydantic_private__": {**private, "_model": None}}
