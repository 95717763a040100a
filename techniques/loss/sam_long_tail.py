"""Losses for classes of very different sizes: LDAM and vector scaling."""

from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from tasks.losses import IGNORED, precise
from training.errors import UsageError


def class_sizes(task: Any, column: str = "labels") -> np.ndarray:
    """Training samples of each class, (classes,), float64.

    Raises:
        UsageError: when the task has no classes, or one of them no sample.
    """
    classes = task.dims.get("num_classes")
    if classes is None or column not in task.train.column_names:
        raise UsageError(f"task: class sizes need num_classes and a column '{column}' of labels")
    labels = np.asarray(task.train[column][:])
    sizes = np.bincount(labels[labels != IGNORED], minlength=classes).astype(np.float64)
    if not sizes.all():
        raise UsageError(f"task: class {int(sizes.argmin())} has no training sample")
    return sizes


class LDAMLoss:
    """Cross-entropy of s·(z − m_y·1_y), with a margin m_j = m·(n_min / n_j)^¼ that is the larger
    the fewer samples n_j a class has.

    z are cosines, of the head `techniques.head.sam_long_tail.CosineHead`, so that a margin means
    the same for every sample.

    Minimiser: none at finite logits; of cosines, the label's 1 and the others −1. Range [0, ∞) of
    the losses. Where the label's logit is far above the others' the loss saturates at 0 with slope
    0, far below it grows with slope −s.

    Args:
        task: tells the classes' sizes.
        margin: m, of the smallest class; 0.5 as in the authors' code.
        scale: s; 30 as there.
        column: of the training set, with the labels.

    Shapes: logits (batch, classes) and labels (batch,) to losses (batch,), 0 where a label is −100.

    Raises:
        ValueError: for a negative margin, or a scale that is not positive.

    Source: "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", arXiv
    1906.07413, as https://github.com/val-iisc/Saddle-LongTail has it, `losses.py`.
    """

    def __init__(
        self, task: Any, margin: float = 0.5, scale: float = 30.0, column: str = "labels"
    ) -> None:
        if margin < 0:
            raise ValueError(f"margin: must not be negative, got {margin}")
        if scale <= 0:
            raise ValueError(f"scale: must be positive, got {scale}")
        sizes = class_sizes(task, column)
        self.margins = (margin * (sizes.min() / sizes) ** 0.25).tolist()
        self.scale = scale

    def __call__(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        logits, labels = precise(outputs["logits"]), batch["labels"]
        own = F.one_hot(labels.clamp(min=0), logits.shape[-1])
        shifted = self.scale * (logits - own * logits.new_tensor(self.margins))
        return F.cross_entropy(shifted, labels, ignore_index=IGNORED, reduction="none")


class VSLoss:
    """Cross-entropy of z / Δ + ι: Δ_j = (n_max / n_j)^γ scales, ι_j = τ·log(n_j / n) shifts.

    Minimiser: none at finite logits, the label's should be far above the others'. Range [0, ∞);
    saturates at 0 with slope 0 there, and grows with slope −1/Δ_y far on the other side.

    Args:
        task: tells the classes' sizes.
        gamma: γ; 0.3 as in the authors' code.
        tau: τ; 1 as there.
        column: of the training set, with the labels.

    Shapes: logits (batch, classes) and labels (batch,) to losses (batch,), 0 where a label is −100.

    Raises:
        ValueError: for a negative γ or τ.

    Source: "Label-Imbalanced and Group-Sensitive Classification under Overparameterization", arXiv
    2103.01550, as https://github.com/val-iisc/Saddle-LongTail has it, `losses.py`.
    """

    def __init__(
        self, task: Any, gamma: float = 0.3, tau: float = 1.0, column: str = "labels"
    ) -> None:
        for name, value in {"gamma": gamma, "tau": tau}.items():
            if value < 0:
                raise ValueError(f"{name}: must not be negative, got {value}")
        sizes = class_sizes(task, column)
        self.scales = ((sizes.max() / sizes) ** gamma).tolist()
        self.shifts = (tau * np.log(sizes / sizes.sum())).tolist()

    def __call__(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        z = precise(outputs["logits"])
        adjusted = z / z.new_tensor(self.scales) + z.new_tensor(self.shifts)
        labels = batch["labels"]
        return F.cross_entropy(adjusted, labels, ignore_index=IGNORED, reduction="none")
