"""Handwritten digits at angles, one of which no training digit has: domain generalisation."""

from typing import Any

import numpy as np
import torch
from scipy.ndimage import rotate
from torch import Tensor

from tasks import losses
from tasks.arrays import as_dataset, is_classifier
from tasks.digits import Digits
from training.errors import UsageError

ANGLES = (0.0, 15.0, 30.0, 45.0, 60.0)
"""Those of DomainBed's RotatedMNIST but the last, 75 (arXiv 2007.01434)."""


class RotatedDigits(Digits):
    """Classify scikit-learn's digits turned by an angle that training did not have.

    The domains are the angles. Every training digit belongs to one domain, as in DomainBed. The
    validation digits are there twice, in the held-out domain and in one of the training domains:
    `accuracy` is that of the first and `source_accuracy`, which may choose hyperparameters, that of
    the second; the loss is the mean of both.

    Args:
        angles: of the training domains, in degrees, counter-clockwise.
        held_out: the angle of the domain that generalisation is measured on.
        objective: the model's; `"reconstruction"` leaves out the accuracies.

    Raises:
        UsageError: without training domains, or when the held-out one is among them.
    """

    def __init__(
        self,
        *,
        angles: tuple[float, ...] = ANGLES,
        held_out: float = 75.0,
        objective: str | None = None,
    ) -> None:
        if not angles or held_out in angles:
            raise UsageError(f"task.angles: some, and none of them {held_out}, got {list(angles)}")
        super().__init__(objective=objective)
        parts = [
            {name: np.asarray(part[name]) for name in ("pixels", "labels")}
            for part in (self.train, self.validation)
        ]
        (train, train_labels), (validation, labels) = (p.values() for p in parts)
        sources, targets = turned(train, angles), turned(validation, (held_out,))
        self.mean, self.std = float(sources.mean()), float(sources.std())
        self.train = as_dataset(
            {
                "pixels": sources,
                "labels": train_labels,
                "held_out": np.zeros(len(sources), int),
                "angle": np.resize(angles, len(sources)),
            }
        )
        at = np.resize(angles, len(targets))
        self.validation = as_dataset(
            {
                "pixels": np.concatenate([targets, turned(validation, angles)]),
                "labels": np.concatenate([labels, labels]),
                "held_out": np.repeat([1, 0], len(targets)),
                "angle": np.concatenate([np.full(len(targets), held_out), at]),
            }
        )

    def prepare(
        self, rows: dict[str, Any], generator: torch.Generator, training: bool
    ) -> dict[str, Any]:
        """`pixel_values` (batch, 1, 8, 8), `labels` (batch,) and `held_out` (batch,), 1 or 0."""
        prepared = super().prepare(rows, generator, training)
        return prepared | {"held_out": rows["held_out"]}

    def scores(self, outputs: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Whether each digit of the held-out domain, and each of the others, was recognised."""
        if not is_classifier(self):
            return {}
        correct, held_out = losses.correct(outputs, batch), batch["held_out"].bool()
        return {"accuracy": correct[held_out], "source_accuracy": correct[~held_out]}


def turned(images: np.ndarray, angles: tuple[float, ...]) -> np.ndarray:
    """Images (count, 64) of which the i-th is turned by the i-th angle, and again from the first:
    bilinear, with 0 from outside."""
    squares = images.reshape(-1, 8, 8)
    found = np.empty_like(squares)
    for i, angle in enumerate(angles):
        part = squares[i :: len(angles)]
        found[i :: len(angles)] = rotate(part, angle, axes=(2, 1), reshape=False, order=1)
    return found.reshape(images.shape)
