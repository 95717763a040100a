"""Image datasets as memory-mapped pixels, and their augmentation."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import Image
from torch import Tensor

from tasks import sources
from tasks.cache import cached, digest
from training.errors import UsageError

GREY = frozenset({"1", "L", "LA", "I", "I;16", "I;16B", "I;16L"})
"""Pillow's modes of images without colour."""


@dataclass
class Images:
    """A dataset of images of one size.

    `train` and `validation` have the columns `pixels` (channels·size·size, uint8), and `labels`
    or `text` where the dataset has them. `mean` and `std` are the training set's by channel, of
    pixels from 0 to 1.
    """

    train: Dataset
    validation: Dataset
    channels: int
    size: int
    classes: int | None
    mean: Tensor
    std: Tensor

    def standardised(self, rows: dict[str, Any]) -> Tensor:
        """Pixels as float32 (batch, channels, size, size), with mean 0 and variance 1."""
        pixels = rows["pixels"].view(-1, self.channels, self.size, self.size)
        mean, std = self.mean[:, None, None], self.std[:, None, None]
        return (pixels.float() / 255 - mean) / std


def load(
    path: str,
    *,
    name: str | None = None,
    size: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    text_column: str | None = None,
    train_split: str = "train",
    validation_split: str | None = None,
) -> Images:
    """Load a Hugging Face image dataset or folder; decoded once, cached by a hash of its content.

    Images are grey where all of a split are, else in colour; 16 bits a channel become 8.

    Args:
        path: a folder, a name under `ASSAY_DATA`, or a hub id.
        name: the configuration of a hub dataset that has several.
        size: side to resize to, in pixels; default: the images' own, which must be one.
        image_column, label_column: default: the first of images, and of class labels.
        text_column: of captions, where wanted.
        train_split, validation_split: the second is by default `validation`, else `test`, else
            the last tenth of the first.

    Raises:
        UsageError: for a dataset, split or column that is not there, or images of many sizes.
    """
    found = sources.load(path, name)
    train = sources.split(found, train_split, "task.train_split", path)
    held_out = sources.held_out(found, train_split, validation_split, path)
    if held_out is None:
        parts = train.train_test_split(test_size=0.1, seed=0)
        train, held_out = parts["train"], parts["test"]
    columns = {"image": _image_column(train, image_column, path)}
    label = _label_column(train, label_column, path)
    if label:
        columns["label"] = label
    if text_column:
        columns["text"] = sources.column(train, text_column, "task.text_column", path)
    folders = [_decoded(part, columns, size, path) for part in (train, held_out)]
    about = [json.loads((folder / "about.json").read_text()) for folder in folders]
    if about[0]["shape"] != about[1]["shape"]:
        shapes = " and ".join("×".join(map(str, part["shape"])) for part in about)
        raise UsageError(f"'{path}': its splits' images are of {shapes}; see task.size")
    channels, side, _ = about[0]["shape"]
    return Images(
        *(Dataset.from_file(str(folder / "pixels.arrow")) for folder in folders),
        channels=channels,
        size=side,
        classes=_classes(train, label),
        mean=torch.tensor(about[0]["mean"]),
        std=torch.tensor(about[0]["std"]).clamp(min=1e-3),
    )


