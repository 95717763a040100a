"""I-Con: one loss for contrastive learning, neighbour embedding and clustering."""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.losses import precise
from techniques.loss.inf_cl_tiled_contrastive import processes
from training.errors import UsageError
from training.parallel import gathered


class Supervision(Protocol):
    """Which samples should be neighbours."""

    def read(self, batch: dict[str, Any]) -> Tensor:
        """What tells it, (rows, ...), of the batch."""
        ...

    def __call__(self, ours: Tensor, everyone: Tensor, itself: Tensor) -> Tensor:
        """p(j|i) of our rows i over all j; 0 where j is i."""
        ...


class Learned(Protocol):
    """Which samples' embeddings are neighbours; `includes_itself`: whether i is its own."""

    includes_itself: bool

    def __call__(self, ours: Tensor, everyone: Tensor, itself: Tensor) -> Tensor:
        """log q(j|i) of our rows i over all j."""
        ...


class Partners:
    """p: a view's neighbour is the other view of its image. With `Gaussian` of cosines, SimCLR."""

    def read(self, batch: dict[str, Any]) -> Tensor:
        if "pixel_values" not in batch or len(batch["pixel_values"]) % 2:
            raise UsageError("task.loss.supervision: Partners needs two views of each image")
        count = len(batch["pixel_values"]) // 2
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        ids = torch.arange(count, device=batch["pixel_values"].device) + rank * count
        return ids.repeat(2)[:, None]

    def __call__(self, ours: Tensor, everyone: Tensor, itself: Tensor) -> Tensor:
        return uniform((ours == everyone.T) & ~itself)


class Classes:
    """p: uniform over the others of the same class. With `Gaussian` of cosines, SupCon."""

    def read(self, batch: dict[str, Any]) -> Tensor:
        for name in ("classes", "labels"):
            if name in batch:
                return batch[name][:, None]
        raise UsageError("task.loss.supervision: Classes needs a task with labels")

    def __call__(self, ours: Tensor, everyone: Tensor, itself: Tensor) -> Tensor:
        return uniform((ours == everyone.T) & (ours >= 0) & ~itself)  # −100 is no class


class Inputs:
    """What compares the samples themselves, flattened: of `input`, by default the pixels."""

    def __init__(self, input: str = "pixel_values") -> None:
        self.input = input

    def read(self, batch: dict[str, Any]) -> Tensor:
        if self.input not in batch:
            raise UsageError(f"task.loss.supervision.input: the batch has no '{self.input}'")
        return batch[self.input].flatten(1)


class Neighbours(Inputs):
    """p: uniform over the `k` nearest others of the batch."""

    def __init__(self, k: int, input: str = "pixel_values") -> None:
        super().__init__(input)
        if k < 1:
            raise ValueError(f"k: must be at least 1, got {k}")
        self.k = k

    def __call__(self, ours: Tensor, everyone: Tensor, itself: Tensor) -> Tensor:
        near = distances(ours, everyone).masked_fill(itself, torch.inf)
        nearest = near.topk(min(self.k, len(everyone) - 1), largest=False).indices
        return uniform(torch.zeros_like(itself).scatter(1, nearest, True))


class Near(Inputs):
    """p: softmax of −‖xᵢ − xⱼ‖²/2σ² over the others. With `Gaussian`, SNE of one σ; with
    `StudentT`, t-SNE whose q is normalised by row."""

    def __init__(self, sigma: float, input: str = "pixel_values") -> None:
        super().__init__(input)
        self.kernel = Gaussian(sigma)

    def __call__(self, ours: Tensor, everyone: Tensor, itself: Tensor) -> Tensor:
        return self.kernel(ours, everyone, itself).exp()


class Gaussian:
    """log q: log-softmax of −d/2σ² over the others, d the squared distance or 1 − cosine.

    Of cosines it is the contrastive softmax at the temperature 2σ².
    """

    includes_itself = False

    def __init__(self, sigma: float, metric: str = "euclidean") -> None:
        if sigma <= 0:
            raise ValueError(f"sigma: must be positive, got {sigma}")
        if metric not in ("euclidean", "cosine"):
            raise ValueError(f"metric: expected euclidean or cosine, got '{metric}'")
        self.sigma, self.metric = sigma, metric

    def __call__(self, ours: Tensor, everyone: Tensor, itself: Tensor) -> Tensor:
        if self.metric == "cosine":
            d = 1 - F.normalize(ours, dim=1) @ F.normalize(everyone, dim=1).T
        else:
            d = distances(ours, everyone)
        return (-d / (2 * self.sigma**2)).masked_fill(itself, -torch.inf).log_softmax(1)


class StudentT:
    """log q of 1/(1 + ‖zᵢ − zⱼ‖²/γ), normalised over the others."""

    includes_itself = False

    def __init__(self, gamma: float = 1.0) -> None:
        if gamma <= 0:
            raise ValueError(f"gamma: must be positive, got {gamma}")
        self.gamma = gamma

    def __call__(self, ours: Tensor, everyone: Tensor, itself: Tensor) -> Tensor:
        logits = -(distances(ours, everyone) / self.gamma).log1p()
        return logits.masked_fill(itself, -torch.inf).log_softmax(1)


