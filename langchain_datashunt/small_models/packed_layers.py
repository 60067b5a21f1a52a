"""What a packed encoder is built of: tokens without padding, products, attention, and the layers of architectures.

A new architecture is a function from the transformers network to `Parts`, and a line in `ARCHITECTURES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from langchain_datashunt._extras import require

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
        return self.states[self.lengths.cumsum(0) - self.lengths]

    def mean(self) -> torch.Tensor:
        """The mean state of each text, shape `[n, d]`."""
        torch_ = require("torch", "torch")
        n, device = len(self.lengths), self.states.device
        owner = torch_.repeat_interleave(torch_.arange(n, device=device), self.lengths)
        total = torch_.zeros(n, self.states.shape[1], device=device).index_add_(0, owner, self.states.float())
        return total / self.lengths[:, None]  # type: ignore[no-any-return]


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
        kept: What layers compute once for the batch.
    """

    ids: torch.Tensor
    places: torch.Tensor
    lengths: torch.Tensor
    runs: list[Run]
    kept: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, ids: Sequence[Sequence[int]], device: torch.device) -> Tokens:
        """The tokens of texts in their order."""
        torch_ = require("torch", "torch")
        lengths = np.fromiter((len(one) for one in ids), dtype=np.int64, count=len(ids))
        starts = lengths.cumsum() - lengths
        flat = np.fromiter((token for one in ids for token in one), dtype=np.int64, count=int(lengths.sum()))
        places = np.arange(len(flat)) - np.repeat(starts, lengths)
        edges = np.flatnonzero(np.diff(lengths)) + 1
        first = np.concatenate([[0], edges])
        counts = np.diff(np.concatenate([first, [len(lengths)]]))
        runs = [Run(int(starts[i]), int(n), int(lengths[i])) for i, n in zip(first.tolist(), counts, strict=True) if n]
        own = [torch_.from_numpy(array).to(device, non_blocking=True) for array in (flat, places, lengths)]
        return cls(own[0], own[1], own[2], runs)

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max((run.length for run in self.runs), default=0)

    def bounds(self) -> torch.Tensor:
        """Where each text begins, and where the last one ends, shape `[n + 1]`; 32-bit, as kernels take it."""
        torch_ = require("torch", "torch")
        if "bounds" not in self.kept:
            zero = torch_.zeros(1, dtype=torch_.int32, device=self.lengths.device)
            self.kept["bounds"] = torch_.cat([zero, self.lengths.cumsum(0).to(torch_.int32)])
        found: torch.Tensor = self.kept["bounds"]
        return found


class Linear:
    """A linear layer with its weight reordered for oneDNN on the CPU; with GELU after it, if so asked."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, activation: Callable[[Any], Any] | None = None
    ) -> None:
        own: Any = require("torch", "torch")
        self.weight, self.activation = weight.detach().contiguous(), activation
        self.bias = None if bias is None else bias.detach().contiguous()
        self.fused = isinstance(activation, own.nn.Module) and type(activation).__name__ == "GELUActivation"
        self.packed: Any = None
        if weight.device.type != "cpu":
            return
        try:
            self.packed = own.ops.mkldnn._reorder_linear_weight(self.weight, _PACKING_ROWS)
            self._product: Any = own.ops.mkldnn._linear_pointwise
        except (AttributeError, RuntimeError):
            self.packed = None

    @classmethod
    def of(cls, layer: torch.nn.Linear, activation: Callable[[Any], Any] | None = None) -> Linear:
        """That of a torch layer."""
        return cls(layer.weight, layer.bias, activation)

    @classmethod
    def joined(cls, layers: Sequence[torch.nn.Linear]) -> Linear:
        """Several of the same input as one."""
        torch_ = require("torch", "torch")
        biases = [layer.bias for layer in layers]
        return cls(torch_.cat([layer.weight for layer in layers]), None if biases[0] is None else torch_.cat(biases))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The product, `[n, out]` of `[n, in]`."""
        if self.packed is not None:
            after, algorithm = ("gelu", "none") if self.fused else ("none", "")
            found: torch.Tensor = self._product(x, self.packed, self.bias, after, [], algorithm)
            return found if self.fused or self.activation is None else self.activation(found)
        plain: torch.Tensor = require("torch.nn.functional", "torch").linear(x, self.weight, self.bias)
        return plain if self.activation is None else self.activation(plain)


