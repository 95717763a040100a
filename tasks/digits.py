"""Handwritten digits, which scikit-learn brings."""

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from tasks import binary, losses
from tasks.arrays import as_dataset, is_classifier
from training.errors import UsageError


class Digits:
    """Classify scikit-learn's 1,797 handwritten digits of 8×8 pixels.

    A fixed, stratified fifth is for validation. Pixels (0 to 16) are standardised with the training
    set's mean and standard deviation.

    Args:
        positive: null, or a list of digits that are class 1 and all others class 0: one digit is
            about a tenth of the samples. Two classes have the metrics of `tasks.binary` too.
        objective: the model's; `"reconstruction"` leaves out the accuracy.

    Raises:
        UsageError: for positives that are none, all, or no digits.
    """

    unit = "samples"

    def __init__(self, *, positive: list[int] | None = None, objective: str | None = None) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        some = isinstance(positive, list) and bool(positive) and set(positive) < set(range(10))
        if positive is not None and not some:
            raise UsageError(f"task.positive: a list of some of the digits 0 to 9, got {positive}")
        classes = 10 if positive is None else 2
        self.dims = {
            **{"in_channels": 1, "image_size": 8, "num_classes": classes},
            **{"in_features": 64, "out_features": classes},
        }
        images, labels = load_digits(return_X_y=True)
        parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
        train, validation, train_labels, validation_labels = map(np.asarray, parts)
        if positive is not None:
            train_labels, validation_labels = (
                np.isin(part, positive).astype(np.int64) for part in parts[2:]
            )
        self.mean, self.std = float(train.mean()), float(train.std())
        self.objective = objective
        self.train: Dataset = as_dataset({"pixels": train, "labels": train_labels})
        self.validation: Dataset = as_dataset({"pixels": validation, "labels": validation_labels})

    def count(self, batch: dict[str, Any]) -> int:
        """Images in a batch."""
        return len(batch["labels"])

    def prepare(
        self, rows: dict[str, Any], generator: torch.Generator, training: bool
    ) -> dict[str, Any]:
        """`pixel_values` (batch, 1, 8, 8) and `labels` (batch,)."""
        pixels = (rows["pixels"] - self.mean) / self.std
        return {"pixel_values": pixels.view(-1, 1, 8, 8), "labels": rows["labels"]}

    loss = staticmethod(losses.cross_entropy)

    def scores(self, outputs: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Whether each digit was recognised."""
        return {"accuracy": losses.correct(outputs, batch)} if is_classifier(self) else {}

    def collect(self, outputs: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Of two classes, what the metrics need."""
        two = self.dims["num_classes"] == 2 and is_classifier(self)
        return binary.predictions(outputs, batch) if two else {}

    def summarise(self, rows: dict[str, Tensor]) -> dict[str, float]:
        """Of two classes, `tasks.binary.metrics`."""
        return binary.metrics(rows) if rows else {}
