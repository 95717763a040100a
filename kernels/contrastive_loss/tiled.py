"""Rows of logits a few at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor

ELEMENTS = 1 << 21
"""Logits held at once: 8 MiB in float32."""


def statistics(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor,
    skipped: list[Tensor],
    kind: str,
    columns: bool,
) -> tuple[Tensor, Tensor]:
    """F of every row, and with `columns` the log-sum-exp of every column."""
    rows = torch.empty(len(a), dtype=scale.dtype, device=a.device)
    down = torch.full((len(b),), -torch.inf, dtype=scale.dtype, device=a.device)
    b = b.to(scale.dtype)
    for some in _chunks(len(a), len(b)):
        z = _logits(a[some], b, scale, bias, [s[some] for s in skipped])
        if kind == "sigmoid":
            rows[some] = F.softplus(z).sum(1)
            continue
        rows[some] = z.logsumexp(1)
        if columns:
            down = torch.logaddexp(down, z.logsumexp(0))
    return rows, down


def add_gradients(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor,
    skipped: list[Tensor],
    kind: str,
    ours: tuple[Tensor, Tensor],
    theirs: tuple[Tensor, Tensor] | None,
    da: Tensor,
    db: Tensor,
) -> Tensor:
    """Add Σ dz·b to `da` and Σ dz·a to `db`, and return Σ dz.

    `ours` are the rows' log-sum-exps (not used by the sigmoid) and the weights of their losses,
    `theirs` the columns'.
    """
    a, b = a.to(scale.dtype), b.to(scale.dtype)
    total = torch.zeros_like(bias)
    for some in _chunks(len(a), len(b)):
        z = _logits(a[some], b, scale, bias, [s[some] for s in skipped])
        lse, weight = ours[0][some, None], ours[1][some, None]
        if kind == "sigmoid":
            dz = z.sigmoid_().mul_(weight)
        elif theirs is None:
            dz = z.sub_(lse).exp_().mul_(weight)
        else:
            dz = (z - theirs[0]).exp_().mul_(theirs[1])
            dz.addcmul_(z.sub_(lse).exp_(), weight)
        da[some] += dz @ b
        db.addmm_(dz.T, a[some])
        total += dz.sum()
    return total


def _logits(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, skipped: list[Tensor]) -> Tensor:
    z = (a.to(scale.dtype) @ b.T).mul_(scale).add_(bias)
    for columns in skipped:
        z.scatter_(1, columns[:, None], -torch.inf)
    return z


def _chunks(rows: int, columns: int) -> list[slice]:
    step = max(1, ELEMENTS // max(columns, 1))
    return [slice(start, start + step) for start in range(0, rows, step)]
