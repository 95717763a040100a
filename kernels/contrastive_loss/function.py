"""The loss and its gradient from blocks of the matrix of logits, on one process or around a ring.

With F the log-sum-exp of a row (infonce), or the sum of softplus over its negatives (sigmoid), a
row's loss is F plus a term of its partner alone. `blocks` is the module that makes F and its
gradient for `a` against one block of `b`: `tiled` or `triton`.
"""

# pyright: reportIncompatibleMethodOverride=false

from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.contrastive_loss.exchange import pass_on, size
from kernels.contrastive_loss.reference import partners


class Contrast(torch.autograd.Function):
    """Saves the embeddings and one number a row (and a column, if `symmetric`)."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        bias: Tensor,
        kind: str,
        views: bool,
        symmetric: bool,
        group: dist.ProcessGroup | None,
        blocks: ModuleType,
    ) -> Tensor:
        wide = torch.promote_types(a.dtype, torch.float32)
        a, b = a.contiguous(), b.contiguous()
        scale, bias = scale.to(wide), bias.to(wide)
        partner = partners(a, views)
        skipped = _skipped(a, partner, kind, views)
        empty = 0.0 if kind == "sigmoid" else -torch.inf
        rows, columns = (torch.full((len(a),), empty, dtype=wide, device=a.device) for _ in "ab")
        visitors = [b, columns] if symmetric else [b]
        for turn in range(size(group)):
            own = skipped if turn == 0 else []
            found = blocks.statistics(a, visitors[0], scale, bias, own, kind, symmetric)
            rows = _add(rows, found[0], kind)
            if symmetric:
                visitors[1] = _add(visitors[1], found[1], kind)
            visitors = pass_on(visitors, group)  # after the last turn all are home
        columns = visitors[1] if symmetric else None

        positive = scale * (a.to(wide) * b[partner].to(wide)).sum(1) + bias
        ctx.save_for_backward(a, b, scale, bias, partner, rows, columns, positive)
        ctx.options = kind, views, symmetric, group, blocks
        if kind == "sigmoid":
            return rows + F.softplus(-positive)
        return (rows + columns) / 2 - positive if columns is not None else rows - positive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b, scale, bias, partner, rows, columns, positive = ctx.saved_tensors
        kind, views, symmetric, group, blocks = ctx.options
        (grad,) = grads
        weight = grad / 2 if symmetric else grad
        da, db = torch.zeros_like(a, dtype=scale.dtype), torch.zeros_like(b, dtype=scale.dtype)
        dbias = torch.zeros_like(bias)
        visitors = [b, db, columns, weight] if symmetric else [b, db]
        for turn in range(size(group)):
            own = _skipped(a, partner, kind, views) if turn == 0 else []
            theirs = (visitors[2], visitors[3]) if symmetric else None
            dbias += blocks.add_gradients(
                a, visitors[0], scale, bias, own, kind, (rows, weight), theirs, da, visitors[1]
            )
            visitors = pass_on(visitors, group)
        db = visitors[1]

        slope = -grad * torch.sigmoid(-positive) if kind == "sigmoid" else -grad
        da.addcmul_(b[partner].to(da.dtype), slope[:, None])
        db.index_add_(0, partner, a.to(db.dtype) * slope[:, None])
        dbias += slope.sum()
        dscale = (a.to(da.dtype) * da).sum()
        da, db = da.mul_(scale).to(a.dtype), db.mul_(scale).to(b.dtype)
        return da, db, dscale, dbias, None, None, None, None, None


def _skipped(a: Tensor, partner: Tensor, kind: str, views: bool) -> list[Tensor]:
    """Columns that are left out of each row's F: itself, and of the sigmoid loss its partner."""
    itself = [torch.arange(len(a), device=a.device)] if views else []
    return [*itself, partner] if kind == "sigmoid" else itself


def _add(total: Tensor, found: Tensor, kind: str) -> Tensor:
    return total + found if kind == "sigmoid" else torch.logaddexp(total, found)
