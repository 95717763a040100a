"""Saves `x` alone, where autograd would keep every intermediate."""

import math
from typing import Any

import torch
from torch import Tensor

from kernels.golu import reference


class GoLU(torch.autograd.Function):
    """Forward as the reference; the backward computes the gate again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float, beta: float, gamma: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.parameters = alpha, beta, gamma
        return reference.golu(x, alpha, beta, gamma)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (x,), (alpha, beta, gamma), (grad,) = ctx.saved_tensors, ctx.parameters, grads
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inner = beta * torch.exp((-gamma * wide).clamp(max=math.log(reference.DEEP / beta)))
        # d/dx x·g(x) = g·(1 + γ·x·β·exp(−γ·x))
        slope = alpha * torch.exp(-inner) * (1 + gamma * wide * inner)
        return (grad * slope).to(x.dtype), None, None, None
