"""What a random network makes of points in a cube, for studies of how loss scales."""

from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor

from tasks import losses
from tasks.arrays import as_dataset


class Teacher:
    """Regress a random teacher y = Σₖ aₖ·max(wₖ·x + bₖ, 0) on uniform points of [−1, 1]^d.

    w and b are uniform in ±1/√d, as those of `torch.nn.Linear` at its start, so that a perceptron
    of one hidden layer has features of the same distribution; a is normal. Labels are standardised
    with the training set's mean and standard deviation, so that the mean predictor's loss is 1.

    Args:
        features: d, the dimension of the data.
        width: the teacher's, terms of the sum.
        samples, validation: points of the two sets.
        seed: of teacher and points, whatever the run's.

    Raises:
        ValueError: for a number below 1, or fewer than two samples.
    """

    unit = "samples"

    def __init__(
        self,
        *,
        features: int = 4,
        width: int = 1024,
        samples: int = 8192,
        validation: int = 8192,
        seed: int = 0,
    ) -> None:
        least = min(features, width, samples - 1, validation)
        if least < 1:
            raise ValueError(
                "task.features, task.width, task.samples, task.validation: must be at least 1, "
                f"samples 2, got {features}, {width}, {samples} and {validation}"
            )
        rng = np.random.default_rng(seed)
        bound = 1 / np.sqrt(features)
        self.weights = rng.uniform(-bound, bound, (width, features))
        self.biases = rng.uniform(-bound, bound, width)
        self.readout = rng.standard_normal(width)
        points = rng.uniform(-1, 1, (samples + validation, features)).astype(np.float32)
        labels = self.labels(points)
        labels = (labels - labels[:samples].mean()) / labels[:samples].std()
        self.train: Dataset = as_dataset({"features": points[:samples], "labels": labels[:samples]})
        self.validation: Dataset = as_dataset(
            {"features": points[samples:], "labels": labels[samples:]}
        )
        self.dims = {"in_features": features, "out_features": 1}

    def labels(self, points: np.ndarray) -> np.ndarray:
        """What the teacher makes of points (count, d): (count,), float64."""
        parts = np.array_split(points.astype(float), max(1, len(points) // 1024))
        hidden = (np.maximum(part @ self.weights.T + self.biases, 0) for part in parts)
        return np.concatenate([part @ self.readout for part in hidden])

    def count(self, batch: dict[str, Any]) -> int:
        """Points in a batch."""
        return len(batch["labels"])

    def prepare(self, rows: dict[str, Any], generator: Any, training: bool) -> dict[str, Any]:
        """`features` (batch, d) and `labels` (batch,)."""
        return rows

    loss = staticmethod(losses.squared_error)

    def scores(self, outputs: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """None beside the loss, the squared error."""
        return {}
