"""Mixup."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.errors import UsageError

INPUTS = ("pixel_values", "features", "past_values")
"""Entries of a batch that can be mixed."""


class Mixup:
    """Mixes each sample of a batch with another: x̃ = λ·x_i + (1 − λ)·x_j with one λ ~ Beta(α, α) a
    batch and j a random permutation. `MixedLoss` as `task.loss` weighs both samples' labels alike.

    The batch gets `other_labels`, those of j, and `mix`, λ.

    Args:
        alpha: of the Beta distribution; 1 as in both sources: λ is uniform.

    Raises:
        ValueError: for an alpha that is not positive.
        UsageError: for a batch without inputs that are real numbers.

    Source: "mixup: Beyond Empirical Risk Minimization", arXiv 1710.09412;
    https://github.com/facebookresearch/mixup-cifar10, `train.py`.
    https://github.com/2014mchidamb/temp-scaling-limitations, `utils/mixup_utils.py`, is the same
    for two samples.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        if not alpha > 0:
            raise ValueError(f"alpha: must be positive, got {alpha}")
        self.alpha = alpha

    def __call__(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """The batch mixed."""
        names = [name for name in INPUTS if name in batch]
        if not names:
            raise UsageError(f"data.batch: mixup needs one of {', '.join(INPUTS)} in the batch")
        draw = np.random.default_rng(int(torch.randint(2**63 - 1, (), generator=generator)))
        share = draw.beta(self.alpha, self.alpha)
        others = torch.randperm(len(batch["labels"]), generator=generator)
        mixed = {name: share * batch[name] + (1 - share) * batch[name][others] for name in names}
        return {
            **batch,
            **mixed,
            "other_labels": batch["labels"][others],
            "mix": torch.tensor(share, dtype=torch.float32),
        }


class MixedLoss:
    """λ·ℓ(outputs, labels) + (1 − λ)·ℓ(outputs, other_labels), ℓ the task's own loss; ℓ alone of a
    batch that is not mixed.

    Args:
        task: the run's.
    """

    def __init__(self, task: Any) -> None:
        self.loss = task.loss

    def __call__(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        """Unreduced, shaped like the labels."""
        losses = self.loss(outputs, batch)
        if "mix" not in batch:
            return losses
        others = self.loss(outputs, {**batch, "labels": batch["other_labels"]})
        return batch["mix"] * losses + (1 - batch["mix"]) * others
