"""The definition."""

import torch
from torch import Tensor


def grouped(x: Tensor, groups: int) -> Tensor:
    """(..., channels) to (..., groups, channels / groups), at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (groups, -1))


def horner(x: Tensor, coefficients: Tensor) -> Tensor:
    """c₀ + c₁x + ..., with `x` (..., groups, channels) and coefficients (groups, terms)."""
    value = torch.zeros_like(x)
    for column in coefficients.to(x.dtype).unbind(1)[::-1]:
        value = value * x + column[:, None]
    return value


def group_rational(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """P(x) / (1 + Σ |b_k| |x|ᵏ)."""
    z = grouped(x, len(numerator))
    size = z.abs()
    below = 1 + size * horner(size, denominator.abs())
    return (horner(z, numerator) / below).flatten(-2).to(x.dtype)
