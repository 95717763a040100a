"""The definition."""

import math

import torch
from torch import Tensor

DEEP = 1e4
"""A gate of exp(−DEEP) is 0 in every dtype, so larger exponents may be cut to it."""


def golu(x: Tensor, alpha: float, beta: float, gamma: float) -> Tensor:
    """x · α·exp(−β·exp(−γ·x)); the exponent is cut where the gate is 0, so that no infinity
    meets a zero."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inner = torch.exp((-gamma * wide).clamp(max=math.log(DEEP / beta)))
    return (wide * alpha * torch.exp(-beta * inner)).to(x.dtype)
