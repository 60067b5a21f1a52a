"""Self-attention of the padding-free encoder over concatenated texts.

On a CPU, texts of similar length form small groups. The scores of a group, their exponentials and the sums take one
vectorized call each. For texts of ten or twenty tokens, torch's `scaled_dot_product_attention` works head by head and
takes two or three times as long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from langchain_datashunt._utils.optional import require
from langchain_datashunt.small_models.engine.layers import Run, Tokens

if TYPE_CHECKING:
    import torch

Rotation: TypeAlias = Callable[["torch.Tensor", Tokens], "torch.Tensor"]
"""Function that rotates queries or keys `[tokens, heads, width]` by their positions."""

_STEP = 8
"""Multiple that lengths are rounded up to within a group.

Few distinct shapes matter, because the matrix library prepares a kernel for each shape."""

_GROUP_TOKENS = 512
"""Maximum tokens per group, so that its scores fit into the cache of one core."""

_LONGEST_BY_PRODUCTS, _LONGEST_ROUNDED = 64, 1024
"""Maximum text length for `attend_by_products`, in float32 and in bfloat16.

For longer texts, torch's attention is as fast and does not store all scores."""

_FEW_TOKENS = 32
"""Number of tokens up to which torch's attention is faster, because it takes fewer calls."""

_LONGEST_IN_SINGLE = 24
"""Text length up to which float32 costs hardly more than bfloat16, so the more accurate float32 is used."""

_SAFE_SUMS = (2.0**-100, 2.0**115)
"""Range of sums of exponentials that neither overflows nor underflows, even multiplied by values of some thousands."""


class Group(NamedTuple):
    """Texts whose attention is computed together.

    Attributes:
        rows: Tokens as a slice, or as indices `[texts * length]` in which the first token of a text fills the padding.
        texts: Number of texts.
        length: Tokens per text, including padding.
        real: Mask of real tokens, shape `[texts, 1, 1, length]`, or None without padding.
    """

    rows: slice | torch.Tensor
    texts: int
    length: int
    real: torch.Tensor | None = None


@dataclass(frozen=True)
class Groups:
    """All texts of a batch in groups.

    Attributes:
        groups: Groups in the order in which they are computed.
        order: Row of each batch token in the concatenated groups, shape `[tokens]`, or None if both have one order.
    """

    groups: Sequence[Group]
    order: torch.Tensor | None

    @classmethod
    def from_runs(cls, runs: Sequence[Run], longest: int) -> Groups:
        """Group texts of up to `longest` tokens by similar length, and longer texts by equal length."""
        torch_ = require("torch", "torch")
        alike: dict[int, list[Run]] = {}
        for run in runs:
            alike.setdefault(_rounded_up(run.length) if run.length <= longest else -run.length, []).append(run)
        groups: list[Group] = []
        tokens: list[Any] = []
        for bucket in alike.values():
            starts = np.concatenate([run.start + np.arange(run.texts) * run.length for run in bucket])
            lengths = np.repeat([run.length for run in bucket], [run.texts for run in bucket])
            for some in _portions(len(starts), int(lengths.max())):
                group, own = _group_of(starts[some], lengths[some])
                groups.append(group)
                tokens.append(own)
        together = np.concatenate(tokens)
        in_order = bool((together == np.arange(len(together))).all())
        if in_order:
            return cls(groups, None)
        order = np.empty(int(together.max()) + 1, dtype=np.int64)
        there = together >= 0
        order[together[there]] = np.flatnonzero(there)
        return cls(groups, torch_.from_numpy(order))


