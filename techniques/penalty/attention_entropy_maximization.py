"""Attention entropy maximisation (AEM)."""

from typing import Any

import torch
from torch import Tensor, nn


def attention_entropy_maximization(model: nn.Module, outputs: Any, batch: dict[str, Any]) -> Tensor:
    """Σₙ aₙ·log aₙ, the negative entropy of attention weights in nats, a scalar: the mean over bags
    and heads, and over positions and layers where there are several.

    The paper's gated attention has one head and its code one bag in a batch; of several heads that
    code takes the mean, too. It is from −log(instances), at uniform attention, which is its
    minimiser, to 0, at one weight of 1, near which its gradient vanishes.

    The authors' README trains with a coefficient of 0.1; the default of their code, 0, is none.

    Args:
        model: has modules that keep the `entropy` of their weights, (batch, heads) or (batch,
            heads, positions), and have run: `models.abmil.GatedAttention`, or in a transformer
            `techniques.attention.entropy_guided_attention.EntropyGuidedAttention`.
        outputs, batch: not used.

    Raises:
        ValueError: for a model without such modules.

    Source: "AEM: Attention Entropy Maximization for Multiple Instance Learning based Whole Slide
    Image Classification", arXiv 2406.15303; https://github.com/dazhangyu123/AEM, `main.py`.
    """
    found = [getattr(module, "entropy", None) for module in model.modules()]
    entropies = [entropy.mean() for entropy in found if isinstance(entropy, Tensor)]
    if not entropies:
        raise ValueError("the model has no module that keeps the entropy of its attention")
    return -torch.stack(entropies).mean()
