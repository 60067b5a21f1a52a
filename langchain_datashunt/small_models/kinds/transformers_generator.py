"""TransformersGenerator: a small model from a causal, sequence-to-sequence or image-to-text transformers model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr
from typing_extensions import override

from langchain_datashunt._utils.optional import require
from langchain_datashunt._utils.settings import from_dict
from langchain_datashunt.exceptions import BundleMismatchError, ConfigurationError
from langchain_datashunt.images import ImageReader, Picture
from langchain_datashunt.inputs import InputReader, text_reader
from langchain_datashunt.policies.thresholds import PLAIN_CLASSES
from langchain_datashunt.small_models.bundles.bundle import BundleInfo, check_tied_weights
from langchain_datashunt.small_models.bundles.networks import safe_config, shapes_of
from langchain_datashunt.small_models.engine.devices import choose_device, choose_dtype, quiet_transformers
from langchain_datashunt.small_models.kinds.generating import (
    AnswerExamples,
    Generated,
    GeneratingModel,
    answer_lineage,
    fit_answers,
    learned_answers,
    split_answers,
    written,
)
from langchain_datashunt.small_models.kinds.generator_networks import (
    IGNORED,
    PAIR,
    Form,
    auto_class,
    begin_tokens,
    end_tokens,
    form_of,
    full_rows,
    greedy,
    own_state,
    padded_rows,
    prompt_limit,
)
from langchain_datashunt.small_models.kinds.image_inputs import ImageScale
from langchain_datashunt.small_models.training.training import TrainingSettings, seed_everything


class TransformersGenerator(GeneratingModel):
    r"""A generative model of the transformers library that answers texts or captions images.

    ```python
    small = TransformersGenerator(model="folder-or-hub-id", template="Question: {input}\nAnswer:")
    ShuntRunnable(small=small, large=prompt | ChatOpenAI() | StrOutputParser(), policy=Threshold(0.8))
    ```

    Decoding is greedy. The probability of each token is recorded during generation. The confidence therefore needs
    neither a second pass nor memory for the scores of the whole vocabulary.
    """

    reads_text: ClassVar[bool] = False

    model: str | None = None
    """Folder or hub id. None for a model from a bundle."""

    form: Form | None = None
    """Input form of the network. None uses the form in the model's configuration."""

    template: str = "{input}"
    """Prompt template that contains `{input}`; not used for images."""

    chat: bool | None = None
    """Whether to apply the tokenizer's chat template. None applies it if there is one."""

    max_new_tokens: int = Field(default=64, ge=1)
    """Maximum tokens per answer."""

    stop: tuple[str, ...] = ()
    """Texts at which an answer ends, for example "\\n"."""

    images: ImageReader = ImageReader()
    """Reader of the input images, with size limits."""

    scale: ImageScale | None = None
    """Image preprocessing for the network. None reads it from the model's configuration."""

    quantization: Literal["4bit"] | None = None
    """Quantisation of the weights; "4bit" uses bitsandbytes and needs a CUDA device."""

    device: str | None = None
    """Device "cuda", "mps" or "cpu". None uses the first available."""

    dtype: str = "float32"
    """Data type "float32", "bfloat16", "float16" or "auto" (bfloat16 on a GPU with native support, else float32)."""

    batch_size: int = Field(default=16, ge=1)
    """Maximum inputs per batch."""

    _network: Any = PrivateAttr(default=None)
    _tokenizer: Any = PrivateAttr(default=None)

    def model_post_init(self, context: Any, /) -> None:
        """Load the network and its tokenizer if `model` is given."""
        super().model_post_init(context)
        if "{input}" not in self.template:
            raise ConfigurationError(f"Expected `template` to contain {{input}}, got {self.template!r}.")
        if self.model is None:
            return
        transformers = require("transformers", "torch")
        with quiet_transformers():
            config = transformers.AutoConfig.from_pretrained(self.model)
            self.form = self.form or form_of(config)
            auto = getattr(transformers, auto_class(config, self.form))
            network = auto.from_pretrained(self.model, **self._weights_options(transformers))
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.model)
        if self.form == "image":
            self.scale = self.scale or ImageScale.from_transformers(self.model)
        self.model_id = self.model_id or Path(self.model).name
        self._take(network, tokenizer)

    def _weights_options(self, transformers: Any) -> dict[str, Any]:
        if self.quantization is None:
            return {}
        require("bitsandbytes", "4bit")
        if choose_device(self.device).type != "cuda":
            raise ConfigurationError(
                "quantization='4bit' requires a CUDA device. Omit `quantization` to use another device."
            )
        return {"quantization_config": transformers.BitsAndBytesConfig(load_in_4bit=True), "device_map": "cuda"}

    def _take(self, network: Any, tokenizer: Any) -> None:
        device = choose_device(self.device)
        if self.quantization is None:
            network = network.to(device, choose_dtype(self.dtype, device))
        self._network = network.eval()
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        settings = network.generation_config
        if settings.eos_token_id is None:
            settings.eos_token_id = tokenizer.eos_token_id
        if settings.pad_token_id is None:
            settings.pad_token_id = tokenizer.pad_token_id
        for part in network.modules():  # `generate` fills values missing in a call from these configurations
            if getattr(part, "generation_config", None) is not None:
                part.generation_config = greedy(part.generation_config)
        tokenizer.padding_side = "left" if self.form == "causal" else "right"
        self._tokenizer = tokenizer

    def _ready(self) -> Any:
        if self._network is None:
            raise ConfigurationError(
                "This TransformersGenerator has no weights. Pass a folder or hub id as `model`, or load a bundle with "
                "load_small_model(folder)."
            )
        return self._network

    @property
    @override
    def reader(self) -> InputReader:
        if self.form != "image":
            return text_reader(self.input_key)
        return self.images.model_copy(update={"input_key": self.input_key})

    @classmethod
    @override
    def reader_of(cls, info: BundleInfo) -> InputReader:
        if info.settings["form"] != "image":
            return text_reader(info.input_key)
        return ImageReader(**info.settings["images"], input_key=info.input_key)

    # Generation

    @override
    def generate(self, inputs: Sequence[Any]) -> list[Generated]:
        torch = require("torch", "torch")
        made: list[Generated] = []
        with torch.inference_mode():
            for start in range(0, len(inputs), self.batch_size):
                made += self._written(self._ready(), inputs[start : start + self.batch_size])
        return made

    def _written(self, network: Any, inputs: Sequence[Any]) -> list[Generated]:
        transformers, torch = require("transformers", "torch"), require("torch", "torch")
        noted: list[Any] = []

        def note(_: Any, scores: Any) -> Any:
            """Record the log-probability of the most probable token, which greedy decoding selects."""
            noted.append(scores.float().log_softmax(-1).amax(-1))
            return scores

        asked, cut = self._asked(network, inputs)
        tokens = network.generate(
            **asked,
            max_new_tokens=self.max_new_tokens,
            logits_processor=transformers.LogitsProcessorList([note]),
        )
        steps = torch.stack(noted, dim=1).double().cpu().numpy()
        chosen = tokens[:, -steps.shape[1] :].cpu().numpy()
        return [self._one(*row) for row in zip(chosen, steps, cut, strict=True)]

    def _one(self, tokens: NDArray[Any], logprobs: NDArray[Any], cut: bool) -> Generated:
        ended = np.flatnonzero(np.isin(tokens, end_tokens(self._network, self._tokenizer)))
        length = int(ended[0]) if ended.size else len(tokens)
        text = self._tokenizer.decode(tokens[:length], skip_special_tokens=True)
        found = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        if found:
            text = text[: min(found)]
            while length and len(self._tokenizer.decode(tokens[: length - 1], skip_special_tokens=True)) >= len(text):
                length -= 1
        is_text = ~np.isin(tokens[:length], self._tokenizer.all_special_ids)
        return Generated(text.strip(), logprobs[:length][is_text], cut)

    def _asked(self, network: Any, inputs: Sequence[Any]) -> tuple[dict[str, Any], list[bool]]:
        """Return the arguments of `generate`, and a truncation flag for each input."""
        if self.form == "image":
            return {"pixel_values": self._pixel_values(network, inputs)}, [False] * len(inputs)
        prompts = [self._prompt(text) for text in inputs]
        ids = self._tokenizer(prompts, add_special_tokens=not self._chats())["input_ids"]
        ids = [one or begin_tokens(self._tokenizer) for one in ids]
        limit = prompt_limit(network, self)
        cut = [len(one) > limit for one in ids]
        if any(cut):  # drop the beginning: the end of a prompt usually holds the question
            ids = [one[-limit:] for one in ids]
        padded = self._tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        return {name: tensor.to(network.device) for name, tensor in padded.items()}, cut

    def _prompt(self, text: str) -> str:
        asked = self.template.replace("{input}", text)
        if not self._chats():
            return asked
        message = [{"role": "user", "content": asked}]
        return str(self._tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))

    def _chats(self) -> bool:
        there = getattr(self._tokenizer, "chat_template", None) is not None
        if self.chat and not there:
            raise ConfigurationError(f"The tokenizer of {self.model_id} has no chat template. Pass chat=False.")
        return there if self.chat is None else self.chat

    def _pixel_values(self, network: Any, pictures: Sequence[Picture]) -> Any:
        assert self.scale is not None
        pixels = [self.scale.pixels(picture) for picture in pictures]
        return self.scale.tensor(pixels, network.device).to(network.dtype)

    # Training

    def features(self, examples: AnswerExamples) -> list[Any]:
        """Return one pair per example: prompt token ids or image pixels, and answer token ids with an end token."""
        end = end_tokens(self._network, self._tokenizer)[:1]
        answers = [
            [*self._tokenizer(answer, add_special_tokens=False)["input_ids"], *end] for answer in examples.answers
        ]
        inputs = [self.reader.read(text) for text in examples.texts]
        if self.form == "image":
            assert self.scale is not None
            return [(self.scale.pixels(one), answer) for one, answer in zip(inputs, answers, strict=True)]
        prompts = [self._prompt(text) for text in inputs]
        ids = self._tokenizer(prompts, add_special_tokens=not self._chats())["input_ids"]
        limit = prompt_limit(self._network, self)
        return [(one[-limit:], answer[: self.max_new_tokens]) for one, answer in zip(ids, answers, strict=True)]

    def losses_of(self, network: Any, features: list[Any]) -> Any:
        """Compute the mean negative log-likelihood per answer token in nats, shape `[n, 1]`."""
        torch = require("torch", "torch")
        device = next(network.parameters()).device
        read, answers = [one for one, _ in features], [answer for _, answer in features]
        if self.form == "causal":
            rows = [[*one, *answer] for one, answer in zip(read, answers, strict=True)]
            asked = [[IGNORED] * len(one) + list(answer) for one, answer in zip(read, answers, strict=True)]
            ids, mask = padded_rows(rows, self._tokenizer.pad_token_id, device)
            wanted = full_rows(asked, IGNORED, device)
            logits = network(input_ids=ids, attention_mask=mask).logits[:, :-1]
            wanted = wanted[:, 1:]
        else:
            wanted = full_rows(answers, IGNORED, device)
            if self.form == "image":
                assert self.scale is not None
                given = {"pixel_values": self.scale.tensor(read, device)}
            else:
                ids, mask = padded_rows(read, self._tokenizer.pad_token_id, device)
                given = {"input_ids": ids, "attention_mask": mask}
            logits = network(**given, labels=wanted).logits
        kept = wanted != IGNORED
        found = torch.nn.functional.cross_entropy(
            logits.float().transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none"
        )
        return (found * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)

    @override
    def learn_answers(
        self, stages: Sequence[AnswerExamples], held_out: AnswerExamples, settings: TrainingSettings
    ) -> Self:
        self._can_learn()
        chosen = settings.filled(epochs=5, batch_size=8, learning_rate=3e-5, patience=2)
        learner: Self = learned_answers(self, stages, held_out, chosen)
        return learner

    def train(self, inputs: Sequence[Any], answers: Sequence[str], *, settings: TrainingSettings | None = None) -> Self:
        """Return a copy of this model fine-tuned on inputs and answers, with early stopping.

        Args:
            inputs: `n` training inputs in any form that `reader` accepts.
            answers: Target answers to the inputs.
            settings: Training settings. None uses 5 epochs, batch size 8 and learning rate 3e-5.

        Returns:
            A trained copy. This model is not changed.

        Raises:
            ConfigurationError: The weights are quantised, or this type of captioner cannot be trained.
            DataError: The training set cannot be used. The message gives the reason.
        """
        self._can_learn()
        chosen = (settings or TrainingSettings()).filled(epochs=5, batch_size=8, learning_rate=3e-5, patience=2)
        split = split_answers(written(self.reader, inputs), answers, chosen)
        seed_everything(chosen.seed)
        learner = self.model_copy()
        learner._network, learner._bundle = copy.deepcopy(self._ready()), None
        report = fit_answers(
            learner._network, learner.losses_of, [learner.features(split[0])], learner.features(split[1]), chosen,
            what="generator",
        )  # fmt: skip
        learner.lineage = answer_lineage(split, chosen, report, base=self.model)
        return learner

    def _can_learn(self) -> None:
        if self.quantization is not None:
            raise ConfigurationError("Weights in 4 bits cannot be trained. Load the model without `quantization`.")
        kind = self._ready().config.model_type
        if self.form == "image" and kind != PAIR:
            raise ConfigurationError(f"Captioners of type {kind!r} cannot be trained. Use a model of type {PAIR!r}.")

    # Bundles

    @classmethod
    @override
    def kind(cls) -> str:
        return "generator"

    @override
    def settings(self) -> dict[str, Any]:
        network = self._ready()
        if self.quantization is not None:
            raise ConfigurationError("Weights in 4 bits cannot be saved. Save the model without `quantization`.")
        names = ("form", "template", "chat", "max_new_tokens", "stop", "dtype", "batch_size")
        return {
            **super().settings(),
            **{name: getattr(self, name) for name in names},
            "architecture": network.config.to_dict(),
            "generation": network.generation_config.to_dict(),
            "scale": None if self.scale is None else self.scale.model_dump(),
            "images": self.images.model_dump(exclude={"input_key"}),
        }

    @override
    def weights(self) -> dict[str, NDArray[Any]]:
        return {name: tensor.float().cpu().numpy() for name, tensor in own_state(self._ready()).items()}

    @override
    def write_files(self, folder: Path) -> None:
        self._tokenizer.save_pretrained(str(folder / "tokenizer"))

    @classmethod
    @override
    def from_weights(cls, info: BundleInfo, weights: dict[str, NDArray[Any]], folder: Path, **overrides: Any) -> Self:
        if not any(name.startswith("tokenizer/") for name in info.files):
            raise BundleMismatchError(
                f"The bundle {folder} of kind 'generator' has no tokenizer. Copy the complete bundle again."
            )
        torch, transformers = require("torch", "torch"), require("transformers", "torch")
        stored = info.settings
        architecture = safe_config(stored["architecture"])
        auto = getattr(transformers, auto_class(architecture, stored["form"]))
        own = hasattr(auto, "base_model_prefix")

        def build() -> Any:
            return auto(architecture) if own else auto.from_config(architecture, trust_remote_code=False)

        check_tied_weights(info, weights, shapes_of(build))
        network = build()
        network.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()}, strict=False)
        network.tie_weights()
        network.generation_config = transformers.GenerationConfig.from_dict(stored["generation"])
        names = ("form", "template", "chat", "max_new_tokens", "slope", "intercept")
        model = cls(
            **info.shared(),
            **{name: stored[name] for name in names},
            stop=tuple(stored["stop"]),
            score=from_dict(stored["score"], PLAIN_CLASSES),
            scale=None if stored["scale"] is None else ImageScale(**stored["scale"]),
            images=ImageReader(**stored["images"]),
            device=overrides.get("device"),
            dtype=overrides.get("dtype") or stored["dtype"],
            batch_size=overrides.get("batch_size") or stored["batch_size"],
        )
        with quiet_transformers():
            tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder / "tokenizer"))
            model._take(network, tokenizer)
        return model
