"""Marking the hidden units that are to be removed after training."""

import torch
from torch import nn

from techniques.post.hidden import hidden_units
from techniques.post.variance_based_pruning import incoming, lowest

CRITERIA = ("magnitude", "random")


def regularize_then_prune(
    model: nn.Module, *, amount: float = 0.5, by: str = "magnitude", seed: int = 0
) -> None:
    """Mark the same fraction of each feed-forward layer's hidden units to be removed, for good: a
    buffer `removed` of bool, (units,), in the layer out of them. The model computes what it did.

    For the penalty and the step after training of the same name.

    Args:
        model: changed in place.
        amount: fraction of a layer's units; 0.5.
        by: "magnitude", the lowest ‖w‖₂ of the weights into a unit, or "random".
        seed: of what is random.

    Raises:
        ValueError: for an amount outside [0, 1), or another criterion.
        UsageError: for a model without such units.

    Source: see the penalty. How the paper chooses could not be confirmed: both are our own.
    """
    if not 0 <= amount < 1:
        raise ValueError(f"amount: must be at least 0 and below 1, got {amount}")
    if by not in CRITERIA:
        raise ValueError(f"by: one of {', '.join(CRITERIA)}, got '{by}'")
    generator = torch.Generator().manual_seed(seed)
    for name, hidden in hidden_units(model).items():
        draws = torch.rand(hidden.size, generator=generator)
        score = incoming(hidden) if by == "magnitude" else draws
        removed = lowest({name: score}, amount)[name]
        hidden.out.register_buffer("removed", removed.to(hidden.out.weight.device))
