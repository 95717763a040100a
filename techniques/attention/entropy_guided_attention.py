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
        threshold: where the thresholds start. 0.5 is ours, as neither paper nor code says; the
            paper's have learned values from 0.2 to 0.52 (figure 6).
        temperature: where the temperatures start. 1 is plain attention; the paper starts its models
            without layer norm at 0.01 (CodeParrot) and 0.1 (Languini).

    The paper has one temperature for each head and position; this is one for each head, which does
    not depend on the length.

    Raises:
        ValueError: for a threshold outside (0, 1), a temperature that is not positive, or sizes
            that do not fit.

    Source: "Entropy-Guided Attention for Private LLMs", arXiv 2501.03489;
    https://github.com/Nandan91/entropy-guided-attention-llm, `entropy_regularization.py`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        layer: int,
        *,
        threshold: float = 0.5,
        temperature: float = 1.0,
        **keys: Any,
    ) -> None:
        super().__init__(dim, heads, layer, **keys)
        if not 0 < threshold < 1:
            raise ValueError(f"threshold: must be between 0 and 1, got {threshold}")
        if temperature <= 0:
            raise ValueError(f"temperature: must be positive, got {temperature}")
        self.threshold = nn.Parameter(torch.full((heads,), float(threshold)))
        self.temperature = nn.Parameter(torch.full((heads,), float(temperature)))
        self.entropy: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        out, self.entropy = entropy_attention(
            q, k, v, causal=self.causal, temperature=self.temperature, bias=bias
        )
        return out
