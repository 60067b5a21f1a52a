"""TextCNN and LSTMClassifier: word-based networks trained from scratch, as in Table 1 of the paper."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr
from typing_extensions import override

from langchain_datashunt._utils.optional import require
from langchain_datashunt.calibration.temperature import fit_temperature
from langchain_datashunt.exceptions import BundleMismatchError
from langchain_datashunt.prediction import BoolArray
from langchain_datashunt.small_models.base import Loss, SmallModel
from langchain_datashunt.small_models.bundles.bundle import BundleInfo, check_weights
from langchain_datashunt.small_models.engine.devices import choose_device, cpu_workers
from langchain_datashunt.small_models.engine.text_batches import compute_texts, token_budget
from langchain_datashunt.small_models.engine.tokenization import pad
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

_WORD = re.compile(r"\w+|[^\w\s]")
_PAD, _UNKNOWN = 0, 1
VOCABULARY_FILE = "vocabulary.json"


class WordNetwork(SmallModel):
    """Base class of word networks, with vocabulary, training and bundles. Subclasses implement `build`."""

    vocabulary: tuple[str, ...] = Field(repr=False)
    """Known words; their ids start at 2, after the ids for padding and unknown words."""

    embedding_size: int = Field(default=128, ge=1)
    """Dimensions of a word embedding."""

    hidden_size: int = Field(default=100, ge=1)
    """Filters per width for TextCNN, or units per direction for LSTMClassifier."""

    dropout: float = Field(default=0.5, ge=0.0, lt=1.0)
    """Fraction of features dropped in training."""

    max_length: int = Field(default=256, ge=1)
    """Maximum words per text. Longer texts are truncated."""

    batch_size: int = Field(default=256, ge=1)
    """Maximum texts per batch."""

    device: str | None = None
    """Device "cuda", "mps" or "cpu". None uses the first available."""

    shortest: ClassVar[int] = 1
    """Minimum number of words that the network needs. Shorter texts are padded."""

    _network: Any = PrivateAttr(default=None)
    _ids: dict[str, int] = PrivateAttr(default_factory=dict)

    def model_post_init(self, context: Any, /) -> None:
        """Build the network with randomly initialised weights."""
        super().model_post_init(context)
        self._ids = {word: i + 2 for i, word in enumerate(self.vocabulary)}
        self._network = self.build().to(choose_device(self.device)).eval()

    @abstractmethod
    def build(self) -> Any:
        """Build the torch module that maps word ids `[n, t]` and mask `[n, t]` to logits `[n, k]`."""

    def encode(self, text: str) -> list[int]:
        """Return the word ids of a text, without truncation."""
        return [self._ids.get(word, _UNKNOWN) for word in _WORD.findall(text.lower())]

    def features(self, texts: Sequence[str]) -> list[Any]:
        """Return the word ids of each text, without truncation."""
        return [self.encode(text) for text in texts]

    def logits_of(self, network: Any, ids: Sequence[Sequence[int]]) -> Any:
        """Compute logits `[n, k]` from word ids with `network`, which is this model's network, a copy or a wrapper."""
        fill = [[*one[: self.max_length], *[_PAD] * (self.shortest - len(one))] for one in ids]
        return network(*pad(fill, _PAD, next(network.parameters()).device))

    @override
    def workers(self) -> int:
        return cpu_workers(choose_device(self.device))

    @override
    def predict_scores(self, texts: Sequence[str]) -> Scores:
        def tokenize(some: Sequence[str]) -> tuple[list[list[int]], BoolArray]:
            ids = self.features(some)
            cut = np.array([len(one) > self.max_length for one in ids], dtype=np.bool_)
            return [one[: self.max_length] for one in ids], cut

        def forward(ids: list[list[int]]) -> Any:
            return self.logits_of(self._network, ids)

        budget, k = 4 * token_budget(choose_device(self.device)), len(self.labels)
        return Scores(*compute_texts(tokenize, texts, forward, k, budget=budget, batch_size=self.batch_size))

    @classmethod
    def train(
        cls,
        texts: Sequence[str],
        labels: Sequence[str],
        *,
        validation: tuple[Sequence[str], Sequence[str]] | None = None,
        label_set: Sequence[str] | None = None,
        settings: TrainingSettings | None = None,
        model_id: str | None = None,
        input_key: str = "input",
        vocabulary_size: int = 30_000,
        **network: Any,
    ) -> Self:
        """Train a network from scratch with early stopping on the validation loss.

        Args:
            texts: `n` training texts, from which the vocabulary is built.
            labels: Labels of the texts.
            validation: Texts and labels for early stopping and calibration. None holds out a stratified part of
                `texts`.
            label_set: All labels in order. None uses the labels of the training set, sorted.
            settings: Training settings. None uses 40 epochs, batch size 32 and learning rate 2e-3.
            model_id: Name of the model in predictions and logs. None uses the name of the kind.
            input_key: Key of the text in mapping inputs.
            vocabulary_size: Maximum number of words in the vocabulary. Rarer words are treated as unknown.
            **network: Fields of this class, such as `embedding_size`, `hidden_size`, `dropout`, `max_length` and
                `device`.

        Returns:
            A trained classifier.

        Raises:
            DataError: The training set cannot be used. The message gives the reason.
        """
        chosen = (settings or TrainingSettings()).filled(epochs=40, batch_size=32, learning_rate=2e-3, patience=6)
        split = split_examples(texts, labels, validation=validation, settings=chosen, label_set=label_set)
        seed_everything(chosen.seed)
        counts = Counter(word for text in split.train.texts for word in _WORD.findall(text.lower()))
        model = cls(
            labels=split.labels,
            model_id=model_id or cls.kind(),
            input_key=input_key,
            vocabulary=tuple(word for word, _ in counts.most_common(vocabulary_size)),
            **network,
        )
        report = fit_network(
            model._network,
            model.logits_of,
            [Stage(model.features(split.train.texts), split.train.targets)],
            Stage(model.features(split.validation.texts), split.validation.targets),
            chosen,
            what=cls.__name__,
        )
        if len(split.validation) >= MIN_EXAMPLES_FOR_CALIBRATION:
            logits = np.asarray(model.predict_scores(split.validation.texts).logits, dtype=np.float64)
            model.temperature = fit_temperature(logits, split.validation.targets.argmax(axis=1))
        model.lineage = lineage_of(split, chosen, report)
        return model

    @override
    def fit_soft_targets(
        self, stages: Sequence[Examples], held_out: Examples, settings: TrainingSettings, loss: Loss
    ) -> Self:
        chosen = settings.filled(epochs=20, batch_size=32, learning_rate=1e-3, patience=4)
        learner: Self = fit_soft_targets_network(self, stages, held_out, chosen, loss)
        return learner

    # Bundles

    @override
    def settings(self) -> dict[str, Any]:
        names = ("embedding_size", "hidden_size", "dropout", "max_length", "batch_size")
        return {name: getattr(self, name) for name in names}

    @override
    def weights(self) -> dict[str, NDArray[Any]]:
        return {name: tensor.cpu().numpy() for name, tensor in self._network.state_dict().items()}

    @override
    def write_files(self, folder: Path) -> None:
        words = json.dumps(list(self.vocabulary))
        (folder / VOCABULARY_FILE).write_text(words, encoding="utf-8")

    @classmethod
    @override
    def from_weights(cls, info: BundleInfo, weights: dict[str, NDArray[Any]], folder: Path, **overrides: Any) -> Self:
        if VOCABULARY_FILE not in info.files:
            raise BundleMismatchError(
                f"The bundle {folder} of kind {info.kind!r} has no {VOCABULARY_FILE}. Copy the complete bundle again."
            )
        words = json.loads((folder / VOCABULARY_FILE).read_text(encoding="utf-8"))
        known = {name: overrides[name] for name in ("device", "batch_size") if overrides.get(name)}
        model = cls(
            **info.shared(),
            vocabulary=tuple(words),
            **{**info.settings, **known},
        )
        torch = require("torch", "torch")
        shapes = {name: tuple(tensor.shape) for name, tensor in model._network.state_dict().items()}
        check_weights(info, weights, shapes)
        model._network.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
        return model


class TextCNN(WordNetwork):
    """A convolutional network over word embeddings (Kim 2014).

    Convolutions of width 3, 4 and 5, max pooling over time, dropout and a linear layer.
    """

    shortest: ClassVar[int] = 5

    @classmethod
    @override
    def kind(cls) -> str:
        return "textcnn"

    @override
    def build(self) -> Any:
        from langchain_datashunt.small_models.kinds.word_modules import ConvolutionOverWords

        return ConvolutionOverWords(
            len(self.vocabulary) + 2, self.embedding_size, self.hidden_size, len(self.labels), self.dropout
        )


class LSTMClassifier(WordNetwork):
    """A bidirectional LSTM over word embeddings, with max pooling over time, dropout and a linear layer."""

    @classmethod
    @override
    def kind(cls) -> str:
        return "lstm"

    @override
    def build(self) -> Any:
        from langchain_datashunt.small_models.kinds.word_modules import RecurrenceOverWords

        return RecurrenceOverWords(
            len(self.vocabulary) + 2, self.embedding_size, self.hidden_size, len(self.labels), self.dropout
        )
