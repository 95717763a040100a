"""The definition, with the whole matrix of logits."""

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, *, kind: str, views: bool, symmetric: bool
) -> Tensor:
    """One loss a row of `a`."""
    wide = torch.promote_types(a.dtype, torch.float32)
    logits = scale * (a.to(wide) @ b.to(wide).T) + bias
    rows = torch.arange(len(a), device=a.device)
    partner = partners(a, views)
    if kind == "sigmoid":
        sign = torch.full_like(logits, -1.0)
        sign[rows, partner] = 1.0
        terms = F.softplus(-sign * logits)
        if views:
            terms = terms.masked_fill(rows[:, None] == rows, 0.0)
        return terms.sum(1)
    if views:
        logits = logits.masked_fill(rows[:, None] == rows, -torch.inf)
    losses = F.cross_entropy(logits, partner, reduction="none")
    if symmetric:
        losses = (losses + F.cross_entropy(logits.T, partner, reduction="none")) / 2
    return losses


def partners(a: Tensor, views: bool) -> Tensor:
    """The row of `b` that belongs to each row of `a`."""
    rows = torch.arange(len(a), device=a.device)
    return rows.roll(len(a) // 2) if views else rows
