"""Self-attention, for the `model.attention` slot."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Multi-head softmax self-attention. A technique overrides `attend`.

    Args:
        dim: features per token.
        heads: attention heads; must divide `dim`.
        layer: index of the block this layer sits in, for techniques that depend on depth.
        causal: whether a token sees only itself and earlier tokens.
        kv_heads: heads of keys and values (grouped-query attention); default `heads`.
        bias: whether the projections have biases.

    Shapes: `(batch, length, dim) -> (batch, length, dim)`.

    Raises:
        ValueError: when `heads` does not divide `dim`, or `kv_heads` does not divide `heads`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        layer: int,
        *,
        causal: bool = True,
        kv_heads: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        kv_heads = kv_heads or heads
        if dim % heads:
            raise ValueError(f"heads: must divide the width {dim}, got {heads}")
        if heads % kv_heads:
            raise ValueError(f"kv_heads: must divide heads {heads}, got {kv_heads}")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.layer, self.causal = layer, causal
        self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * self.head_dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, position: Any = None
    ) -> Tensor:
        q, k, v = self.project(x, position)
        return self.merge(self.attend(q, k, v, score_bias(q, attention_mask, position)))

    def project(self, x: Tensor, position: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, `(batch, heads, length, head_dim)` and with `kv_heads`."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        if hasattr(position, "rotate"):
            q, k = position.rotate(q, k)
        return q, k, v

    def merge(self, attended: Tensor) -> Tensor:
        """What the heads attended to, as the layer's output."""
        return self.out(attended.transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """Mix the values: `(batch, heads, length, head_dim)` in and out.

        `k` and `v` have `kv_heads` heads. `bias` is added to the scores, broadcast to
        `(batch, heads, length, length)`; −inf hides a key. Causality is `self.causal`.
        """
        if bias is not None and self.causal:
            bias = bias + causal_bias(q)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, is_causal=self.causal and bias is None, enable_gqa=self.grouped
        )

    @property
    def grouped(self) -> bool:
        """Whether several query heads share one key and value head."""
        return self.kv_heads != self.heads


def causal_bias(q: Tensor) -> Tensor:
    """`(length, length)` with −inf where the key comes after the query, 0 elsewhere."""
    length = q.shape[-2]
    return torch.full((length, length), -torch.inf, dtype=q.dtype, device=q.device).triu(1)


def score_bias(q: Tensor, attention_mask: Tensor | None, position: Any) -> Tensor | None:
    """The additive score bias from a padding mask `(batch, length)` and the position module."""
    bias = None
    if hasattr(position, "bias"):
        bias = position.bias(q.shape[-2]).to(q.dtype)
    if attention_mask is not None:
        hidden = torch.zeros_like(attention_mask, dtype=q.dtype)
        hidden = hidden.masked_fill(~attention_mask.bool(), -torch.inf)[:, None, None, :]
        bias = hidden if bias is None else bias + hidden
    return bias
