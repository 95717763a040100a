"""Attention whose queries and keys are normalised."""

from typing import Any

from torch import Tensor, nn

from models.attention import SelfAttention


class QKNormAttention(SelfAttention):
    """`softmax(LN(q)·LN(k)ᵀ/√d)·v`, so that logits cannot grow with the projections: LayerNorm over
    each head's d features, with a learned scale and no bias, one for queries and one for keys;
    after the rotation where positions rotate.

    Arguments and shapes are those of `SelfAttention`.

    Source: "Scaling Vision Transformers to 22 Billion Parameters", arXiv 2302.05442, equation 1, as
    in "Small-scale proxies for large-scale Transformer training instabilities", arXiv 2309.14322.
    """

    def __init__(self, dim: int, heads: int, layer: int, **keys: Any) -> None:
        super().__init__(dim, heads, layer, **keys)
        self.query_norm = nn.LayerNorm(self.head_dim, bias=False)
        self.key_norm = nn.LayerNorm(self.head_dim, bias=False)

    def project(self, x: Tensor, position: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        """Those of `SelfAttention`, normalised."""
        q, k, v = super().project(x, position)
        return self.query_norm(q), self.key_norm(k), v
