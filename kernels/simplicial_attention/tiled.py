"""A few queries at a time, with the keys of their windows alone; scores again in the backward."""

# pyright: reportIncompatibleMethodOverride=false

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ELEMENTS = 1 << 21
"""Scores held at once: 8 MiB in float32."""


class SimplicialAttention(torch.autograd.Function):
    """Of (batch · heads, length, head_dim); saves its inputs, the output and one number a query."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k1: Tensor,
        k2: Tensor,
        v1: Tensor,
        v2: Tensor,
        windows: tuple[int, int],
        scale: float,
        hidden: Tensor | None,
    ) -> Tensor:
        out = torch.zeros_like(q)
        lse = torch.full(q.shape[:2], -torch.inf, dtype=q.dtype, device=q.device)
        for rows, queries, first, second in _blocks(q, windows):
            _, z = _scores(q, k1, k2, windows, scale, hidden, rows, queries, first, second)
            total = z.flatten(-2).logsumexp(-1)
            lse[rows, queries] = total
            weights = z.sub_(_safe(total)[..., None, None]).exp_()
            mixed = weights @ v1[rows, None, first]  # (rows, queries, second, head_dim)
            out[rows, queries] = (mixed * v2[rows, None, second]).sum(2)
        ctx.save_for_backward(q, k1, k2, v1, v2, out, lse, hidden)
        ctx.options = windows, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k1, k2, v1, v2, out, lse, hidden = ctx.saved_tensors
        windows, scale = ctx.options
        (grad,) = grads
        dq, dk1, dk2, dv1, dv2 = (torch.zeros_like(x) for x in (q, k1, k2, v1, v2))
        inner = (grad * out).sum(-1)
        for rows, queries, first, second in _blocks(q, windows):
            product, z = _scores(q, k1, k2, windows, scale, hidden, rows, queries, first, second)
            weights = z.sub_(_safe(lse[rows, queries])[..., None, None]).exp_()
            upstream = grad[rows, queries, None] * v2[rows, None, second]
            mixed = weights @ v1[rows, None, first]
            dv2[rows, second] += (mixed * grad[rows, queries, None]).sum(1)
            dv1[rows, first] += weights.flatten(1, 2).mT @ upstream.flatten(1, 2)
            slope = upstream @ v1[rows, None, first].mT
            slope.sub_(inner[rows, queries, None, None]).mul_(weights).mul_(scale)
            mixed = slope @ k1[rows, None, first]
            dq[rows, queries] = (mixed * k2[rows, None, second]).sum(2)
            dk2[rows, second] += (mixed * q[rows, queries, None]).sum(1)
            dk1[rows, first] += slope.flatten(1, 2).mT @ product.flatten(1, 2)
        return dq, dk1, dk2, dv1, dv2, None, None, None


Block = tuple[slice, slice, slice, slice]
"""Rows (of batch · heads), queries, and the keys of both windows."""


def _blocks(q: Tensor, windows: tuple[int, int]) -> Iterator[Block]:
    count, length, dim = q.shape
    widths = [min(window, length) for window in windows]
    each = widths[1] * (widths[0] + dim)
    step = max(1, min(length, 16, ELEMENTS // max(each, 1)))
    wide = (widths[1] + step) * (widths[0] + step + dim)
    rows = max(1, ELEMENTS // (step * wide))
    for row in range(0, count, rows):
        for start in range(0, length, step):
            end = min(start + step, length)
            first, second = (slice(max(0, start - w + 1), end) for w in windows)
            yield slice(row, min(row + rows, count)), slice(start, end), first, second


def _scores(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    windows: tuple[int, int],
    scale: float,
    hidden: Tensor | None,
    rows: slice,
    queries: slice,
    first: slice,
    second: slice,
) -> tuple[Tensor, Tensor]:
    """q·k2 (rows, queries, second, head_dim), and the scores (rows, queries, second, first)."""
    product = q[rows, queries, None] * k2[rows, None, second]
    z = (product @ k1[rows, None, first].mT).mul_(scale)
    at = torch.arange(queries.start, queries.stop, device=q.device)
    for keys, window, place in ((first, windows[0], -1), (second, windows[1], -2)):
        position = torch.arange(keys.start, keys.stop, device=q.device)
        distance = at[:, None] - position
        out = (distance < 0) | (distance >= window)
        shape = (1, len(at), 1, -1) if place == -1 else (1, len(at), -1, 1)
        z.masked_fill_(out.view(shape), -torch.inf)
        if hidden is not None:
            shape = (-1, 1, 1, len(position)) if place == -1 else (-1, 1, len(position), 1)
            z.masked_fill_(hidden[rows, keys].reshape(shape), -torch.inf)
    return product, z


def _safe(lse: Tensor) -> Tensor:
    """With 0 for −inf, of queries that see nothing, whose weights are then 0."""
    return lse.masked_fill(lse == -torch.inf, 0.0)
