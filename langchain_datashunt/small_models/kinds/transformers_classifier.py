"""TransformersClassifier: any AutoModelForSequenceClassification, loaded from a folder or hub id, or fine-tuned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr
from typing_extensions import override

from langchain_datashunt._utils.optional import require
from langchain_datashunt.calibration.temperature import fit_temperature
from langchain_datashunt.exceptions import BundleMismatchError, ConfigurationError
from langchain_datashunt.small_models.base import Loss, SmallModel
from langchain_datashunt.small_models.bundles.bundle import BundleInfo, check_weights
from langchain_datashunt.small_models.bundles.networks import safe_config, shapes_of, unique_labels
from langchain_datashunt.small_models.engine.devices import (
    choose_device,
    choose_dtype,
    cpu_workers,
    kept_dtype,
    quiet_transformers,
)
from langchain_datashunt.small_models.engine.layers import TokenStates
from langchain_datashunt.small_models.engine.padding_free import Engine, EngineSelector, log_once
from langchain_datashunt.small_models.engine.text_batches import compute_texts, token_budget
from langchain_datashunt.small_models.engine.tokenization import TextTokenizer, pad, usable_length
from langchain_datashunt.small_models.kinds.encoder import BUNDLED_ENCODER, bundled_encoder_path
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

_ARCHITECTURE = "architecture"


def _modernbert_head(network: Any, states: TokenStates) -> Any:
    """Return the logits of a ModernBERT head, which pools by the mean or by the first token."""
    first = network.config.classifier_pooling == "cls"
    pooled = states.first() if first else states.mean().to(states.states.dtype)
    return network.classifier(network.head(pooled))


HEADS: dict[str, Callable[[Any, TokenStates], Any]] = {
    "BertForSequenceClassification": lambda own, states: own.classifier(own.bert.pooler(states.first()[:, None])),
    "RobertaForSequenceClassification": lambda own, states: own.classifier(states.first()[:, None]),
    "XLMRobertaForSequenceClassification": lambda own, states: own.classifier(states.first()[:, None]),
    "DistilBertForSequenceClassification": lambda own, states: own.classifier(
        own.pre_classifier(states.first()).relu()
    ),
    "ModernBertForSequenceClassification": _modernbert_head,
    "DebertaV2ForSequenceClassification": lambda own, states: own.classifier(own.pooler(states.first()[:, None])),
}
"""Functions from a network and its last states to logits `[n, k]`, by class name of the network."""


def _refuse_other_tasks(config: Any, model: str) -> None:
    """Reject networks for regression or multi-label classification, whose softmax is not a confidence.

    Raises:
        ConfigurationError: The network does not choose exactly one of several labels.
    """
    if config.problem_type in ("multi_label_classification", "regression") or config.num_labels < 2:
        kind = config.problem_type or "regression"
        raise ConfigurationError(
            f"Expected a classifier that chooses one of several labels for `model`, got {model} "
            f"({config.num_labels} outputs, {kind}), whose confidence would be meaningless. Fine-tune it: "
            f"TransformersClassifier.train(..., base={model!r})."
        )


class TransformersClassifier(SmallModel):
    """A sequence classifier of the transformers library.

    `TransformersClassifier(model="folder-or-hub-id")` loads a trained classifier with its labels.
    `TransformersClassifier.train(...)` fine-tunes an encoder.
    """

    labels: tuple[str, ...] = ()
    """Label names. Empty uses `id2label` of the model's configuration."""

    model: str | None = None
    """Folder or hub id. None for a model from `train` or a bundle."""

    device: str | None = None
    """Device "cuda", "mps" or "cpu". None uses the first available."""

    dtype: str = "float32"
    """Data type "float32", "bfloat16", "float16" or "auto" (bfloat16 on a GPU with native support, else float32).

    On a CPU, the padding-free engine uses bfloat16 for matrix products only. Calibrate the threshold with the same
    dtype as in use."""

    batch_size: int | None = Field(default=None, ge=1)
    """Maximum texts per batch. None is limited only by the token budget of the device."""

    max_length: int | None = Field(default=None, ge=4)
    """Maximum tokens per text, including special tokens. None uses the model's own limit."""

    engine: Engine = "auto"
    """Inference engine. "plain" runs transformers, "padding-free" skips the computation of padding, and "auto" chooses
    by speed."""

    _network: Any = PrivateAttr(default=None)
    _engine_selector: EngineSelector = PrivateAttr()
    _tokenizer: TextTokenizer | None = PrivateAttr(default=None)

    def model_post_init(self, context: Any, /) -> None:
        """Load the network and its labels if `model` is given."""
        super().model_post_init(context)
        self._engine_selector = EngineSelector(self.engine)
        if self.model is None:
            return
        auto = require("transformers", "torch").AutoModelForSequenceClassification
        with quiet_transformers():
            network = auto.from_pretrained(self.model)
        _refuse_other_tasks(network.config, self.model)
        own = unique_labels([str(network.config.id2label[i]) for i in range(network.config.num_labels)])
        if self.labels and len(self.labels) != len(own):
            raise ConfigurationError(
                f"Expected one label for each output of {self.model} in `labels`, got {len(self.labels)} labels for "
                f"{len(own)} outputs ({', '.join(own[:5])}). Pass one name per output in this order, or no labels."
            )
        limit = usable_length(network.config, self.max_length)
        self.labels = self.labels or own
        self.model_id = self.model_id or Path(self.model).name
        self._take(network, TextTokenizer.from_pretrained(self.model, limit))

    def _take(self, network: Any, tokenizer: TextTokenizer) -> None:
        device, engine = choose_device(self.device), self.engine if type(network).__name__ in HEADS else "plain"
        products = choose_dtype(self.dtype, device)
        self._network = network.to(device, kept_dtype(products, device, engine)).eval()
        self._engine_selector = EngineSelector(self.engine, products)
        self._tokenizer = tokenizer

    def _ready(self) -> TextTokenizer:
        if self._tokenizer is None:
            raise ConfigurationError(
                "This TransformersClassifier has no weights. Pass a folder or hub id as `model`, or create the "
                "classifier with TransformersClassifier.train(...) or load_small_model(folder)."
            )
        return self._tokenizer

    def features(self, texts: Sequence[str]) -> list[Any]:
        """Tokenise texts to lists of token ids, truncated to the maximum length."""
        return self._ready()(texts)[0]

    def logits_of(self, network: Any, ids: list[list[int]]) -> Any:
        """Compute logits `[n, k]` from token ids with `network`, which is this model's network, a copy or a wrapper."""
        tokens, mask = pad(ids, self._ready().pad_id, next(network.parameters()).device)
        return network(input_ids=tokens, attention_mask=mask).logits

    @override
    def workers(self) -> int:
        return cpu_workers(choose_device(self.device))

    @override
    def predict_scores(self, texts: Sequence[str]) -> Scores:
        budget, k = token_budget(choose_device(self.device)), len(self.labels)
        return Scores(*compute_texts(self._ready(), texts, self._logits, k, budget=budget, batch_size=self.batch_size))

    def _logits(self, ids: list[list[int]]) -> Any:
        """Compute logits `[n, k]` from token ids with the selected engine, or with transformers if there is none."""
        head = HEADS.get(type(self._network).__name__)
        if head is None:
            if self.engine not in ("auto", "plain"):
                raise ConfigurationError(
                    f"{type(self._network).__name__} does not support engine={self.engine!r}. Use 'auto' or 'plain'. "
                    f"Other engines support: {', '.join(HEADS)}."
                )
            if self.engine == "auto":
                log_once(str(self._network.config.model_type))
            return self.logits_of(self._network, ids)
        encoder = self._own_selector().engine_for(self._network.base_model, self._network)
        return self.logits_of(self._network, ids) if encoder is None else head(self._network, encoder(ids))

    def _own_selector(self) -> EngineSelector:
        """Return the engine of this model's network.

        A copy of the model shares the engine object, so a new one is created if network or engine differ.
        """
        selector = self._engine_selector
        if selector.engine != self.engine or selector.network not in (None, self._network.base_model):
            selector = self._engine_selector = EngineSelector(self.engine, selector.dtype)
        return selector

    @classmethod
    def train(
        cls,
        texts: Sequence[str],
        labels: Sequence[str],
        *,
        validation: tuple[Sequence[str], Sequence[str]] | None = None,
        label_set: Sequence[str] | None = None,
        settings: TrainingSettings | None = None,
        base: str | None = None,
        model_id: str = "transformers",
        input_key: str = "input",
        max_length: int | None = 256,
        device: str | None = None,
        dtype: str = "float32",
    ) -> Self:
        """Fine-tune an encoder with early stopping on the validation loss.

        Args:
            texts: `n` training texts.
            labels: Labels of the texts.
            validation: Texts and labels for early stopping and calibration. None holds out a stratified part of
                `texts`.
            label_set: All labels in order. None uses the labels of the training set, sorted.
            settings: Training settings. None uses 10 epochs, batch size 16 and learning rate 5e-5.
            base: Folder or hub id of the encoder. None uses the bundled package.
            model_id: Name of the model in predictions and logs.
            input_key: Key of the text in mapping inputs.
            max_length: Maximum tokens per text, including special tokens. None uses the encoder's own limit.
            device: "cuda", "mps" or "cpu". None uses the first available.
            dtype: Data type of the trained model. Its weights are trained in float32.

        Returns:
            A trained classifier.

        Raises:
            DataError: The training set cannot be used. The message gives the reason.
        """
        chosen = (settings or TrainingSettings()).filled(epochs=10, batch_size=16, learning_rate=5e-5, patience=2)
        split = split_examples(texts, labels, validation=validation, settings=chosen, label_set=label_set)
        seed_everything(chosen.seed)
        path = bundled_encoder_path() if base is None else base
        model = cls(
            labels=split.labels,
            model_id=model_id,
            input_key=input_key,
            device=device,
            max_length=max_length,
        )
        auto = require("transformers", "torch").AutoModelForSequenceClassification
        with quiet_transformers():  # the head is new on purpose, so a warning about its missing weights would mislead
            network = auto.from_pretrained(
                path,
                num_labels=len(split.labels),
                ignore_mismatched_sizes=True,
                id2label=dict(enumerate(split.labels)),
                label2id={label: i for i, label in enumerate(split.labels)},
            )
        limit = usable_length(network.config, max_length)
        model._take(network, TextTokenizer.from_pretrained(path, limit))
        report = fit_network(
            model._network,
            model.logits_of,
            [Stage(model.features(split.train.texts), split.train.targets)],
            Stage(model.features(split.validation.texts), split.validation.targets),
            chosen,
            what="fine-tuning",
        )
        model.dtype = dtype
        model._take(model._network, model._ready())
        if len(split.validation) >= MIN_EXAMPLES_FOR_CALIBRATION:
            logits = np.asarray(model.predict_scores(split.validation.texts).logits, dtype=np.float64)
            model.temperature = fit_temperature(logits, split.validation.targets.argmax(axis=1))
        model.lineage = lineage_of(split, chosen, report, base=BUNDLED_ENCODER if base is None else base)
        return model

    @override
    def fit_soft_targets(
        self, stages: Sequence[Examples], held_out: Examples, settings: TrainingSettings, loss: Loss
    ) -> Self:
        chosen = settings.filled(epochs=7, batch_size=16, learning_rate=2e-5, patience=2)
        learner: Self = fit_soft_targets_network(self, stages, held_out, chosen, loss)
        return learner

    # Bundles

    @classmethod
    @override
    def kind(cls) -> str:
        return "transformers"

    @override
    def settings(self) -> dict[str, Any]:
        tokenizer = self._ready()
        return {
            _ARCHITECTURE: self._network.config.to_dict(),
            "pad_id": tokenizer.pad_id,
            "max_length": tokenizer.max_length,
            "dtype": self.dtype,
            "batch_size": self.batch_size,
        }

    @override
    def weights(self) -> dict[str, NDArray[Any]]:
        return {name: tensor.float().cpu().numpy() for name, tensor in self._network.state_dict().items()}

    @override
    def write_files(self, folder: Path) -> None:
        self._ready().save(folder / "tokenizer.json")

    @classmethod
    @override
    def from_weights(cls, info: BundleInfo, weights: dict[str, NDArray[Any]], folder: Path, **overrides: Any) -> Self:
        if "tokenizer.json" not in info.files:
            raise BundleMismatchError(
                f"The bundle {folder} of kind 'transformers' has no tokenizer.json. Copy the complete bundle again."
            )
        torch, transformers = require("torch", "torch"), require("transformers", "torch")
        architecture, auto = safe_config(info.settings[_ARCHITECTURE]), transformers.AutoModelForSequenceClassification

        def build() -> Any:
            return auto.from_config(architecture, trust_remote_code=False)

        check_weights(info, weights, dict(shapes_of(build)))
        network = build()
        head = network.config.num_labels
        if head != len(info.labels):
            raise BundleMismatchError(
                f"Expected one output for each of the {len(info.labels)} labels of the bundle {folder}, got {head} "
                f"outputs. Save the bundle again from the trained model."
            )
        network.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
        model = cls(
            **info.shared(),
            device=overrides.get("device"),
            dtype=overrides.get("dtype") or info.settings["dtype"],
            batch_size=overrides.get("batch_size") or info.settings["batch_size"],
            engine=overrides.get("engine") or "auto",
        )
        backend = require("tokenizers", "torch").Tokenizer.from_file(str(folder / "tokenizer.json"))
        model._take(network, TextTokenizer(backend, info.settings["pad_id"], info.settings["max_length"]))
        return model
