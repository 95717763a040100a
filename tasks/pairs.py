"""Pairs that belong together: two views of an image, or an image and its caption."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks import images
from tasks.digits import Digits
from tasks.losses import precise
from tasks.tokenizers import Bytes
from training.errors import UsageError

CAPTION = "caption"
"""The column of captions that digits have."""
WORDINGS = ("digit {}", "the number {}", "a handwritten {}", "here is a {}")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Pairs:
    """Tell each sample's partner from all others in the batch.

    Without `text_column` a sample is an image of which a batch holds two views, drawn with
    SimCLR's random resized crop, mirroring, and brightness and contrast (arXiv 2002.05709); the
    model's `logits` are their embeddings. With it the sample is an image and its caption, in bytes,
    and the model gives `image_embeds` and `text_embeds`.

    Where the dataset has labels, a batch has them as `classes`, one an image: for losses that are
    supervised, and not `labels`, which every loss and its mask would read.

    Args:
        path: `digits` (scikit-learn's, no network), or as for the task `image`.
        text_column: of captions; of the digits `caption`, a number in words in one of four
            wordings, drawn anew each time. Many of a batch's captions are then the same, so that
            the accuracy, which asks for the one partner, is far below 1.
        context_length: bytes of a caption that are kept.
        mirror: whether views may be mirrored; null: where the images are not digits.
        temperature: of the loss, in evaluation too; 0.5 as SimCLR has it for CIFAR-10.
        name, size, image_column, train_split, validation_split: as in `tasks.images.load`.

    Raises:
        UsageError: for a dataset or column that is not there.
    """

    unit = "samples"

    def __init__(
        self,
        *,
        path: str = "digits",
        text_column: str | None = None,
        context_length: int = 64,
        mirror: bool | None = None,
        temperature: float = 0.5,
        name: str | None = None,
        size: int | None = None,
        image_column: str | None = None,
        train_split: str = "train",
        validation_split: str | None = None,
    ) -> None:
        self.temperature, self.text_column = temperature, text_column
        self.context_length = context_length
        self.mirror = path != "digits" if mirror is None else mirror
        self.digits = Digits() if path == "digits" else None
        if self.digits is not None:
            if text_column not in (None, CAPTION):
                raise UsageError(
                    f"task.text_column: the digits' is '{CAPTION}', not '{text_column}'"
                )
            self.train, self.validation = self.digits.train, self.digits.validation
            self.dims = {"in_channels": 1, "image_size": 8}
        else:
            self.images = images.load(
                path,
                name=name,
                size=size,
                image_column=image_column,
                text_column=text_column,
                train_split=train_split,
                validation_split=validation_split,
            )
            self.train, self.validation = self.images.train, self.images.validation
            self.dims = {"in_channels": self.images.channels, "image_size": self.images.size}
        if text_column is not None:
            self.dims |= {"vocab_size": Bytes.vocab_size, "context_length": context_length}

    def count(self, batch: dict[str, Any]) -> int:
        """Images in a batch; views count."""
        return len(batch["pixel_values"])

    def prepare(
        self, rows: dict[str, Any], generator: torch.Generator, training: bool
    ) -> dict[str, Any]:
        """`pixel_values` (2·batch, channels, size, size), partners `batch` apart; or with captions
        (batch, ...), `input_ids` and `attention_mask` (batch, context_length). `classes`, where
        there are any, (2·batch,) or (batch,)."""
        batch = self.plain(rows, generator)
        classes, views = batch.pop("labels", None), 1
        if self.text_column is None:
            pixels, views = batch["pixel_values"], 2
            each = [view(pixels, generator, self.mirror) for _ in range(views)]
            batch["pixel_values"] = torch.cat(each)
        if classes is not None:
            batch["classes"] = classes.repeat(views)
        return batch

    def plain(self, rows: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Each image once and as it is, with `labels` (batch,) where there are any, and its caption
        where the model needs one: what a probe of the model's features reads."""
        if self.digits is not None:
            batch = {"pixel_values": self.digits.prepare(rows, generator, False)["pixel_values"]}
        else:
            batch = {"pixel_values": self.images.standardised(rows)}
        if self.text_column is not None:
            batch |= self._captions(self._texts(rows, generator))
        if isinstance(rows.get("labels"), Tensor):
            batch["labels"] = rows["labels"]
        return batch

    def _texts(self, rows: dict[str, Any], generator: torch.Generator) -> list[str]:
        if self.digits is None:
            return rows["text"]
        drawn = torch.randint(len(WORDINGS), rows["labels"].shape, generator=generator)
        pairs = zip(drawn.tolist(), rows["labels"].tolist())
        return [WORDINGS[wording].format(NUMBERS[number]) for wording, number in pairs]

    def _captions(self, texts: list[str]) -> dict[str, Tensor]:
        ids = torch.zeros(len(texts), self.context_length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            found = torch.tensor(list((text or " ").encode()[: self.context_length]))
            ids[row, : len(found)], mask[row, : len(found)] = found, 1
        return {"input_ids": ids, "attention_mask": mask}

    def loss(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        """`infonce` at the task's temperature."""
        return infonce(outputs, batch, temperature=self.temperature)

    def scores(self, outputs: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Whether each sample's partner is the nearest of the batch."""
        similarity, partner = _similarities(outputs)
        return {"accuracy": (similarity.argmax(1) == partner).float()}


def infonce(outputs: Any, batch: dict[str, Any], *, temperature: float = 0.5) -> Tensor:
    """−log softmax of each sample's cosine with its partner, over the others in the batch.

    Of two views (SimCLR's NT-Xent, arXiv 2002.05709) one value a view, over all other views; of
    images and captions (CLIP, arXiv 2103.00020) one a pair, the mean of both directions.

    Args:
        outputs: `logits` (2·batch, embedding), or `image_embeds` and `text_embeds`.
        batch: not used.
        temperature: cosines are divided by it.
    """
    if temperature <= 0:
        raise ValueError(f"temperature: must be positive, got {temperature}")
    similarity, partner = _similarities(outputs)
    scaled = similarity / temperature
    rows = F.cross_entropy(scaled, partner, reduction="none")
    if "image_embeds" not in outputs:
        return rows
    return (rows + F.cross_entropy(scaled.T, partner, reduction="none")) / 2


def view(images: Tensor, generator: torch.Generator, mirror: bool) -> Tensor:
    """A random view of each image: a resized crop of 20% to 100% of its area, at an aspect ratio of
    3/4 to 4/3, perhaps mirrored, its brightness and contrast changed by up to 40%."""
    batch = len(images)
    noise = torch.rand(7, batch, generator=generator)
    area = 0.2 + 0.8 * noise[0]
    ratio = torch.exp((2 * noise[1] - 1) * math.log(4 / 3))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    x, y = (2 * noise[2] - 1) * (1 - width), (2 * noise[3] - 1) * (1 - height)
    if mirror:
        width = torch.where(noise[4] < 0.5, -width, width)
    zero = torch.zeros(batch)
    transform = torch.stack([width, zero, x, zero, height, y], dim=1).view(batch, 2, 3)
    grid = F.affine_grid(transform, list(images.shape), align_corners=False)
    crops = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    brightness, contrast = (0.6 + 0.8 * noise[5:])[:, :, None, None, None]
    return crops * contrast + (brightness - 1)


def embeddings(outputs: Any) -> tuple[Tensor, Tensor | None]:
    """What a contrastive loss compares, of length 1 and in at least float32: the images' and the
    captions' embeddings (batch, embedding), or those of both views (2·batch, embedding) and None.
    """
    if "image_embeds" in outputs:
        image, text = (_normalised(outputs[k]) for k in ("image_embeds", "text_embeds"))
        return image, text
    return _normalised(outputs["logits"]), None


def _normalised(x: Tensor) -> Tensor:
    return F.normalize(precise(x), dim=-1)


def _similarities(outputs: Any) -> tuple[Tensor, Tensor]:
    """Cosines of every sample with every candidate, and the index of its partner."""
    ours, theirs = embeddings(outputs)
    count = len(ours)
    rows = torch.arange(count, device=ours.device)
    if theirs is not None:
        return ours @ theirs.T, rows
    itself = torch.eye(count, dtype=torch.bool, device=ours.device)
    return (ours @ ours.T).masked_fill(itself, -torch.inf), rows.roll(count // 2)
