"""ColdStartModel: stands where there is no small model yet, so that everything is asked and recorded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator
from typing_extensions import override

from langchain_datashunt.exceptions import ConfigurationError
from langchain_datashunt.small_models.base import Loss, SmallModel
from langchain_datashunt.small_models.bundles.bundle import BundleInfo
from langchain_datashunt.small_models.scores import Scores
from langchain_datashunt.small_models.serving.dynamic_batching import DynamicBatching
from langchain_datashunt.small_models.training.training import Examples, TrainingSettings

_NEXT_TO_NOTHING = 1e-3


class ColdStartModel(SmallModel):
    """Knows the labels of a task and nothing else: collect mode, before there is a small model.

    ```python
    small = ColdStartModel(labels=("refund", "cancel", "status"))
    chain = ConfidenceRouterChain.from_models(small, chat_model, recorder=recorder)
    ```

    All labels are as good as equally probable, so that the default threshold sends everything to the large model, whose
    answers are recorded. What 2CD then makes of it is a first small model, trained on these answers.
    """

    first: str = "embedding"
    """The kind of the first small model, which `fit_soft_targets` trains."""

    dynamic_batching: DynamicBatching | None = Field(default=None, exclude=True, repr=False)
    """There is nothing to join requests for."""

    @field_validator("labels")
    @classmethod
    def _two_or_more(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(value) < 2:
            raise ConfigurationError(f"A task has two labels or more; given: {', '.join(value) or 'none'}.")
        return value

    @property
    @override
    def is_placeholder(self) -> bool:
        return True

    @override
    def predict_scores(self, texts: Sequence[str]) -> Scores:
        """Nearly zeros; by a hair, which label comes first is drawn by lot for each text, so that none is preferred."""
        return Scores(np.array([_lots(text, len(self.labels)) for text in texts]).reshape(-1, len(self.labels)))

    @override
    def fit_soft_targets(
        self, stages: Sequence[Examples], held_out: Examples, settings: TrainingSettings, loss: Loss
    ) -> Any:
        """The first small model, of the kind `first`, from the most probable label of each example.

        A kind holds out for itself what it stops on and is calibrated on; the loss is its own.

        Raises:
            DataError: There are fewer than two labels with two examples.
        """
        from langchain_datashunt.small_models.bundles.loading import small_model_class

        parts = [*stages, held_out]
        texts = [text for part in parts for text in part.texts]
        names = [self.labels[i] for part in parts for i in part.targets.argmax(axis=1).tolist()]
        kind: Any = small_model_class(self.first)
        model = kind.train(texts, names, label_set=self.labels, settings=settings, input_key=self.input_key)
        model.lineage = {**model.lineage, "parent": self.lineage}
        return model

    # Bundles

    @classmethod
    @override
    def kind(cls) -> str:
        return "cold_start"

    @override
    def settings(self) -> dict[str, Any]:
        return {"first": self.first}

    @override
    def weights(self) -> dict[str, NDArray[Any]]:
        return {}

    @classmethod
    @override
    def from_weights(cls, info: BundleInfo, weights: dict[str, NDArray[Any]], folder: Path, **overrides: Any) -> Self:
        return cls(**info.shared(), first=info.settings["first"])


def _lots(text: str, k: int) -> NDArray[np.float64]:
    seed = int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8])
    return np.asarray(np.random.default_rng(seed).random(k) * _NEXT_TO_NOTHING)
