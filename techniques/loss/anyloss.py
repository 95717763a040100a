"""AnyLoss: a metric of the confusion matrix as a loss."""

from typing import Any

import torch
import torch.distributed.nn.functional as dist
from torch import Tensor, nn

from tasks.binary import margins
from tasks.losses import IGNORED
from techniques.loss.inf_cl_tiled_contrastive import processes

METRICS = ("fbeta", "gmean", "balanced_accuracy", "accuracy")


class AnyLoss(nn.Module):
    """1 − a metric of the batch's confusion matrix, whose counts are of sharpened probabilities.

    With p = σ(f₁ − f₀) the probability of class 1 and A = 1 / (1 + exp(−L·(p − ½))):

        TP = Σ y·A    FP = Σ (1 − y)·A    FN = Σ y·(1 − A)    TN = Σ (1 − y)·(1 − A)

    `fbeta` is (1 + β²)·TP / (β²·(TP + FN) + TP + FP), `gmean` √(TPR·TNR), `balanced_accuracy`
    (TPR + TNR) / 2 with TPR = TP / (TP + FN) and TNR = TN / (TN + FP), and `accuracy`
    (TP + TN) / n. Where a batch lacks a class that the metric divides by, the metric is 0 and has
    no gradient; the code of the authors' extension adds 1e-5 to denominators to that end. That
    extension also has no root in `gmean`, which the code of the paper's losses has.

    A statistic of the batch is no mean over samples: each of its labels has the batch's value, so
    that their mean is it. In several processes the counts are those of all of them. Micro-batches
    of `trainer.accumulate` are batches of their own, whose metrics are averaged: their loss is not
    that of the whole batch.

    Range: 0 to 1. Minimiser: any f that gives every sample's class a probability well above ½, at
    L = 73 above about 0.6. Where logits are saturated the gradient, a multiple of
    L·A·(1 − A)·p·(1 − p), is 0 on both sides: a sample that is confidently wrong is given up.

    Args:
        metric: one of the four; F-beta in the overlay.
        beta: β of F-beta; 1 as in the paper's F1.
        scale: L; 73 as in the code of the paper's losses.

    Shapes: two-class `logits` (..., 2) and `labels` (...) of 0 and 1 to losses (...), 0 where a
    label is −100.

    Raises:
        ValueError: for another metric, a β or scale that is not positive, or a model whose outputs
            are not two.

    Source: "AnyLoss: Transforming Classification Metrics into Loss Functions", arXiv 2405.14745;
    https://github.com/doheonhan/anyloss_extension, `[Type1_1]_LearningTime.ipynb` (the paper's
    losses) and `AnyLoss_Code.ipynb` (the extension's).
    """

    def __init__(self, metric: str = "fbeta", beta: float = 1.0, scale: float = 73.0) -> None:
        super().__init__()
        if metric not in METRICS:
            raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
        for name, value in {"beta": beta, "scale": scale}.items():
            if value <= 0:
                raise ValueError(f"{name}: must be positive, got {value}")
        self.metric, self.beta, self.scale = metric, beta, scale

    def forward(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        labels = batch["labels"]
        kept, positive = labels != IGNORED, labels == 1
        sharp = 0.5 * self.scale * torch.tanh(margins(outputs) / 2)  # L·(p − ½)
        parts = [
            torch.where(rows, (sign * sharp).sigmoid(), 0).sum()
            for rows in (positive, kept & ~positive)
            for sign in (1, -1)
        ]
        group = processes(self.training)
        counts = torch.stack(parts)
        if group is not None:
            counts = dist.all_reduce(counts, group=group)
        loss = 1 - self._value(*counts)  # type: ignore[misc]
        return loss * kept

    def _value(self, tp: Tensor, fn: Tensor, fp: Tensor, tn: Tensor) -> Tensor:
        positive, negative = tp + fn, fp + tn
        tiny = torch.finfo(tp.dtype).tiny
        if self.metric == "fbeta":
            weighted = self.beta**2 * positive
            return (1 + self.beta**2) * tp / (weighted + tp + fp).clamp(min=tiny)
        if self.metric == "accuracy":
            return (tp + tn) / (positive + negative).clamp(min=tiny)
        pairs = (positive * negative).clamp(min=tiny)
        if self.metric == "gmean":
            return (tp * tn / pairs).clamp(min=tiny).sqrt()  # the root has no slope at 0
        return (negative * tp + positive * tn) / (2 * pairs)
