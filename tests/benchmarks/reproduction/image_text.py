"""ImageTextModel: CLIP as the large side, which reads the prompt of Prompt Pruning as the paper writes it."""

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
    """A model that says how well a text fits an image, as the large side: it answers with the label whose prompt fits.

    Each candidate's prompt is "This is a photo of a cat.", and where the small model's probability is told, "This is a
    photo of a cat with probability 0.31." (Data Shunt, section on Prompt Pruning).
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    model: str
    """Folder or hub id of a CLIP model of transformers."""

    labels: tuple[str, ...] = Field(min_length=1)
    """All labels; candidates are some of them."""

    template: str = "This is a photo of a {label}."
    """The prompt of a label."""

    told_template: str = "This is a photo of a {label} with probability {probability}."
    """The same where the small model's probability is told."""

    input_key: str = "input"
    """The name of the input in the mapping."""

    images: ImageReader = ImageReader()
    """How images are read."""

    device: str | None = None
    """cuda, mps or cpu; None chooses."""

    _network: Any = PrivateAttr(default=None)
    _tokenizer: Any = PrivateAttr(default=None)
    _scale: ImageScale | None = PrivateAttr(default=None)
    _texts: dict[str, Any] = PrivateAttr(default_factory=dict)

    def model_post_init(self, context: Any, /) -> None:
        """Load the model."""
        super().model_post_init(context)
        for name in ("template", "told_template"):
            if "{label}" not in getattr(self, name):
                raise ConfigurationError(f"The {name} {getattr(self, name)!r} has no {{label}}.")
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
        """The probabilities of the candidates for one input, over all labels.

        Raises:
            InputError: There is no image in it.
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
        """Probabilities `[k]` for each input, or what is wrong with it."""
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
                f"None of the candidates {', '.join(told.candidates[:5])} is a label of this model."
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
        """Unit vectors `[n, d]` of prompts; those of plain labels are remembered."""
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
