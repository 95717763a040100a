"""The plain losses of the tasks, unreduced, and the default weighting."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""A label with this value takes no part in the loss, as in PyTorch and Hugging Face."""


def precise(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cross_entropy(outputs: Any, batch: dict[str, Any]) -> Tensor:
    """Cross-entropy of `logits` (..., classes) against integer `labels` (...), shaped like them."""
    logits, labels = outputs["logits"], batch["labels"]
    flat = F.cross_entropy(
        precise(logits).flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view(labels.shape)


def squared_error(outputs: Any, batch: dict[str, Any]) -> Tensor:
    """Squared error of `logits` against real `labels` of as many elements, shaped like them."""
    labels = batch["labels"]
    return (precise(outputs["logits"]).view(labels.shape) - labels).square()


def supervised(outputs: Any, batch: dict[str, Any]) -> Tensor:
    """Cross-entropy where labels are classes, squared error where they are real."""
    if batch["labels"].is_floating_point():
        return squared_error(outputs, batch)
    return cross_entropy(outputs, batch)


def correct(outputs: Any, batch: dict[str, Any]) -> Tensor:
    """1 where the largest logit is the label's, else 0; shaped like the labels.

    Where the model gives hidden states, logits are made one sample at a time and not kept, so that
    a run whose fused loss never holds them does not begin to.
    """
    labels = batch["labels"]
    if "logits" not in outputs and "hidden" in outputs:
        hidden, classifier = outputs["hidden"], outputs["classifier"]
        predicted = torch.cat([classifier(one).argmax(-1) for one in hidden.split(1)])
    else:
        predicted = outputs["logits"].argmax(-1)
    return (predicted == labels).float()


def valid(losses: Tensor, batch: dict[str, Any]) -> Tensor:
    """Mask, shaped like `losses`, of the elements that count: those whose label is not −100."""
    labels = batch.get("labels")
    if labels is None or labels.shape != losses.shape or labels.is_floating_point():
        return torch.ones_like(losses, dtype=torch.bool)
    return labels != IGNORED


def per_sample(losses: Tensor, batch: dict[str, Any]) -> Tensor:
    """Mean over each sample's elements that count: (batch, ...) to (batch,); 0 where none does."""
    mask, rows = (x.reshape(len(x), -1) for x in (valid(losses, batch), losses))
    return (rows * mask).sum(1) / mask.sum(1).clamp(min=1)


def masked_mean(losses: Tensor, outputs: Any, batch: dict[str, Any]) -> Tensor:
    """Mean of the losses over the elements that count; 0 where none does."""
    mask = valid(losses, batch)
    return (losses * mask).sum() / mask.sum().clamp(min=1)
