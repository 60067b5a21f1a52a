"""PackedEncoder: BERT-like encoders on the CPU without padding, with weights laid out for the matrix library.

Tokens of all texts of a batch stand one after the other, so that nothing is computed for padding; texts of one length
share an attention call. Products go through oneDNN with weights that are reordered once; by torch's own product where
that is not there. An architecture that is not known here, or an encoder whose results differ from the library's own, is
computed by transformers as ever.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from langchain_datashunt._extras import require
from langchain_datashunt.exceptions import ConfigurationError, ShuntWarning
from langchain_datashunt.small_models.tokenization import pad

if TYPE_CHECKING:
    import torch

Engine: TypeAlias = Literal["auto", "packed", "plain"]
"""What computes an encoder."""

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}
"""How far a state of the packed encoder may be from the library's own, relative to the largest, by number format."""

_PACKING_ROWS = 1024
_PROBE_LENGTHS = (3, 7, 7, 12)


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
        torch = require("torch", "torch")
        owner = torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths)
        total = torch.zeros(len(self.lengths), self.states.shape[1]).index_add_(0, owner, self.states.float())
        return total / self.lengths[:, None]  # type: ignore[no-any-return]


class _Linear:
    """A linear layer with its weight reordered for oneDNN, where torch can do that; with GELU after it if so asked."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor, activation: Callable[[Any], Any] | None = None
    ) -> None:
        own: Any = require("torch", "torch")
        self.weight, self.bias, self.activation = weight.contiguous(), bias.contiguous(), activation
        self.fused = isinstance(activation, own.nn.Module) and type(activation).__name__ == "GELUActivation"
        self.packed: Any = None
        try:
            self.packed = own.ops.mkldnn._reorder_linear_weight(self.weight, _PACKING_ROWS)
            self._product: Any = own.ops.mkldnn._linear_pointwise
        except (AttributeError, RuntimeError):
            self.packed = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed is not None:
            after, algorithm = ("gelu", "none") if self.fused else ("none", "")
            found: torch.Tensor = self._product(x, self.packed, self.bias, after, [], algorithm)
            return found if self.fused or self.activation is None else self.activation(found)
        plain: torch.Tensor = require("torch.nn.functional", "torch").linear(x, self.weight, self.bias)
        return plain if self.activation is None else self.activation(plain)


@dataclass(frozen=True)
class _Layer:
    qkv: _Linear
    out: _Linear
    norm1: torch.nn.LayerNorm
    up: _Linear
    down: _Linear
    norm2: torch.nn.LayerNorm


@dataclass(frozen=True)
class _Parts:
    """What an architecture calls its parts."""

    words: torch.Tensor
    places: torch.Tensor
    first_place: int
    norm: torch.nn.LayerNorm
    layers: list[Any]
    heads: int


class PackedEncoder:
    """The packed form of a transformers encoder; made by `packed`."""

    def __init__(self, parts: _Parts, dtype: torch.dtype) -> None:
        self.parts, self.dtype = parts, dtype
        self.layers: list[_Layer] = parts.layers

    def __call__(self, ids: Sequence[Sequence[int]]) -> PackedStates:
        """States of texts, given as token ids, in their order; quickest where texts of one length stand together."""
        torch, functional = require("torch", "torch"), require("torch.nn.functional", "torch")
        lengths = np.fromiter((len(one) for one in ids), dtype=np.int64, count=len(ids))
        starts = lengths.cumsum() - lengths
        flat = np.fromiter((token for one in ids for token in one), dtype=np.int64, count=int(lengths.sum()))
        places = np.arange(len(flat)) - np.repeat(starts, lengths) + self.parts.first_place
        runs = _runs(lengths)
        with torch.inference_mode():
            x = functional.embedding(torch.from_numpy(flat), self.parts.words)
            x = x + functional.embedding(torch.from_numpy(places), self.parts.places)
            x = self.parts.norm(x)
            for layer in self.layers:
                mixed = self._attention(layer.qkv(x), runs, functional)
                x = layer.norm1(layer.out(mixed).add_(x))
                x = layer.norm2(layer.down(layer.up(x)).add_(x))
        return PackedStates(x, torch.from_numpy(lengths))

    def _attention(self, qkv: torch.Tensor, runs: list[tuple[int, int, int]], functional: Any) -> torch.Tensor:
        heads, width = self.parts.heads, qkv.shape[1] // 3
        parts = []
        for start, texts, length in runs:
            own = qkv[start : start + texts * length].view(texts, length, 3, heads, width // heads)
            q, k, v = own.permute(2, 0, 3, 1, 4).unbind(0)
            seen = functional.scaled_dot_product_attention(q, k, v)
            parts.append(seen.transpose(1, 2).reshape(-1, width))
        joined: torch.Tensor = parts[0] if len(parts) == 1 else require("torch", "torch").cat(parts)
        return joined


class Packing:
    """The packed form of one network, made when it is first needed, and anew when the network's weights have changed.

    Args:
        engine: "plain" never packs, "packed" insists, "auto" packs where it can be had.
    """

    def __init__(self, engine: Engine = "auto") -> None:
        if engine not in ("auto", "packed", "plain"):
            raise ConfigurationError(f"There is no engine {engine!r}; use 'auto', 'packed' or 'plain'.")
        self.engine: Engine = engine
        self._made: PackedEncoder | None = None
        self._stamp: tuple[int, ...] | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Without what was made, which no pickle holds; copies make their own."""
        return Packing, (self.engine,)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Packing:
        return Packing(self.engine)

    def of(self, network: torch.nn.Module) -> PackedEncoder | None:
        """The packed form, None where transformers is to compute.

        Raises:
            ConfigurationError: The engine is "packed", and this network has no packed form.
        """
        if self.engine == "plain":
            return None
        stamp = (id(network), *(part for one in network.parameters() for part in (one.data_ptr(), _version(one))))
        if stamp != self._stamp:
            with self._lock:
                if stamp != self._stamp:
                    self._made = packed(network)
                    self._stamp = stamp
        if self._made is None and self.engine == "packed":
            raise ConfigurationError(
                f"The architecture {getattr(network.config, 'model_type', '?')!r} has no packed form here, or runs on "
                f"no CPU; use engine='auto'. There are: {', '.join(_ARCHITECTURES)}."
            )
        return self._made


