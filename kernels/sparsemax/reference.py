"""The definition, by sorting (Martins and Astudillo, algorithm 1)."""

import torch
from torch import Tensor


def threshold(x: Tensor) -> Tensor:
    """τ of each row of the last dimension, which is kept; `x` has no −inf."""
    ordered = x.sort(dim=-1, descending=True).values
    count = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
    excess = ordered.cumsum(-1) - 1
    support = (count * ordered > excess).sum(-1, keepdim=True).clamp(min=1)
    return excess.gather(-1, support - 1) / support


def sparsemax(x: Tensor) -> Tensor:
    """Over the last dimension."""
    if not x.shape[-1]:
        return x.clone()
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    hidden = wide == -torch.inf
    highest = wide.amax(-1, keepdim=True).clamp(min=torch.finfo(wide.dtype).min).detach()
    # Only differences count. An entry 2 below the highest is outside the support already.
    shifted = (wide.masked_fill(hidden, 0) - highest).masked_fill(hidden, -2).clamp(min=-2)
    found = (shifted - threshold(shifted)).clamp(min=0)
    return found.masked_fill(hidden, 0).to(x.dtype)
