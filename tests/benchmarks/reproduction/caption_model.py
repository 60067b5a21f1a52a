"""CaptionModel: an image captioner from a ResNet and an LSTM with attention (Xu et al. 2015)."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr
from typing_extensions import override

from langchain_datashunt._utils.optional import require
from langchain_datashunt._utils.settings import from_dict
from langchain_datashunt.exceptions import BundleMismatchError, ConfigurationError, DataError, InputError
from langchain_datashunt.images import ImageReader, Picture
from langchain_datashunt.policies.thresholds import PLAIN_CLASSES
from langchain_datashunt.small_models.bundles.bundle import BundleInfo, check_weights
from langchain_datashunt.small_models.bundles.loading import KINDS
from langchain_datashunt.small_models.bundles.networks import shapes_of
from langchain_datashunt.small_models.engine.devices import choose_device, cpu_workers, quiet_transformers
from langchain_datashunt.small_models.kinds.generating import (
    AnswerExamples,
    Generated,
    GeneratingModel,
    answer_lineage,
    fit_answers,
    learned_answers,
    split_answers,
)
from langchain_datashunt.small_models.kinds.image_inputs import ImageScale
from langchain_datashunt.small_models.training.training import TrainingSettings, seed_everything

_WORD = re.compile(r"\w+|[^\w\s]")
_SPECIAL = 4
VOCABULARY_FILE = "vocabulary.json"

RESNET_101 = {
    "depths": [3, 4, 23, 3],
    "hidden_sizes": [256, 512, 1024, 2048],
    "layer_type": "bottleneck",
    "embedding_size": 64,
}
"""Arguments of transformers' ResNetConfig for ResNet-101."""


