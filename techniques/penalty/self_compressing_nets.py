"""How many bits a model's weights take."""

from typing import Any

import torch
from torch import Tensor, nn

from techniques.reparam.self_compressing_nets import LearnedBits


def self_compressing_nets(model: nn.Module, outputs: Any, batch: dict[str, Any]) -> Tensor:
    """Q: the mean number of bits b over all weights of layers with `LearnedBits`; 0 where there are
    none any more.

    The overlay's coefficient, 0.05, is the notebook's. There the mean is over b and e too, 0.5%
    more numbers. Inputs that a layer no longer has because the channel before has 0 bits count as
    long as it trains; `techniques.post.self_compressing_nets` removes them.

    Source: see `techniques.reparam.self_compressing_nets`.
    """
    bits, weights = [], 0
    for layer in model.modules():
        if learned := learned_bits(layer):
            original: Tensor = layer.parametrizations.weight.original  # type: ignore[union-attr]
            bits.append(learned.depth().sum() * (original.numel() // len(original)))
            weights += original.numel()
    if not bits:
        return torch.zeros((), device=next(model.parameters()).device)
    return torch.stack(bits).sum() / weights


def learned_bits(layer: nn.Module) -> LearnedBits | None:
    """What the layer's weight is reparametrised by, if it is that."""
    found = getattr(getattr(layer, "parametrizations", None), "weight", [None])[0]
    return found if isinstance(found, LearnedBits) else None
