"""Saved: how a model becomes a bundle and comes back. Each kind says what its settings and weights are."""

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
    """What can be saved as a bundle: config.json, safetensors weights, nothing pickled."""

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    labels: tuple[str, ...] = Field(min_length=1)
    """Label names in the order of the model's outputs, `k` of them."""

    model_id: str = ""
    """Name under which predictions and records speak of this model."""

    temperature: float = Field(default=1.0, gt=0.0)
    """Calibration: probabilities are softmax(logits / temperature)."""

    threshold: float | None = None
    """The shunt threshold that was chosen for this model, where one was."""

    policy: Policy | None = None
    """The policy that was chosen for this model, where it is more than a threshold."""

    fusion: AnswerFusion | None = None
    """What is known of a large model's answers to this task, where it was calibrated on some."""

    input_key: str = DEFAULT_INPUT_KEY
    """Where mappings hold the input."""

    lineage: dict[str, Any] = Field(default_factory=dict)
    """Where the model comes from: training settings, data hashes, metrics. JSON-ready."""

    _bundle: str | None = PrivateAttr(default=None)

    @field_validator("labels")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if twice := repeated(value):
            raise ConfigurationError(
                f"The labels name {', '.join(map(repr, twice[:5]))} more than once; a model's label set has each once."
            )
        return value

    @classmethod
    def kind(cls) -> str:
        """The name of this kind of model in bundles.

        Raises:
            ConfigurationError: It has none, so it cannot be saved.
        """
        raise ConfigurationError(
            f"A {cls.__name__} has no bundles: it does not say its kind(), settings(), weights() and from_weights()."
        )

    def settings(self) -> dict[str, Any]:
        """What this kind needs beside its weights to be made again; JSON-ready."""
        return {}

    def weights(self) -> dict[str, NDArray[Any]]:
        """All parameters as arrays by name."""
        msg = f"{type(self).__name__} has no weights of its own to save."
        raise ConfigurationError(msg)

    def write_files(self, folder: Path) -> None:
        """Write further files (a tokenizer, a vocabulary) into the bundle's folder."""

    @classmethod
    def from_weights(cls, info: BundleInfo, weights: dict[str, NDArray[Any]], folder: Path, **overrides: Any) -> Self:
        """Make the model of what `weights`, `settings` and `write_files` saved."""
        raise ConfigurationError(
            f"A {cls.__name__} does not implement from_weights(), so no bundle of it can be loaded."
        )

    def info(self) -> BundleInfo:
        """What a bundle's config.json says of this model."""
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
        """A policy or a fusion as a bundle keeps it; refused here where it could not be read back."""
        if part is None:
            return None
        plain = to_dict(part)
        from_dict(plain, PLAIN_CLASSES)
        return plain

    def save(self, folder: str | Path) -> Path:
        """Save as a bundle: config.json, safetensors weights, nothing pickled. Replaces a bundle there at once.

        Raises:
            BundleError: The folder holds something else than a bundle.
        """
        path = write_bundle(Path(folder), self.info(), self.weights(), self.write_files)
        self._bundle = str(path)
        return path

    @classmethod
    def load(cls, folder: str | Path, **overrides: Any) -> Self:
        """Load a bundle of this kind; runs no code from it.

        Args:
            folder: Where `save` wrote it.
            **overrides: What this machine decides and the bundle does not: as for `load_small_model`.

        Raises:
            BundleError: The bundle is truncated, too new, of another kind, or does not fit together.
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
        """As a reference to the bundle that it was loaded from or saved to."""
        if self._bundle is None or read_info(Path(self._bundle)).labels != self.labels:
            return self.to_json_not_implemented()
        from langchain_datashunt.small_models.bundles.loading import BundledSmallModel

        mine = {
            name: getattr(self, name)
            for name in ("model_id", "temperature", "threshold", "input_key", "policy", "fusion")
        }
        return BundledSmallModel.model_validate({"path": self._bundle, **mine}).to_json()
