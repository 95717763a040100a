"""Transforms of a training set, for `data.transforms`."""

import numpy as np
from datasets import Dataset

from tasks.losses import IGNORED


def subset(dataset: Dataset, *, samples: int, seed: int = 0) -> Dataset:
    """So many random samples, the same for every run with this seed.

    Raises:
        ValueError: when there are fewer.
    """
    if not 1 <= samples <= len(dataset):
        raise ValueError(f"samples: expected 1 to {len(dataset)}, got {samples}")
    return dataset.select(np.random.default_rng(seed).permutation(len(dataset))[:samples])


def long_tail(dataset: Dataset, *, ratio: float, seed: int = 0, column: str = "labels") -> Dataset:
    """Classes of exponentially falling size, as CIFAR-LT (arXiv 1901.05555) has them: of C classes,
    class i keeps round(n·ratio^(−i/(C−1))) random samples, n being the size of the smallest class.

    Raises:
        ValueError: for a ratio below 1, or fewer than two classes.
    """
    if ratio < 1:
        raise ValueError(f"ratio: must be at least 1, got {ratio}")
    labels = np.array(dataset[column])
    classes, sizes = np.unique(labels, return_counts=True)
    if len(classes) < 2:
        raise ValueError("long_tail: needs at least two classes")
    order = np.random.default_rng(seed).permutation(len(labels))
    kept = []
    for i, label in enumerate(classes):
        size = round(sizes.min() * ratio ** (-i / (len(classes) - 1)))
        kept.append(order[labels[order] == label][:size])
    return dataset.select(np.sort(np.concatenate(kept)))


def hide_labels(dataset: Dataset, *, keep: int, seed: int = 0, column: str = "labels") -> Dataset:
    """Labels of all but `keep` random samples become −100, which the losses ignore: what is left
    is a semi-supervised task.

    Raises:
        ValueError: for more than there are, or fewer than 1.
    """
    if not 1 <= keep <= len(dataset):
        raise ValueError(f"keep: expected 1 to {len(dataset)}, got {keep}")
    labels = np.array(dataset[column])
    labels[np.random.default_rng(seed).permutation(len(labels))[keep:]] = IGNORED
    return _relabelled(dataset, labels, column)


def noisy_labels(
    dataset: Dataset, *, fraction: float, seed: int = 0, column: str = "labels"
) -> Dataset:
    """A random `fraction` of the labels is replaced by labels drawn uniformly from the classes that
    occur, which may be right by chance.

    Raises:
        ValueError: for a fraction outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction: expected 0 to 1, got {fraction}")
    rng = np.random.default_rng(seed)
    labels = np.array(dataset[column])
    wrong = rng.permutation(len(labels))[: round(fraction * len(labels))]
    labels[wrong] = rng.choice(np.unique(labels), size=len(wrong))
    return _relabelled(dataset, labels, column)


def confused_labels(
    dataset: Dataset, *, fraction: float, seed: int = 0, column: str = "labels"
) -> Dataset:
    """Each label becomes with probability `fraction` another class, of each class's labels the
    same: classes overlap. Any dataset with all the classes has the same ones for a seed.

    It is the noise of arXiv 2306.00740: https://github.com/2014mchidamb/temp-scaling-limitations,
    `utils/data_utils.py`.

    Raises:
        ValueError: for a fraction outside [0, 1], or fewer than two classes.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction: expected 0 to 1, got {fraction}")
    rng = np.random.default_rng(seed)
    classes, numbers = np.unique(dataset[column], return_inverse=True)
    if len(classes) < 2:
        raise ValueError("confused_labels: needs at least two classes")
    steps = rng.integers(1, len(classes), len(classes))
    others = classes[(np.arange(len(classes)) + steps) % len(classes)]
    moved = rng.random(len(numbers)) < fraction
    return _relabelled(dataset, np.where(moved, others[numbers], classes[numbers]), column)


def _relabelled(dataset: Dataset, labels: np.ndarray, column: str) -> Dataset:
    return dataset.remove_columns(column).add_column(column, list(labels))  # type: ignore[call-arg]
