"""ImageClassifier: a small ResNet trained from scratch, or any AutoModelForImageClassification."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr
from typing_extensions import override

from langchain_datashunt._utils.optional import require
from langchain_datashunt.calibration.temperature import fit_temperature
from langchain_datashunt.exceptions import BundleMismatchError, ConfigurationError, DataError, InputError
from langchain_datashunt.images import ImageReader, Picture, Pixels
from langchain_datashunt.small_models.base import Loss, SmallModel
from langchain_datashunt.small_models.bundles.bundle import BundleInfo, check_weights
from langchain_datashunt.small_models.bundles.networks import safe_config, shapes_of, unique_labels
from langchain_datashunt.small_models.engine.devices import (
    choose_device,
    choose_dtype,
    cpu_workers,
    on_host,
    quiet_transformers,
)
from langchain_datashunt.small_models.kinds.image_inputs import ImageScale
from langchain_datashunt.small_models.scores import Scores
from langchain_datashunt.small_models.training.fitting import Stage, fit_network, fit_soft_targets_network
from langchain_datashunt.small_models.training.training import (
    MIN_EXAMPLES_FOR_CALIBRATION,
    Examples,
    TrainingSettings,
    lineage_of,
    seed_everything,
    split_examples,
)

RESNET = "datashunt-resnet"
"""The `model_type` of the small ResNet in bundles; other values are model types of transformers."""

Augmentation = Literal["none", "shift", "shift-flip"]
"""Augmentation of training images: none, random shifts by up to an eighth of the width, or shifts and mirroring."""


class ImageClassifier(SmallModel):
    """A classifier of images.

    ```python
    small = ImageClassifier.train(images, labels)            # a ResNet-32 for small images
    small = ImageClassifier(model="folder-or-hub-id")        # any AutoModelForImageClassification
    small.invoke(Path("cat.png"))
    ```

    Accepts PIL images, arrays, bytes, `pathlib.Path`s and data URLs, and content blocks or messages with one image.
    """

    reads_text: ClassVar[bool] = False

    labels: tuple[str, ...] = ()
    """Label names. Empty uses `id2label` of the model's configuration."""

    model: str | None = None
    """Folder or hub id of a transformers model. None for a model from `train` or a bundle."""

    images: ImageReader = ImageReader()
    """Reader of the input images, with size limits."""

    scale: ImageScale | None = None
    """Preprocessing for the network. None reads it from the configuration of `model`."""

    augmentation: Augmentation = "none"
    """Augmentation of images in training and further training."""

    device: str | None = None
    """Device "cuda", "mps" or "cpu". None uses the first available."""

    dtype: str = "float32"
    """Data type "float32", "bfloat16", "float16" or "auto" (bfloat16 on a GPU with native support, else float32)."""

    batch_size: int = Field(default=64, ge=1)
    """Maximum images per batch."""

    _network: Any = PrivateAttr(default=None)
    _architecture: dict[str, Any] = PrivateAttr(default_factory=dict)

    def model_post_init(self, context: Any, /) -> None:
        """Load the network with its labels and preprocessing if `model` is given."""
        super().model_post_init(context)
        if self.model is None:
            return
        transformers = require("transformers", "torch")
        with quiet_transformers():
            network = transformers.AutoModelForImageClassification.from_pretrained(self.model)
        own = unique_labels([str(network.config.id2label[i]) for i in range(network.config.num_labels)])
        if self.labels and len(self.labels) != len(own):
            raise ConfigurationError(
                f"Expected one label for each output of {self.model} in `labels`, got {len(self.labels)} labels for "
                f"{len(own)} outputs ({', '.join(own[:5])}). Pass one name per output in this order, or no labels."
            )
        self.labels = self.labels or own
        self.model_id = self.model_id or Path(self.model).name
        self.scale = self.scale or ImageScale.from_transformers(self.model)
        self._take(network, network.config.to_dict())

    def _take(self, network: Any, architecture: dict[str, Any]) -> None:
        device = choose_device(self.device)
        self._architecture = architecture
        self._network = network.to(device, choose_dtype(self.dtype, device)).eval()

    def _ready(self) -> ImageScale:
        if self._network is None or self.scale is None:
            raise ConfigurationError(
                "This ImageClassifier has no weights. Pass a folder or hub id as `model`, or create the classifier "
                "with ImageClassifier.train(...) or load_small_model(folder)."
            )
        return self.scale

    @property
    @override
    def reader(self) -> ImageReader:
        images = self.images
        same = images.input_key == self.input_key
        return images if same else images.model_copy(update={"input_key": self.input_key})

    @classmethod
    @override
    def reader_of(cls, info: BundleInfo) -> ImageReader:
        return ImageReader(**info.settings["images"], input_key=info.input_key)

    @override
    def workers(self) -> int:
        return cpu_workers(choose_device(self.device))

    def features(self, images: Sequence[str | Picture]) -> list[Any]:
        """Return the resized pixels of pictures or data URLs, each of shape `[h, w, c]`, before normalisation."""
        scale, read = self._ready(), self.reader.read
        return [scale.pixels(image if isinstance(image, Picture) else read(image)) for image in images]

    def logits_of(self, network: Any, pixels: list[Pixels]) -> Any:
        """Compute logits of shape `[n, k]`, with augmentation if the network is in training mode.

        Args:
            network: This model's network, a copy, or a wrapper of it.
            pixels: Output of `features` for `n` images.
        """
        first = next(network.parameters())
        images = self._ready().tensor(pixels, first.device)
        if network.training and self.augmentation != "none":
            from langchain_datashunt.small_models.kinds.image_modules import shifted

            images = shifted(images, max(1, images.shape[-1] // 8), self.augmentation == "shift-flip")
        found = network(images.to(first.dtype))
        return getattr(found, "logits", found)

    @override
    def predict_scores(self, texts: Sequence[Picture]) -> Scores:
        torch = require("torch", "torch")
        pixels = self.features(texts)
        with torch.inference_mode():
            parts = [
                self.logits_of(self._network, pixels[start : start + self.batch_size]).float()
                for start in range(0, len(pixels), self.batch_size)
            ]
            return Scores(on_host(parts))

    @classmethod
    def train(
        cls,
        texts: Sequence[Any],
        labels: Sequence[str],
        *,
        validation: tuple[Sequence[Any], Sequence[str]] | None = None,
        label_set: Sequence[str] | None = None,
        settings: TrainingSettings | None = None,
        base: str | None = None,
        depth: int = 32,
        width: int = 16,
        size: tuple[int, int] | None = None,
        channels: Literal[1, 3] | None = None,
        augmentation: Augmentation = "shift",
        images: ImageReader | None = None,
        model_id: str | None = None,
        input_key: str = "input",
        device: str | None = None,
    ) -> Self:
        """Train a ResNet from scratch, or fine-tune a transformers model if `base` is given.

        Training stops early on the validation loss.

        Args:
            texts: `n` training images in any form that `images` reads.
            labels: Labels of the images.
            validation: Images and labels for early stopping. None holds out a stratified part of `texts`.
            label_set: All labels in order. None uses the labels of the training set, sorted.
            settings: Training settings. None uses 60 epochs, batch size 64 and learning rate 3e-3, or with `base` 10
                epochs, batch size 16 and learning rate 5e-5.
            base: Folder or hub id of a transformers model to fine-tune. None trains a ResNet from scratch.
            depth: Number of layers of the ResNet, of the form 6 n + 2.
            width: Number of channels in the first group of the ResNet.
            size: Input height and width of the ResNet in pixels. None uses those of the first image, at most 32 each.
            channels: 1 for grey or 3 for colour. None uses the channels of the first image.
            augmentation: Augmentation of the training images.
            images: Reader of the images, with size limits. None uses the default limits.
            model_id: Name of the model in predictions and logs. None uses the name of the network.
            input_key: Key of the image in mapping inputs.
            device: "cuda", "mps" or "cpu". None uses the first available.

        Returns:
            A trained classifier.

        Raises:
            ConfigurationError: `depth` is not of the form 6 n + 2 with n >= 1.
            DataError: The training set cannot be used. The message gives the reason.
        """
        reader = images or ImageReader()
        fine = {"epochs": 10, "batch_size": 16, "learning_rate": 5e-5, "patience": 2}
        scratch = {"epochs": 60, "batch_size": 64, "learning_rate": 3e-3, "patience": 12}
        chosen = (settings or TrainingSettings()).filled(**(scratch if base is None else fine))
        if base is None and (depth < 8 or (depth - 2) % 6):
            raise ConfigurationError(f"Expected `depth` of the form 6 n + 2 (8, 14, 20, ...), got {depth}.")
        urls = _as_urls(reader, texts, "Training")
        held_out = None if validation is None else (_as_urls(reader, validation[0], "Validation"), validation[1])
        split = split_examples(urls, labels, validation=held_out, settings=chosen, label_set=label_set)
        seed_everything(chosen.seed)
        model = cls(
            labels=split.labels,
            model_id=model_id or (f"resnet-{depth}" if base is None else Path(base).name),
            input_key=input_key,
            images=reader,
            augmentation=augmentation,
            device=device,
        )
        if base is None:
            first = reader.read(urls[0])
            high, wide = size or (min(32, first.pixels.shape[0]), min(32, first.pixels.shape[1]))
            colours = channels or first.pixels.shape[2]
            pixels = [reader.read(url).resized(high, wide, colours) for url in split.train.texts]
            model.scale = ImageScale.fitted(pixels, high, wide, colours)
            described = {"model_type": RESNET, "depth": depth, "width": width, "channels": colours}
            model._take(_network_of(described, len(split.labels)), described)
        else:
            model.scale = ImageScale.from_transformers(base)
            with quiet_transformers():
                network = require("transformers", "torch").AutoModelForImageClassification.from_pretrained(
                    base,
                    num_labels=len(split.labels),
                    ignore_mismatched_sizes=True,
                    id2label=dict(enumerate(split.labels)),
                    label2id={label: i for i, label in enumerate(split.labels)},
                )
            model._take(network, network.config.to_dict())
        report = fit_network(
            model._network,
            model.logits_of,
            [Stage(model.features(split.train.texts), split.train.targets)],
            Stage(model.features(split.validation.texts), split.validation.targets),
            chosen,
            what="image classifier",
        )
        if len(split.validation) >= MIN_EXAMPLES_FOR_CALIBRATION:
            found = model.predict_scores([reader.read(url) for url in split.validation.texts])
            logits = np.asarray(found.logits, dtype=np.float64)
            model.temperature = fit_temperature(logits, split.validation.targets.argmax(axis=1))
        model.lineage = lineage_of(split, chosen, report, base=base or f"resnet-{depth}, {width} wide")
        return model

    @override
    def fit_soft_targets(
        self, stages: Sequence[Examples], held_out: Examples, settings: TrainingSettings, loss: Loss
    ) -> Self:
        chosen = settings.filled(epochs=20, batch_size=64, learning_rate=1e-3, patience=5)
        learner: Self = fit_soft_targets_network(self, stages, held_out, chosen, loss)
        return learner

    # Bundles

    @classmethod
    @override
    def kind(cls) -> str:
        return "image"

    @override
    def settings(self) -> dict[str, Any]:
        return {
            "architecture": self._architecture,
            "scale": self._ready().model_dump(),
            "images": self.images.model_dump(exclude={"input_key"}),
            "augmentation": self.augmentation,
            "dtype": self.dtype,
            "batch_size": self.batch_size,
        }

    @override
    def weights(self) -> dict[str, NDArray[Any]]:
        return {
            name: (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()
            for name, tensor in self._network.state_dict().items()
        }

    @classmethod
    @override
    def from_weights(cls, info: BundleInfo, weights: dict[str, NDArray[Any]], folder: Path, **overrides: Any) -> Self:
        torch = require("torch", "torch")
        architecture = dict(info.settings["architecture"])
        check_weights(info, weights, dict(shapes_of(lambda: _network_of(architecture, len(info.labels)))))
        network = _network_of(architecture, len(info.labels))
        if (outputs := getattr(getattr(network, "config", None), "num_labels", len(info.labels))) != len(info.labels):
            raise BundleMismatchError(
                f"Expected one output for each of the {len(info.labels)} labels of the bundle {folder}, got {outputs} "
                f"outputs. Save the bundle again from the trained model."
            )
        network.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
        model = cls(
            **info.shared(),
            images=ImageReader(**info.settings["images"]),
            scale=ImageScale(**info.settings["scale"]),
            augmentation=info.settings["augmentation"],
            device=overrides.get("device"),
            dtype=overrides.get("dtype") or info.settings["dtype"],
            batch_size=overrides.get("batch_size") or info.settings["batch_size"],
        )
        model._take(network, architecture)
        return model


def _network_of(architecture: dict[str, Any], labels: int) -> Any:
    """Build a network with randomly initialised weights."""
    settings = dict(architecture)
    kind = settings.pop("model_type")
    if kind == RESNET:
        from langchain_datashunt.small_models.kinds.image_modules import ResNetClassifier

        return ResNetClassifier(labels=labels, **settings)
    config = safe_config(architecture)
    auto = require("transformers", "torch").AutoModelForImageClassification
    return auto.from_config(config, trust_remote_code=False)


def _as_urls(reader: ImageReader, images: Sequence[Any], what: str) -> list[str]:
    """Convert images to data URLs, since trainers and logs represent every input as text.

    Raises:
        DataError: An image cannot be read.
    """
    urls = []
    for i, image in enumerate(images):
        try:
            urls.append(reader.read(image).data_url(reader.recorded_side))
        except InputError as error:
            raise DataError(f"{what} image {i} cannot be used: {error} Remove or replace it.") from error
    return urls
