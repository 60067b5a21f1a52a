from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from langchain_datashunt.small_models.engine import text_batches
from langchain_datashunt.small_models.engine.text_batches import compute_texts, token_budget, token_budget_batches
from langchain_datashunt.small_models.kinds import encoder as encoder_module
from langchain_datashunt.small_models.kinds.encoder import SentenceEncoder


def tokenize(texts: Sequence[str]) -> tuple[list[list[int]], Any]:
    return [[int(text)] * (1 + int(text) % 7) for text in texts], np.array([int(text) % 5 == 0 for text in texts])


@pytest.mark.parametrize("n", [0, 1, 9, 10, 11, 95])
def test_compute_texts_returns_values_in_input_order(n: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(text_batches, "CHUNK", 10)
    texts, batches = [str(i) for i in np.random.default_rng(n).permutation(n)], []

    def forward(ids: list[list[int]]) -> torch.Tensor:
        batches.append([len(one) for one in ids])
        return torch.tensor([[one[0], len(one)] for one in ids])

    found, cut = compute_texts(tokenize, texts, forward, 2, budget=20, batch_size=4)
    assert found.tolist() == [[int(text), 1 + int(text) % 7] for text in texts]
    assert cut.tolist() == [int(text) % 5 == 0 for text in texts]
    assert found.dtype == np.float32
    assert all(len(one) * max(one) <= 20 and len(one) <= 4 for one in batches)


def test_compute_texts_tokenizes_next_chunk_in_background(monkeypatch: Any) -> None:
    monkeypatch.setattr(text_batches, "CHUNK", 3)
    ahead, computing = threading.Event(), threading.current_thread()
    begun: list[int] = []

    def in_turn(texts: Sequence[str]) -> Any:
        assert threading.current_thread() is not computing
        begun.append(int(texts[0]))
        if texts[0] == "3":
            ahead.set()
        return tokenize(texts)

    def forward(ids: list[list[int]]) -> torch.Tensor:
        assert ahead.wait(10), "the second chunk was not tokenized while the first one was computed"
        return torch.tensor([[float(one[0])] for one in ids])

    found, _ = compute_texts(in_turn, [str(i) for i in range(8)], forward, 1, budget=100)
    assert found[:, 0].tolist() == list(range(8))
    assert begun == [0, 3, 6]


def test_compute_texts_error_in_later_chunk_raises(monkeypatch: Any) -> None:
    monkeypatch.setattr(text_batches, "CHUNK", 2)
    with pytest.raises(ValueError, match="invalid literal"):
        compute_texts(tokenize, ["1", "2", "3", "no"], lambda ids: torch.zeros(len(ids), 1), 1, budget=100)


def test_token_budget_batches_counts_padding() -> None:
    assert list(token_budget_batches([5, 1, 1, 9, 1], 9)) == [[1, 2, 4], [0], [3]]
    assert list(token_budget_batches([1, 1, 1], 100, 2)) == [[0, 1], [2]]
    assert list(token_budget_batches([50], 9)) == [[0]], "a text over the budget forms its own batch"
    assert token_budget(torch.device("cpu")) < token_budget(torch.device("cuda")) == token_budget("cuda")


def test_embed_ids_in_parts_or_at_once_gives_same_gradients(monkeypatch: Any) -> None:
    encoder = SentenceEncoder()
    texts = [" ".join(["card"] * (1 + 3 * (i % 7))) for i in range(40)]
    ids = encoder.tokenizer(texts)[0]

    def gradient() -> tuple[Any, Any]:
        encoder.network.zero_grad()
        vectors = encoder.embed_ids(encoder.network, ids)
        (vectors * torch.arange(len(ids))[:, None]).sum().backward()  # type: ignore[no-untyped-call]
        return vectors.detach(), encoder.network.get_input_embeddings().weight.grad.clone()  # type: ignore[operator, union-attr]

    by_turns = gradient()
    monkeypatch.setattr(encoder_module, "_BY_TURNS", 1_000)
    at_once = gradient()
    assert torch.allclose(by_turns[0], at_once[0], atol=1e-5)
    assert torch.allclose(by_turns[1], at_once[1], atol=1e-3)
    assert np.allclose(by_turns[0].numpy(), encoder.encode(texts)[0], atol=1e-5)
