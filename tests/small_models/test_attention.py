"""Tests of attention without padding against a softmax of each text, for any lengths, order and size of scores."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from langchain_datashunt.small_models.engine import attention as packed_attention
from langchain_datashunt.small_models.engine.attention import Attention, attend_by_products
from langchain_datashunt.small_models.engine.layers import Tokens

HEADS, WIDTH = 3, 8
LENGTHS = st.lists(st.integers(1, 90) | st.integers(1, 12), min_size=1, max_size=40)
HOW_FAR = {torch.float32: 2e-5, torch.float64: 2e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}


def tokens_of(lengths: list[int]) -> Tokens:
    return Tokens.from_ids([[0] * length for length in lengths], torch.device("cpu"))


def text_by_text(qkv: torch.Tensor, lengths: list[int], window: int | None = None) -> torch.Tensor:
    """Return the reference attention, computed text by text in float64."""
    q, k, v = qkv.double().view(len(qkv), 3, HEADS, WIDTH).permute(1, 2, 0, 3)
    found, start = [], 0
    for length in lengths:
        own = slice(start, start + length)
        scores = q[:, own] @ k[:, own].transpose(1, 2) / math.sqrt(WIDTH)
        if window is not None:
            places = torch.arange(length)
            scores = scores.masked_fill((places[:, None] - places).abs() > window, -math.inf)
        found.append((scores.softmax(-1) @ v[:, own]).transpose(0, 1).reshape(length, -1))
        start += length
    return torch.cat(found)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=30)
@given(lengths=LENGTHS, seed=st.integers(0, 1000), larger=st.sampled_from([1.0, 4.0]))
def test_attention_agrees_with_softmax_of_each_text(
    dtype: torch.dtype, window: int | None, lengths: list[int], seed: int, larger: float
) -> None:
    torch.manual_seed(seed)
    qkv = torch.randn(sum(lengths), 3 * HEADS * WIDTH)
    qkv[:, : HEADS * WIDTH] *= larger
    qkv = qkv.to(dtype)
    found = Attention(HEADS, window)(qkv, tokens_of(lengths))
    assert found.dtype == dtype
    assert (found.double() - text_by_text(qkv, lengths, window)).abs().max() <= HOW_FAR[dtype] * larger


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [13, 30])
@pytest.mark.parametrize("shift", [-400.0, 400.0])
def test_attention_extreme_scores_do_not_overflow(dtype: torch.dtype, length: int, shift: float) -> None:
    """Scores are shifted so far that exponentials overflow or underflow. Softmax depends on differences only."""
    torch.manual_seed(0)
    lengths = [length, length - 2, length - 1, length]
    qkv = torch.randn(sum(lengths), 3, HEADS, WIDTH)
    qkv[:, :2, :, 0] = torch.tensor([1.0, shift * math.log(2) * math.sqrt(WIDTH)])[None, :, None]
    for part in (0, 1):
        qkv[:, part, :, 1:] *= 0.3
    qkv = qkv.view(len(qkv), -1).to(dtype)
    found = Attention(HEADS)(qkv, tokens_of(lengths)).double()
    far = (found - text_by_text(qkv, lengths)).abs().max()
    assert far <= (1e-3 if dtype == torch.float32 else 1.0)
    assert found.abs().max() <= qkv.view(len(qkv), 3, -1)[:, 2].abs().max() + 0.05, (
        "the output is a weighted mean of the values"
    )


def test_attention_ignores_values_of_other_texts() -> None:
    """Huge, infinite or NaN values in one text do not change the others."""
    torch.manual_seed(1)
    lengths = [9, 11, 10]
    qkv = torch.randn(30, 3 * HEADS * WIDTH)
    alone = Attention(HEADS)(qkv, tokens_of(lengths))
    for strange in (1e30, math.inf, math.nan):
        other = qkv.clone()
        other[9:20] = strange
        found = Attention(HEADS)(other, tokens_of(lengths))
        assert torch.allclose(found[:9], alone[:9], atol=1e-5), strange
        assert torch.allclose(found[20:], alone[20:], atol=1e-5), strange


def test_attention_many_texts_takes_few_calls(monkeypatch: Any) -> None:
    """200 texts of 5 to 24 tokens form three length buckets, whether sorted or not, in groups of at most 512 tokens."""
    calls = []

    def counted(texts: torch.Tensor, *rest: Any) -> None:
        calls.append(texts.shape[:2])
        attend_by_products(texts, *rest)

    monkeypatch.setattr(packed_attention, "attend_by_products", counted)
    lengths = np.random.default_rng(0).integers(5, 25, 200).tolist()
    qkv = torch.randn(sum(lengths), 3 * HEADS * WIDTH)
    found = Attention(HEADS)(qkv, tokens_of(lengths))
    assert {length for _, length in calls} == {8, 16, 24}
    assert len(calls) <= 12
    assert all(texts * length <= 512 for texts, length in calls)
    in_order = sorted(range(200), key=lengths.__getitem__)
    starts = np.cumsum(lengths) - lengths
    rows = np.concatenate([np.arange(starts[i], starts[i] + lengths[i]) for i in in_order])
    again = Attention(HEADS)(qkv[rows], tokens_of([lengths[i] for i in in_order]))
    assert torch.allclose(again, found[rows], atol=1e-6)


def test_attention_equal_lengths_need_no_copy_or_mask(monkeypatch: Any) -> None:
    """Consecutive texts of equal length are read as a view, without padding."""
    seen: list[Any] = []
    monkeypatch.setattr(
        packed_attention, "attend_by_products", lambda texts, real, out: seen.append((tuple(texts.shape[:2]), real))
    )
    Attention(HEADS)(torch.randn(65, 3 * HEADS * WIDTH), tokens_of([13] * 5))
    assert seen == [((5, 13), None)]


@pytest.mark.parametrize("lengths", [[32], [10, 10, 12], [40, 40, 20, 50]])
def test_attention_few_tokens_uses_torch(lengths: list[int], monkeypatch: Any) -> None:
    """A short text alone, or the only one of its length, is faster with torch's attention than as a group."""
    grouped = []

    def noted(texts: torch.Tensor, *rest: Any) -> None:
        grouped.append(tuple(texts.shape[:2]))
        attend_by_products(texts, *rest)

    monkeypatch.setattr(packed_attention, "attend_by_products", noted)
    qkv = torch.randn(sum(lengths), 3 * HEADS * WIDTH)
    found = Attention(HEADS)(qkv, tokens_of(lengths))
    assert grouped == ([] if sum(lengths) <= 32 else [(2, 40), (1, 50)])
    assert (found.double() - text_by_text(qkv, lengths)).abs().max() <= HOW_FAR[torch.float32]


def test_attention_long_texts_uses_torch(monkeypatch: Any) -> None:
    """Texts of more than 64 tokens in float32, or 1024 in bfloat16, use torch's attention."""
    calls = []
    own = functional.scaled_dot_product_attention
    monkeypatch.setattr(
        functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(a[0].shape[2]) or own(*a, **k)
    )
    lengths = [64, 65, 1024, 65, 1025]
    qkv = torch.randn(sum(lengths), 3 * HEADS * WIDTH)
    Attention(HEADS)(qkv, tokens_of(lengths))
    assert sorted(calls) == [65, 1024, 1025]
    calls.clear()
    rounded = Attention(HEADS)(qkv.bfloat16(), tokens_of(lengths))
    assert calls == [1025]
    assert (rounded.double() - text_by_text(qkv.bfloat16(), lengths)).abs().max() <= HOW_FAR[torch.bfloat16]