def crop_and_flip(images: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Each image mirrored with probability ½ and cropped to its size from zero-padded borders."""
    batch, _, height, width = images.shape
    flipped = torch.rand(batch, generator=generator) < 0.5
    images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
    padded = F.pad(images, (padding,) * 4)
    offsets = torch.randint(2 * padding + 1, (2, batch, 1), generator=generator)
    rows, columns = offsets[0] + torch.arange(height), offsets[1] + torch.arange(width)
    each = torch.arange(batch)[:, None, None]
    return padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _decoded(dataset: Dataset, columns: dict[str, str], size: int | None, path: str) -> Path:
    """The folder with the split's pixels."""
    raw = dataset.cast_column(columns["image"], datasets.Image(decode=False))

    def rows() -> Iterator[dict[str, Any]]:
        for row in raw:
            image = row[columns["image"]]  # type: ignore[index]
            content = image["bytes"] or Path(image["path"]).read_bytes()
            others = {key: row[column] for key, column in columns.items() if key != "image"}  # type: ignore[index]
            yield others | {"image": content}

    def write(folder: Path) -> None:
        grey = all(_open(row["image"], path).mode in GREY for row in rows())
        pixels = (row | {"pixels": _pixels(row["image"], grey, size, path)} for row in rows())
        _write(folder, pixels, columns, path)

    parts = (
        part
        for row in rows()
        for part in (row["image"], str(row.get("label")), str(row.get("text")))
    )
    return cached("images", digest([*map(str, ("images-1", size, sorted(columns))), *parts]), write)


def _write(
    folder: Path,
    rows: Iterator[dict[str, Any]],
    columns: dict[str, str],
    path: str,
) -> None:
    writer = shape = schema = None
    count, total, squares = 0, np.zeros(1), np.zeros(1)
    group: list[dict[str, Any]] = []

    def flush() -> None:
        arrays = [_fixed(np.stack([row["pixels"] for row in group]))]
        if "label" in columns:
            arrays.append(pa.array([row["label"] for row in group], pa.int64()))
        if "text" in columns:
            arrays.append(pa.array([row["text"] for row in group], pa.string()))
        assert writer is not None
        writer.write_batch(pa.record_batch(arrays, schema=schema))
        group.clear()

    for row in rows:
        pixels = row["pixels"]
        if shape is None:
            shape = pixels.shape
            kind = pa.list_(pa.uint8(), int(np.prod(shape)))
            fields = [("pixels", kind)]
            fields += [("labels", pa.int64())] if "label" in columns else []
            fields += [("text", pa.string())] if "text" in columns else []
            schema = pa.schema(fields)
            writer = pa.ipc.new_stream(str(folder / "pixels.arrow"), schema)
            if shape[1] != shape[2]:
                raise UsageError(f"'{path}': images are not square; set task.size")
        if pixels.shape != shape:
            raise UsageError(
                f"'{path}': images of {shape[2]}×{shape[1]} and of {pixels.shape[2]}×"
                f"{pixels.shape[1]} pixels; set task.size"
            )
        scaled = pixels.reshape(shape[0], -1) / 255.0
        total, squares = total + scaled.mean(1), squares + (scaled**2).mean(1)
        count += 1
        group.append(row)
        if len(group) == 256:
            flush()
    if shape is None or writer is None:
        raise UsageError(f"'{path}': a split has no images")
    if group:
        flush()
    writer.close()
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    about = {"shape": shape, "mean": mean.tolist(), "std": std.tolist()}
    (folder / "about.json").write_text(json.dumps(about))


def _open(content: bytes, path: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"'{path}': an image cannot be read: {error}") from error


def _pixels(content: bytes, grey: bool, size: int | None, path: str) -> np.ndarray:
    """(channels, height, width), uint8."""
    image = _open(content, path)
    try:
        image.load()
    except (OSError, ValueError, SyntaxError) as error:
        raise UsageError(f"'{path}': an image cannot be read: {error}") from error
    if image.mode.startswith("I"):  # of 16 bits, which `convert` would clip to 8
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    image = image.convert("L" if grey else "RGB")
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _fixed(array: np.ndarray) -> pa.FixedSizeListArray:
    values = pa.array(np.ascontiguousarray(array).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(values, int(np.prod(array.shape[1:])))


def _image_column(dataset: Dataset, wanted: str | None, path: str) -> str:
    if wanted:
        return sources.column(dataset, wanted, "task.image_column", path)
    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            return name
    columns = ", ".join(dataset.column_names)
    raise UsageError(f"'{path}' has no column of images (it has {columns}); see task.image_column")


def _label_column(dataset: Dataset, wanted: str | None, path: str) -> str | None:
    if wanted:
        return sources.column(dataset, wanted, "task.label_column", path)
    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.ClassLabel):
            return name
    whole = [n for n in ("label", "labels", "fine_label") if n in dataset.features]
    return whole[0] if whole else None


def _classes(dataset: Dataset, label: str | None) -> int | None:
    if label is None:
        return None
    feature = dataset.features[label]
    if isinstance(feature, datasets.ClassLabel):
        return len(feature.names)
    return int(max(dataset[label])) + 1
