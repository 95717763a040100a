"""Load balancing of experts without an auxiliary loss."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.moe import MixtureOfExperts

if TYPE_CHECKING:
    from training.run import Run


class LossFreeBalancing:
    """After each step, bᵢ ← bᵢ + u·sign(mean load − loadᵢ) for each expert's selection bias b.

    The loads are the step's tokens by expert over all micro-batches and processes. The biases are
    buffers of `models.moe.MixtureOfExperts`, which checkpoints keep. Records the largest load over
    the mean, less 1 (the paper's MaxVio), averaged over layers, as `probe/max_violation`.

    Args:
        rate: u; 0.001 as in the paper.
        every: steps between records.

    Raises:
        ValueError: for a rate that is not positive; at the start, for a model without such layers.

    Source: "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", arXiv 2408.15664
    (algorithm 1). No released code was found; the paper's text decides.
    """

    def __init__(self, rate: float = 0.001, every: int = 10) -> None:
        if rate <= 0:
            raise ValueError(f"rate: must be positive, got {rate}")
        if every < 1:
            raise ValueError(f"every: must be at least 1, got {every}")
        self.rate, self.every = rate, every

    def on_fit_start(self, run: "Run") -> None:
        """Look for the layers, and forget what an initialisation sent through them."""
        layers = [m for m in run.model.modules() if isinstance(m, MixtureOfExperts)]
        if not layers:
            raise ValueError("callbacks.loss_free_balancing: the model has no mixture of experts")
        for layer in layers:
            layer.load = None

    def on_step_end(self, run: "Run") -> None:
        """Move the biases."""
        violations = []
        for layer in run.model.modules():
            if isinstance(layer, MixtureOfExperts) and layer.load is not None:
                load = run.accelerator.reduce(layer.load, "sum").float()  # type: ignore[union-attr]
                balance(layer.bias, load, self.rate)
                violations.append(load.max() / load.mean() - 1)
                layer.load = None
        if violations and run.step % self.every == 0:
            run.record({"probe/max_violation": torch.stack(violations).mean().item()})


def balance(bias: Tensor, load: Tensor, rate: float) -> None:
    """Move the biases (experts,) by `rate` towards equal loads (experts,), in place."""
    bias.add_(torch.sign(load.mean() - load), alpha=rate)
