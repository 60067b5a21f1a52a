"""ImageTextModel: CLIP as the large model, with the paper's prompts of Prompt Pruning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from langchain_core.runnables import RunnableConfig, RunnableSerializable
from pydantic import ConfigDict, Field, PrivateAttr
from typing_extensions import override

from langchain_datashunt._utils.optional import require
from langchain_datashunt._utils.settings import Configured
from langchain_datashunt.exceptions import ConfigurationError, InputError
from langchain_datashunt.images import ImageReader
from langchain_datashunt.prediction import FloatArray, Prediction, PredictionBatch
from langchain_datashunt.small_models.engine.devices import choose_device, quiet_transformers
from langchain_datashunt.small_models.kinds.image_inputs import ImageScale
from langchain_datashunt.small_models.scores import softmax
from tests.benchmarks.reproduction.local_large import Told, told_by


class ImageTextModel(Configured, RunnableSerializable[Any, str]):
    """Image-text model as the large model, which answers with the label whose prompt matches the image best.

    The prompt of a candidate is "This is a photo of a cat.", or "This is a photo of a cat with probability 0.31." if
    the small model's probability is given (Data Shunt, section on Prompt Pruning).
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    model: str
    """Folder or hub id of a transformers CLIP model."""

    labels: tuple[str, ...] = Field(min_length=1)
    """All labels. Candidates are a subset of them."""

    template: str = "This is a photo of a {label}."
    """Prompt of a label."""

    told_template: str = "This is a photo of a {label} with probability {probability}."
    """Prompt of a label if the small model's probability is given."""

    input_key: str = "input"
    """Key of the input in the mapping."""

    images: ImageReader = ImageReader()
    """Reader of images."""

    device: str | None = None
    """Torch device: cuda, mps or cpu. None selects it automatically."""

    _network: Any = PrivateAttr(default=None)
    _tokenizer: Any = PrivateAttr(default=None)
    _scale: ImageScale | None = PrivateAttr(default=None)
    _texts: dict[str, Any] = PrivateAttr(default_factory=dict)

    def model_post_init(self, context: Any, /) -> None:
        """Load the model."""
        super().model_post_init(context)
        for name in ("template", "told_template"):
            if "{label}" not in getattr(self, name):
                raise ConfigurationError(f"Expected {{label}} in `{name}`, got {getattr(self, name)!r}.")
        transformers = require("transformers", "torch")
        with quiet_transformers():
            network = transformers.CLIPModel.from_pretrained(self.model)
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(self.model)
        self._network = network.to(choose_device(self.device)).eval()
        self._scale = ImageScale.from_transformers(self.model)

    @override
    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> str:
        return self._call_with_config(self._one, input, config)

    @override
    def batch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        return self._batch_with_config(self._many, inputs, config, return_exceptions=return_exceptions)

    def predict(self, value: Any) -> Prediction:
        """Return the probabilities over all labels for one input, which are zero for labels that are not candidates.

        Raises:
            InputError: If the input has no image.
        """
        found = self._probabilities([told_by(value, self.input_key)])[0]
        if isinstance(found, Exception):
            raise found
        return PredictionBatch.from_arrays(self.labels, found[None], model_id=self.model)[0]

    def _one(self, value: Any) -> str:
        return self.predict(value).label

    def _many(self, values: list[Any]) -> list[Any]:
        found = self._probabilities([told_by(value, self.input_key) for value in values])
        return [one if isinstance(one, Exception) else self.labels[int(one.argmax())] for one in found]

    def _probabilities(self, told: Sequence[Told]) -> list[Any]:
        """Return probabilities `[k]` or an error for each input."""
        torch = require("torch", "torch")
        assert self._scale is not None
        found: list[Any] = [None] * len(told)
        pictures, rows = [], []
        for i, one in enumerate(told):
            try:
                pictures.append(self._scale.pixels(self.images.read(one.value)))
                rows.append(i)
            except InputError as error:
                found[i] = error
        if not rows:
            return found
        with torch.inference_mode():
            pixels = self._scale.tensor(pictures, self._network.device)
            seen = _unit(_tensor(self._network.get_image_features(pixel_values=pixels)))
            for i, vector in zip(rows, seen, strict=True):
                try:
                    found[i] = self._of(vector, told[i])
                except ConfigurationError as error:
                    found[i] = error
        return found

    def _of(self, vector: Any, told: Told) -> FloatArray:
        names = [label for label in self.labels if not told.candidates or label in told.candidates]
        if not names:
            raise ConfigurationError(
                f"None of the candidates {', '.join(told.candidates[:5])} is a label of this model. Use its labels."
            )
        texts = [self._prompt(label, told.probabilities.get(label)) for label in names]
        fits = (self._embedded(texts) @ vector * self._network.logit_scale.exp()).double().cpu().numpy()
        p = np.zeros(len(self.labels))
        p[[self.labels.index(name) for name in names]] = softmax(fits[None])[0]
        return p

    def _prompt(self, label: str, probability: float | None) -> str:
        if probability is None:
            return self.template.replace("{label}", label)
        return self.told_template.replace("{label}", label).replace("{probability}", str(probability))

    def _embedded(self, texts: Sequence[str]) -> Any:
        """Return unit vectors `[n, d]` of prompts. Those of plain labels are cached."""
        torch = require("torch", "torch")
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        made: dict[str, Any] = {}
        if new:
            asked = self._tokenizer(new, padding=True, truncation=True, return_tensors="pt").to(self._network.device)
            made = dict(zip(new, _unit(_tensor(self._network.get_text_features(**asked))), strict=True))
            plain = {self._prompt(label, None) for label in self.labels}
            self._texts.update({text: vector for text, vector in made.items() if text in plain})
        return torch.stack([made[text] if text in made else self._texts[text] for text in texts])


def _tensor(found: Any) -> Any:
    return getattr(found, "pooler_output", found)


def _unit(vectors: Any) -> Any:
    return vectors / vectors.norm(dim=-1, keepdim=True)