Rotation: TypeAlias = Callable[["torch.Tensor", Tokens], "torch.Tensor"]
"""Turns queries or keys `[tokens, heads, width]` by their places."""


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
        width = qkv.shape[1] // 3
        q, k, v = qkv.view(len(qkv), 3, self.heads, width // self.heads).unbind(1)
        if self.rotation is not None:
            q, k = self.rotation(q, tokens), self.rotation(k, tokens)
        if (kernel := _variable_length_kernel(qkv)) is not None:
            reach = (-1, -1) if self.window is None else (self.window, self.window)
            bounds, longest = tokens.bounds(), tokens.longest
            seen: torch.Tensor = kernel(q, k, v, bounds, bounds, longest, longest, window_size=reach)
            return seen.reshape(-1, width)
        torch_ = require("torch", "torch")
        parts = [self._run(q, k, v, run, tokens).reshape(-1, width) for run in tokens.runs]
        return parts[0] if len(parts) == 1 else torch_.cat(parts)

    def _run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, run: Run, tokens: Tokens) -> torch.Tensor:
        own = slice(run.start, run.start + run.texts * run.length)
        shape = (run.texts, run.length, self.heads, q.shape[-1])
        three = [part[own].reshape(shape).transpose(1, 2) for part in (q, k, v)]
        mask = self._mask(run.length, tokens, q.device)
        functional = require("torch.nn.functional", "torch")
        seen: torch.Tensor = functional.scaled_dot_product_attention(*three, attn_mask=mask)
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


def _variable_length_kernel(qkv: torch.Tensor) -> Any:
    """Torch's attention over texts of any length in one call: on CUDA in half precision, where this torch has it."""
    if qkv.device.type != "cuda" or str(qkv.dtype) not in ("torch.bfloat16", "torch.float16"):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


Layer: TypeAlias = "Callable[[torch.Tensor, Tokens], torch.Tensor]"
"""From the states `[tokens, d]` of texts to the next; may overwrite the former."""


