"""The definition, with the logits matrix in memory."""

import torch
from torch import Tensor
from torch.nn import functional as F


def per_token(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """Negative log likelihood and log-sum-exp of every row, each (tokens,).

    hidden (tokens, dim), weight (vocab, dim), bias (vocab,), targets (tokens,). Half-precision
    inputs are raised to float32 first.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    nll = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    return nll, logits.logsumexp(-1)
