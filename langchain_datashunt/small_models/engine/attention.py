"""Attention of a padding-free encoder: each text attends to itself, over tokens that follow one another.

On a CPU, texts of similar length form small groups. A group's scores, their exponentials and the sums are one call
each of the matrix library or of torch's vector functions. For texts of ten or twenty tokens, torch's own attention
works head by head and takes two or three times as long.
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
"""Turns queries or keys `[tokens, heads, width]` by their places."""

_STEP = 8
"""Lengths of one group differ by less: few shapes, for the matrix library prepares itself for each of them."""

_GROUP_TOKENS = 512
"""Tokens of one group at the most, so that its scores stay in a core's own cache."""

_LONGEST_BY_PRODUCTS, _LONGEST_ROUNDED = 64, 1024
"""In single precision, in bfloat16; above it torch's own attention, which never holds all scores, is as quick."""

_FEW_TOKENS = 32
"""Up to so many in a group, as of a short text alone, torch's own attention is quicker, being fewer calls."""

_LONGEST_IN_SINGLE = 24
"""Up to this length single precision costs hardly more than bfloat16, and is that much nearer to the truth."""

_SAFE_SUMS = (2.0**-100, 2.0**115)
"""Between these a sum of powers, also times values of some thousands, is far from the ends of a number format."""


class Group(NamedTuple):
    """Texts whose attention is computed together.

    Attributes:
        rows: Which tokens: a slice, or their indices `[texts * length]`, the first token standing in for missing ones.
        texts: How many.
        length: Tokens of each, missing ones counted.
        real: Which tokens there are, `[texts, 1, 1, length]`; None where none is missing.
    """

    rows: slice | torch.Tensor
    texts: int
    length: int
    real: torch.Tensor | None = None


@dataclass(frozen=True)
class Groups:
    """All texts of a batch in groups.

    Attributes:
        groups: One after the other.
        order: Where each token of the batch stands in the groups, `[tokens]`; None where they have its order.
    """

    groups: Sequence[Group]
    order: torch.Tensor | None

    @classmethod
    def from_runs(cls, runs: Sequence[Run], longest: int) -> Groups:
        """Texts up to a length with others that are little shorter or longer, those above it with equal ones alone."""
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
    """Texts that begin there, as a group; and which token each of its rows is, -1 for a missing one."""
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
    """Self-attention of each text to itself.

    Attributes:
        heads: How many.
        window: How far a token sees to either side; None for the whole text.
        rotation: What is done with queries and keys first; None for nothing.
    """

    heads: int
    window: int | None = None
    rotation: Rotation | None = None

    def __call__(self, qkv: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """From queries, keys and values side by side, `[tokens, 3 * d]`, to `[tokens, d]`."""
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
        """From `[tokens, 3, heads, width]` to `[tokens, heads, width]`."""
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
        """Of texts of one length, from `[texts, length, 3, heads, width]` to `[texts, length, heads, width]`."""
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
    """Attention by plain products, exponentials of all scores at once, and a division by their sums at the end.

    Weights are powers of the scores as they are, without their row's largest being taken off first, which for short
    rows costs more than all else; where sums come near to the ends of what a number holds, it is taken off.

    Args:
        texts: Queries, keys and values, shape `[texts, length, 3, heads, width]`.
        real: Which tokens there are, shape `[texts, 1, 1, length]`, at most 7 of a text missing; None for all.
        out: Is given what is seen, shape `[texts, length, heads, width]`.
    """
    torch_ = require("torch", "torch")
    n, length, _, heads, width = texts.shape
    rounded = texts.dtype == torch_.bfloat16 and length > _LONGEST_IN_SINGLE
    dtype = torch_.bfloat16 if rounded else torch_.float32
    own = torch_.empty((3, n, heads, length, width), dtype=dtype).copy_(texts.permute(2, 0, 3, 1, 4))
    q, k, v = own.view(3, n * heads, length, width)
    q.mul_(width**-0.5 / math.log(2))
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
    """Powers of two in their place, 0 for what is missing, and their sums `[texts, heads, length, 1]`."""
    scores.exp2_()
    if real is not None:
        scores[..., -_STEP:].mul_(real[..., -_STEP:])
    return scores.sum(-1, keepdim=True)
