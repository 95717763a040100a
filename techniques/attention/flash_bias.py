"""FlashBias attention."""

from typing import Any

from torch import Tensor

from kernels.entropy_attention import entropy_attention
from models.attention import SelfAttention


class FlashBiasAttention(SelfAttention):
    """Softmax attention whose position bias stays in its low-rank factors.

    With the bias B = Φ_q·Φ_kᵀ of rank r, softmax(QKᵀ/√d + B) is softmax([Q, √d·Φ_q][K, Φ_k]ᵀ/√d):
    the bias is a few more features of queries and keys, and the (heads, length, length) matrix is
    never made. For the position modules that have `factors`, such as ALiBi, this is exact.

    The paper's truncated SVD of learned biases and its networks that factor data-dependent ones are
    not here.

    For the arguments see `SelfAttention`.

    Raises:
        ValueError: for a position module with a bias but without factors, or attention that is not
            causal (ALiBi's distance |i − j| has a low rank on one side only).

    Source: "FlashBias: Fast Computation of Attention with Bias", arXiv 2505.12044;
    https://github.com/thuml/FlashBias, `1_Language_Model/attention_with_alibi_bias.py`.
    """

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, position: Any = None
    ) -> Tensor:
        q, k, v = self.project(x, position)
        out, _ = entropy_attention(
            q,
            k,
            v,
            causal=self.causal,
            bias_factors=self._factors(q, position),
            key_padding_mask=None if attention_mask is None else ~attention_mask.bool(),
        )
        return self.merge(out)

    def _factors(self, q: Tensor, position: Any) -> tuple[Tensor, Tensor] | None:
        if not hasattr(position, "bias"):
            return None
        if not hasattr(position, "factors"):
            raise ValueError(
                "model.attention: flash_bias needs a position module with low-rank factors, such "
                f"as ALiBi; {type(position).__name__} has none"
            )
        if not self.causal:
            raise ValueError("model.attention: flash_bias needs causal attention")
        ours, theirs = position.factors(q.shape[-2])
        return ours.to(q.dtype), theirs.to(q.dtype)
