"""What a packed encoder is built of: tokens without padding, products, and layers; attention is a module of its own."""

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

_PACKING_ROWS = 1024


@dataclass(frozen=True)
class PackedStates:
    """Last hidden states of `n` texts.

    Attributes:
        states: Shape `[tokens, d]`, the texts' one after the other.
        lengths: Tokens of each text, shape `[n]`.
    """

    states: torch.Tensor
    lengths: torch.Tensor

    def first(self) -> torch.Tensor:
        """The first token's state of each text, shape `[n, d]`."""
        if len(self.lengths) == 1:
            return self.states[:1]
        return self.states[self.lengths.cumsum(0) - self.lengths]

    def mean(self) -> torch.Tensor:
        """The mean state of each text, shape `[n, d]`."""
        states = self.states.float()
        if len(self.lengths) == 1:
            return states.mean(0, keepdim=True)
        torch_ = require("torch", "torch")
        found: torch.Tensor = torch_.segment_reduce(states, "mean", lengths=self.lengths, unsafe=True)
        return found


class Run(NamedTuple):
    """Texts of one length that stand together."""

    start: int
    texts: int
    length: int


@dataclass
class Tokens:
    """Where the tokens of `n` texts stand, one text after the other.

    Attributes:
        ids: Token ids, shape `[tokens]`.
        places: The place of each in its text, from 0, shape `[tokens]`.
        lengths: Tokens of each text, shape `[n]`.
        runs: Texts of one length that stand together.
        host_ids: The ids in host memory, shape `[tokens]`.
        kept: What layers compute once for the batch.
    """

    ids: torch.Tensor
    places: torch.Tensor
    lengths: torch.Tensor
    runs: list[Run]
    host_ids: NDArray[np.int64]
    kept: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def from_ids(cls, ids: Sequence[Sequence[int]], device: torch.device) -> Tokens:
        """The tokens of texts in their order; they reach a device by one copy."""
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
        """Return whether a token is among the ids, without asking the device."""
        return bool((self.host_ids == token).any())


class Linear:
    """A linear layer with its weight reordered for oneDNN on the CPU; with GELU after it, if so asked."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, activation: Callable[[Any], Any] | None = None
    ) -> None:
        own: Any = require("torch", "torch")
        self.weight, self.activation = weight.detach().contiguous(), activation
        self.bias = None if bias is None else bias.detach().to(weight.dtype).contiguous()
        self.fused = isinstance(activation, own.nn.Module) and type(activation).__name__ == "GELUActivation"
        self.packed: Any = None
        if weight.device.type != "cpu":
            return
        try:
            self.packed = own.ops.mkldnn._reorder_linear_weight(self.weight, _PACKING_ROWS)
            self._product: Any = own.ops.mkldnn._linear_pointwise
        except (AttributeError, RuntimeError):
            self.packed = None
            return
        if bias is not None and bias.dtype != weight.dtype:
            try:  # what is added needs not be rounded as what is multiplied
                self._product(self.weight[:1], self.packed, bias.detach(), "none", [], "")
                self.bias = bias.detach().contiguous()
            except RuntimeError:
                pass

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The product, `[n, out]` of `[n, in]`, in the weight's number format."""
        x = x.to(self.weight.dtype)
        if self.packed is not None:
            after, algorithm = ("gelu", "none") if self.fused else ("none", "")
            found: torch.Tensor = self._product(x, self.packed, self.bias, after, [], algorithm)
            return found if self.fused or self.activation is None else self.activation(found)
        plain: torch.Tensor = require("torch.nn.functional", "torch").linear(x, self.weight, self.bias)
        return plain if self.activation is None else self.activation(plain)


@dataclass(frozen=True)
class Products:
    """Makes linear layers of a number format from those of a network.

    Attributes:
        dtype: The format of their weights, inputs and results; sums and norms between them stay in the network's.
    """

    dtype: torch.dtype

    def pack(self, layer: torch.nn.Linear, activation: Callable[[Any], Any] | None = None) -> Linear:
        """That of a torch layer."""
        return self._made(layer.weight, layer.bias, activation)

    def joined(self, layers: Sequence[torch.nn.Linear]) -> Linear:
        """Several of the same input as one."""
        torch_ = require("torch", "torch")
        biases = [layer.bias for layer in layers]
        weight = torch_.cat([layer.weight for layer in layers])
        return self._made(weight, None if biases[0] is None else torch_.cat(biases))

    def _made(self, weight: Any, bias: Any, activation: Callable[[Any], Any] | None = None) -> Linear:
        return Linear(weight.to(self.dtype), bias, activation)


SelfAttention: TypeAlias = Callable[["torch.Tensor", Tokens], "torch.Tensor"]
"""From queries, keys and values side by side, `[tokens, 3 * d]`, to `[tokens, d]`: each text attends to itself."""

Layer: TypeAlias = "Callable[[torch.Tensor, Tokens], torch.Tensor]"
"""From the states `[tokens, d]` of texts to the next; may overwrite the former."""


@dataclass(frozen=True)
class PostNormLayer:
    """Of BERT and its kin: attention, then a feed-forward part, each normalised after it was added."""

    qkv: Linear
    attention: SelfAttention
    out: Linear
    norm1: Any
    up: Linear
    down: Linear
    norm2: Any

    def __call__(self, x: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Compute it."""
        x = self.norm1(x.add_(self.out(self.attention(self.qkv(x), tokens))))
        found: torch.Tensor = self.norm2(x.add_(self.down(self.up(x))))
        return found


@dataclass(frozen=True)
class PreNormGatedLayer:
    """Of ModernBERT: normalised before attention and before a gated feed-forward part."""

    norm1: Any
    qkv: Linear
    attention: SelfAttention
    out: Linear
    norm2: Any
    up: Linear
    activation: Any
    down: Linear

    def __call__(self, x: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Compute it."""
        x = x + self.out(self.attention(self.qkv(self.norm1(x)), tokens))
        value, gate = self.up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(self.activation(value) * gate)
