"""Computation of many texts in batches by token budget, with tokenization in a background thread."""

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
"""Number of texts that are tokenized and sorted by length together."""

Tokenize: TypeAlias = Callable[[Sequence[str]], tuple[list[list[int]], BoolArray]]
"""Function from `n` texts to their token ids, and a mask of the truncated texts, shape `[n]`."""


def token_budget(device: Any) -> int:
    """Return the maximum tokens per batch: enough to fill a GPU, or few enough for the caches of a CPU."""
    return 65_536 if getattr(device, "type", device) == "cuda" else 4_096


def token_budget_batches(lengths: Sequence[int], budget: int, max_rows: int | None = None) -> Iterator[list[int]]:
    """Yield batches of indices of texts of similar length.

    A text longer than `budget` forms a batch of its own.

    Args:
        lengths: Tokens of each text.
        budget: Maximum tokens per batch, including padding.
        max_rows: Maximum texts per batch; None means no limit.
    """
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
    """Compute one vector per text with a network, in batches of similar length.

    Args:
        tokenize: Function from texts to token ids.
        texts: `n` texts.
        forward: Function from the token ids of `m` texts to values of shape `[m, width]` on any device. They stay on
            the device until a chunk is complete, which avoids a synchronization per batch.
        width: Values per text.
        budget: Maximum tokens per batch, including padding.
        batch_size: Maximum texts per batch; None means no limit besides the budget.

    Returns:
        The values in the order of `texts`, shape `[n, width]`, and a mask of the truncated texts, shape `[n]`.
    """
    if len(texts) == 1:  # a shortcut, because the steps below are slow once a network has filled the caches
        ids, cut = tokenize(texts)
        with require("torch", "torch").inference_mode():
            return on_host([forward(ids).float()]).copy(), cut  # a copy, because the array may be a view of all states
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
    """Yield the start, token ids and truncation mask of each chunk, tokenizing the next one in another thread."""
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
