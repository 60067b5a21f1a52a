"""How many texts are computed: in batches by a budget of tokens, the next ones tokenised while these are computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from langchain_datashunt._utils.optional import require
from langchain_datashunt.prediction import BoolArray
from langchain_datashunt.small_models.engine.devices import on_host

if TYPE_CHECKING:
    import torch

CHUNK = 2048
"""Texts that are tokenised, and sorted by length, at once."""

Tokenize: TypeAlias = Callable[[Sequence[str]], tuple[list[list[int]], BoolArray]]
"""From `n` texts to their token ids, and which of them were cut, shape `[n]`."""


def token_budget(device: Any) -> int:
    """Tokens of one batch at the most: what fills a GPU, and what stays in the caches of a CPU."""
    return 65_536 if getattr(device, "type", device) == "cuda" else 4_096


def token_budget_batches(lengths: Sequence[int], budget: int, max_rows: int | None = None) -> Iterator[list[int]]:
    """Indices in batches of similar length, each at most `budget` padded tokens and `max_rows` texts."""
    rows: list[int] = []
    for i in np.argsort(np.asarray(lengths), kind="stable").tolist():
        if rows and (lengths[i] * (len(rows) + 1) > budget or len(rows) == max_rows):
            yield rows
            rows = []
        rows.append(i)
    if rows:
        yield rows


def compute_texts(
    tokenize: Tokenize,
    texts: Sequence[str],
    forward: Callable[[list[list[int]]], torch.Tensor],
    width: int,
    *,
    budget: int,
    batch_size: int | None = None,
) -> tuple[NDArray[np.float32], BoolArray]:
    """What a network computes of texts, in their order, shape `[n, width]`, and which were cut, shape `[n]`.

    Args:
        tokenize: Gives token ids.
        texts: `n` texts.
        forward: From the token ids of `m` texts to `[m, width]` on any device. What a GPU computes stays there until a
            chunk is done, so that nothing waits for a batch.
        width: Values of a text.
        budget: Tokens of one batch at the most, padding counted.
        batch_size: Texts of one batch at the most; None for no bound but the budget.
    """
    if len(texts) == 1:  # each step of what follows is slow after a network has filled the caches
        ids, cut = tokenize(texts)
        with require("torch", "torch").inference_mode():
            return on_host([forward(ids).float()]).copy(), cut  # it may be a part of all states
    found, cut = np.empty((len(texts), width), dtype=np.float32), np.zeros(len(texts), dtype=np.bool_)
    for start, ids, cut_here in _tokenized(tokenize, texts):
        chunk = slice(start, start + len(ids))
        cut[chunk] = cut_here
        orders: list[list[int]] = []
        parts: list[torch.Tensor] = []
        with require("torch", "torch").inference_mode():
            for rows in token_budget_batches([len(one) for one in ids], budget, batch_size):
                parts.append(forward([ids[i] for i in rows]).float())
                orders.append(rows)
            found[chunk][np.concatenate(orders)] = on_host(parts)
    return found, cut


def _tokenized(tokenize: Tokenize, texts: Sequence[str]) -> Iterator[tuple[int, list[list[int]], BoolArray]]:
    """Chunks in turn: where each begins, its ids, and which were cut; another thread does the next one meanwhile."""
    if len(texts) <= CHUNK:
        if texts:
            yield 0, *tokenize(texts)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="tokenize") as ahead:
        coming = ahead.submit(tokenize, texts[:CHUNK])
        for start in range(0, len(texts), CHUNK):
            ids, cut = coming.result()
            if following := texts[start + CHUNK : start + 2 * CHUNK]:
                coming = ahead.submit(tokenize, following)
            yield start, ids, cut
