from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from langchain_datashunt import EmbeddingClassifier, TrainingSettings, TransformersClassifier
from langchain_datashunt.exceptions import ConfigurationError, ShuntWarning
from langchain_datashunt.small_models import packed as packed_module
from langchain_datashunt.small_models.devices import choose_dtype, cpu_workers
from langchain_datashunt.small_models.encoder import SentenceEncoder, bundled_encoder_path, shared_encoder
from langchain_datashunt.small_models.packed import Packing, packed

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
SMALL = {**SIZES, "vocab_size": 30522, "num_labels": 4, "max_position_embeddings": 130}
MODERN = {
    "local_attention": 24, "global_attn_every_n_layers": 2, "num_hidden_layers": 4, "pad_token_id": 0,
    "cls_token_id": 101, "sep_token_id": 102, "bos_token_id": 101, "eos_token_id": 102, "classifier_pooling": "cls",
}  # fmt: skip


def network(kind: str) -> Any:
    import transformers as t

    t.set_seed(0)
    if kind == "distilbert":
        own = {"dim": 48, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "vocab_size": 30522, "num_labels": 4}
        return t.DistilBertForSequenceClassification(t.DistilBertConfig(**own)).eval()
    classes = {
        "bert": (t.BertForSequenceClassification, t.BertConfig, {}),
        "bert with relu": (t.BertForSequenceClassification, t.BertConfig, {"hidden_act": "relu"}),
        "roberta": (t.RobertaForSequenceClassification, t.RobertaConfig, {"pad_token_id": 0, "type_vocab_size": 1}),
        "xlm-roberta": (
            t.XLMRobertaForSequenceClassification,
            t.XLMRobertaConfig,
            {"pad_token_id": 0, "type_vocab_size": 1},
        ),
        "modernbert": (t.ModernBertForSequenceClassification, t.ModernBertConfig, MODERN),
        "modernbert mean": (
            t.ModernBertForSequenceClassification,
            t.ModernBertConfig,
            {**MODERN, "classifier_pooling": "mean"},
        ),
        "electra": (t.ElectraForSequenceClassification, t.ElectraConfig, {"embedding_size": 48}),
    }
    cls, config, more = classes[kind]
    return cls(config(**{**SMALL, **more})).eval()


def saved(kind: str, folder: Path) -> str:
    from transformers import AutoTokenizer

    network(kind).save_pretrained(folder)
    AutoTokenizer.from_pretrained(bundled_encoder_path()).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def texts(shop_messages: Any) -> list[str]:
    return [*shop_messages[0][:60], "a", " ".join(["word"] * 90), "", *shop_messages[0][:5]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "kind", ["bert", "bert with relu", "roberta", "xlm-roberta", "distilbert", "modernbert", "modernbert mean"]
)
def test_packed_classifiers_agree_with_transformers(kind: str, dtype: str, texts: list[str], tmp_path: Path) -> None:
    folder = saved(kind, tmp_path)
    if kind.startswith("modernbert") and not hasattr(network(kind).config, "sliding_window"):
        assert packed(network(kind).base_model) is None
        pytest.skip("this version of transformers lays ModernBERT out otherwise, and computes it itself")
    plain = TransformersClassifier(model=folder, engine="plain", dtype=dtype, max_length=100)
    quick = TransformersClassifier(model=folder, engine="packed", dtype=dtype, max_length=100)
    one, two = plain.predict_batch(texts), quick.predict_batch(texts)
    assert np.abs(one.probabilities - two.probabilities).max() <= (1e-4 if dtype == "float32" else 1e-2)
    assert (one.best == two.best).mean() >= 0.995
    assert quick.invoke(texts[0]).label == plain.invoke(texts[0]).label


@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_padding_tokens_inside_a_text_are_placed_as_transformers_does(kind: str) -> None:
    base = network(kind).base_model
    made, padding = packed(base), int(base.config.pad_token_id)
    assert made is not None
    ids = [[50, 60, padding, 70, 80], [51, 61], [padding], [52, padding, padding, 62]]
    own = packed_module._plain(base)(ids).states
    assert (made(ids).states - own).abs().max() / own.abs().max() < 1e-5


def test_copies_with_another_network_or_engine_have_their_own(tmp_path: Path, texts: list[str]) -> None:
    model = TransformersClassifier(model=saved("bert", tmp_path), engine="packed")
    own = model.predict_batch(texts[:4])
    other = model.model_copy()
    other._network = copy.deepcopy(model._network)
    with torch.no_grad():
        other._network.classifier.weight.mul_(2.0)
    assert not np.array_equal(other.predict_batch(texts[:4]).probabilities, own.probabilities)
    assert other._packing is not model._packing
    first = model._packing.of(model._network.base_model)
    assert np.array_equal(model.predict_batch(texts[:4]).probabilities, own.probabilities)
    assert model._packing.of(model._network.base_model) is first, "made once"
    plain = model.model_copy(update={"engine": "plain"})
    assert np.abs(plain.predict_batch(texts[:4]).probabilities - own.probabilities).max() < 1e-4
    assert plain._packing.engine == "plain"


