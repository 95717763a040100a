"""PowerNorm."""

from typing import Any

import torch
from torch import Tensor, nn


class PowerNorm(nn.Module):
    """x / √(ψ² + eps) · weight + bias over the last dimension, with ψ² the running mean of x² by
    channel: `(..., dim) -> (..., dim)`.

    A scaling by each group's root mean square comes before. During the first `warmup` training
    steps the batch's own mean square is used; the backward always treats it as a constant and
    subtracts ν·x̂ from the upstream gradient, where ν is a running mean of their product. In
    evaluation the running mean square is used.

    Args:
        dim: features.
        eps: added to the mean square.
        alpha_forward, alpha_backward: decays of ψ² and ν; 0.9 as in the code.
        warmup: training steps; 10,000 as in the code.
        groups: of features scaled together before; 1 as in the code.

    Raises:
        ValueError: when `groups` do not divide `dim`, or a decay is outside [0, 1].

    Source: "PowerNorm: Rethinking Batch Normalization in Transformers", arXiv 2003.07845;
    https://github.com/sIncerass/powernorm, `fairseq/modules/norms/mask_powernorm.py`.
    """

    mean_square: Tensor
    product: Tensor
    steps: Tensor

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        alpha_forward: float = 0.9,
        alpha_backward: float = 0.9,
        warmup: int = 10_000,
        groups: int = 1,
    ) -> None:
        super().__init__()
        if groups < 1 or dim % groups:
            raise ValueError(f"groups: must divide {dim} features, got {groups}")
        for name, value in {
            "alpha_forward": alpha_forward,
            "alpha_backward": alpha_backward,
        }.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: must be between 0 and 1, got {value}")
        self.eps, self.warmup, self.groups = eps, warmup, groups
        self.alpha_forward, self.alpha_backward = alpha_forward, alpha_backward
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.register_buffer("mean_square", torch.ones(dim))
        self.register_buffer("product", torch.zeros(dim))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        grouped = wide.unflatten(-1, (self.groups, -1))
        scale = torch.rsqrt(grouped.square().mean(-1, keepdim=True) + self.eps)
        wide = (grouped * scale).flatten(-2)
        if not self.training:
            normal = wide * torch.rsqrt(self.mean_square + self.eps)
            return (normal * self.weight + self.bias).to(x.dtype)
        batch = wide.detach().flatten(0, -2).square().mean(0)
        self.steps += 1
        used = torch.where(self.steps <= self.warmup, batch, self.mean_square)
        normal = _Normalise.apply(
            wide, used + self.eps, batch + self.eps, self.product, self.alpha_backward
        )
        # The code averages over all steps so far during the warm-up, and then decays as well.
        average = self.mean_square + (batch - self.mean_square) / self.steps
        running = torch.where(self.steps < self.warmup, average, self.mean_square)
        self.mean_square.copy_(running.lerp(batch, 1 - self.alpha_forward))
        return (normal * self.weight + self.bias).to(x.dtype)


class _Normalise(torch.autograd.Function):
    """x / √used, with the paper's approximate gradient, which updates ν on its way."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, used: Tensor, batch: Tensor, product: Tensor, alpha: float
    ) -> Tensor:
        normal = x * torch.rsqrt(used)
        ctx.save_for_backward(normal, batch)
        ctx.product, ctx.alpha = product, alpha
        return normal

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (normal, batch), (grad,) = ctx.saved_tensors, grads
        approximate = grad - (1 - ctx.alpha) * ctx.product * normal
        ctx.product.add_((approximate * normal).flatten(0, -2).mean(0))
        return approximate * torch.rsqrt(batch), None, None, None, None
