"""A validation set in two, samples to calibrate on and the rest to judge by."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from tasks.losses import IGNORED
from techniques.callback import probing
from training.errors import UsageError

if TYPE_CHECKING:
    from training.run import Run


def check_share(share: float) -> None:
    """Refuse a share of the validation set that is not between 0 and 1.

    Raises:
        ValueError: naming it.
    """
    if not 0 < share < 1:
        raise ValueError(f"share: expected above 0 and below 1, got {share}")


def halves(run: "Run", share: float, seed: int) -> tuple[Dataset, Dataset]:
    """A random `share` of the validation set, to calibrate on, and the rest.

    Raises:
        UsageError: when one of them has no sample.
    """
    dataset = run.task.validation
    count = round(share * len(dataset))
    if not 0 < count < len(dataset):
        raise UsageError(f"share: {share} of {len(dataset)} validation samples is none or all")
    order = np.random.default_rng(seed).permutation(len(dataset))
    return dataset.select(order[:count]), dataset.select(order[count:])


def said(run: "Run", dataset: Any) -> tuple[Tensor, Tensor]:
    """The model's logits of every label of a dataset, (labels, classes) in float64, and the labels
    (labels,), on the CPU; labels that are ignored are left out.

    Raises:
        UsageError: for labels that are not classes.
    """
    logits, labels = [], []
    for batch, outputs in probing.validation(run, dataset):
        if batch["labels"].is_floating_point():
            raise UsageError("post: calibration needs labels that are classes")
        counts = batch["labels"] != IGNORED
        logits.append(outputs["logits"][counts].double().cpu())
        labels.append(batch["labels"][counts].cpu())
    return torch.cat(logits), torch.cat(labels)
