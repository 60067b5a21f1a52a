"""Architectures that the padding-free encoder supports.

One function per architecture takes a transformers network, its configuration and a `Products` factory, and returns the
network as `Parts`. Register a new architecture in `ARCHITECTURES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from langchain_datashunt._utils.optional import require
from langchain_datashunt.small_models.engine.attention import Attention, Rotation
from langchain_datashunt.small_models.engine.deberta import DisentangledAttention
from langchain_datashunt.small_models.engine.layers import (
    Layer,
    PostNormLayer,
    PreNormGatedLayer,
    Products,
    Tokens,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Parts:
    """Parts of a network that the padding-free encoder runs in order.

    Attributes:
        embed: Function from tokens to states of shape `[tokens, d]`.
        layers: Layers in order.
        finish: Function applied to the last states, or None.
        window: Distance in tokens beyond which attention works differently, 0 if it never does. The self-check
            includes a longer text to cover both cases.
    """

    embed: Callable[[Tokens], torch.Tensor]
    layers: Sequence[Layer]
    finish: Callable[[Any], Any] | None = None
    window: int = 0


def _embedder(words: torch.Tensor, places: torch.Tensor, norm: Any, padding: int | None = None) -> Any:
    """Return a function that sums token and position embeddings and normalizes them.

    With `padding`, positions are counted from `padding` + 1, as RoBERTa does.
    """
    functional = require("torch.nn.functional", "torch")
    words, places = words.detach(), places.detach()

    def embed(tokens: Tokens) -> Any:
        x = functional.embedding(tokens.ids, words)
        where = tokens.places if padding is None else _places_after(tokens, padding)
        return norm(x + functional.embedding(where, places))

    return embed


def _places_after(tokens: Tokens, padding: int) -> torch.Tensor:
    """Return positions as RoBERTa counts them, from `padding` + 1. Padding tokens inside a text get `padding`."""
    if not tokens.may_contain(padding):
        return tokens.places + padding + 1
    torch_ = require("torch", "torch")
    real = tokens.ids != padding
    counted = real.cumsum(0)
    first = (
        torch_.arange(len(real), device=real.device) - tokens.places
    )  # index of the first token of each token's text
    before = (counted - real.long())[first]
    found: torch.Tensor = torch_.where(real, counted - before + padding, padding)
    return found


def _bert(network: Any, config: Any, products: Products) -> Parts:
    """Return the parts of BERT, RoBERTa or XLM-RoBERTa, which differ only in how they count positions."""
    if getattr(config, "position_embedding_type", "absolute") != "absolute" or getattr(config, "is_decoder", False):
        raise TypeError("Expected an encoder with absolute position embeddings, got a decoder or relative positions.")
    own = network.embeddings
    padding = getattr(own, "padding_idx", None) if "roberta" in config.model_type else None
    attention = Attention(int(config.num_attention_heads))
    layers = []
    for layer in network.encoder.layer:
        inner, out = layer.attention.self, layer.attention.output
        layers.append(
            PostNormLayer(
                products.joined((inner.query, inner.key, inner.value)),
                attention,
                products.pack(out.dense),
                out.LayerNorm,
                products.pack(layer.intermediate.dense, layer.intermediate.intermediate_act_fn),
                products.pack(layer.output.dense),
                layer.output.LayerNorm,
            )
        )
    places = own.position_embeddings.weight + own.token_type_embeddings.weight[0]
    after = None if padding is None else int(padding)
    return Parts(_embedder(own.word_embeddings.weight, places, own.LayerNorm, after), layers)


def _distilbert(network: Any, config: Any, products: Products) -> Parts:
    own, attention = network.embeddings, Attention(int(config.n_heads))
    layers = [
        PostNormLayer(
            products.joined((layer.attention.q_lin, layer.attention.k_lin, layer.attention.v_lin)),
            attention,
            products.pack(layer.attention.out_lin),
            layer.sa_layer_norm,
            products.pack(layer.ffn.lin1, layer.ffn.activation),
            products.pack(layer.ffn.lin2),
            layer.output_layer_norm,
        )
        for layer in network.transformer.layer
    ]
    return Parts(_embedder(own.word_embeddings.weight, own.position_embeddings.weight, own.LayerNorm), layers)


def _modernbert(network: Any, config: Any, products: Products) -> Parts | None:
    """Return the parts of ModernBERT, with rotary positions and sliding-window attention in most layers."""
    if not hasattr(config, "layer_types") or not hasattr(config, "sliding_window"):
        return None  # this version of transformers has a different ModernBERT implementation
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
            products.pack(layer.attn.Wqkv),
            kinds[layer.attention_type],
            products.pack(layer.attn.Wo),
            layer.mlp_norm,
            products.pack(layer.mlp.Wi),
            layer.mlp.act,
            products.pack(layer.mlp.Wo),
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


def _deberta(network: Any, config: Any, products: Products) -> Parts | None:
    """Return the parts of DeBERTa v2 or v3, or None if it has absolute attention only or a convolution layer."""
    if not config.relative_attention or network.encoder.conv is not None:
        return None
    relative = network.encoder.get_rel_embedding().detach()
    layers = [
        PostNormLayer(
            products.joined((own.query_proj, own.key_proj, own.value_proj)),
            DisentangledAttention.from_attention(own, relative, products.dtype),
            products.pack(layer.attention.output.dense),
            layer.attention.output.LayerNorm,
            products.pack(layer.intermediate.dense, layer.intermediate.intermediate_act_fn),
            products.pack(layer.output.dense),
            layer.output.LayerNorm,
        )
        for layer in network.encoder.layer
        for own in (layer.attention.self,)
    ]
    own, functional = network.embeddings, require("torch.nn.functional", "torch")
    words = own.word_embeddings.weight.detach()
    places = None if own.position_embeddings is None else own.position_embeddings.weight.detach()
    kinds = None if own.token_type_embeddings is None else own.token_type_embeddings.weight[0].detach()

    def embed(tokens: Tokens) -> Any:
        x = functional.embedding(tokens.ids, words)
        if places is not None:
            x = x + functional.embedding(tokens.places, places)
        if kinds is not None:
            x = x + kinds
        return own.LayerNorm(x if own.embed_proj is None else own.embed_proj(x))

    return Parts(embed, layers, window=max(0, int(getattr(config, "position_buckets", 0))) // 2)


ARCHITECTURES: dict[str, Callable[[Any, Any, Products], Parts | None]] = {
    "bert": _bert,
    "roberta": _bert,
    "xlm-roberta": _bert,
    "distilbert": _distilbert,
    "modernbert": _modernbert,
    "deberta-v2": _deberta,
}
"""Functions by transformers `model_type`. A function returns None if it does not support the given network."""