def packed(network: torch.nn.Module) -> PackedEncoder | None:
    """The packed form of an encoder that transformers made, None where it cannot be had.

    It is had for BERT, RoBERTa, XLM-RoBERTa and DistilBERT on the CPU, after its states were compared with the
    library's own. That it is not had for another architecture is no failure; that results differ is a warning.
    """
    kind = str(getattr(network.config, "model_type", ""))
    if kind not in _ARCHITECTURES or next(network.parameters()).device.type != "cpu" or network.training:
        return None
    dtype = next(network.parameters()).dtype
    try:
        made = PackedEncoder(_ARCHITECTURES[kind](network, network.config), dtype)
        far = _difference(network, made)
    except (AttributeError, RuntimeError, TypeError) as error:
        warnings.warn(f"The packed form of {kind} cannot be made ({error}); transformers computes it.", ShuntWarning, 2)
        return None
    if not far <= TOLERANCE[str(dtype).removeprefix("torch.")]:
        told = f"The packed form of {kind} differs from transformers by {far:.2g}; transformers computes it."
        warnings.warn(told, ShuntWarning, 2)
        return None
    return made


def _difference(network: torch.nn.Module, made: PackedEncoder) -> float:
    """The largest difference of a state on made-up tokens, relative to the largest state."""
    torch, config = require("torch", "torch"), network.config
    rng, size = np.random.default_rng(0), int(getattr(config, "vocab_size", 2))
    ids = [rng.integers(0, size, length).tolist() for length in _PROBE_LENGTHS]
    with torch.inference_mode():
        tokens, mask = pad(ids, 0, "cpu")
        states = network(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
        own = torch.cat([states[i, : len(one)] for i, one in enumerate(ids)])
        found = (made(ids).states.float() - own).abs().max() / own.abs().max()
    return float(found)


def _version(parameter: torch.Tensor) -> int:
    """How often a parameter was written to; those made in inference mode do not count."""
    return 0 if parameter.is_inference() else parameter._version


def _runs(lengths: np.ndarray[Any, np.dtype[np.int64]]) -> list[tuple[int, int, int]]:
    """Texts of one length that stand together: first token, how many texts, their length."""
    edges = np.flatnonzero(np.diff(lengths)) + 1
    first = np.concatenate([[0], edges])
    count = np.diff(np.concatenate([first, [len(lengths)]]))
    starts = lengths.cumsum() - lengths
    return [(int(starts[i]), int(n), int(lengths[i])) for i, n in zip(first.tolist(), count.tolist(), strict=True) if n]


def _bert(network: Any, config: Any) -> _Parts:
    """BERT, RoBERTa and XLM-RoBERTa: the same parts, but RoBERTa counts places from after the padding's."""
    if getattr(config, "position_embedding_type", "absolute") != "absolute" or getattr(config, "is_decoder", False):
        raise TypeError("only absolute places, and no decoder")
    embeddings, torch = network.embeddings, require("torch", "torch")
    padding = getattr(embeddings, "padding_idx", None) if "roberta" in config.model_type else None
    layers = []
    for layer in network.encoder.layer:
        own, out = layer.attention.self, layer.attention.output
        three = (own.query, own.key, own.value)
        layers.append(
            _Layer(
                _Linear(torch.cat([one.weight for one in three]).detach(), torch.cat([o.bias for o in three]).detach()),
                _Linear(out.dense.weight.detach(), out.dense.bias.detach()),
                out.LayerNorm,
                _linear_with(layer.intermediate.dense, layer.intermediate.intermediate_act_fn),
                _Linear(layer.output.dense.weight.detach(), layer.output.dense.bias.detach()),
                layer.output.LayerNorm,
            )
        )
    return _Parts(
        embeddings.word_embeddings.weight.detach(),
        (embeddings.position_embeddings.weight + embeddings.token_type_embeddings.weight[0]).detach(),
        0 if padding is None else int(padding) + 1,
        embeddings.LayerNorm,
        layers,
        int(config.num_attention_heads),
    )


def _distilbert(network: Any, config: Any) -> _Parts:
    torch = require("torch", "torch")
    layers = []
    for layer in network.transformer.layer:
        own = layer.attention
        three = (own.q_lin, own.k_lin, own.v_lin)
        layers.append(
            _Layer(
                _Linear(torch.cat([one.weight for one in three]).detach(), torch.cat([o.bias for o in three]).detach()),
                _Linear(own.out_lin.weight.detach(), own.out_lin.bias.detach()),
                layer.sa_layer_norm,
                _linear_with(layer.ffn.lin1, layer.ffn.activation),
                _Linear(layer.ffn.lin2.weight.detach(), layer.ffn.lin2.bias.detach()),
                layer.output_layer_norm,
            )
        )
    embeddings = network.embeddings
    words, places = embeddings.word_embeddings.weight.detach(), embeddings.position_embeddings.weight.detach()
    return _Parts(words, places, 0, embeddings.LayerNorm, layers, int(config.n_heads))


def _linear_with(dense: Any, activation: Any) -> _Linear:
    return _Linear(dense.weight.detach(), dense.bias.detach(), activation)


_ARCHITECTURES: dict[str, Callable[[Any, Any], _Parts]] = {
    "bert": _bert,
    "roberta": _bert,
    "xlm-roberta": _bert,
    "distilbert": _distilbert,
}
"""By transformers' name of the architecture; a new one is one function and one line."""
