"""The mean of losses whose samples have weights."""

from typing import Any

from torch import Tensor

from tasks.losses import masked_mean, valid


def weighted_mean(losses: Tensor, outputs: Any, batch: dict[str, Any]) -> Tensor:
    """Σ w·ℓ / Σ w over the labels that are not −100, with w the batch's `weight` (batch,), as
    `torch.nn.functional.cross_entropy` weights classes; the plain mean without weights."""
    if "weight" not in batch:
        return masked_mean(losses, outputs, batch)
    weight = batch["weight"].to(losses) * valid(losses, batch)
    return (losses * weight).sum() / weight.sum().clamp(min=1e-12)
