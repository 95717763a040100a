"""Deferred re-weighting: small classes count more, but only late in training."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from tasks.losses import IGNORED
from techniques.loss.sam_long_tail import class_sizes

if TYPE_CHECKING:
    from training.run import Run


class DeferredReweighting:
    """From a fraction of training on each sample's `weight` is that of its class,
    (1 − β) / (1 − β^n_j), of n_j samples, scaled so that the classes' mean is 1.

    With `techniques.weighting.sam_long_tail.weighted_mean`; a micro-batch's `share` becomes that of
    the weights, so that a step's loss is the weighted mean over the whole batch.

    Args:
        start: fraction of the steps before which samples count alike; 0.8, the authors' epoch 160
            of 200.
        beta: β; 0.9999 as in the authors' code. At 0 weights are equal, at 1 they are 1/n_j.
        column: of the training set, with the labels.

    Raises:
        ValueError: for a fraction outside [0, 1] or a β outside [0, 1).

    Source: https://github.com/val-iisc/Saddle-LongTail, `cifar_train_sam.py`, train rule DRW; first
    in "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", arXiv 1906.07413.
    """

    def __init__(self, start: float = 0.8, beta: float = 0.9999, column: str = "labels") -> None:
        if not 0 <= start <= 1:
            raise ValueError(f"start: must be between 0 and 1, got {start}")
        if not 0 <= beta < 1:
            raise ValueError(f"beta: must be in [0, 1), got {beta}")
        self.start, self.beta, self.column = start, beta, column

    def on_fit_start(self, run: "Run") -> None:
        """Count the classes."""
        weights = class_weights(class_sizes(run.task, self.column), self.beta)
        self.weights = torch.tensor(weights, dtype=torch.float32, device=run.device)

    def on_batch(self, run: "Run") -> None:
        """Weight the step's samples."""
        if run.step < self.start * run.max_steps:
            return
        for batch in run.microbatches:
            labels = batch["labels"]
            counts = labels != IGNORED
            weight = self.weights[labels.clamp(min=0)] * counts
            batch["weight"] = weight * batch.get("weight", 1)  # of a selected training set
        sums = torch.stack([batch["weight"].sum() for batch in run.microbatches])
        total = run.accelerator.reduce(sums.sum(), "sum").clamp(min=1e-12)  # type: ignore[union-attr]
        # Gradients are averaged over processes; times their number, the average is the sum.
        for batch, own in zip(run.microbatches, sums):
            batch["share"] = own / total * run.accelerator.num_processes


def class_weights(sizes: np.ndarray, beta: float) -> np.ndarray:
    """Weights of classes by their number of samples, (classes,), of mean 1."""
    weights = (1 - beta) / (1 - beta**sizes)
    return weights / weights.mean()