@dataclass(frozen=True)
class PostNormLayer:
    """Of BERT and its kin: attention, then a feed-forward part, each normalised after it was added."""

    qkv: Linear
    attention: Attention
    out: Linear
    norm1: Any
    up: Linear
    down: Linear
    norm2: Any

    def __call__(self, x: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Compute it."""
        x = self.norm1(self.out(self.attention(self.qkv(x), tokens)).add_(x))
        found: torch.Tensor = self.norm2(self.down(self.up(x)).add_(x))
        return found


@dataclass(frozen=True)
class PreNormGatedLayer:
    """Of ModernBERT: normalised before attention and before a gated feed-forward part."""

    norm1: Any
    qkv: Linear
    attention: Attention
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


@dataclass(frozen=True)
class Parts:
    """A network in parts.

    Attributes:
        embed: From tokens to states `[tokens, d]`.
        layers: One after the other.
        finish: Of the last states; None for nothing.
        window: The furthest that a layer with a window sees, so that it can be checked; 0 where there is none.
    """

    embed: Callable[[Tokens], torch.Tensor]
    layers: Sequence[Layer]
    finish: Callable[[Any], Any] | None = None
    window: int = 0


def _embedder(words: torch.Tensor, places: torch.Tensor, norm: Any, padding: int | None = None) -> Any:
    """The sum of a token's own and its place's embedding; with a padding id, places are counted from after it."""
    functional = require("torch.nn.functional", "torch")
    words, places = words.detach(), places.detach()

    def embed(tokens: Tokens) -> Any:
        x = functional.embedding(tokens.ids, words)
        where = tokens.places if padding is None else _places_after(tokens, padding)
        return norm(x + functional.embedding(where, places))

    return embed


def _places_after(tokens: Tokens, padding: int) -> torch.Tensor:
    """Places as RoBERTa counts them: from `padding` + 1; a padding token inside a text has the place `padding`."""
    real = tokens.ids != padding
    if bool(real.all()):
        return tokens.places + padding + 1
    torch_ = require("torch", "torch")
    counted = real.cumsum(0)
    before = torch_.repeat_interleave((counted - real.long())[tokens.bounds()[:-1].long()], tokens.lengths)
    found: torch.Tensor = torch_.where(real, counted - before + padding, padding)
    return found


def _bert(network: Any, config: Any) -> Parts:
    """BERT, RoBERTa and XLM-RoBERTa: the same parts, but RoBERTa counts places from after the padding's."""
    if getattr(config, "position_embedding_type", "absolute") != "absolute" or getattr(config, "is_decoder", False):
        raise TypeError("only absolute places, and no decoder")
    own = network.embeddings
    padding = getattr(own, "padding_idx", None) if "roberta" in config.model_type else None
    attention = Attention(int(config.num_attention_heads))
    layers = []
    for layer in network.encoder.layer:
        inner, out = layer.attention.self, layer.attention.output
        layers.append(
            PostNormLayer(
                Linear.joined((inner.query, inner.key, inner.value)),
                attention,
                Linear.of(out.dense),
                out.LayerNorm,
                Linear.of(layer.intermediate.dense, layer.intermediate.intermediate_act_fn),
                Linear.of(layer.output.dense),
                layer.output.LayerNorm,
            )
        )
    places = own.position_embeddings.weight + own.token_type_embeddings.weight[0]
    after = None if padding is None else int(padding)
    return Parts(_embedder(own.word_embeddings.weight, places, own.LayerNorm, after), layers)


def _distilbert(network: Any, config: Any) -> Parts:
    own, attention = network.embeddings, Attention(int(config.n_heads))
    layers = [
        PostNormLayer(
            Linear.joined((layer.attention.q_lin, layer.attention.k_lin, layer.attention.v_lin)),
            attention,
            Linear.of(layer.attention.out_lin),
            layer.sa_layer_norm,
            Linear.of(layer.ffn.lin1, layer.ffn.activation),
            Linear.of(layer.ffn.lin2),
            layer.output_layer_norm,
        )
        for layer in network.transformer.layer
    ]
    return Parts(_embedder(own.word_embeddings.weight, own.position_embeddings.weight, own.LayerNorm), layers)


def _modernbert(network: Any, config: Any) -> Parts | None:
    """ModernBERT: rotated queries and keys, and a window in most layers."""
    if not hasattr(config, "layer_types") or not hasattr(config, "sliding_window"):
        return None  # this version of transformers lays it out otherwise
    own, functional = network.embeddings, require("torch.nn.functional", "torch")
    words = own.tok_embeddings.weight.detach()
    heads, far = int(config.num_attention_heads), int(config.sliding_window)
    kinds = {
        kind: Attention(heads, far if kind == "sliding_attention" else None, _rotation(network.rotary_emb, kind))
        for kind in set(config.layer_types)
    }
    layers = [
        PreNormGatedLayer(
            layer.attn_norm,
            Linear.of(layer.attn.Wqkv),
            kinds[layer.attention_type],
            Linear.of(layer.attn.Wo),
            layer.mlp_norm,
            Linear.of(layer.mlp.Wi),
            layer.mlp.act,
            Linear.of(layer.mlp.Wo),
        )
        for layer in network.layers
    ]

    def embed(tokens: Tokens) -> Any:
        return own.norm(functional.embedding(tokens.ids, words))

    return Parts(embed, layers, network.final_norm, far)


def _rotation(rotary: Any, kind: str) -> Rotation:
    torch_ = require("torch", "torch")

    def rotate(x: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        key = ("rotation", kind)
        if key not in tokens.kept:
            cos, sin = rotary(x, tokens.places[None], kind)
            tokens.kept[key] = (cos[0][:, None].float(), sin[0][:, None].float())
        cos, sin = tokens.kept[key]
        y = x.float()
        first, second = y.chunk(2, dim=-1)
        turned: torch.Tensor = (y * cos + torch_.cat((-second, first), dim=-1) * sin).to(x.dtype)
        return turned

    return rotate


ARCHITECTURES: dict[str, Callable[[Any, Any], Parts | None]] = {
    "bert": _bert,
    "roberta": _bert,
    "xlm-roberta": _bert,
    "distilbert": _distilbert,
    "modernbert": _modernbert,
}
"""By transformers' name of the architecture; None where this version of it lays one out otherwise."""
