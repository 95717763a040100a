"""ProtoCLR: contrast with the prototypes of the batch's classes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.losses import IGNORED
from tasks.metric_learning import everyones


class ProtoCLR:
    """Cross-entropy of zᵢ·c / τ over the classes of the batch, one value a row: z are embeddings of
    length 1 and cₖ is the mean of those of class k, the row's own and all views' among them.

    Prototypes are not of length 1, and gradients go through them. It takes batch·classes products
    where the supervised contrastive loss takes batch². In several processes the prototypes are
    those of all their samples.

    With C classes of one size its mean is least, log(1 + (C − 1)·exp(−C / ((C − 1)·τ))), where each
    class is one point and these are the corners of a simplex. A value is below
    log(1 + (C − 1)·exp(2/τ)), and 0 with one class. Cosines do not saturate: an embedding's length
    changes nothing.

    Args:
        temperature: τ; 0.1 as in the authors' code.

    Shapes: `logits` (batch, embedding) and `labels` (batch,), views of an image being rows, to
    losses (batch,), 0 where a label is −100.

    Raises:
        ValueError: for a temperature that is not positive.

    Source: "Domain-Invariant Representation Learning of Bird Sounds", arXiv 2409.08589;
    https://github.com/ilyassmoummad/ProtoCLR, `losses.py` (`ProtoCLRLoss`) and `args.py`.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        if temperature <= 0:
            raise ValueError(f"temperature: must be positive, got {temperature}")
        self.temperature = temperature

    def __call__(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        ours, samples, labels, place = everyones(outputs, batch)
        classes, number = labels.unique(return_inverse=True)
        members = F.one_hot(number, len(classes)).to(samples.dtype)
        with torch.autocast(ours.device.type, enabled=False):
            prototypes = members.T @ samples / members.sum(0)[:, None]
            scaled = ours @ prototypes.T / self.temperature
        scaled = scaled.masked_fill(classes == IGNORED, torch.finfo(scaled.dtype).min)
        own = number[place].where(batch["labels"] != IGNORED, IGNORED)
        return F.cross_entropy(scaled, own, ignore_index=IGNORED, reduction="none")
