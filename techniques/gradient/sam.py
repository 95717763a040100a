"""Sharpness-aware minimisation."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from training.objective import Backward, Batch, Losses, backprop


class SAM:
    """The gradient at w + ρ·g/‖g‖, with g the gradient at w: two passes a step.

    Adaptive (ASAM): at w + ρ·w²·g/‖|w|·g‖. Running statistics of batch norms follow the first pass
    only, as in the authors' example. The losses returned are those at w.

    Args:
        rho: ρ; 0.05 as in the paper.
        adaptive: whether the ascent is scaled by the weights.

    Raises:
        ValueError: for a negative ρ.

    Source: "Sharpness-Aware Minimization for Efficiently Improving Generalization", arXiv
    2010.01412; https://github.com/davda54/sam, `sam.py` and `example/utility/bypass_bn.py`.
    """

    def __init__(self, rho: float = 0.05, adaptive: bool = False) -> None:
        if rho < 0:
            raise ValueError(f"rho: must not be negative, got {rho}")
        self.rho, self.adaptive = rho, adaptive

    def __call__(
        self,
        objective: nn.Module,
        model: nn.Module,
        microbatches: list[Batch],
        backward: Backward,
    ) -> Losses:
        losses = backprop(objective, model, microbatches, backward)
        parameters = [p for p in objective.parameters() if p.grad is not None]
        before = [p.detach().clone() for p in parameters]
        self._climb(parameters)
        objective.zero_grad(set_to_none=True)
        with frozen_statistics(model):
            backprop(objective, model, microbatches, backward)
        with torch.no_grad():
            for parameter, value in zip(parameters, before):
                parameter.copy_(value)
        return losses

    @torch.no_grad()
    def _climb(self, parameters: list[nn.Parameter]) -> None:
        weights = [p.abs() if self.adaptive else torch.ones_like(p) for p in parameters]
        norm = nn.utils.get_total_norm(
            [w * g for w, g in zip(weights, (p.grad for p in parameters)) if g is not None]
        )
        for weight, parameter in zip(weights, parameters):
            assert parameter.grad is not None
            parameter.add_(weight**2 * parameter.grad * (self.rho / (norm + 1e-12)))


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Within it, batch norms in training leave their running statistics as they are."""
    buffers = {
        buffer: buffer.clone()
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        for buffer in module.buffers(recurse=False)
    }
    try:
        yield
    finally:
        for buffer, value in buffers.items():
            buffer.copy_(value)
