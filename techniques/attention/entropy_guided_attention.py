"""Entropy-guided attention."""

from typing import Any

import torch
from torch import Tensor, nn

from kernels.entropy_attention import entropy_attention
from models.attention import SelfAttention


class EntropyGuidedAttention(SelfAttention):
    """Softmax attention that keeps the entropy of each row's weights, with a learned temperature
    and a learned entropy threshold for each head.

    `entropy` (batch, heads, length) is of the last forward, in nats, and differentiable; attention
    matrices are never stored. `threshold` (heads,), as a fraction of the largest possible entropy,
    is for `techniques.penalty.entropy_guided_attention`. `temperature` (heads,) divides the scores.

    Args:
        dim, heads, layer, causal, kv_heads, bias: as in `SelfAttention`.
        threshold: where the thresholds start. 0.5 is ours: the released code leaves it to the
            model, and the paper's text was not at hand.

    Raises:
        ValueError: for a threshold outside (0, 1), or sizes that do not fit.

    Source: "Entropy-Guided Attention for Private LLMs", arXiv 2501.03489;
    https://github.com/Nandan91/entropy-guided-attention-llm, `entropy_regularization.py`.
    """

    def __init__(
        self, dim: int, heads: int, layer: int, *, threshold: float = 0.5, **keys: Any
    ) -> None:
        super().__init__(dim, heads, layer, **keys)
        if not 0 < threshold < 1:
            raise ValueError(f"threshold: must be between 0 and 1, got {threshold}")
        self.threshold = nn.Parameter(torch.full((heads,), threshold))
        self.temperature = nn.Parameter(torch.ones(heads))
        self.entropy: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        out, self.entropy = entropy_attention(
            q, k, v, causal=self.causal, temperature=self.temperature, bias=bias
        )
        return out
