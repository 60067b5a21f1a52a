"""Disentangled attention of DeBERTa without padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from langchain_datashunt._utils.optional import require
from langchain_datashunt.small_models.engine.layers import Run, Tokens

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DisentangledAttention:
    """Attention by content and by relative position (He et al. 2021, eq. 4).

    The projections of relative positions depend on the weights alone, so they are computed once and not per batch.

    Attributes:
        heads: Number of heads.
        span: Number of distinct relative positions to either side.
        buckets: Number of buckets of relative positions, logarithmic for distant ones; 0 disables bucketing.
        furthest: Largest relative position of the logarithmic scale, in tokens.
        place_keys: Keys of the content-to-position scores, shape `[heads, width, 2 * span]`, or None if unused.
        place_queries: Queries of the position-to-content scores, shape `[heads, width, 2 * span]`, or None if unused.
    """

    heads: int
    span: int
    buckets: int
    furthest: int
    place_keys: torch.Tensor | None
    place_queries: torch.Tensor | None

    @classmethod
    def from_attention(cls, own: Any, relative: torch.Tensor, dtype: torch.dtype) -> Self:
        """Create the attention of one transformers layer.

        Args:
            own: Attention module of the layer.
            relative: Embeddings of relative positions, shape `[2 * span, d]`.
            dtype: Dtype of the queries and keys.
        """
        heads, span = int(own.num_attention_heads), int(own.pos_ebd_size)
        shared = own.share_att_key

        def projected(layer: Any) -> torch.Tensor:
            with require("torch", "torch").inference_mode():
                found: torch.Tensor = layer(relative[: 2 * span]).view(2 * span, heads, -1).permute(1, 2, 0)
            return found.to(dtype).contiguous()

        keys = projected(own.key_proj if shared else own.pos_key_proj) if "c2p" in own.pos_att_type else None
        queries = projected(own.query_proj if shared else own.pos_query_proj) if "p2c" in own.pos_att_type else None
        return cls(heads, span, max(0, int(own.position_buckets)), int(own.max_relative_positions), keys, queries)

    def __call__(self, qkv: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Compute attention from concatenated queries, keys and values.

        Args:
            qkv: Queries, keys and values, shape `[tokens, 3 * d]`.
            tokens: Tokens of the batch.

        Returns:
            Attention output, shape `[tokens, d]`.
        """
        width = qkv.shape[1] // 3
        parts = [self._run(qkv, run, tokens).reshape(-1, width) for run in tokens.runs]
        return parts[0] if len(parts) == 1 else require("torch", "torch").cat(parts)

    def _run(self, qkv: torch.Tensor, run: Run, tokens: Tokens) -> torch.Tensor:
        own = qkv[run.start : run.start + run.texts * run.length]
        q, k, v = own.view(run.texts, run.length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each [texts, heads, ...]
        scale = (q.shape[-1] * (1 + (self.place_keys is not None) + (self.place_queries is not None))) ** -0.5
        bias = 0.0
        shape = (run.texts, self.heads, run.length, run.length)
        if self.place_keys is not None:
            index = self._index(run.length, tokens, "c2p", qkv.device).expand(shape)
            bias = (q @ self.place_keys).gather(-1, index)
        if self.place_queries is not None:
            index = self._index(run.length, tokens, "p2c", qkv.device).expand(shape)
            bias = bias + (k @ self.place_queries).gather(-1, index).transpose(-1, -2)
        mask = bias * scale if hasattr(bias, "shape") else None
        functional = require("torch.nn.functional", "torch")
        seen: torch.Tensor = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return seen.transpose(1, 2)

    def _index(self, length: int, tokens: Tokens, kind: str, device: torch.device) -> torch.Tensor:
        """Return the index of the relative position of each pair of tokens, shape `[length, length]`.

        The index is computed once per batch, length and kind.
        """
        key = ("relative", kind, self.span, self.buckets, self.furthest, length)
        if key not in tokens.kept:
            torch_ = require("torch", "torch")
            places = torch_.arange(length, device=device)
            between = places[:, None] - places[None]
            if self.buckets > 0 and self.furthest > 0:
                between = self._in_buckets(between)
            index = (between if kind == "c2p" else -between) + self.span
            tokens.kept[key] = index.clamp(0, 2 * self.span - 1)
        found: torch.Tensor = tokens.kept[key]
        return found

    def _in_buckets(self, between: torch.Tensor) -> torch.Tensor:
        """Keep small relative positions and map larger ones to a logarithmic scale."""
        torch_ = require("torch", "torch")
        half = self.buckets // 2
        far = between.abs().clamp(min=half).float()
        widest = float(torch_.log(torch_.tensor((self.furthest - 1) / half)))  # a tensor, to round as transformers does
        steps = torch_.ceil(torch_.log(far / half) / widest * (half - 1)) + half
        found: torch.Tensor = torch_.where(between.abs() <= half, between, (steps * between.sign()).long())
        return found
