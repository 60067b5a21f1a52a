"""Saved: the base class of models that can be saved as a bundle and loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from numpy.typing import NDArray
from pydantic import ConfigDict, Field, PrivateAttr, field_validator
from typing_extensions import override

from langchain_datashunt._utils.settings import Configured, from_dict, to_dict
from langchain_datashunt.exceptions import ConfigurationError
from langchain_datashunt.inputs import DEFAULT_INPUT_KEY
from langchain_datashunt.policies.fusion import AnswerFusion
from langchain_datashunt.policies.thresholds import PLAIN_CLASSES, Policy
from langchain_datashunt.small_models.bundles.bundle import BundleInfo, read_info, repeated, write_bundle


class Saved(Configured):
    """Base class of models that can be saved as a bundle of JSON settings and safetensors weights."""

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    labels: tuple[str, ...] = Field(min_length=1)
    """`k` label names, in the order of the model's outputs."""

    model_id: str = ""
    """Name of this model in predictions and call records."""

    temperature: float = Field(default=1.0, gt=0.0)
    """Calibration temperature. Probabilities are softmax(logits / temperature)."""

    threshold: float | None = None
    """Confidence threshold chosen for this model, or None if none was chosen."""

    policy: Policy | None = None
    """Policy chosen for this model if it is more than a threshold, else None."""

    fusion: AnswerFusion | None = None
    """Fusion with a large model's answers, calibrated on this task, or None if it was not calibrated."""

    input_key: str = DEFAULT_INPUT_KEY
    """Key of the input in mappings."""

    lineage: dict[str, Any] = Field(default_factory=dict)
    """Origin of the model: training settings, data hashes and metrics. JSON-serializable."""

    _bundle: str | None = PrivateAttr(default=None)

    @field_validator("labels")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if twice := repeated(value):
            raise ConfigurationError(
                f"Expected unique `labels`, got {', '.join(map(repr, twice[:5]))} more than once. Give each label once."
            )
        return value

    @classmethod
    def kind(cls) -> str:
        """Return the name of this kind of model in bundles.

        Raises:
            ConfigurationError: If the class has no kind, so that it cannot be saved.
        """
        raise ConfigurationError(
            f"{cls.__name__} cannot be saved. Implement its kind(), settings(), weights() and from_weights()."
        )

    def settings(self) -> dict[str, Any]:
        """Return the settings that, with the weights, rebuild this model, as JSON-serializable values."""
        return {}

    def weights(self) -> dict[str, NDArray[Any]]:
        """Return all parameters as arrays by name."""
        msg = f"{type(self).__name__} cannot be saved, because it does not implement weights()."
        raise ConfigurationError(msg)

    def write_files(self, folder: Path) -> None:
        """Write further files, for example a tokenizer, into the bundle's folder."""

    @classmethod
    def from_weights(cls, info: BundleInfo, weights: dict[str, NDArray[Any]], folder: Path, **overrides: Any) -> Self:
        """Build the model from its saved weights, settings and further files."""
        raise ConfigurationError(
            f"Bundles of {cls.__name__} cannot be loaded, because it does not implement from_weights()."
        )

    def info(self) -> BundleInfo:
        """Return the contents of config.json for this model."""
        return BundleInfo(
            kind=self.kind(),
            labels=self.labels,
            model_id=self.model_id,
            temperature=self.temperature,
            threshold=self.threshold,
            policy=self._plain(self.policy),
            fusion=self._plain(self.fusion),
            input_key=self.input_key,
            lineage=self.lineage,
            settings=self.settings(),
        )

    @staticmethod
    def _plain(part: Configured | None) -> dict[str, Any] | None:
        """Return a policy or fusion as a dictionary. Raise if it could not be loaded again."""
        if part is None:
            return None
        plain = to_dict(part)
        from_dict(plain, PLAIN_CLASSES)
        return plain

    def save(self, folder: str | Path) -> Path:
        """Save this model as a bundle, and return the absolute path of its folder.

        A bundle in the folder is replaced atomically.

        Raises:
            BundleError: If the folder holds anything other than a bundle.
        """
        path = write_bundle(Path(folder), self.info(), self.weights(), self.write_files)
        self._bundle = str(path)
        return path

    @classmethod
    def load(cls, folder: str | Path, **overrides: Any) -> Self:
        """Load a bundle of this kind, without running code from it.

        Args:
            folder: Folder written by `save`.
            **overrides: Settings that depend on the machine, see `load_small_model`.

        Raises:
            BundleError: If the bundle is truncated, too new or inconsistent.
            ConfigurationError: If the bundle is of another kind, or an override is unknown.
        """
        from langchain_datashunt.small_models.bundles.loading import load_small_model

        model = load_small_model(folder, **overrides)
        if not isinstance(model, cls):
            found = read_info(Path(folder)).kind
            raise ConfigurationError(
                f"{folder} holds a bundle of kind {found!r}, not a {cls.__name__}. Use load_small_model(folder)."
            )
        return model

    @override
    def to_json(self) -> Any:
        """Serialize as a reference to the bundle that this model was loaded from or saved to."""
        if self._bundle is None or read_info(Path(self._bundle)).labels != self.labels:
            return self.to_json_not_implemented()
        from langchain_datashunt.small_models.bundles.loading import BundledSmallModel

        mine = {
            name: getattr(self, name)
            for name in ("model_id", "temperature", "threshold", "input_key", "policy", "fusion")
        }
        return BundledSmallModel.model_validate({"path": self._bundle, **mine}).to_json()