def _rounded_up(length: int) -> int:
    return -(-length // _STEP) * _STEP


def _portions(texts: int, length: int) -> Iterator[slice]:
    most = max(1, _GROUP_TOKENS // _rounded_up(length))
    for start in range(0, texts, most):
        yield slice(start, min(texts, start + most))


def _group_of(starts: Any, lengths: Any) -> tuple[Group, Any]:
    """Return a group of the texts at `starts`, and the batch token of each of its rows, -1 for padding."""
    torch_, texts, longest = require("torch", "torch"), len(starts), int(lengths.max())
    equal = bool((lengths == longest).all())
    if equal and (np.diff(starts) == longest).all():
        first, last = int(starts[0]), int(starts[0]) + texts * longest
        return Group(slice(first, last), texts, longest), np.arange(first, last)
    length = longest if equal else _rounded_up(longest)
    real = np.arange(length) < lengths[:, None]
    rows = starts[:, None] + np.where(real, np.arange(length), 0)
    missing = None if equal else torch_.from_numpy(real[:, None, None])
    group = Group(torch_.from_numpy(rows.reshape(-1)), texts, length, missing)
    return group, np.where(real, rows, -1).reshape(-1)


@dataclass(frozen=True)
class Attention:
    """Self-attention within each text.

    Attributes:
        heads: Number of heads.
        window: Tokens that are visible to either side, or None for the whole text.
        rotation: Rotary position embedding of queries and keys, or None.
    """

    heads: int
    window: int | None = None
    rotation: Rotation | None = None

    def __call__(self, qkv: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Compute attention from concatenated queries, keys and values.

        Args:
            qkv: Queries, keys and values, shape `[tokens, 3 * d]`.
            tokens: Tokens of the batch.

        Returns:
            Attention output, shape `[tokens, d]`.
        """
        torch_, width = require("torch", "torch"), qkv.shape[1] // 3
        three = qkv.view(len(qkv), 3, self.heads, width // self.heads)
        if self.rotation is not None:
            q, k, v = three.unbind(1)
            three = torch_.stack((self.rotation(q, tokens), self.rotation(k, tokens), v), 1)
        if qkv.device.type == "cpu" and len(qkv) > _FEW_TOKENS:
            return self._in_groups(three, tokens).view(-1, width)
        parts = [self._by_torch(_texts_of(three, run), tokens).reshape(-1, width) for run in tokens.runs]
        return parts[0] if len(parts) == 1 else torch_.cat(parts)

    def _in_groups(self, three: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Compute attention by groups, from `[tokens, 3, heads, width]` to `[tokens, heads, width]`."""
        rounded = three.dtype == require("torch", "torch").bfloat16
        longest = _LONGEST_ROUNDED if rounded else _LONGEST_BY_PRODUCTS
        if self.window is not None:
            longest = min(longest, self.window + 1)
        key = ("groups", longest)
        if key not in tokens.kept:
            tokens.kept[key] = Groups.from_runs(tokens.runs, longest)
        plan: Groups = tokens.kept[key]
        seen = three.new_empty((sum(group.texts * group.length for group in plan.groups), *three.shape[2:]))
        at = 0
        for group in plan.groups:
            rows = group.texts * group.length
            mine = three[group.rows] if isinstance(group.rows, slice) else three.index_select(0, group.rows)
            texts = mine.view(group.texts, group.length, *three.shape[1:])
            out = seen[at : at + rows].view(group.texts, group.length, *three.shape[2:])
            if group.real is not None or (group.length <= longest and rows > _FEW_TOKENS):
                attend_by_products(texts, group.real, out)
            else:
                out.copy_(self._by_torch(texts, tokens))
            at += rows
        return seen if plan.order is None else seen.index_select(0, plan.order)

    def _by_torch(self, texts: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Compute attention of texts of one length with torch.

        The shape changes from `[texts, length, 3, heads, width]` to `[texts, length, heads, width]`.
        """
        functional = require("torch.nn.functional", "torch")
        mask = self._mask(texts.shape[1], tokens, texts.device)
        q, k, v = texts.permute(2, 0, 3, 1, 4)
        seen: torch.Tensor = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return seen.transpose(1, 2)

    def _mask(self, length: int, tokens: Tokens, device: torch.device) -> torch.Tensor | None:
        if self.window is None or length <= self.window + 1:
            return None
        torch_, key = require("torch", "torch"), ("mask", self.window, length)
        if key not in tokens.kept:
            places = torch_.arange(length, device=device)
            tokens.kept[key] = (places[:, None] - places[None]).abs() <= self.window
        found: torch.Tensor = tokens.kept[key]
        return found


def _texts_of(three: torch.Tensor, run: Run) -> torch.Tensor:
    return three[run.start : run.start + run.texts * run.length].view(run.texts, run.length, *three.shape[1:])


def attend_by_products(texts: torch.Tensor, real: torch.Tensor | None, out: torch.Tensor) -> None:
    """Compute attention by matrix products, with one vectorized exponential, and write the result to `out`.

    A usual softmax subtracts the maximum of each row first, which costs more than all other steps for short rows. This
    function omits it, and repeats the computation with it if a sum is close to overflow or underflow.

    Args:
        texts: Queries, keys and values, shape `[texts, length, 3, heads, width]`.
        real: Mask of real tokens, shape `[texts, 1, 1, length]`, with at most 7 padding tokens per text, or None
            without padding.
        out: Output tensor, shape `[texts, length, heads, width]`.
    """
    torch_ = require("torch", "torch")
    n, length, _, heads, width = texts.shape
    rounded = texts.dtype == torch_.bfloat16 and length > _LONGEST_IN_SINGLE
    dtype = torch_.bfloat16 if rounded else torch_.float32
    own = torch_.empty((3, n, heads, length, width), dtype=dtype).copy_(texts.permute(2, 0, 3, 1, 4))
    q, k, v = own.view(3, n * heads, length, width)
    q.mul_(width**-0.5 / math.log(2))  # scaled to base 2, because `_powers` uses exp2
    weights = torch_.bmm(q, k.transpose(1, 2))
    by_text = weights.view(n, heads, length, length)
    sums = _powers(by_text, real)
    lowest, highest = sums.aminmax()
    if not (lowest > _SAFE_SUMS[0] and highest < _SAFE_SUMS[1]):
        torch_.bmm(q, k.transpose(1, 2), out=weights)
        weights.sub_(weights.amax(-1, keepdim=True))
        sums = _powers(by_text, real)
    seen = torch_.bmm(weights, v).view(n, heads, length, width)
    torch_.div(seen.transpose(1, 2), sums.transpose(1, 2), out=out)


def _powers(scores: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """Replace scores by powers of two in place, and return their sums, shape `[texts, heads, length, 1]`.

    Padding gets the weight 0.
    """
    scores.exp2_()
    if real is not None:  # only the last tokens of a row can be padding
        scores[..., -_STEP:].mul_(real[..., -_STEP:])
    return scores.sum(-1, keepdim=True)
