"""Small models of every modality that train in seconds, with inputs and a large model for each."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from langchain_core.runnables import Runnable, RunnableLambda

from langchain_datashunt import Prediction
from langchain_datashunt.small_models import ImageClassifier, TextCNN, TrainingSettings, TransformersGenerator
from tests.benchmarks.reproduction.caption_model import CaptionModel
from tests.benchmarks.reproduction.local_large import LocalLargeModel
from tests.benchmarks.reproduction.scenes import draw_scenes

COLOURS = ("red", "green", "blue", "grey")
WORDS = ("cat", "dog", "owl", "fox", "elk", "ant", "bee", "cow")


@dataclass
class Modality:
    """Kind of input and output, with models and data for tests.

    Attributes:
        small: Small model.
        inputs: At least 24 inputs.
        large: Large model, from the mapping that a shunt passes to it to the correct answer.
        truth: Function from the index of an input to the correct answer.
    """

    small: Any
    inputs: Sequence[Any]
    large: Runnable[Any, Any]
    truth: Callable[[int], str]


def word_level_tokenizer(folder: Path, words: Sequence[str]) -> int:
    """Save a tokenizer of whole words to a folder, and return the size of its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(str(folder))
    return len(vocabulary)


def tiny_gpt2(folder: Path) -> str:
    """Save a GPT-2 of one layer with random weights and the vocabulary of `echoes`, and return its folder."""
    from transformers import GPT2Config, GPT2LMHeadModel, set_seed

    n = word_level_tokenizer(folder, [*WORDS, *COLOURS, "say", "twice", "?"])
    set_seed(0)
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=n, n_embd=48, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2,
            pad_token_id=0,
        )
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def tiny_t5(folder: Path) -> str:
    from transformers import T5Config, T5ForConditionalGeneration, set_seed

    n = word_level_tokenizer(folder, [*WORDS, *COLOURS, "say", "twice", "?"])
    set_seed(0)
    T5ForConditionalGeneration(
        T5Config(
            vocab_size=n, d_model=48, d_ff=64, num_layers=1, num_heads=2, d_kv=24, decoder_start_token_id=0,
            eos_token_id=2, pad_token_id=0,
        )
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def tiny_vision_pair(folder: Path) -> str:
    """Save a ViT encoder with a GPT-2 decoder and random weights, and return its folder."""
    from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig, set_seed

    n = word_level_tokenizer(folder, [*WORDS, *COLOURS])
    set_seed(0)
    vision = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8
    )
    text = GPT2Config(
        vocab_size=n, n_embd=32, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    model = VisionEncoderDecoderModel(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    model.generation_config.decoder_start_token_id = 1
    model.save_pretrained(folder)
    preprocessor(folder)
    return str(folder)


def preprocessor(folder: Path, side: int = 16) -> None:
    told = {"size": {"height": side, "width": side}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps({**told, "do_normalize": True}))


def echoes() -> tuple[list[str], list[str]]:
    """Return questions and answers that a tiny generator can learn: repeat a word twice."""
    questions = [f"say {word} {colour} twice ?" for word in WORDS for colour in COLOURS]
    return questions, [f"{word} {word}" for word in WORDS for _ in COLOURS]


def squares(n: int, seed: int = 0) -> tuple[list[Any], list[str]]:
    """Return noisy images in one of two colours, with the colours as labels."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(["blue", "red"], n).tolist()
    images = []
    for label in labels:
        pixels = rng.integers(0, 120, (12, 12, 3), dtype=np.uint8)
        pixels[..., 0 if label == "red" else 2] += np.uint8(rng.integers(20, 110))
        images.append(pixels)
    return images, labels


def quiet(epochs: int, **more: Any) -> TrainingSettings:
    return TrainingSettings(progress=False, epochs=epochs, **more)


def answering(truth: dict[bytes, str], small: Any) -> Runnable[Any, Any]:
    """Return a large model that looks up the correct answer of the input in its prompt variables."""

    def answer(mapping: Any) -> str:
        reader = small.reader
        return truth[reader.key(reader.read(mapping["input"]))]

    return RunnableLambda(answer)


def _modality(small: Any, inputs: Sequence[Any], truth: Sequence[str]) -> Modality:
    by_key = {small.reader.key(small.reader.read(one)): right for one, right in zip(inputs, truth, strict=True)}
    return Modality(small, inputs, answering(by_key, small), lambda i: truth[i])


def text_modality(folder: Path) -> Modality:
    texts = [f"{word} and {colour} {i}" for i, word in enumerate(WORDS) for colour in COLOURS]
    labels = ["warm" if "red" in text or "grey" in text else "cold" for text in texts]
    small = TextCNN.train(texts[:12], labels[:12], settings=quiet(3), hidden_size=8, embedding_size=8)
    return _modality(small, texts, labels)


def image_modality(folder: Path) -> Modality:
    images, labels = squares(48)
    small = ImageClassifier.train(images[:8], labels[:8], depth=8, width=4, settings=quiet(2), augmentation="none")
    return _modality(small, images, labels)


def caption_modality(folder: Path) -> Modality:
    scenes = draw_scenes(48, seed=3)
    captions = [f"a {scene.first.colour} {scene.first.shape}" for scene in scenes]
    images = [scene.pixels for scene in scenes]
    small = CaptionModel.train(
        images, captions, settings=quiet(1), size=(16, 16), depth=8, width=6, embedding_size=32, hidden_size=48,
        dropout=0.0, max_words=8,
    )  # fmt: skip
    return _modality(small, images, captions)


def generation_modality(folder: Path) -> Modality:
    questions, answers = echoes()
    base = TransformersGenerator(model=tiny_gpt2(folder), max_new_tokens=4, model_id="tiny")
    small = base.train(questions[:8], answers[:8], settings=quiet(4, learning_rate=5e-3, patience=4))
    return _modality(small, questions, answers)


MODALITIES: dict[str, Callable[[Path], Modality]] = {
    "text": text_modality,
    "image": image_modality,
    "caption": caption_modality,
    "generated text": generation_modality,
}


def local(model: Any) -> LocalLargeModel:
    return LocalLargeModel(model=model)


class ScriptedSmall(Runnable[Any, Prediction]):
    """Generative small model that is confident if the input contains "surely"."""

    labels = ("answer", "other")

    def invoke(self, input: Any, config: Any = None, **kwargs: Any) -> Prediction:
        text = input if isinstance(input, str) else input["input"]
        if "fail" in text:
            raise RuntimeError("no luck")
        return Prediction.from_answer(f"short: {text}", 0.95 if "surely" in text else 0.2, model_id="scripted")
