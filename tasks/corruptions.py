"""Corrupted copies of square images: transforms of a dataset whose column `pixels` has them, as
that of `task=digits`, for `data.transforms` or to see what a model makes of data it has not been
trained on. Pixels stay within the range that the dataset has.

Of CIFAR-10-C's kinds ("Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", arXiv 1903.12261) noise and blur; and a turn.
"""

import math

import numpy as np
from datasets import Dataset
from scipy.ndimage import gaussian_filter, rotate

from tasks.arrays import as_dataset


def noise(dataset: Dataset, *, std: float, seed: int = 0) -> Dataset:
    """Normal noise of a standard deviation in units of the pixels, the same for every run.

    Raises:
        ValueError: for a negative one.
    """
    if std < 0:
        raise ValueError(f"std: must not be negative, got {std}")
    images = _images(dataset)
    return _with(dataset, images + np.random.default_rng(seed).normal(0, std, images.shape))


def blur(dataset: Dataset, *, sigma: float) -> Dataset:
    """A Gaussian filter of a width in pixels, with 0 from outside.

    Raises:
        ValueError: for a negative one.
    """
    if sigma < 0:
        raise ValueError(f"sigma: must not be negative, got {sigma}")
    return _with(dataset, gaussian_filter(_images(dataset), sigma, mode="constant", axes=(2, 3)))


def turn(dataset: Dataset, *, degrees: float) -> Dataset:
    """Counter-clockwise; bilinear, with 0 from outside."""
    turned = rotate(_images(dataset), degrees, axes=(3, 2), reshape=False, order=1)
    return _with(dataset, turned)


def _images(dataset: Dataset) -> np.ndarray:
    """(count, channels, side, side), float64: one channel, or three."""
    pixels = np.asarray(dataset["pixels"], dtype=np.float64)
    size = pixels.shape[1]
    side = math.isqrt(size)
    if side**2 != size:
        side = math.isqrt(size // 3)
    return pixels.reshape(len(pixels), -1, side, side)


def _with(dataset: Dataset, images: np.ndarray) -> Dataset:
    """With other images, cut to the range of its own."""
    columns = {name: np.asarray(dataset[name]) for name in dataset.column_names}
    cut = images.clip(columns["pixels"].min(), columns["pixels"].max())
    return as_dataset({**columns, "pixels": cut.reshape(len(cut), -1)})


def shifts(dataset: Dataset, *, copies: int, pixels: int = 1, seed: int = 0) -> Dataset:
    """So many copies of each image, every one moved by up to so many pixels down and across, with
    0 from outside: the augmentation of as many epochs, a function of the seed, the copy and the
    image, whatever the order in which they are trained on.

    Raises:
        ValueError: for less than one copy, or negative pixels.
    """
    if copies < 1 or pixels < 0:
        raise ValueError(f"copies, pixels: at least 1 and 0, got {copies} and {pixels}")
    images = _images(dataset)
    edges = np.pad(images, ((0, 0), (0, 0), (pixels, pixels), (pixels, pixels)))
    views = np.lib.stride_tricks.sliding_window_view(edges, images.shape[2:], axis=(2, 3))
    offsets = np.random.default_rng(seed).integers(2 * pixels + 1, size=(copies, len(images), 2))
    moved = [
        views[np.arange(len(images)), :, down, across] for down, across in offsets.swapaxes(1, 2)
    ]
    columns = {name: np.asarray(dataset[name]) for name in dataset.column_names}
    repeated = {name: np.concatenate([values] * copies) for name, values in columns.items()}
    return as_dataset(
        {**repeated, "pixels": np.concatenate(moved).reshape(len(moved) * len(images), -1)}
    )
