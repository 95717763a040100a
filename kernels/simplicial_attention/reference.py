"""The definition, with the cube of scores."""

import torch
from torch import Tensor


def simplicial_attention(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    *,
    windows: tuple[int, int],
    scale: float,
    hidden: Tensor | None,
) -> Tensor:
    """(batch, heads, length, head_dim); `hidden` (batch, length) marks keys that are left out."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k1, k2, v1, v2 = (x.to(wide) for x in (q, k1, k2, v1, v2))
    dtype = v1.dtype
    scores = scale * torch.einsum("bhid,bhjd,bhkd->bhijk", q, k1, k2)
    first, second = (visible(q.shape[2], window, q.device) for window in windows)
    mask = (first[:, :, None] & second[:, None, :])[None, None]
    if hidden is not None:
        shown = ~hidden[:, None, None, :]
        mask = mask & shown[..., :, None] & shown[..., None, :]
    scores = scores.masked_fill(~mask, -torch.inf).flatten(-2)
    weights = torch.softmax(scores, -1).masked_fill(~mask.any(-1).any(-1)[..., None], 0.0)
    length = q.shape[2]
    weights = weights.unflatten(-1, (length, length)).to(dtype)
    return torch.einsum("bhijk,bhjd,bhkd->bhid", weights, v1, v2)


def visible(length: int, window: int, device: torch.device) -> Tensor:
    """(length, length): whether the query of a row sees the key of a column."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)
