"""ESLM: train only on the tokens of highest risk."""

import math
from typing import Any

import torch
from torch import Tensor

from tasks.losses import precise, valid


class EslmTokenSelection:
    """Mean loss over the tokens whose risk is at least its value-at-risk at level α.

    With S the risk of each token of the micro-batch, VaR = inf{s : share of tokens with S ≤ s is at
    least α}, the ⌈αM⌉-th smallest of M; tokens with S ≥ VaR are kept, the top 1 − α. With the loss
    as the risk this minimises the conditional value-at-risk of the loss. No gradient flows through
    the choice.

    Args:
        alpha: share of the tokens left out, in [0, 1); 0 is the plain mean. The paper's value could
            not be checked against its code; a small one, as 0.1, leaves most tokens in.
        risk: `"loss"` (CVaR-loss), or `"entropy"` of the predicted distribution (VaR-entropy),
            which needs `logits`.

    The batch of the paper is here a micro-batch on one process: with accumulation or several
    processes each chooses among its own tokens.

    Shapes: losses (...) to a scalar; 0 where every label is −100.

    Raises:
        ValueError: when `alpha` is not in [0, 1) or `risk` is unknown.

    Source: "ESLM: Risk-Averse Selective Language Modeling for Efficient Pretraining", arXiv
    2505.19893. Without Ada-ESLM, which adapts α, and without selection of whole sequences.
    """

    def __init__(self, alpha: float, risk: str = "loss") -> None:
        if not 0 <= alpha < 1:
            raise ValueError(f"alpha: must be in [0, 1), got {alpha}")
        if risk not in ("loss", "entropy"):
            raise ValueError(f"risk: expected loss or entropy, got {risk!r}")
        self.alpha, self.risk = alpha, risk

    def __call__(self, losses: Tensor, outputs: Any, batch: dict[str, Any]) -> Tensor:
        mask = valid(losses, batch)
        scores = losses.detach() if self.risk == "loss" else entropy(outputs["logits"])
        # Ignored tokens sort first; staying in tensors avoids waiting for the GPU to count them.
        ascending = scores.masked_fill(~mask, -math.inf).flatten().sort().values
        count = mask.sum()
        rank = (self.alpha * count.double() - 1e-9).ceil().long().clamp(min=1)
        position = (mask.numel() - count + rank - 1).clamp(max=mask.numel() - 1)
        kept = mask & (scores >= ascending.gather(0, position.view(1)))
        return (losses * kept).sum() / kept.sum().clamp(min=1)


@torch.no_grad()
def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax(logits): (..., classes) to (...)."""
    log_p = precise(logits).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)
