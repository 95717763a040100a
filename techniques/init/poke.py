"""A perturbation of the start too small to matter by itself."""

from typing import Any

import torch
from torch import nn


@torch.no_grad()
def poke(model: nn.Module, batch: dict[str, Any], *, entry: int = 0, factor: float = 1.001) -> None:
    """Multiply one entry of the model's first weight matrix by a factor: what becomes of it is the
    sensitivity of training to where it starts.

    Args:
        model: changed in place.
        batch: not used.
        entry: which, in row-major order, from the start again after the last.
        factor: 1.001 as in the source.

    Raises:
        ValueError: for a negative entry, or a model without a weight matrix.

    Source: https://github.com/KellerJordan/CIFAR-isolated-randomness, `launch_poked.py`, for
    "Calibrated Chaos: Variance Between Runs of Neural Network Training is Harmless and Inevitable",
    arXiv 2304.01910; there the first entry of a convolution, at various steps.
    """
    if entry < 0:
        raise ValueError(f"entry: must be at least 0, got {entry}")
    weight = next((p for p in model.parameters() if p.ndim >= 2), None)
    if weight is None:
        raise ValueError("poke: the model has no weight matrix")
    weight.view(-1)[entry % weight.numel()] *= factor