class CaptionModel(GeneratingModel):
    """Image captioner with a ResNet, soft attention over its feature map, and an LSTM.

    ```python
    small = CaptionModel.train(images, captions)
    small.invoke(Path("scene.png")).answer      # "a red circle above a blue square"
    ```

    The confidence is the mean probability of the words (Data Shunt, eq. 8).
    """

    reads_text: ClassVar[bool] = False

    vocabulary: tuple[str, ...] = Field(default=(), repr=False)
    """Known words. Their ids start at 4, after padding, start, end and unknown."""

    eye: dict[str, Any] = Field(default_factory=lambda: {"kind": "small", "depth": 14, "width": 16, "channels": 3})
    """Image network: `{"kind": "small", depth, width, channels}`, or `{"kind": "resnet", "config": {...}}`."""

    embedding_size: int = Field(default=128, ge=1)
    """Dimensions of a word embedding."""

    hidden_size: int = Field(default=256, ge=1)
    """Units of the LSTM."""

    dropout: float = Field(default=0.3, ge=0.0, lt=1.0)
    """Dropout rate in training."""

    evenness: float = Field(default=0.05, ge=0.0)
    """Weight of the training loss that spreads attention over all positions of the image."""

    max_words: int = Field(default=30, ge=1)
    """Maximum words per caption."""

    beams: int = Field(default=1, ge=1, le=32)
    """Beam width. 1 is greedy decoding."""

    images: ImageReader = ImageReader()
    """Reader of images."""

    scale: ImageScale | None = None
    """Size, channels and normalization of the network's input."""

    device: str | None = None
    """Torch device: cuda, mps or cpu. None selects it automatically."""

    batch_size: int = Field(default=64, ge=1)
    """Maximum images per batch."""

    _network: Any = PrivateAttr(default=None)
    _ids: dict[str, int] = PrivateAttr(default_factory=dict)

    def model_post_init(self, context: Any, /) -> None:
        """Build the network with random weights."""
        super().model_post_init(context)
        if not self.vocabulary or self.scale is None:
            raise ConfigurationError(
                "A CaptionModel requires a vocabulary and a scale. Create it with CaptionModel.train(...) or "
                "load_small_model(folder)."
            )
        from tests.benchmarks.reproduction.caption_modules import AttendingWriter

        self._ids = {word: i + _SPECIAL for i, word in enumerate(self.vocabulary)}
        network = AttendingWriter(
            self.eye, len(self.vocabulary) + _SPECIAL, self.embedding_size, self.hidden_size, self.dropout
        )
        self._network = network.to(choose_device(self.device)).eval()

    @property
    @override
    def reader(self) -> ImageReader:
        return self.images.model_copy(update={"input_key": self.input_key})

    @classmethod
    @override
    def reader_of(cls, info: BundleInfo) -> ImageReader:
        return ImageReader(**info.settings["images"], input_key=info.input_key)

    @override
    def workers(self) -> int:
        return cpu_workers(choose_device(self.device))

    # Captioning

    @override
    def generate(self, inputs: Sequence[Picture]) -> list[Generated]:
        torch = require("torch", "torch")
        made: list[Generated] = []
        with torch.inference_mode():
            for start in range(0, len(inputs), self.batch_size):
                images = self._tensor([self._pixels(picture) for picture in inputs[start : start + self.batch_size]])
                if self.beams == 1:
                    ids, logs = self._network.greedy(images, self.max_words)
                else:
                    ids, logs = self._network.beam(images, self.max_words, self.beams)
                made += map(self._said, ids.cpu().numpy(), logs.double().cpu().numpy())
        return made

    def _said(self, ids: NDArray[Any], logs: NDArray[Any]) -> Generated:
        ended = np.flatnonzero(ids == 2)
        length = int(ended[0]) if ended.size else len(ids)
        words = [self.vocabulary[i - _SPECIAL] if i >= _SPECIAL else "?" for i in ids[:length].tolist()]
        return Generated(re.sub(r" ([^\w\s])", r"\1", " ".join(words)), logs[:length])

    def _pixels(self, picture: Picture) -> Any:
        assert self.scale is not None
        return self.scale.pixels(picture)

    def _tensor(self, pixels: list[Any]) -> Any:
        assert self.scale is not None
        return self.scale.tensor(pixels, next(self._network.parameters()).device)

    # Training

    def features(self, examples: AnswerExamples) -> list[Any]:
        """Return (pixels, word ids with END) of examples. Unknown words become UNKNOWN."""
        read, known = self.reader.read, self._ids
        seen: dict[str, Any] = {}
        found = []
        for url, caption in zip(examples.texts, examples.answers, strict=True):
            if url not in seen:
                seen[url] = self._pixels(read(url))
            ids = [known.get(word, 3) for word in _WORD.findall(caption.lower())][: self.max_words]
            found.append((seen[url], [*ids, 2]))
        return found

    def losses_of(self, network: Any, features: list[Any]) -> Any:
        """Return the loss of each caption, shape `[n, 1]`."""
        torch = require("torch", "torch")
        images = self._tensor([pixels for pixels, _ in features]).to(next(network.parameters()).device)
        words = torch.zeros(len(features), max(len(ids) for _, ids in features), dtype=torch.long)
        for i, (_, ids) in enumerate(features):
            words[i, : len(ids)] = torch.tensor(ids)
        return getattr(network, "module", network).losses(images, words.to(images.device), self.evenness)

    @classmethod
    def train(
        cls,
        images: Sequence[Any],
        captions: Sequence[str | Sequence[str]],
        *,
        validation: tuple[Sequence[Any], Sequence[str | Sequence[str]]] | None = None,
        settings: TrainingSettings | None = None,
        eye: Literal["small", "resnet101"] = "small",
        depth: int = 14,
        width: int = 16,
        base: str | None = None,
        size: tuple[int, int] | None = None,
        vocabulary_size: int = 10_000,
        model_id: str = "captioner",
        input_key: str = "input",
        reader: ImageReader | None = None,
        **network: Any,
    ) -> Self:
        """Train on images and their captions, with early stopping on the held-out loss.

        Args:
            images: `n` images that `reader` can read.
            captions: One or several captions per image.
            validation: Images and captions for early stopping; None holds out part of the images.
            settings: Training settings; None means 30 epochs, batches of 32 and a learning rate of 1e-3.
            eye: "small", a ResNet for small images, or "resnet101", as in the paper.
            depth: Layers of the small ResNet, 6 n + 2.
            width: Channels of its first group.
            base: Folder or hub id of a transformers ResNet that provides the architecture and initial weights instead
                of `eye`.
            size: Height and width of the network's input; None means those of the first image, 224 for ResNet-101.
            vocabulary_size: Number of most frequent words in the vocabulary.
            model_id: Name of the model in predictions and records.
            input_key: Key of the image in mappings.
            reader: Reader of images, with its limits.
            **network: embedding_size, hidden_size, dropout, evenness, max_words, beams, device.

        Raises:
            DataError: If the training set is unusable. The message gives the reason.
        """
        read = reader or ImageReader()
        chosen = (settings or TrainingSettings()).filled(epochs=30, batch_size=32, learning_rate=1e-3, patience=5)
        urls, answers = _pairs(read, images, captions)
        if validation is None:
            split = split_answers(urls, answers, chosen)
        else:
            split = [AnswerExamples(urls, answers), AnswerExamples(*_pairs(read, *validation))]
        seed_everything(chosen.seed)
        counts = Counter(word for caption in split[0].answers for word in _WORD.findall(caption.lower()))
        first = read.read(urls[0])
        architecture, scale = _eye(eye, depth, width, base, size, first, [read.read(u) for u in split[0].texts[:500]])
        model = cls(
            model_id=model_id,
            input_key=input_key,
            images=read,
            vocabulary=tuple(word for word, _ in counts.most_common(vocabulary_size)),
            eye=architecture,
            scale=scale,
            **network,
        )
        if base is not None:
            with quiet_transformers():
                begun = require("transformers", "torch").ResNetModel.from_pretrained(base)
            model._network.eye.network.load_state_dict(begun.state_dict())
        report = fit_answers(
            model._network, model.losses_of, [model.features(split[0])], model.features(split[1]), chosen,
            what="captioner",
        )  # fmt: skip
        model.lineage = answer_lineage(split, chosen, report, base=base)
        return model

    @override
    def learn_answers(
        self, stages: Sequence[AnswerExamples], held_out: AnswerExamples, settings: TrainingSettings
    ) -> Self:
        chosen = settings.filled(epochs=10, batch_size=32, learning_rate=5e-4, patience=3)
        learner: Self = learned_answers(self, stages, held_out, chosen)
        return learner

    # Bundles

    @classmethod
    @override
    def kind(cls) -> str:
        return "captioner"

    @override
    def settings(self) -> dict[str, Any]:
        names = (
            "eye", "embedding_size", "hidden_size", "dropout", "evenness", "max_words", "beams", "batch_size",
        )  # fmt: skip
        assert self.scale is not None
        return {
            **super().settings(),
            **{name: getattr(self, name) for name in names},
            "scale": self.scale.model_dump(),
            "images": self.images.model_dump(exclude={"input_key"}),
        }

    @override
    def weights(self) -> dict[str, NDArray[Any]]:
        return {name: tensor.cpu().numpy() for name, tensor in self._network.state_dict().items()}

    @override
    def write_files(self, folder: Path) -> None:
        words = json.dumps(list(self.vocabulary), ensure_ascii=False)
        (folder / VOCABULARY_FILE).write_text(words, encoding="utf-8")

    @classmethod
    @override
    def from_weights(cls, info: BundleInfo, weights: dict[str, NDArray[Any]], folder: Path, **overrides: Any) -> Self:
        if VOCABULARY_FILE not in info.files:
            raise BundleMismatchError(
                f"The bundle {folder} of kind {info.kind!r} has no {VOCABULARY_FILE}. Copy it again."
            )
        from tests.benchmarks.reproduction.caption_modules import AttendingWriter

        words = json.loads((folder / VOCABULARY_FILE).read_text(encoding="utf-8"))
        said = dict(info.settings)
        sizes = (len(words) + _SPECIAL, said["embedding_size"], said["hidden_size"], said["dropout"])
        check_weights(info, weights, dict(shapes_of(lambda: AttendingWriter(said["eye"], *sizes))))
        known = {name: overrides[name] for name in ("device", "batch_size") if overrides.get(name)}
        model = cls(
            **info.shared(),
            **{
                **said,
                "score": from_dict(said["score"], PLAIN_CLASSES),
                "scale": ImageScale(**said["scale"]),
                "images": ImageReader(**said["images"]),
                **known,
            },
            vocabulary=tuple(words),
        )
        torch = require("torch", "torch")
        model._network.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
        return model


