"""The penalty on attention entropies far from their thresholds."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from techniques.attention.entropy_guided_attention import EntropyGuidedAttention


def attention_entropy(
    model: nn.Module, outputs: Any, batch: dict[str, Any], *, margin: float = 0.2
) -> Tensor:
    """mean over layers and heads of Σ 1[|H − θ·E| > γ·E] · (H − θ·E)², a scalar.

    H is a row's attention entropy, θ its head's learned threshold, E = log(length) the largest
    possible entropy and γ the margin. The sum runs over samples and positions, as in the authors'
    code, so the penalty grows with the batch; divided by the micro-batch's share, so that
    accumulation changes nothing. The paper's coefficient is 1e-5, 5e-5 for its longer context.

    Args:
        model: has `EntropyGuidedAttention` layers, which have run.
        outputs: not used.
        batch: of which `share` is used.
        margin: γ; 0.2 as in the paper and its code.

    Raises:
        ValueError: for a model without such layers, or a negative margin.

    Source: "Entropy-Guided Attention for Private LLMs", arXiv 2501.03489;
    https://github.com/Nandan91/entropy-guided-attention-llm, `entropy_regularization.py`.
    """
    if margin < 0:
        raise ValueError(f"margin: must not be negative, got {margin}")
    layers = [m for m in model.modules() if isinstance(m, EntropyGuidedAttention)]
    if not layers:
        raise ValueError("the model has no EntropyGuidedAttention layer")
    total = torch.zeros((), device=layers[0].threshold.device)
    for layer in layers:
        entropy = layer.entropy
        assert entropy is not None
        largest = math.log(entropy.shape[-1])
        deviation = entropy - layer.threshold[:, None] * largest
        outside = deviation.abs() > margin * largest
        total = total + (deviation * outside).square().sum() / entropy.shape[1]
    return total / len(layers) / batch.get("share", 1.0)
