"""Sensitivity sampling by clusters: losses at the centres stand for those of all samples."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import Accelerator
from datasets import Dataset
from torch import nn

from techniques.data.pilot import embeddings, pilot
from techniques.data.selection import Scores, Selection, over, sample_losses, scored

if TYPE_CHECKING:
    from training.run import Run


class SensitivitySampling:
    """Draws samples with replacement by s(e) = ℓ(c) + λ·‖e − c‖^z, with c the centre of k-means
    nearest to the embedding e and ℓ(c) a model's loss at it: k losses are computed, not one for
    each sample.

    Sample i is drawn with probability p_i = s_i/Σs. Its weight 1/(m·p_i), of m drawn, makes the
    weighted sum of losses an unbiased estimate of the sum over the whole set; batches have it times
    m/(whole set), so that it is 1 on average, for the weighting
    `techniques.data.selection.weighted_mean`. One cluster and λ = 0 is uniform sampling.

    Where the loss is Hölder continuous, |ℓ(e) − ℓ(e')| ≤ λ·‖e − e'‖^z, s bounds ℓ from above. λ is
    in losses for each unit of distance to the power z and is to be chosen; the paper's values of λ
    and k in its experiments could not be confirmed. Centroids are rounded to the samples nearest to
    them. Embeddings and losses are of one and the same model here.

    Args:
        fraction: m as a share of the whole set; above 0.
        clusters: k.
        holder: λ.
        power: z; 2, that of k-means.
        of, model, trust: the model, as in `techniques.data.pilot`.
        seed: of k-means and of the draw.

    Raises:
        ValueError: for a setting out of range.
        UsageError: without a model.

    Source: "Data-Efficient Learning via Clustering-Based Sensitivity Sampling: Foundation Models
    and Beyond", arXiv 2402.17327 (algorithm 1). No released code was found.
    """

    def __init__(
        self,
        fraction: float,
        clusters: int,
        holder: float,
        power: float = 2.0,
        of: str | None = None,
        model: Callable[..., nn.Module] | None = None,
        trust: bool = False,
        seed: int = 0,
    ) -> None:
        if fraction <= 0:
            raise ValueError(f"fraction: must be positive, got {fraction}")
        if holder < 0:
            raise ValueError(f"holder: must not be negative, got {holder}")
        if power <= 0:
            raise ValueError(f"power: must be positive, got {power}")
        self.fraction, self.clusters, self.holder, self.power = fraction, clusters, holder, power
        self.of, self.model, self.trust, self.seed = of, model, trust, seed

    def __call__(self, dataset: Dataset, task: Any, accelerator: Accelerator) -> Dataset:
        model, about = pilot(self.of, self.model, task, accelerator, self.trust)
        settings = [self.clusters, self.holder, self.power, self.seed]
        parts = ["sensitivity-1", *map(str, settings), *about]

        def score() -> np.ndarray:
            points = over(embeddings(model), dataset, task, accelerator)
            centres, nearest = cluster(points, self.clusters, self.seed)
            at_centres = dataset.select(centres)
            losses = over(sample_losses(model, task), at_centres, task, accelerator)
            return sensitivities(points, centres, nearest, losses, self.holder, self.power)

        scores = scored(dataset, task, parts, score, accelerator)
        self.selection = Selection(dataset, task, scores, *self._drawn(scores, len(dataset)))
        return self.selection.chosen()

    def _drawn(self, scores: Scores, samples: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices, and weights of mean 1."""
        count = max(round(self.fraction * samples), 1)
        drawn, weights = draw(scores.values, count, self.seed)
        return drawn, weights * count / samples

    def on_fit_start(self, run: "Run") -> None:
        """Show what was drawn."""
        self.selection.write(run, self)


def cluster(embeddings: np.ndarray, clusters: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """k-means whose centres are samples: each centroid is rounded to the sample nearest to it.

    Args:
        embeddings: (samples, dim).
        clusters: k.
        seed: of scikit-learn's k-means.

    Returns indices of the centres (clusters,), and which of them is nearest to each sample
    (samples,).

    Raises:
        ValueError: for fewer than one cluster, or more than samples.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import pairwise_distances_argmin

    if not 1 <= clusters <= len(embeddings):
        raise ValueError(f"clusters: expected 1 to {len(embeddings)}, got {clusters}")
    means = KMeans(clusters, n_init="auto", random_state=seed).fit(embeddings).cluster_centers_
    centres = pairwise_distances_argmin(means, embeddings)
    return centres, pairwise_distances_argmin(embeddings, embeddings[centres])


def sensitivities(
    embeddings: np.ndarray,
    centres: np.ndarray,
    nearest: np.ndarray,
    losses: np.ndarray,
    holder: float,
    power: float = 2.0,
) -> np.ndarray:
    """s(e) = ℓ(c) + λ·‖e − c‖^z.

    Shapes: `embeddings` (samples, dim), `centres` (clusters,) indices of samples, `nearest`
    (samples,) numbers of centres, `losses` (clusters,) those of the centres; to (samples,).
    """
    distances = np.linalg.norm(embeddings - embeddings[centres[nearest]], axis=1)
    return losses[nearest] + holder * distances**power


def draw(scores: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of `count` samples drawn with replacement, sample i with probability p_i = s_i/Σs,
    and their weights 1/(count·p_i).

    Raises:
        ValueError: for scores that are negative, not finite or all 0.
    """
    if not (np.isfinite(scores).all() and (scores >= 0).all() and scores.any()):
        raise ValueError("scores: expected finite numbers of at least 0, not all of them 0")
    p = scores / scores.sum()
    drawn = np.random.default_rng(seed).choice(len(p), size=count, p=p)
    return drawn, 1 / (count * p[drawn])
