"""2-simplicial attention."""

from typing import Any

from torch import Tensor, nn

from kernels.simplicial_attention import WINDOWS, simplicial_attention
from models.attention import SelfAttention


class TwoSimplicialAttention(SelfAttention):
    """In every fourth layer attention to pairs of tokens, in the others plain attention.

    A query's logits for the pair (j, k) are (1/√d)·Σ qᵢ·kⱼ·k′ₖ, softmax is over all pairs of two
    sliding windows, and the output is the weighted sum of vⱼ ∘ v′ₖ. Keys k′ and values v′ have
    projections of their own, and the authors' code's biases 1/d and 1.

    Rotary positions are left out of the layers with pairs: the trilinear form is not invariant
    under rotation, and the authors' kernels take none.

    Args:
        dim, heads, layer, kv_heads, bias: as in `SelfAttention`.
        every: layers `every` − 1, 2·`every` − 1, ... have pairs; 4.
        windows: of j and of k, in tokens; 512 and 32.
        keys: as in `SelfAttention`; causal only.

    Raises:
        ValueError: for `every` below 1, attention that is not causal, or a position module with a
            bias, which pairs do not have.

    Source: "Fast and Simplex: 2-Simplicial Attention in Triton", arXiv 2507.02754;
    https://github.com/pytorch/FBGEMM, `fbgemm_gpu/experimental/simplicial_attention/simplicial/`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        layer: int,
        *,
        every: int = 4,
        windows: tuple[int, int] = WINDOWS,
        **keys: Any,
    ) -> None:
        super().__init__(dim, heads, layer, **keys)
        if every < 1:
            raise ValueError(f"every: must be at least 1, got {every}")
        self.windows = (windows[0], windows[1])
        self.second: nn.Linear | None = None
        if (layer + 1) % every == 0:
            if not self.causal:
                raise ValueError("model.attention: two_simplicial_attention is causal only")
            size = 2 * self.kv_heads * self.head_dim
            self.second = nn.Linear(dim, size, bias=self.qkv.bias is not None)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, position: Any = None
    ) -> Tensor:
        if self.second is None:
            return super().forward(x, attention_mask, position)
        if hasattr(position, "bias"):
            raise ValueError(
                f"model.position: pairs of tokens have no bias as {type(position).__name__}'s"
            )
        q, k1, v1 = self.project(x)
        pair = self.second(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        k2, v2 = pair.chunk(2, dim=1)
        out = simplicial_attention(
            q,
            k1,
            k2,
            v1,
            v2,
            windows=self.windows,
            key_padding_mask=None if attention_mask is None else ~attention_mask.bool(),
        )
        return self.merge(out)
