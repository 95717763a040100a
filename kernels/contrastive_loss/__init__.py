"""Contrastive losses whose memory is linear in the batch."""

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.backend import choose
from kernels.contrastive_loss import exchange, reference, tiled

KINDS = ("infonce", "sigmoid")


def contrastive_loss(
    a: Tensor,
    b: Tensor | None = None,
    *,
    kind: str = "infonce",
    scale: float | Tensor = 1.0,
    bias: float | Tensor = 0.0,
    symmetric: bool | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Contrast every sample with its partner and with all others, in memory linear in the batch.

    With the logits zᵢⱼ = scale·aᵢ·bⱼ + bias, and bᵢ the partner of aᵢ:

        infonce: lossᵢ = logΣⱼ exp(zᵢⱼ) − zᵢᵢ, or if `symmetric` its mean with that of bᵢ over all a
        sigmoid: lossᵢ = softplus(−zᵢᵢ) + Σⱼ≠ᵢ softplus(zᵢⱼ)

    The matrix of logits is made again in the backward and never stored. Values and gradients are
    exact, and gradients of the first order only. Half-precision inputs are computed in float32, on
    a GPU by products of their own dtype.

    Args:
        a: (batch, dim), floating point; normalise it for cosines.
        b: like `a`. None: `a` holds two views of each sample, batch/2 apart, which are each other's
            partners; a view is not contrasted with itself (SimCLR's NT-Xent).
        kind: `"infonce"` or `"sigmoid"`.
        scale: the inverse temperature; a number or a tensor of no dimension, which may require a
            gradient.
        bias: likewise. It does nothing to infonce.
        symmetric: of infonce; default: with `b`. The sigmoid loss is symmetric by itself.
        group: processes whose samples are contrasted with one another, each with a batch of its
            own of the same size; blocks of `b` go around the ring of them. Every process gets the
            losses of its own rows, and gradients of the sum of all processes' losses: average
            parameters' gradients over the processes, as DDP does, and those are of the mean loss.
        backend: `"auto"`, `"reference"`, `"tiled"` or `"triton"`; the reference takes no group.

    Returns:
        (batch,) losses, float32 (float64 for float64).

    Raises:
        ValueError: for arguments that are not as above.

    Sources: "Breaking the Memory Barrier: Near Infinite Batch Size Scaling for Contrastive Loss",
    arXiv 2410.17243; "Sigmoid Loss for Language Image Pre-Training", arXiv 2303.15343; NT-Xent,
    arXiv 2002.05709.
    """
    views = b is None
    if symmetric is None:
        symmetric = kind == "infonce" and not views
    _check(a, b, kind, symmetric, views)
    scale, bias = (_number(n, x, a) for n, x in {"scale": scale, "bias": bias}.items())
    b = a if b is None else b
    chosen = choose(backend, a, b, scale, bias)
    if chosen == "triton" and a.dtype == torch.float64:
        if backend == "triton":
            raise ValueError('a: float64 is not supported with backend="triton"; use "tiled"')
        chosen = "tiled"
    with torch.autocast(a.device.type, enabled=False):
        if chosen == "reference":
            if group is not None:
                raise ValueError("group: the reference takes none; use 'tiled'")
            return reference.contrastive_loss(
                a, b, scale, bias, kind=kind, views=views, symmetric=symmetric
            )
        exchange.check(a, group)
        from kernels.contrastive_loss.function import Contrast

        blocks = tiled
        if chosen == "triton":
            from kernels.contrastive_loss import triton as blocks
        return Contrast.apply(a, b, scale, bias, kind, views, symmetric, group, blocks)  # type: ignore[return-value]


def _check(a: Tensor, b: Tensor | None, kind: str, symmetric: bool, views: bool) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    for name, x in {"a": a, "b": a if b is None else b}.items():
        if x.dim() != 2:
            raise ValueError(f"{name}: expected (batch, dim), got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"{name}: expected a floating-point dtype, got {x.dtype}")
    if b is not None and (b.shape != a.shape or b.dtype != a.dtype):
        raise ValueError(
            f"b: expected a's shape {tuple(a.shape)} and dtype {a.dtype}, got {tuple(b.shape)} and "
            f"{b.dtype}"
        )
    if views and len(a) % 2:
        raise ValueError(f"a: without b, expected an even number of rows, got {len(a)}")
    if symmetric and (views or kind == "sigmoid"):
        raise ValueError("symmetric: is for kind='infonce' with a and b")


def _number(name: str, value: float | Tensor, a: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                f"{name}: expected one floating-point number, got {value.dtype} of shape "
                f"{tuple(value.shape)}"
            )
        return value.reshape(())
    return torch.tensor(
        float(value), dtype=torch.promote_types(a.dtype, torch.float32), device=a.device
    )