def test_a_text_without_tokens_gets_one(texts: list[str]) -> None:
    encoder = SentenceEncoder(engine="packed")
    encoder.tokenizer.backend.post_processor = None
    assert encoder.tokenizer(["", "card"])[0][0] == [encoder.tokenizer.pad_id]
    one, two = encoder.encode(["", "card", ""])[0], encoder.encode([""])[0]
    assert np.allclose(one[0], two[0], atol=1e-5)
    assert np.allclose(one[2], two[0], atol=1e-5)


def test_an_architecture_that_is_not_known_is_left_to_transformers(texts: list[str], tmp_path: Path) -> None:
    folder = saved("electra", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = TransformersClassifier(model=folder)
        assert model.predict_batch(texts).sound.all()
    for engine in ("packed", "onnx"):
        with pytest.raises(ConfigurationError, match="ElectraForSequenceClassification is not computed by engine="):
            TransformersClassifier(model=folder, engine=engine).predict_batch(texts)  # type: ignore[arg-type]
    assert packed(network("electra").base_model) is None
    with pytest.raises(ConfigurationError, match="'electra' has no packed form here"):
        Packing("packed").of(network("electra").base_model)
    with pytest.raises(ConfigurationError, match="no engine 'quick'"):
        SentenceEncoder(engine="quick")  # type: ignore[arg-type]


def test_results_that_differ_are_not_used(monkeypatch: Any) -> None:
    base = network("bert").base_model
    monkeypatch.setattr(packed_module, "_difference", lambda network, made: float("nan"))
    with pytest.warns(ShuntWarning, match="differs from transformers"):
        assert packed(base) is None
    monkeypatch.setitem(packed_module.ARCHITECTURES, "bert", lambda network, config: network.nothing)
    with pytest.warns(ShuntWarning, match="cannot be made"):
        assert packed(base) is None


def test_without_onednn_torchs_own_product_is_used(monkeypatch: Any) -> None:
    class Nothing:
        def __getattr__(self, name: str) -> Any:
            raise AttributeError(name)

    monkeypatch.setattr(torch.ops, "mkldnn", Nothing(), raising=False)
    made = packed(network("bert").base_model)
    assert made is not None
    assert made.parts.layers[0].qkv.packed is None


def test_a_packing_follows_its_network_and_no_copy_shares_it() -> None:
    base, packing = network("bert").base_model, Packing("packed")
    first = packing.of(base)
    assert first is not None
    assert packing.of(base) is first
    with torch.no_grad():
        base.encoder.layer[0].output.dense.weight.mul_(1.5)
    again = packing.of(base)
    assert again is not None
    assert again is not first, "the weights have changed"
    ids = [[5, 6, 7], [8, 9]]
    assert not torch.allclose(first(ids).states, again(ids).states)
    assert packing.of(base.train()) is None, "what is being trained is left to transformers"
    assert packing.of(base.eval()) is again
    base.load_state_dict(network("bert").base_model.state_dict(), assign=True)
    assert packing.of(base) is not again, "the weights were replaced"
    third = packing.of(base)
    base.encoder.layer[1].output.dense.weight.data = torch.zeros_like(base.encoder.layer[1].output.dense.weight)
    assert packing.of(base) is not third, "a weight was moved"
    fourth = packing.of(base)
    packing.forget()
    assert packing.of(base) is not fourth
    base.register_forward_hook(lambda *_: None)
    assert packed(base) is None, "a hook wants to see the network's calls"
    assert packed(network("bert").base_model.double()) is None
    assert Packing("plain").of(base) is None
    for copied in (copy.deepcopy(packing), pickle.loads(pickle.dumps(packing))):
        assert (copied.engine, copied._made) == ("packed", None)


def test_the_encoder_embeds_the_same_packed_and_plain(texts: list[str]) -> None:
    plain = SentenceEncoder(engine="plain").encode(texts)[0]
    quick = SentenceEncoder(engine="packed")
    assert np.abs(quick.encode(texts)[0] - plain).max() < 1e-5
    assert np.allclose(np.linalg.norm(quick.encode(texts)[0], axis=1), 1.0, atol=1e-5)
    quick.pooling = "cls"
    first = SentenceEncoder(engine="plain")
    first.pooling = "cls"
    assert np.abs(quick.encode(texts)[0] - first.encode(texts)[0]).max() < 1e-5
    assert np.array_equal(pickle.loads(pickle.dumps(quick)).encode(texts[:3])[0], quick.encode(texts[:3])[0])


def test_routes_and_labels_are_the_same_with_either_engine(shop_messages: Any) -> None:
    texts, labels = shop_messages
    small = EmbeddingClassifier.train(texts, labels, settings=TrainingSettings(progress=False))
    assert small.embeddings is shared_encoder()
    other = small.model_copy(update={"embeddings": SentenceEncoder(engine="plain")})
    one, two = small.predict_batch(texts), other.predict_batch(texts)
    assert one.label_names() == two.label_names()
    assert np.array_equal(one.confidence >= 0.5, two.confidence >= 0.5)


class TestOnnx:
    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip(
            "onnxruntime", reason="onnxruntime is not installed: pip install 'langchain-datashunt[onnx]'"
        )
        pytest.importorskip("onnx")

    @pytest.mark.parametrize("kind", ["bert", "distilbert", "modernbert"])
    def test_it_agrees_with_transformers(self, kind: str, texts: list[str], tmp_path: Path) -> None:
        folder = saved(kind, tmp_path)
        plain = TransformersClassifier(model=folder, engine="plain", max_length=100)
        quick = TransformersClassifier(model=folder, engine="onnx", max_length=100)
        one, two = plain.predict_batch(texts), quick.predict_batch(texts)
        assert np.abs(one.probabilities - two.probabilities).max() <= 1e-4
        assert (one.best == two.best).all()

    def test_eight_bits_are_asked_for_by_name_and_their_agreement_is_told(self, texts: list[str]) -> None:
        plain, quick = SentenceEncoder(engine="plain"), SentenceEncoder(engine="onnx-int8")
        own, other = plain.encode(texts)[0], quick.encode(texts)[0]
        cosine = (own * other).sum(axis=1)
        assert 0.8 < cosine.min() < 0.99999, "8 bits are not the same, and not far"
        found = quick.packing.difference(quick.network, [quick.tokenizer([text])[0][0] for text in texts[:5]])
        assert 0.001 < found < 0.5
        assert plain.packing.difference(plain.network, [[5, 6, 7]]) == 0.0

    def test_what_it_cannot_compute_is_said(self, tmp_path: Path) -> None:
        half = SentenceEncoder(engine="onnx", dtype="bfloat16")
        with pytest.raises(ConfigurationError, match=r"float32 on the CPU here.*bfloat16"):
            half.encode(["a"])


def test_auto_is_half_precision_on_a_gpu_alone(monkeypatch: Any) -> None:
    assert choose_dtype("auto") is torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert choose_dtype("auto", torch.device("cuda")) is torch.bfloat16
    assert choose_dtype("auto", torch.device("cpu")) is torch.float32
    assert cpu_workers(torch.device("cuda")) == 1
    assert 1 <= cpu_workers("cpu") <= 4
    with pytest.raises(ConfigurationError, match="'int4' is no number format"):
        choose_dtype("int4")


def test_auto_takes_what_a_trial_finds_quicker(monkeypatch: Any) -> None:
    base = network("bert").base_model
    taken = Packing("auto")
    monkeypatch.setattr(packed_module, "_TRIALS", {})
    monkeypatch.setattr(packed_module, "trial", lambda encoders, n: {"packed": 1.0, "plain": 0.5})
    assert taken.of(base) is None
    assert taken.seconds == {"packed": 1.0, "plain": 0.5}
    monkeypatch.setattr(packed_module, "trial", lambda encoders, n: {"packed": 0.1, "plain": 0.9})
    assert Packing("auto").of(network("bert").base_model) is None, "networks of one form are computed alike"
    packed_module._TRIALS.clear()
    monkeypatch.setattr(packed_module, "trial", lambda encoders, n: {"packed": 1.0, "plain": 0.9})
    assert Packing("auto").of(base) is not None, "a little slower may be a busy moment"
    assert Packing("packed").of(base) is not None
    monkeypatch.undo()
    monkeypatch.setattr(packed_module, "_TRIALS", {})
    own = Packing("auto")
    own.of(base)
    assert set(own.seconds) == {"packed", "plain"}
    assert all(0 < seconds < 60 for seconds in own.seconds.values())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "modernbert"])
def test_packed_classifiers_agree_on_a_gpu(kind: str, dtype: str, texts: list[str], tmp_path: Path) -> None:
    folder = saved(kind, tmp_path)
    given: dict[str, Any] = {"model": folder, "dtype": dtype, "max_length": 100, "device": "cuda"}
    plain, quick = (TransformersClassifier(engine=engine, **given) for engine in ("plain", "packed"))  # type: ignore[arg-type]
    one, two = plain.predict_batch(texts), quick.predict_batch(texts)
    assert np.abs(one.probabilities - two.probabilities).max() <= (1e-4 if dtype == "float32" else 1e-2)
    assert (one.best == two.best).mean() >= 0.995
