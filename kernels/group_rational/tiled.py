"""Some rows at a time, keeping `x` and the coefficients alone."""

from typing import Any

import torch
from torch import Tensor

from kernels.group_rational import reference

CHUNK = 1 << 18
"""Elements whose intermediates are held at once."""


class GroupRational(torch.autograd.Function):
    """Forward as the reference; the backward computes both polynomials again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
        ctx.save_for_backward(x, numerator, denominator)
        rows = x.reshape(-1, x.shape[-1])
        parts = [reference.group_rational(r, numerator, denominator) for r in _chunks(rows)]
        return torch.cat(parts).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, numerator, denominator = ctx.saved_tensors
        rows, grad = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, x.shape[-1])
        wide = torch.promote_types(x.dtype, torch.float32)
        da, db = torch.zeros_like(numerator, dtype=wide), torch.zeros_like(denominator, dtype=wide)
        slopes = []
        for part, upstream in zip(_chunks(rows), _chunks(grad)):
            slope, a, b = _gradients(part, upstream, numerator, denominator)
            slopes.append(slope)
            da, db = da + a, db + b
        dx = torch.cat(slopes).view(x.shape)
        return dx, da.to(numerator.dtype), db.to(denominator.dtype)


def _gradients(
    x: Tensor, grad: Tensor, numerator: Tensor, denominator: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    z, g = reference.grouped(x, len(numerator)), reference.grouped(grad, len(numerator))
    size, sign, positive = z.abs(), z.sign(), denominator.abs()
    below = 1 + size * reference.horner(size, positive)
    value = reference.horner(z, numerator) / below
    scaled = g / below
    order = torch.arange(1, numerator.shape[1], device=x.device)
    above_slope = reference.horner(z, numerator[:, 1:] * order)
    order = torch.arange(1, denominator.shape[1] + 1, device=x.device)
    below_slope = sign * reference.horner(size, positive * order)
    slope = scaled * (above_slope - value * below_slope)
    da, db = [], []
    power = scaled
    for _ in range(numerator.shape[1]):
        da.append(power.sum((0, 2)))
        power = power * z
    power = -scaled * value
    for _ in range(denominator.shape[1]):
        power = power * size
        db.append(power.sum((0, 2)))
    return (
        slope.flatten(-2).to(x.dtype),
        torch.stack(da, dim=1),
        torch.stack(db, dim=1) * denominator.sign(),
    )


def _chunks(rows: Tensor) -> tuple[Tensor, ...]:
    return rows.split(max(CHUNK // max(rows.shape[-1], 1), 1))
