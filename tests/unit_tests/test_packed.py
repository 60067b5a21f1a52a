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
    plain = TransformersClassifier(model=folder, engine="plain", dtype=dtype, max_length=100)
    quick = TransformersClassifier(model=folder, engine="packed", dtype=dtype, max_length=100)
    one, two = plain.predict_batch(texts), quick.predict_batch(texts)
    assert np.abs(one.probabilities - two.probabilities).max() <= (1e-4 if dtype == "float32" else 1e-2)
    assert (one.best == two.best).mean() >= 0.995
    assert quick.invoke(texts[0]).label == plain.invoke(texts[0]).label


def test_an_architecture_that_is_not_known_is_left_to_transformers(texts: list[str], tmp_path: Path) -> None:
    folder = saved("electra", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = TransformersClassifier(model=folder)
        assert model.predict_batch(texts).sound.all()
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
    base, packing = network("bert").base_model, Packing()
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
    assert packing.of(base.train()) is again, "packed before it was trained on"
    assert Packing("plain").of(base) is None
    for copied in (copy.deepcopy(packing), pickle.loads(pickle.dumps(packing))):
        assert (copied.engine, copied._made) == ("auto", None)


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
