"""Building blocks of the padding-free encoder: tokens, linear layers and transformer layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from langchain_datashunt._utils.optional import require
from langchain_datashunt.small_models.engine.devices import on_device

if TYPE_CHECKING:
    import torch

_REORDERING_ROWS = 1024


@dataclass(frozen=True)
class TokenStates:
    """Last hidden states of `n` texts without padding.

    Attributes:
        states: States of all texts, concatenated, shape `[tokens, d]`.
        lengths: Tokens of each text, shape `[n]`.
    """

    states: torch.Tensor
    lengths: torch.Tensor

    def first(self) -> torch.Tensor:
        """Return the state of the first token of each text, shape `[n, d]`."""
        if len(self.lengths) == 1:
            return self.states[:1]
        return self.states[self.lengths.cumsum(0) - self.lengths]

    def mean(self) -> torch.Tensor:
        """Return the mean state of each text, shape `[n, d]`."""
        states = self.states.float()
        if len(self.lengths) == 1:
            return states.mean(0, keepdim=True)
        torch_ = require("torch", "torch")
        found: torch.Tensor = torch_.segment_reduce(states, "mean", lengths=self.lengths, unsafe=True)
        return found


class Run(NamedTuple):
    """Consecutive texts of equal length.

    Attributes:
        start: Index of the first token.
        texts: Number of texts.
        length: Tokens per text.
    """

    start: int
    texts: int
    length: int


@dataclass
class Tokens:
    """Concatenated tokens of `n` texts on a device.

    Attributes:
        ids: Token ids, shape `[tokens]`.
        places: Position of each token in its text, from 0, shape `[tokens]`.
        lengths: Tokens of each text, shape `[n]`.
        runs: Consecutive texts of equal length.
        host_ids: Token ids in host memory, shape `[tokens]`.
        kept: Values that layers compute once per batch and share, such as masks.
    """

    ids: torch.Tensor
    places: torch.Tensor
    lengths: torch.Tensor
    runs: list[Run]
    host_ids: NDArray[np.int64]
    kept: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def from_ids(cls, ids: Sequence[Sequence[int]], device: torch.device) -> Tokens:
        """Create the tokens from the ids of each text, with one device transfer."""
        n = len(ids)
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=n)
        total = int(lengths.sum())
        starts = lengths.cumsum() - lengths
        host = np.empty(2 * total + n, dtype=np.int64)
        host[:total] = np.fromiter(chain.from_iterable(ids), dtype=np.int64, count=total)
        host[total : 2 * total] = np.arange(total) - np.repeat(starts, lengths)
        host[2 * total :] = lengths
        first = np.concatenate([[0], np.flatnonzero(np.diff(lengths)) + 1])
        counts = np.diff(np.concatenate([first, [n]]))
        runs = [Run(int(starts[i]), int(m), int(lengths[i])) for i, m in zip(first.tolist(), counts, strict=True) if m]
        there = on_device(host, device)
        return cls(there[:total], there[total : 2 * total], there[2 * total :], runs, host[:total])

    def may_contain(self, token: int) -> bool:
        """Return whether a token is among the ids, without a device synchronization."""
        return bool((self.host_ids == token).any())


class Linear:
    """Linear layer with an optional activation. On a CPU, its weight is reordered once for oneDNN.

    A GELU activation is fused into the oneDNN call. Without oneDNN, torch's `linear` is used.

    Args:
        weight: Weight, shape `[out, in]`.
        bias: Bias, shape `[out]`, or None.
        activation: Function applied to the product, or None.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, activation: Callable[[Any], Any] | None = None
    ) -> None:
        own: Any = require("torch", "torch")
        self.weight, self.activation = weight.detach().contiguous(), activation
        self.bias = None if bias is None else bias.detach().to(weight.dtype).contiguous()
        self.fused = isinstance(activation, own.nn.Module) and type(activation).__name__ == "GELUActivation"
        self.reordered: Any = None
        if weight.device.type != "cpu":
            return
        try:
            self.reordered = own.ops.mkldnn._reorder_linear_weight(self.weight, _REORDERING_ROWS)
            self._product: Any = own.ops.mkldnn._linear_pointwise
        except (AttributeError, RuntimeError):
            self.reordered = None
            return
        if bias is not None and bias.dtype != weight.dtype:
            try:  # some versions accept a bias of higher precision than the weight
                self._product(self.weight[:1], self.reordered, bias.detach(), "none", [], "")
                self.bias = bias.detach().contiguous()
            except RuntimeError:
                pass

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to `[n, in]` and return `[n, out]` in the dtype of the weight."""
        x = x.to(self.weight.dtype)
        if self.reordered is not None:
            after, algorithm = ("gelu", "none") if self.fused else ("none", "")
            found: torch.Tensor = self._product(x, self.reordered, self.bias, after, [], algorithm)
            return found if self.fused or self.activation is None else self.activation(found)
        plain: torch.Tensor = require("torch.nn.functional", "torch").linear(x, self.weight, self.bias)
        return plain if self.activation is None else self.activation(plain)


@dataclass(frozen=True)
class Products:
    """Factory of linear layers with a given dtype.

    Attributes:
        dtype: Dtype of weights, inputs and outputs. Sums and norms between the layers keep the dtype of the network.
    """

    dtype: torch.dtype

    def pack(self, layer: torch.nn.Linear, activation: Callable[[Any], Any] | None = None) -> Linear:
        """Convert a torch layer."""
        return self._made(layer.weight, layer.bias, activation)

    def joined(self, layers: Sequence[torch.nn.Linear]) -> Linear:
        """Merge several layers with the same input into one."""
        torch_ = require("torch", "torch")
        biases = [layer.bias for layer in layers]
        weight = torch_.cat([layer.weight for layer in layers])
        return self._made(weight, None if biases[0] is None else torch_.cat(biases))

    def _made(self, weight: Any, bias: Any, activation: Callable[[Any], Any] | None = None) -> Linear:
        return Linear(weight.to(self.dtype), bias, activation)


SelfAttention: TypeAlias = Callable[["torch.Tensor", Tokens], "torch.Tensor"]
"""Function from concatenated queries, keys and values `[tokens, 3 * d]` to the attention output `[tokens, d]`."""

Layer: TypeAlias = "Callable[[torch.Tensor, Tokens], torch.Tensor]"
"""Function from states `[tokens, d]` to the next states, which may overwrite its input."""


@dataclass(frozen=True)
class PostNormLayer:
    """Layer of BERT and similar models, with a norm after each residual sum."""

    qkv: Linear
    attention: SelfAttention
    out: Linear
    norm1: Any
    up: Linear
    down: Linear
    norm2: Any

    def __call__(self, x: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Compute the next states."""
        x = self.norm1(x.add_(self.out(self.attention(self.qkv(x), tokens))))
        found: torch.Tensor = self.norm2(x.add_(self.down(self.up(x))))
        return found


@dataclass(frozen=True)
class PreNormGatedLayer:
    """Layer of ModernBERT, with a norm before attention and before the gated feed-forward block."""

    norm1: Any
    qkv: Linear
    attention: SelfAttention
    out: Linear
    norm2: Any
    up: Linear
    activation: Any
    down: Linear

    def __call__(self, x: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Compute the next states."""
        x = x + self.out(self.attention(self.qkv(self.norm1(x)), tokens))
        value, gate = self.up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(self.activation(value) * gate)