def _pairs(
    reader: ImageReader, images: Sequence[Any], captions: Sequence[str | Sequence[str]]
) -> tuple[list[str], list[str]]:
    """Return data URLs and captions, one pair per caption."""
    if len(images) != len(captions):
        raise DataError(f"Expected captions for each image, got {len(images)} images and {len(captions)} captions.")
    urls: list[str] = []
    answers: list[str] = []
    for i, (image, said) in enumerate(zip(images, captions, strict=True)):
        try:
            url = reader.read(image).data_url(reader.recorded_side)
        except InputError as error:
            raise DataError(f"Image {i} cannot be used: {error}") from error
        mine = [said] if isinstance(said, str) else list(said)
        urls += [url] * len(mine)
        answers += mine
    if not urls:
        raise DataError("Expected captioned images for training, got none. Pass at least one image with a caption.")
    return urls, answers


def _eye(
    eye: str,
    depth: int,
    width: int,
    base: str | None,
    size: tuple[int, int] | None,
    first: Picture,
    pictures: Sequence[Picture],
) -> tuple[dict[str, Any], ImageScale]:
    """Return the settings of the image network, and the scale of its input."""
    if base is not None:
        config = require("transformers", "torch").AutoConfig.from_pretrained(base)
        if config.model_type != "resnet":
            raise ConfigurationError(f"Expected a 'resnet' model for `base`, got {base} of type {config.model_type!r}.")
        names = (*RESNET_101, "num_channels", "hidden_act", "downsample_in_first_stage", "downsample_in_bottleneck")
        kept = {name: getattr(config, name) for name in names if hasattr(config, name)}
        return {"kind": "resnet", "config": kept}, ImageScale.from_transformers(base)
    high, wide = size or ((224, 224) if eye == "resnet101" else first.pixels.shape[:2])
    channels = 3 if eye == "resnet101" else first.pixels.shape[2]
    scale = ImageScale.fitted([one.resized(high, wide, channels) for one in pictures], high, wide, channels)
    if eye == "resnet101":
        return {"kind": "resnet", "config": RESNET_101}, scale
    if depth < 8 or (depth - 2) % 6:
        raise ConfigurationError(f"Expected 6 n + 2 layers for `depth` (8, 14, 20, ...), got {depth}.")
    return {"kind": "small", "depth": depth, "width": width, "channels": channels}, scale


KINDS["captioner"] = (__name__, "CaptionModel")
