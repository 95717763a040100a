"""Image classification."""

from typing import Any

import torch
from torch import Tensor

from tasks import images, losses
from tasks.arrays import is_classifier
from training.errors import UsageError


class ImageClassification:
    """Classify the images of a Hugging Face dataset or folder.

    Pixels are standardised with the training set's mean and standard deviation by channel.

    Args:
        path: a folder (one folder of images a class, or Parquet), a name under `ASSAY_DATA`, or a
            hub id.
        augment: in training, mirror with probability ½ and crop from 4 padded pixels, as is usual
            for CIFAR (ResNet, arXiv 1512.03385).
        objective: the model's; `"reconstruction"` leaves out the accuracy.
        name, size, image_column, label_column, train_split, validation_split: as in
            `tasks.images.load`.

    Raises:
        UsageError: for a dataset that is not there, or has no images or labels.
    """

    unit = "samples"

    def __init__(
        self,
        *,
        path: str,
        augment: bool = True,
        objective: str | None = None,
        name: str | None = None,
        size: int | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        train_split: str = "train",
        validation_split: str | None = None,
    ) -> None:
        self.augment, self.objective = augment, objective
        self.images = images.load(
            path,
            name=name,
            size=size,
            image_column=image_column,
            label_column=label_column,
            train_split=train_split,
            validation_split=validation_split,
        )
        self.train, self.validation = self.images.train, self.images.validation
        if self.images.classes is None:
            raise UsageError(f"'{path}' has no column of labels; see task.label_column")
        channels, size, classes = self.images.channels, self.images.size, self.images.classes
        self.dims = {
            **{"in_channels": channels, "image_size": size, "num_classes": classes},
            **{"in_features": channels * size * size, "out_features": classes},
        }

    def count(self, batch: dict[str, Any]) -> int:
        """Images in a batch."""
        return len(batch["labels"])

    def prepare(
        self, rows: dict[str, Any], generator: torch.Generator, training: bool
    ) -> dict[str, Any]:
        """`pixel_values` (batch, channels, size, size) and `labels` (batch,)."""
        pixels = self.images.standardised(rows)
        if training and self.augment:
            pixels = images.crop_and_flip(pixels, generator)
        return {"pixel_values": pixels, "labels": rows["labels"]}

    loss = staticmethod(losses.cross_entropy)

    def scores(self, outputs: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Whether each image was classified right."""
        return {"accuracy": losses.correct(outputs, batch)} if is_classifier(self) else {}
