"""Training on a part of each batch: selective backpropagation and RHO-LOSS."""

from typing import Any

import torch
from torch import Tensor, nn

from tasks.losses import cross_entropy, per_sample, valid
from training.errors import UsageError

Batch = dict[str, Any]


class SelectiveBackprop(nn.Module):
    """Mean loss over the samples that are accepted, each with probability rᵝ, with r in (0, 1] the
    rank of its loss among the last ones.

    A sample's loss is the mean over its labels; the rank counts itself and half of its equals. The
    authors go on until a batch of accepted samples is full; here a step takes as many as it gets.

    Args:
        beta: β, the selectivity; 1 as in the code, which accepts half.
        history: losses to rank among; 5000 as in the code.

    Losses of one label per sample, or of several (batch, ...), to a scalar; 0 where none is
    accepted.

    Raises:
        ValueError: for a negative β or a history below 1.

    Source: "No Train No Gain: Revisiting Efficient Training Algorithms For Transformer-based
    Language Models", arXiv 2307.06440, after "Accelerating Deep Learning by Focusing on the Biggest
    Losers", arXiv 1910.00762; https://github.com/JeanKaddour/NoTrainNoGain,
    `bert/pretrain_bert_sb.py`.
    """

    history: Tensor

    def __init__(self, beta: float = 1.0, history: int = 5000) -> None:
        super().__init__()
        if beta < 0:
            raise ValueError(f"beta: must not be negative, got {beta}")
        if history < 1:
            raise ValueError(f"history: must be at least 1, got {history}")
        self.beta = beta
        self.register_buffer("history", torch.full((history,), torch.nan))

    def forward(self, losses: Tensor, outputs: Any, batch: Batch) -> Tensor:
        own = per_sample(losses, batch).detach()
        with torch.no_grad():
            recent = torch.cat([self.history, own.to(self.history)])[-len(self.history) :]
            self.history.copy_(recent)
            accepted = torch.rand_like(own) < self.ranks(own) ** self.beta
        return mean_of(losses, batch, accepted)

    def ranks(self, values: Tensor) -> Tensor:
        """Of values that are in the history, in it."""
        below = (self.history < values[:, None]).sum(1)
        not_above = (self.history <= values[:, None]).sum(1)
        return (below + not_above + 1) / 2 / self.history.isfinite().sum()


class RhoLoss:
    """Mean loss over the share of the samples whose loss exceeds a teacher's most: what can be
    learnt and is not yet.

    The teacher, trained on held-out samples, comes from `callbacks.teacher`; its losses are the
    irreducible ones. A sample's loss is the mean over its labels.

    Args:
        keep: share of each micro-batch, in (0, 1]; 0.5 as in the code's command (1536 of 3072).

    Losses of one label per sample, or of several (batch, ...), to a scalar.

    Raises:
        ValueError: for a share outside (0, 1].
        UsageError: without a teacher.

    Source: as `SelectiveBackprop`, after "Prioritized Training on Points that are Learnable, Worth
    Learning, and Not Yet Learnt", arXiv 2206.07137; `bert/pretrain_bert_rho_loss.py`.
    """

    def __init__(self, keep: float = 0.5) -> None:
        if not 0 < keep <= 1:
            raise ValueError(f"keep: must be above 0 and at most 1, got {keep}")
        self.keep = keep

    def __call__(self, losses: Tensor, outputs: Any, batch: Batch) -> Tensor:
        if "teacher_logits" not in batch:
            raise UsageError("weighting: RHO-LOSS needs a teacher, callbacks.teacher")
        irreducible = cross_entropy({"logits": batch["teacher_logits"]}, batch)
        gain = (per_sample(losses, batch) - per_sample(irreducible, batch)).detach()
        best = gain.topk(max(round(self.keep * len(gain)), 1)).indices
        return mean_of(
            losses, batch, torch.zeros_like(gain, dtype=torch.bool).index_fill(0, best, True)
        )


def mean_of(losses: Tensor, batch: Batch, chosen: Tensor) -> Tensor:
    """Mean over the labels that count of the samples with a true `chosen` (batch)."""
    mask = valid(losses, batch) & chosen.view(-1, *[1] * (losses.ndim - 1))
    return (losses * mask).sum() / mask.sum().clamp(min=1)
