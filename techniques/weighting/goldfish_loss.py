"""The goldfish loss: tokens that are never learnt cannot be recited."""

from typing import Any

import torch
from torch import Tensor

from tasks.losses import valid
from training.errors import UsageError

TABLE_SIZE = 1_000_003
TABLE_SEED = 2971215073


class GoldfishLoss:
    """Mean loss over the tokens that a hash of their context keeps; about one in k is dropped.

    A label is dropped when table[(product of it and the h − 1 labels before it) mod 1 000 003] is
    below 1/k, with a fixed table of uniform numbers. A passage that comes again is masked in the
    same places, so the dropped tokens are never learnt. The first h − 1 labels of a sequence are
    always kept.

    This is the "hash-table" strategy of the authors' code, including the label itself in its own
    hash (the paper hashes the tokens before it) and products that wrap around in 64 bits. The table
    is drawn on the CPU, so that the mask does not depend on the device.

    Args:
        k: one in k tokens is dropped, at least 2; 4 in the paper.
        context: h, tokens in a hash; 13 in the paper.

    The mean is over the kept tokens of each micro-batch.

    Shapes: losses and integer `labels` (batch, length) to a scalar; 0 where nothing is kept.

    Raises:
        ValueError: when `k` is below 2 or `context` below 1.
        UsageError: for labels that are no sequences of at least `context` tokens.

    Source: "Be like a Goldfish, Don't Memorize! Mitigating Memorization in Generative LLMs", arXiv
    2406.10209; https://github.com/ahans30/goldfish-loss, `lit_gpt/utils.py`.
    """

    def __init__(self, k: int = 4, context: int = 13) -> None:
        if k < 2:
            raise ValueError(f"k: must be at least 2, got {k}")
        if context < 1:
            raise ValueError(f"context: must be at least 1, got {context}")
        self.k, self.context = k, context
        generator = torch.Generator().manual_seed(TABLE_SEED)
        # No buffer: DDP would broadcast its 4 MB before every forward.
        self.table = torch.rand(TABLE_SIZE, generator=generator)

    def dropped(self, labels: Tensor) -> Tensor:
        """Mask (batch, length) of the labels that are left out."""
        if labels.is_floating_point() or labels.ndim != 2 or labels.shape[1] < self.context:
            raise UsageError(
                f"weighting: goldfish_loss needs token labels (batch, {self.context} or more), "
                f"got {labels.dtype} {tuple(labels.shape)}"
            )
        self.table = self.table.to(labels.device)
        keys = labels.unfold(1, self.context, 1).prod(-1) % TABLE_SIZE
        mask = torch.zeros_like(labels, dtype=torch.bool)
        mask[:, self.context - 1 :] = self.table[keys] < 1 / self.k
        return mask

    def __call__(self, losses: Tensor, outputs: Any, batch: dict[str, Any]) -> Tensor:
        kept = valid(losses, batch) & ~self.dropped(batch["labels"])
        return (losses * kept).sum() / kept.sum().clamp(min=1)
