"""Circle loss."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.losses import IGNORED
from tasks.metric_learning import class_vectors, compare, least, to_classes


class CircleLoss(nn.Module):
    """log(1 + Σₙ exp(γ·αₙ·(sₙ − m)) · Σₚ exp(−γ·αₚ·(sₚ − 1 + m))), one value a row.

    sₚ are its cosines with the others of its class and sₙ those with other classes; the weights
    αₚ = [1 + m − sₚ]₊ and αₙ = [sₙ + m]₊ are no part of the gradient, so that a similarity is moved
    the more the further it is from its optimum. In several processes the others are those of all of
    them. With `classes` the loss is the class-level one: sₚ is the cosine with a learned vector of
    the row's class, sₙ those with the others', and the loss is a cross-entropy.

    Range, with K positives and L negatives: from log(1 + K·L·exp(−2γm²)), at sₚ = 1 and sₙ = 0, to
    log(1 + K·L·exp(γ·(5 − 2m²))), at sₚ = −1 and sₙ = 1. Minimiser: its gradient drives
    sₚ to 1, and sₙ beyond 0 to −m, from where on it is 0. Cosines do not saturate: an embedding's
    length changes nothing. A row without a positive or a negative has 0, and counts in the mean,
    unlike in pytorch-metric-learning.

    Args:
        margin: m, from 0 to 1; the paper has 0.4 for fine-grained retrieval, and 0.25 for faces and
            re-identification.
        scale: γ; 80 for fine-grained retrieval, 128 for re-identification, 256 for faces.
        classes: training classes, for the class-level loss.
        embedding: features of an embedding, for the class-level loss.

    Shapes: `logits` (batch, embedding) and `labels` (batch,) to losses (batch,), 0 where a label is
    −100.

    Raises:
        ValueError: for a margin or a scale out of range, or `classes` without `embedding`.

    Source: "Circle Loss: A Unified Perspective of Pair Similarity Optimization", arXiv 2002.10857,
    equations 4 to 8; https://github.com/KevinMusgrave/pytorch-metric-learning,
    `losses/circle_loss.py` (one value a row, its defaults), and
    https://github.com/TinyZeaMays/CircleLoss, `circle_loss.py` (which has one value for all pairs
    of the batch) and `circle_loss_early.py` (the class-level loss). None is the authors' own.
    """

    def __init__(
        self,
        margin: float = 0.4,
        scale: float = 80.0,
        classes: int | None = None,
        embedding: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= margin <= 1:
            raise ValueError(f"margin: must be from 0 to 1, got {margin}")
        if scale <= 0:
            raise ValueError(f"scale: must be positive, got {scale}")
        if (classes is None) != (embedding is None):
            raise ValueError("classes, embedding: the class-level loss needs both")
        self.margin, self.scale = margin, scale
        self.weight = None
        if classes is not None and embedding is not None:
            self.weight = class_vectors(classes, embedding)

    def forward(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        if self.weight is None:
            cosines, same, other = compare(outputs, batch)
        else:
            cosines = to_classes(outputs, self.weight)
            labels = batch["labels"][:, None]
            same = labels == torch.arange(len(self.weight), device=labels.device)
            other = ~same & (labels != IGNORED)
        m, constant = self.margin, cosines.detach()
        positive = -self.scale * F.relu(1 + m - constant) * (cosines - 1 + m)
        negative = self.scale * F.relu(constant + m) * (cosines - m)
        positives, negatives = (
            logit.masked_fill(~mask, least(logit)).logsumexp(1)
            for logit, mask in ((positive, same), (negative, other))
        )
        total = positives + negatives
        losses = torch.logaddexp(total, torch.zeros_like(total))  # softplus is exact to 2e-9 only
        return torch.where(same.any(1) & other.any(1), losses, 0)