class Clusters:
    """log q of Σ_c π_ic·π_jc / Σ_k π_kc with π = softmax(z): the chance that a cluster drawn for i
    draws j. A sample is a neighbour of itself. It holds (rows, all, clusters) numbers."""

    includes_itself = True

    def __call__(self, ours: Tensor, everyone: Tensor, itself: Tensor) -> Tensor:
        mine, theirs = ours.log_softmax(1), everyone.log_softmax(1)
        theirs = theirs - theirs.logsumexp(0)
        return (mine[:, None] + theirs).logsumexp(2)


COSINES = functools.partial(Gaussian, 0.5, "cosine")
"""The authors' q of SimCLR."""


class ICon(nn.Module):
    """−Σⱼ p′(j|i)·log q(j|i), with p′ = (1 − α)·p + α·u: KL(p′ ‖ q) and the entropy of p′, which is
    a constant that the authors' code keeps too.

    p says who are neighbours, q follows from the embeddings, u is uniform over the samples that q
    ranges over, of all processes. α > 0 debiases: others than the known neighbours may be near. A
    row without a neighbour has no loss.

    The authors' `LeakKernel` has u over the whole batch. Where q leaves out the sample itself, its
    share would be infinite; here u leaves it out as well.

    Minimiser: q = p′. Range: from the entropy of p′ to infinity. At saturated embeddings: cosines
    are bounded, and so is the loss; the Gaussian's grows with their square; Student-t's with their
    logarithm, and its gradient vanishes; that of clusters linearly. With α > 0 it grows so for
    every pair that is far apart.

    Args:
        supervision: factory of p; `Partners`, `Classes`, `Neighbours` or `Near`.
        learned: factory of q; `Gaussian`, `StudentT` or `Clusters`.
        alpha: α in [0, 1); 0.

    The overlay has the authors' SimCLR: partners, and cosines with σ = 0.5, a temperature of 0.5; a
    sample is left out of its own p and q, as in their playground (in `README.md` it is not).

    Shapes: `logits` (rows, embedding) to losses (rows,), float32 or float64. Two views of an image
    are two rows, partners half of them apart.

    Raises:
        ValueError: for an α outside, and from the factories.
        UsageError: for images with captions, a batch without what p reads, or a single row.

    Source: "I-Con: A Unifying Framework for Representation Learning", arXiv 2504.16929;
    https://github.com/ShadeAlsha/ICon, `distributions/` (`base.py`, `clustering.py`, `distance.py`,
    `graph.py`), `model/losses.py` and, for SimCLR, `README.md` and
    `playground/playground_config.py`.
    """

    def __init__(
        self,
        supervision: Callable[[], Supervision] = Partners,
        learned: Callable[[], Learned] = COSINES,
        alpha: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= alpha < 1:
            raise ValueError(f"alpha: must be in [0, 1), got {alpha}")
        self.supervision, self.learned, self.alpha = supervision(), learned(), alpha

    def forward(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        if "image_embeds" in outputs:
            raise UsageError("task.loss: I-Con compares rows of one kind, the task has captions")
        ours, group = precise(outputs["logits"]), processes(self.training)
        told = self.supervision.read(batch)
        if told.is_floating_point():
            told = precise(told)
        with torch.autocast(ours.device.type, enabled=False):
            everyone, everyone_told = gathered(ours, group), gathered(told, group)
            if len(everyone) < 2:
                raise UsageError("trainer.batch_size: I-Con needs at least 2 rows")
            start = 0 if group is None else dist.get_rank(group) * len(ours)
            columns = torch.arange(len(everyone), device=ours.device)
            itself = columns == columns[start : start + len(ours), None]
            log_q = self.learned(ours, everyone, itself)
            p = self.supervision(told, everyone_told, itself)
            if not self.learned.includes_itself:
                log_q = log_q.masked_fill(itself, 0)
            if self.alpha:
                u = uniform(torch.ones_like(itself) if self.learned.includes_itself else ~itself)
                known = p.sum(1, keepdim=True) > 0
                p = torch.where(known, (1 - self.alpha) * p + self.alpha * u, 0)
            return -(p.to(log_q.dtype) * log_q).sum(1)


def uniform(neighbours: Tensor) -> Tensor:
    """Equal probabilities of those marked in each row; zeros where none is."""
    return neighbours.double() / neighbours.sum(1, keepdim=True).clamp(min=1)


def distances(ours: Tensor, everyone: Tensor) -> Tensor:
    """Squared Euclidean distances, (rows, all), without the cancellation of ‖a‖² + ‖b‖² − 2ab."""
    return torch.cdist(ours, everyone, compute_mode="donot_use_mm_for_euclid_dist").square()
