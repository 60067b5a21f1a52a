from __future__ import annotations

import copy
import os
import pickle
import signal
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from langchain_datashunt import EmbeddingClassifier, TransformersClassifier
from langchain_datashunt.exceptions import ConfigurationError, ShuntWarning
from langchain_datashunt.small_models import TrainingSettings
from langchain_datashunt.small_models.engine import devices as devices_module
from langchain_datashunt.small_models.engine import padding_free as padding_free_module
from langchain_datashunt.small_models.engine.devices import choose_dtype, cpu_workers
from langchain_datashunt.small_models.engine.onnx_encoder import OnnxEncoder
from langchain_datashunt.small_models.engine.padding_free import EngineSelector, padding_free_encoder
from langchain_datashunt.small_models.kinds.encoder import SentenceEncoder, bundled_encoder_path, shared_encoder

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
SMALL = {**SIZES, "vocab_size": 30522, "num_labels": 4, "max_position_embeddings": 130}
MODERN = {
    "local_attention": 24, "global_attn_every_n_layers": 2, "num_hidden_layers": 4, "pad_token_id": 0,
    "cls_token_id": 101, "sep_token_id": 102, "bos_token_id": 101, "eos_token_id": 102, "classifier_pooling": "cls",
}  # fmt: skip

DEBERTA = {
    "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pad_token_id": 0, "type_vocab_size": 0,
    "position_biased_input": False, "max_relative_positions": -1, "pooler_hidden_size": 48,
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
        "deberta": (t.DebertaV2ForSequenceClassification, t.DebertaV2Config, DEBERTA),
        "deberta shared": (
            t.DebertaV2ForSequenceClassification,
            t.DebertaV2Config,
            {**DEBERTA, "share_att_key": True, "position_buckets": 16, "norm_rel_ebd": "layer_norm"},
        ),
        "deberta convolution": (
            t.DebertaV2ForSequenceClassification,
            t.DebertaV2Config,
            {**DEBERTA, "conv_kernel_size": 3, "conv_act": "gelu"},
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
    "kind",
    [
        "bert",
        "bert with relu",
        "roberta",
        "xlm-roberta",
        "distilbert",
        "modernbert",
        "modernbert mean",
        "deberta",
        "deberta shared",
    ],
)
def test_padding_free_classifier_agrees_with_transformers(
    kind: str, dtype: str, texts: list[str], tmp_path: Path
) -> None:
    folder = saved(kind, tmp_path)
    if kind.startswith("modernbert") and not hasattr(network(kind).config, "sliding_window"):
        assert padding_free_encoder(network(kind).base_model) is None
        pytest.skip("this version of transformers has a different ModernBERT implementation")
    plain = TransformersClassifier(model=folder, engine="plain", max_length=100)
    quick = TransformersClassifier(model=folder, engine="padding-free", dtype=dtype, max_length=100)
    one, two = plain.predict_batch(texts), quick.predict_batch(texts)
    assert np.abs(one.probabilities - two.probabilities).max() <= (1e-4 if dtype == "float32" else 1e-2)
    assert (one.best == two.best).mean() >= 0.995
    assert quick.invoke(texts[0]).label == plain.invoke(texts[0]).label


@pytest.mark.parametrize("kind", ["bert", "distilbert", "modernbert", "deberta"])
def test_padding_free_bfloat16_on_cpu_rounds_products_only(kind: str, texts: list[str], tmp_path: Path) -> None:
    """Rounding the products only is more accurate than rounding the whole network."""
    if kind == "modernbert" and not hasattr(network(kind).config, "sliding_window"):
        pytest.skip("this version of transformers has a different ModernBERT implementation")
    folder = saved(kind, tmp_path)
    exact = TransformersClassifier(model=folder, engine="plain", max_length=100)
    whole = TransformersClassifier(model=folder, engine="plain", dtype="bfloat16", max_length=100)
    products = TransformersClassifier(model=folder, dtype="bfloat16", engine="padding-free", max_length=100)
    wanted = exact.predict_batch(texts).probabilities
    far = [np.abs(one.predict_batch(texts).probabilities - wanted).mean() for one in (whole, products)]
    assert 0 < far[1] < 0.9 * far[0]
    assert products._network.dtype == torch.float32, "saved and further trained weights keep float32"
    assert whole._network.dtype == torch.bfloat16


def test_packing_without_engine_converts_network_to_dtype(texts: list[str]) -> None:
    base = network("electra").base_model
    selector = pickle.loads(pickle.dumps(EngineSelector("auto", torch.bfloat16)))
    assert selector.engine_for(base) is None
    assert base.dtype == torch.bfloat16
    assert selector.engine_for(base) is None
    whole = network("bert")
    whole.base_model.register_forward_hook(lambda *_: None)
    assert EngineSelector("auto", torch.bfloat16).engine_for(whole.base_model, whole) is None
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_padding_free_padding_tokens_in_text_agree_with_transformers(kind: str) -> None:
    base = network(kind).base_model
    made, padding = padding_free_encoder(base), int(base.config.pad_token_id)
    assert made is not None
    ids = [[50, 60, padding, 70, 80], [51, 61], [padding], [52, padding, padding, 62]]
    own = padding_free_module.plain_encoder(base)(ids).states
    assert (made(ids).states - own).abs().max() / own.abs().max() < 1e-5


def test_model_copy_with_other_network_or_engine_has_own_selector(tmp_path: Path, texts: list[str]) -> None:
    model = TransformersClassifier(model=saved("bert", tmp_path), engine="padding-free")
    own = model.predict_batch(texts[:4])
    other = model.model_copy()
    other._network = copy.deepcopy(model._network)
    with torch.no_grad():
        other._network.classifier.weight.mul_(2.0)
    assert not np.array_equal(other.predict_batch(texts[:4]).probabilities, own.probabilities)
    assert other._engine_selector is not model._engine_selector
    first = model._engine_selector.engine_for(model._network.base_model)
    assert np.array_equal(model.predict_batch(texts[:4]).probabilities, own.probabilities)
    assert model._engine_selector.engine_for(model._network.base_model) is first, "the engine is built once"
    plain = model.model_copy(update={"engine": "plain"})
    assert np.abs(plain.predict_batch(texts[:4]).probabilities - own.probabilities).max() < 1e-4
    assert plain._engine_selector.engine == "plain"


def test_tokenizer_text_without_tokens_gets_padding_token(texts: list[str]) -> None:
    encoder = SentenceEncoder(engine="padding-free")
    encoder.tokenizer.backend.post_processor = None
    assert encoder.tokenizer(["", "card"])[0][0] == [encoder.tokenizer.pad_id]
    one, two = encoder.encode(["", "card", ""])[0], encoder.encode([""])[0]
    assert np.allclose(one[0], two[0], atol=1e-5)
    assert np.allclose(one[2], two[0], atol=1e-5)


def test_packing_unknown_architecture_uses_transformers(
    texts: list[str], tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setattr(padding_free_module, "_LOGGED", set())
    folder = saved("electra", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = TransformersClassifier(model=folder)
        assert model.predict_batch(texts).sound.all()
        model.predict_batch(texts[:2])
    assert ["architecture 'electra'" in record.message for record in caplog.records] == [True]
    for engine in ("padding-free", "onnx"):
        with pytest.raises(ConfigurationError, match="ElectraForSequenceClassification does not support engine="):
            TransformersClassifier(model=folder, engine=engine).predict_batch(texts)  # type: ignore[arg-type]
    assert padding_free_encoder(network("electra").base_model) is None
    with pytest.raises(ConfigurationError, match="does not support this 'electra' network"):
        EngineSelector("padding-free").engine_for(network("electra").base_model)
    base = network("electra").base_model
    with pytest.raises(ConfigurationError, match="does not support this 'electra' network"):
        EngineSelector("padding-free", torch.bfloat16).engine_for(base)
    assert base.dtype == torch.float32, "a refused call must not convert the caller's model"
    with pytest.raises(ConfigurationError, match="Unknown engine 'quick'"):
        SentenceEncoder(engine="quick")  # type: ignore[arg-type]


def test_packed_self_check_fails_warns_and_returns_none(monkeypatch: Any) -> None:
    base = network("bert").base_model
    monkeypatch.setattr(padding_free_module, "_difference", lambda network, made: float("nan"))
    with pytest.warns(ShuntWarning, match="differs from transformers"):
        assert padding_free_encoder(base) is None
    monkeypatch.setitem(padding_free_module.ARCHITECTURES, "bert", lambda network, config: network.nothing)
    with pytest.warns(ShuntWarning, match="encoder failed"):
        assert padding_free_encoder(base) is None


def test_packed_without_onednn_uses_torch_products(monkeypatch: Any) -> None:
    class Nothing:
        def __getattr__(self, name: str) -> Any:
            raise AttributeError(name)

    monkeypatch.setattr(torch.ops, "mkldnn", Nothing(), raising=False)
    made = padding_free_encoder(network("bert").base_model)
    assert made is not None
    assert made.parts.layers[0].qkv.reordered is None


def test_packing_changed_weights_rebuild_engine_and_copies_start_empty() -> None:
    base, selector = network("bert").base_model, EngineSelector("padding-free")
    first = selector.engine_for(base)
    assert first is not None
    assert selector.engine_for(base) is first
    with torch.no_grad():
        base.encoder.layer[0].output.dense.weight.mul_(1.5)
    again = selector.engine_for(base)
    assert again is not None
    assert again is not first, "the weights have changed"
    ids = [[5, 6, 7], [8, 9]]
    assert not torch.allclose(first(ids).states, again(ids).states)
    assert selector.engine_for(base.train()) is None, "transformers runs a network in training mode"
    assert selector.engine_for(base.eval()) is again
    base.load_state_dict(network("bert").base_model.state_dict(), assign=True)
    assert selector.engine_for(base) is not again, "the weights were replaced"
    third = selector.engine_for(base)
    base.encoder.layer[1].output.dense.weight.data = torch.zeros_like(base.encoder.layer[1].output.dense.weight)
    assert selector.engine_for(base) is not third, "a weight was moved"
    fourth = selector.engine_for(base)
    selector.forget()
    assert selector.engine_for(base) is not fourth
    base.register_forward_hook(lambda *_: None)
    assert padding_free_encoder(base) is None, "a forward hook needs transformers"
    assert padding_free_encoder(network("bert").base_model.double()) is None
    assert EngineSelector("plain").engine_for(base) is None
    for copied in (copy.deepcopy(selector), pickle.loads(pickle.dumps(selector))):
        assert (copied.engine, copied._made) == ("padding-free", None)


def test_sentence_encoder_padding_free_agrees_with_plain(texts: list[str]) -> None:
    plain = SentenceEncoder(engine="plain").encode(texts)[0]
    quick = SentenceEncoder(engine="padding-free")
    assert np.abs(quick.encode(texts)[0] - plain).max() < 1e-5
    assert np.allclose(np.linalg.norm(quick.encode(texts)[0], axis=1), 1.0, atol=1e-5)
    quick.pooling = "cls"
    first = SentenceEncoder(engine="plain")
    first.pooling = "cls"
    assert np.abs(quick.encode(texts)[0] - first.encode(texts)[0]).max() < 1e-5
    assert np.array_equal(pickle.loads(pickle.dumps(quick)).encode(texts[:3])[0], quick.encode(texts[:3])[0])


def test_embedding_classifier_engine_changes_no_label_or_route(shop_messages: Any) -> None:
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
    def test_onnx_classifier_agrees_with_transformers(self, kind: str, texts: list[str], tmp_path: Path) -> None:
        folder = saved(kind, tmp_path)
        plain = TransformersClassifier(model=folder, engine="plain", max_length=100)
        quick = TransformersClassifier(model=folder, engine="onnx", max_length=100)
        one, two = plain.predict_batch(texts), quick.predict_batch(texts)
        assert np.abs(one.probabilities - two.probabilities).max() <= 1e-4
        assert (one.best == two.best).all()

    def test_onnx_int8_differs_and_logs_difference_once(self, texts: list[str], caplog: Any) -> None:
        plain, quick = SentenceEncoder(engine="plain"), SentenceEncoder(engine="onnx-int8")
        own, other = plain.encode(texts)[0], quick.encode(texts)[0]
        cosine = (own * other).sum(axis=1)
        assert 0.8 < cosine.min() < 0.99999, "8-bit weights change the states slightly"
        assert sum("8-bit weights" in record.message for record in caplog.records) == 1, (
            "logged when the engine is built"
        )
        found = quick.selector.difference(quick.network, [quick.tokenizer([text])[0][0] for text in texts[:5]])
        assert 0.001 < found < 0.5
        assert plain.selector.difference(plain.network, [[5, 6, 7]]) == 0.0

    def test_onnx_bfloat16_raises(self, tmp_path: Path) -> None:
        half = SentenceEncoder(engine="onnx", dtype="bfloat16")
        with pytest.raises(ConfigurationError, match=r"require a float32 model on the CPU, got .*bfloat16"):
            half.encode(["a"])


def test_choose_dtype_auto_is_bfloat16_on_gpu_only(monkeypatch: Any) -> None:
    assert choose_dtype("auto") is torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert choose_dtype("auto", torch.device("cuda")) is torch.bfloat16
    assert choose_dtype("auto", torch.device("cpu")) is torch.float32
    assert cpu_workers(torch.device("cuda")) == 1
    assert 1 <= cpu_workers("cpu") <= 4
    with pytest.raises(ConfigurationError, match="Unknown dtype 'int4'"):
        choose_dtype("int4")


@pytest.mark.parametrize("there", [True, False])
def test_choose_dtype_bfloat16_without_cpu_support_logs_once(there: bool, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setattr(devices_module, "cpu_has_bfloat16", lambda: there)
    devices_module._say_that_it_is_slow.cache_clear()
    for _ in range(2):
        assert choose_dtype("bfloat16", "cpu") is torch.bfloat16
        choose_dtype("bfloat16", torch.device("cuda"))
        choose_dtype("float32", "cpu")
    assert ["no bfloat16 instructions" in record.message for record in caplog.records] == [True] * (not there)


def test_cpu_has_bfloat16_follows_torch(monkeypatch: Any) -> None:
    for found in (True, False):
        devices_module.cpu_has_bfloat16.cache_clear()
        monkeypatch.setattr("platform.machine", lambda: "x86_64")
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda found=found: found, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
        assert devices_module.cpu_has_bfloat16() is found
    devices_module.cpu_has_bfloat16.cache_clear()
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert devices_module.cpu_has_bfloat16()
    devices_module.cpu_has_bfloat16.cache_clear()


def test_packing_auto_selects_fastest_engine_of_trial(monkeypatch: Any) -> None:
    def finds(padding_free: float, **others: float) -> None:
        seconds = {"padding-free": padding_free, **others}
        monkeypatch.setattr(padding_free_module, "_TRIALS", {})
        monkeypatch.setattr(padding_free_module, "trial", lambda encoders, n: seconds)

    base = network("bert").base_model
    taken = EngineSelector("auto")
    finds(padding_free=1.0, plain=0.5)
    assert taken.engine_for(base) is None
    assert taken.seconds == {"padding-free": 1.0, "plain": 0.5}
    monkeypatch.setattr(padding_free_module, "trial", lambda encoders, n: {"padding-free": 0.1, "plain": 0.9})
    assert EngineSelector("auto").engine_for(network("bert").base_model) is None, (
        "networks of the same shape share the trial"
    )
    finds(padding_free=1.0, plain=0.9, onnx=0.85)
    assert isinstance(EngineSelector("auto").engine_for(base), padding_free_module.PaddingFreeEncoder), (
        "a small difference may be measurement noise"
    )
    finds(padding_free=2.0, plain=1.1, onnx=1.0)
    assert EngineSelector("auto").engine_for(base) is None, "ONNX Runtime needs a speedup of 1.5"
    finds(padding_free=1.6, plain=1.6, onnx=1.0)
    monkeypatch.setattr(padding_free_module, "_onnx", lambda network: "made")
    assert EngineSelector("auto").engine_for(base) == "made"
    assert EngineSelector("padding-free").engine_for(base) is not None


def test_packing_auto_measures_available_engines(monkeypatch: Any) -> None:
    monkeypatch.setattr(padding_free_module, "_TRIALS", {})
    own = EngineSelector("auto")
    own.engine_for(network("bert").base_model)
    assert set(own.seconds) >= {"padding-free", "plain"}
    assert all(0 < seconds < 60 for seconds in own.seconds.values())
    half = EngineSelector("auto")
    half.engine_for(network("bert").base_model.bfloat16())
    assert set(half.seconds) == {"padding-free", "plain"}, "the ONNX engine requires float32"


@pytest.mark.parametrize(("kind", "gains"), [("bert", True), ("bert", False), ("electra", False)])
def test_packing_auto_measures_onnx_only_if_padding_free_gains_little(kind: str, gains: bool, monkeypatch: Any) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    tried: list[set[str]] = []

    def trial(encoders: dict[str, Any], vocabulary: int) -> dict[str, float]:
        tried.append(set(encoders))
        seconds = {"plain": 1.0, "padding-free": 0.5 if gains else 0.95, "onnx": 0.1}
        return {name: seconds[name] for name in encoders}

    monkeypatch.setattr(padding_free_module, "_TRIALS", {})
    monkeypatch.setattr(padding_free_module, "trial", trial)
    selector, base = EngineSelector("auto"), network(kind).base_model
    made = selector.engine_for(base)
    there = {"plain"} | ({"padding-free"} if kind == "bert" else set())
    if gains:
        assert tried == [there]
        assert isinstance(made, padding_free_module.PaddingFreeEncoder)
        return
    assert tried[-1] == {*there, "onnx"}
    assert isinstance(made, OnnxEncoder)
    own = padding_free_module.plain_encoder(base)([[5, 6, 7]]).states
    assert (made([[5, 6, 7]]).states - own).abs().max() < 1e-4
    monkeypatch.setattr(padding_free_module, "_LARGEST_EXPORT", 10)
    monkeypatch.setattr(padding_free_module, "_TRIALS", {})
    assert not isinstance(EngineSelector("auto").engine_for(base), OnnxEncoder), "the network is too large to export"


def test_packing_auto_trial_respects_position_and_vocabulary_limits(tmp_path: Path, monkeypatch: Any) -> None:
    """Covers a network with fewer positions than the trial texts, and one with fewer embeddings than its vocabulary."""
    import transformers as t

    monkeypatch.setattr(padding_free_module, "_TRIALS", {})
    t.BertForSequenceClassification(t.BertConfig(**{**SMALL, "max_position_embeddings": 16})).save_pretrained(tmp_path)
    t.AutoTokenizer.from_pretrained(bundled_encoder_path()).save_pretrained(tmp_path)
    asked = ["where is my card", "word " * 14]
    plain = TransformersClassifier(model=str(tmp_path), engine="plain", max_length=16).predict_batch(asked)
    quick = TransformersClassifier(model=str(tmp_path), max_length=16).predict_batch(asked)
    assert np.abs(plain.probabilities - quick.probabilities).max() < 1e-4
    base = network("bert").base_model
    base.embeddings.word_embeddings = torch.nn.Embedding(50, 48)
    selector = EngineSelector("auto")
    selector.engine_for(base)
    assert set(selector.seconds) >= {"padding-free", "plain"}


def test_packing_auto_rejects_export_wrong_for_long_texts(monkeypatch: Any) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    import transformers as t

    monkeypatch.setattr(padding_free_module, "_TRIALS", {})
    monkeypatch.setattr(padding_free_module, "trial", lambda encoders, ids: {name: len(name) for name in encoders})
    own = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 20}
    network = t.DebertaModel(t.DebertaConfig(**{**SMALL, **own})).eval()
    assert EngineSelector("auto").engine_for(network) is None, "the export is wrong from 30 tokens on"


def test_transformers_classifier_network_of_other_task_raises(tmp_path: Path) -> None:
    import transformers as t

    t.AutoTokenizer.from_pretrained(bundled_encoder_path()).save_pretrained(tmp_path)
    for own, said in (
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "3 outputs, multi_label_classification"),
        ({"num_labels": 1}, "1 outputs, regression"),
    ):
        t.BertForSequenceClassification(t.BertConfig(**{**SMALL, **own})).save_pretrained(tmp_path)
        with pytest.raises(ConfigurationError, match=f"chooses one of several labels .*{said}"):
            TransformersClassifier(model=str(tmp_path))


def test_trial_leaves_out_failing_engine() -> None:
    base = network("bert").base_model

    def broken(ids: Any) -> Any:
        raise IndexError("no such token")

    found = padding_free_module.trial(
        {"padding-free": broken, "plain": padding_free_module.plain_encoder(base)}, [[5, 6], [7]]
    )
    assert list(found) == ["plain"]


def test_packing_added_hook_or_layer_is_detected(monkeypatch: Any) -> None:
    monkeypatch.setattr(padding_free_module, "_TRIALS", {})
    monkeypatch.setattr(padding_free_module, "_LOGGED", set())
    monkeypatch.setattr(padding_free_module, "_onnx", lambda network: None)
    for add in (
        lambda base: base.encoder.layer[1].register_forward_hook(lambda *_: None),
        lambda base: base.encoder.layer[1].register_forward_pre_hook(lambda *_: None),
    ):
        base, selector = network("bert").base_model, EngineSelector("padding-free")
        assert selector.engine_for(base) is selector.engine_for(base)
        handle = add(base)
        assert EngineSelector("auto").engine_for(base) is None, "a forward hook needs transformers"
        with pytest.raises(ConfigurationError, match="no forward hooks"):
            selector.engine_for(base)
        handle.remove()
        assert selector.engine_for(base) is not None
    assert "bert" not in padding_free_module._LOGGED, "hooks say nothing about the architecture"
    assert EngineSelector("auto").seconds == {}
    own = EngineSelector("auto")
    own.engine_for(network("bert").base_model)
    assert "padding-free" in own.seconds, "a hook on one network does not affect others"
    base, selector = network("bert").base_model, EngineSelector("padding-free")
    first = selector.engine_for(base)
    base.encoder.layer.append(copy.deepcopy(base.encoder.layer[0]))
    assert selector.engine_for(base) is not first
    assert selector.difference(base, [[5, 6, 7]]) < 1e-5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_packing_fork_during_trial_does_not_block_child(monkeypatch: Any) -> None:
    monkeypatch.setattr(padding_free_module, "_TRIALS", {})
    base = network("bert").base_model
    with padding_free_module._TRIALS_LOCK:
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            os._exit(0 if EngineSelector("auto").engine_for(base) is not None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_quiet_transformers_concurrent_threads_restore_settings() -> None:
    from transformers.utils import logging as library

    before, together = (library.get_verbosity(), library.is_progress_bar_enabled()), threading.Barrier(4)

    def load() -> None:
        together.wait(20)
        with devices_module.quiet_transformers():
            together.wait(20)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert (library.get_verbosity(), library.is_progress_bar_enabled()) == before


def test_shared_encoder_equivalent_arguments_return_same_encoder() -> None:
    own = shared_encoder()
    assert shared_encoder(None, None, "float32") is own
    assert shared_encoder(device=str(own.device), engine="auto") is own
    with pytest.raises(ConfigurationError, match="Expected `max_length` of at least 4 tokens, got -5"):
        SentenceEncoder(max_length=-5)


def test_packing_unsupported_variant_logs_once(monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setattr(padding_free_module, "_LOGGED", set())
    monkeypatch.setattr(padding_free_module, "_onnx", lambda network: None)
    base = network("deberta convolution").base_model
    for _ in range(2):
        assert EngineSelector("auto").engine_for(base) is None
    assert [record.message for record in caplog.records if "'deberta-v2'" in record.message] == [
        "The padding-free encoder does not support the architecture 'deberta-v2', so transformers or ONNX Runtime "
        "computes it. Set engine='plain' to silence this warning."
    ]
    assert EngineSelector("plain").engine_for(base) is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_packing_onnx_in_forked_child_is_rebuilt() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    base, selector = network("bert").base_model, EngineSelector("onnx")
    own = selector.engine_for(base)
    assert own is not None
    ids = [[5, 6, 7], [8, 9]]
    expected = own(ids).states.numpy()
    child = os.fork()
    if not child:
        signal.alarm(60)
        try:
            made = selector.engine_for(base)
            same = made is not own and made is not None and np.allclose(made(ids).states.numpy(), expected, atol=1e-5)
            os._exit(0 if same else 3)
        except BaseException:
            os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert selector.engine_for(base) is own
