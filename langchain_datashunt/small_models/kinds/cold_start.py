"""ColdStartModel: a placeholder that defers every request until the first small model is trained."""

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
    """A placeholder for a task with labels but no trained small model.

    ```python
    small = ColdStartModel(labels=("refund", "cancel", "status"))
    chain = ConfidenceRouterChain.from_models(small, chat_model, recorder=recorder)
    ```

    All labels are almost equally probable, so the default threshold defers every request to the large model. With a
    recorder, the large model's answers are logged. Distillation (2CD) trains the first small model on these answers.
    """

    first: str = "embedding"
    """Kind of the small model that `fit_soft_targets` trains."""

    dynamic_batching: DynamicBatching | None = Field(default=None, exclude=True, repr=False)
    """Dynamic batching, which is off by default because requests have no computation to share."""

    @field_validator("labels")
    @classmethod
    def _two_or_more(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(value) < 2:
            raise ConfigurationError(
                f"Expected two labels or more for `labels`, got: {', '.join(value) or 'none'}. Name all labels of the "
                f"task."
            )
        return value

    @property
    @override
    def is_placeholder(self) -> bool:
        return True

    @override
    def predict_scores(self, texts: Sequence[str]) -> Scores:
        """Return near-zero logits, with random differences below 0.001 to break ties.

        The differences are seeded by the text, so each text has a fixed top label and no label is preferred overall.
        """
        return Scores(np.array([_lots(text, len(self.labels)) for text in texts]).reshape(-1, len(self.labels)))

    @override
    def fit_soft_targets(
        self, stages: Sequence[Examples], held_out: Examples, settings: TrainingSettings, loss: Loss
    ) -> Any:
        """Train the first small model, of kind `first`, on the most probable label of each example.

        The stages and `held_out` are joined into one training set. The new model makes its own validation split and
        uses its own loss, so `loss` is ignored.

        Returns:
            A new small model of kind `first`.

        Raises:
            DataError: The training set cannot be used, for example if every label has only one example.
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
