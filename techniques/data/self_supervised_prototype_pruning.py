"""Self-supervised prototypes: prune by the distance to the clusters of an embedding."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn

from tasks.losses import precise
from techniques.data.pilot import embeddings, pilot
from techniques.data.selection import KEEP, Scores, Selection, over, scored
from training.errors import UsageError, nearest
from training.objective import Batch, predict

if TYPE_CHECKING:
    from training.run import Run


class PrototypePruning:
    """Keeps the fraction of the training set that is farthest from, or nearest to, the prototypes:
    the centroids of k-means in the embedding of a self-supervised model.

    Score = 1 − the largest cosine similarity of the sample's embedding to a centroid. Samples near
    a centroid are easy and redundant. The paper keeps the hardest where data is plentiful and finds
    the easiest better where it is scarce. No label is used but for the balance of classes: every
    class keeps at least `balance` of what it would if all classes were equal.

    That the score is a cosine is said where the authors released theirs; that embeddings are scaled
    to length 1 before k-means is how later code of some of the authors has it (SemDeDup), there
    with centroids of length 1 in k-means too. The number of clusters is 1000 for ImageNet's 1000
    classes; the paper finds it to matter little. This number and the 50% of balance are as the
    paper has them, which could not be checked against code.

    Args:
        fraction: share of the samples to keep, in (0, 1].
        keep: `"highest"` distances (hard) or `"lowest"` (easy).
        clusters: k.
        balance: in [0, 1]; 0.5 as for the paper's ImageNet. 0 needs no labels.
        column: the dataset's classes.
        of, model, trust: whose features are the embedding, as in `techniques.data.pilot`.
        seed: of k-means.

    Raises:
        ValueError: for a setting out of range.
        UsageError: for a column that is not there, or without a model.

    Source: "Beyond neural scaling laws: beating power law scaling via data pruning", arXiv
    2206.14486; https://github.com/rgeirhos/dataset-pruning-metrics, `README.md`;
    https://github.com/facebookresearch/SemDeDup, `advance_semdedup.py`, `clustering/clustering.py`.
    """

    def __init__(
        self,
        fraction: float,
        clusters: int,
        keep: str = "highest",
        balance: float = 0.5,
        column: str = "labels",
        of: str | None = None,
        model: Callable[..., nn.Module] | None = None,
        trust: bool = False,
        seed: int = 0,
    ) -> None:
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction: must be in (0, 1], got {fraction}")
        if keep not in KEEP:
            raise ValueError(f"keep: one of {', '.join(KEEP)}, got '{keep}'")
        if not 0 <= balance <= 1:
            raise ValueError(f"balance: must be in [0, 1], got {balance}")
        self.fraction, self.clusters, self.keep, self.balance = fraction, clusters, keep, balance
        self.column, self.seed = column, seed
        self.of, self.model, self.trust = of, model, trust

    def __call__(self, dataset: Dataset, task: Any, accelerator: Accelerator) -> Dataset:
        model, about = pilot(self.of, self.model, task, accelerator, self.trust)
        classes = np.zeros(len(dataset), dtype=np.int64)
        if self.balance:
            classes = np.asarray(dataset[named(self.column, dataset)])
        parts = ["prototypes-1", str(self.clusters), str(self.seed), *about]

        def score() -> np.ndarray:
            found = over(embeddings(model), dataset, task, accelerator)
            return prototype_distances(found, self.clusters, self.seed)

        scores = scored(dataset, task, parts, score, accelerator)
        values = scores.values if self.keep == "highest" else -scores.values
        keep = max(int(self.fraction * len(dataset) + 1e-9), 1)
        kept = balanced(values, classes, keep, self.balance)
        self.selection = Selection(dataset, task, scores, kept)
        return self.selection.chosen()

    def on_fit_start(self, run: "Run") -> None:
        """Show what was kept."""
        self.selection.write(run, self)


def prototype_distances(embeddings: np.ndarray, clusters: int, seed: int = 0) -> np.ndarray:
    """1 − the largest cosine similarity of each embedding to the centroids of k-means on the
    embeddings scaled to length 1. Shapes: (samples, dim) to float64 (samples,), in [0, 2].

    Raises:
        ValueError: for fewer than one cluster, or more than samples.
    """
    from sklearn.cluster import KMeans
    from sklearn.preprocessing import normalize

    if not 1 <= clusters <= len(embeddings):
        raise ValueError(f"clusters: expected 1 to {len(embeddings)}, got {clusters}")
    unit = normalize(embeddings.astype(np.float64))
    means = KMeans(clusters, n_init="auto", random_state=seed).fit(unit).cluster_centers_
    directions: np.ndarray = normalize(means)  # type: ignore[assignment]
    return 1 - (unit @ directions.T).max(1)


def balanced(scores: np.ndarray, classes: np.ndarray, keep: int, balance: float) -> np.ndarray:
    """Indices of the `keep` samples of highest score, of which every class has at least `balance`
    of its equal share, keep/(number of classes), or all it has.

    Each class first has that many of its highest, and the rest of the places go to the highest of
    all others; 0 is the plain choice, 1 equal classes. Equal scores: the first sample.

    Shapes: `scores` and `classes` (samples,), to increasing indices (keep,).
    """
    order = np.argsort(-scores, kind="stable")
    names = np.unique(classes)
    quota = int(balance * keep / len(names))
    first = np.concatenate([order[classes[order] == name][:quota] for name in names])
    others = order[~np.isin(order, first)]
    return np.sort(np.concatenate([first, others[: keep - len(first)]]))


def el2n(
    dataset: Dataset, task: Any, accelerator: Accelerator, of: list[str], trust: bool = False
) -> Scores:
    """For `Select`: the norm of the error, ‖softmax(logits) − onehot(label)‖, mean over models
    that have trained a little, the paper's supervised metric beside its own.

    Args:
        dataset, task, accelerator: as `Select` gives them.
        of: the runs' folders.
        trust: as in `techniques.data.pilot`.

    Source: "Deep Learning on a Data Diet", arXiv 2107.07075.
    """
    pilots = [pilot(folder, None, task, accelerator, trust) for folder in of]
    parts = ["el2n-1", *(part for _, about in pilots for part in about)]

    def score() -> np.ndarray:
        norms = [over(error_norms(model), dataset, task, accelerator) for model, _ in pilots]
        return np.mean(norms, 0)

    return scored(dataset, task, parts, score, accelerator)


def error_norms(model: nn.Module) -> Callable[[Batch], Tensor]:
    """For `over`: ‖softmax(logits) − onehot(label)‖ of each sample."""

    def norms(batch: Batch) -> Tensor:
        p = precise(predict(model, batch)["logits"]).softmax(-1)
        return (p - F.one_hot(batch["labels"], p.shape[-1])).norm(dim=-1)

    return norms


def named(column: str, dataset: Dataset) -> str:
    """The column.

    Raises:
        UsageError: where it is not there.
    """
    if column not in dataset.column_names:
        hint = nearest(column, dataset.column_names)
        raise UsageError(f"data.transforms: the dataset has no column '{column}'{hint}")
    return column
