"""Attention with row entropies in plain PyTorch: the definition. Materialises every score."""

import torch
from torch import Tensor


def entropy_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float,
    temperature: Tensor | None,
    window: int | None,
    bias: Tensor | None,
    bias_factors: tuple[Tensor, Tensor] | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    key_padding_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `kernels.entropy_attention.entropy_attention`, which validates the arguments."""
    dtype = accumulation_dtype(q)
    k, v = (x.to(dtype).repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = (q.to(dtype) * scale) @ k.mT
    if temperature is not None:
        scores = scores / temperature.to(dtype)[:, None, None]
    if bias is not None:
        scores = scores + bias.to(dtype)
    if bias_factors is not None:
        scores = scores + bias_factors[0].to(dtype) @ bias_factors[1].to(dtype).mT

    start, stop = visible_keys(q, k, causal, window, lengths, cu_seqlens)
    keys = torch.arange(k.shape[2], device=q.device)
    hidden = (keys < start[..., None]) | (keys >= stop[..., None])
    hidden = hidden[:, None]
    if key_padding_mask is not None:
        hidden = hidden | key_padding_mask[:, None, None, :]
    if bias is not None:
        hidden = hidden | (scores == -torch.inf)
    if hidden.any():
        empty = hidden.all(-1, keepdim=True)
        # An empty row's scores become 0 rather than −∞, so that no NaN enters its gradient.
        scores = scores.masked_fill(hidden, -torch.inf).masked_fill(empty, 0)
        hidden = hidden | empty
        log_p = scores.log_softmax(-1).masked_fill(hidden, 0)
        p = log_p.exp().masked_fill(hidden, 0)
    else:
        log_p = scores.log_softmax(-1)
        p = log_p.exp()
    return (p @ v).to(q.dtype), -(p * log_p).sum(-1)


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float32 for half-precision inputs, the input's own otherwise."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def visible_keys(
    q: Tensor,
    k: Tensor,
    causal: bool,
    window: int | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """First and one past the last key each query sees, `(batch or 1, query length)`, int32.

    Every mask but the key padding is such an interval. `start >= stop` where there is none.
    """
    queries, keys = q.shape[2], k.shape[2]
    position = torch.arange(queries, dtype=torch.int32, device=q.device)[None]
    return _visible(position + (keys - queries), keys, causal, False, window, lengths, cu_seqlens)


def visible_queries(
    q: Tensor,
    k: Tensor,
    causal: bool,
    window: int | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The transpose: the queries that see each key, `(batch or 1, key length)`."""
    queries, keys = q.shape[2], k.shape[2]
    position = torch.arange(keys, dtype=torch.int32, device=q.device)[None]
    # A later query sees an earlier key: from the key's side causality looks forward.
    return _visible(
        position - (keys - queries), queries, False, causal, window, lengths, cu_seqlens
    )


def _visible(
    position: Tensor,
    others: int,
    only_before: bool,
    only_after: bool,
    window: int | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Interval of the `others` that each position sees, where position i is level with other i."""
    start, stop = torch.zeros_like(position), torch.full_like(position, others)
    if window is not None:
        start, stop = start.maximum(position - window + 1), stop.minimum(position + window)
    if only_before:
        stop = stop.minimum(position + 1)
    if only_after:
        start = start.maximum(position)
    if lengths is not None:
        real = lengths.to(torch.int32)[:, None]
        stop = torch.where(position < real, stop.minimum(real), 0)
    if cu_seqlens is not None:
        ends = cu_seqlens.to(torch.int32)
        sequence = torch.searchsorted(ends, position, right=True)
        start, stop = start.maximum(ends[sequence - 1]), stop.minimum(ends[sequence])
    return start.expand_as(stop), stop.clamp(min=0)
