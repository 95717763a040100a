"""Embeddings that tell apart classes which training did not have."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from datasets import Dataset, concatenate_datasets
from torch import Tensor, nn

from tasks import images
from tasks.digits import Digits
from tasks.losses import IGNORED
from tasks.pairs import embeddings, view
from training.data import mix
from training.errors import UsageError
from training.parallel import gathered

EPISODES = 10
"""Draws of labelled samples that the few-shot accuracy is the mean of, as in ProtoCLR's code."""
ROWS = 1024
"""Samples whose neighbours are looked for at once."""


class MetricLearning:
    """Train on the first classes of a dataset, find neighbours among the others.

    The model's `logits` (batch, embedding) are the embeddings. `val/recall_at_k` is how often one
    of a sample's k nearest others, by cosine, has its class; `val/map_at_r` the mean average
    precision among its R nearest, R being how many others its class has ("A Metric Learning Reality
    Check", arXiv 2003.08505); `val/few_shot_accuracy` how often the nearest of the classes'
    prototypes is its own, each the mean of `shots` random samples, all less the mean of those
    ("SimpleShot", arXiv 1911.04623). `val/loss` is `batch_hard_triplet` over evaluation's batches.

    Args:
        path: `digits` (scikit-learn's, no network), or as for the task `image`.
        train_classes: how many classes, from the first, are for training; the split of the dataset
            is not minded.
        embedding: features of an embedding.
        features: what neighbours are looked for by: `logits`, or `hidden`, what the model's head
            makes them of.
        views: random views of each image in a training batch, as in the task `pairs`, `batch`
            apart; null: the images as they are.
        background: in validation every pixel is at least a random number from 0 to this part of
            the brightest: another domain than training's.
        at: numbers of neighbours of the recalls.
        shots: labelled samples of each class of the few-shot accuracy.
        mirror: whether views may be mirrored; null: where the images are not digits.
        name, size, image_column, label_column, train_split, validation_split: as in
            `tasks.images.load`.

    Raises:
        UsageError: for a dataset that is not there or has no labels, or numbers out of range.
    """

    unit = "samples"

    def __init__(
        self,
        *,
        path: str = "digits",
        train_classes: int = 5,
        embedding: int = 64,
        features: str = "logits",
        views: int | None = None,
        background: float = 0.0,
        at: tuple[int, ...] = (1, 2, 4, 8),
        shots: int = 1,
        mirror: bool | None = None,
        name: str | None = None,
        size: int | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        train_split: str = "train",
        validation_split: str | None = None,
    ) -> None:
        for key, value in {"embedding": embedding, "shots": shots, "views": views or 1}.items():
            if value < 1:
                raise UsageError(f"task.{key}: must be at least 1, got {value}")
        if features not in ("logits", "hidden"):
            raise UsageError(f"task.features: one of logits, hidden, got '{features}'")
        if not 0 <= background <= 1:
            raise UsageError(f"task.background: must be from 0 to 1, got {background}")
        if not at or min(at) < 1:
            raise UsageError(f"task.at: some numbers, each at least 1, got {list(at)}")
        self.features, self.views, self.background = features, views, background
        self.at, self.shots = tuple(at), shots
        self.mirror = path != "digits" if mirror is None else mirror
        if path == "digits":
            self.source: Any = Digits()
            classes, channels, side, self.brightest = 10, 1, 8, 16
        else:
            self.source = images.load(
                path,
                name=name,
                size=size,
                image_column=image_column,
                label_column=label_column,
                train_split=train_split,
                validation_split=validation_split,
            )
            if self.source.classes is None:
                raise UsageError(f"'{path}' has no column of labels; see task.label_column")
            classes, channels, side = (
                getattr(self.source, key) for key in ("classes", "channels", "size")
            )
            self.brightest = 255
        if not 2 <= train_classes < classes:
            raise UsageError(
                f"task.train_classes: must be from 2 to {classes - 1}, got {train_classes}"
            )
        self.train, self.validation = _by_class(self.source, train_classes)
        self.dims = {
            **{"in_channels": channels, "image_size": side, "num_classes": embedding},
            **{"in_features": channels * side * side, "out_features": embedding},
        }

    def count(self, batch: dict[str, Any]) -> int:
        """Images in a batch; views count."""
        return len(batch["labels"])

    def prepare(
        self, rows: dict[str, Any], generator: torch.Generator, training: bool
    ) -> dict[str, Any]:
        """`pixel_values` (batch, channels, size, size) and `labels` (batch,); in training of
        views·batch images, where there are views."""
        if not training and self.background:
            pixels = rows["pixels"]
            noise = torch.rand(pixels.shape, generator=generator)
            floor = self.background * self.brightest * noise
            rows = rows | {"pixels": torch.maximum(pixels, floor.to(pixels.dtype))}
        if isinstance(self.source, Digits):
            pixels = self.source.prepare(rows, generator, training)["pixel_values"]
        else:
            pixels = self.source.standardised(rows)
        labels = rows["labels"]
        if training and self.views:
            drawn = [view(pixels, generator, self.mirror) for _ in range(self.views)]
            pixels, labels = torch.cat(drawn), labels.repeat(self.views)
        return {"pixel_values": pixels, "labels": labels}

    def loss(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        """`batch_hard_triplet`."""
        return batch_hard_triplet(outputs, batch)

    def scores(self, outputs: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """None: what counts is the whole validation set."""
        return {}

    def collect(self, outputs: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Embeddings, or the features they are made of, and labels."""
        return {"embeddings": outputs[self.features].float(), "labels": batch["labels"]}

    def summarise(self, rows: dict[str, Tensor]) -> dict[str, float]:
        """Recalls, mean average precision and few-shot accuracy; NaN where no sample has others of
        its class."""
        found = F.normalize(rows["embeddings"], dim=1)
        values = retrieval(found, rows["labels"], self.at)
        return values | {"few_shot_accuracy": few_shot(found, rows["labels"], self.shots)}


class Balanced:
    """A sampler of `samples` random samples of each class in turn, the classes in a new order every
    time around: a batch of P·`samples` has P classes. For `data.sampler`.

    An epoch is as long as another's, to whole turns, but every class is as frequent; a class with
    few samples has them more often.

    Args:
        length: samples in the training set.
        seed: the run's seed.
        task: whose training set has `labels`.
        samples: of each class; 4, as "In Defense of the Triplet Loss" (arXiv 1703.07737) has them.

    Raises:
        ValueError: for `samples` below 1.
    """

    def __init__(self, length: int, seed: int, *, task: Any, samples: int = 4) -> None:
        if samples < 1:
            raise ValueError(f"samples: must be at least 1, got {samples}")
        self.seed, self.samples = seed, samples
        labels = torch.tensor(task.train["labels"])
        self.members = [torch.nonzero(labels == c).flatten() for c in labels.unique()]
        turn = samples * len(self.members)
        self.turns = -(-length // turn)
        self.length = self.turns * turn  # whole turns, so that the next epoch's batches are alike

    def indices(self, epoch: int) -> Tensor:
        """One epoch's order, int64."""
        generator = torch.Generator().manual_seed(mix(self.seed, epoch))
        groups = []
        for members in self.members:
            times = -(-self.turns * self.samples // len(members))
            order = [torch.randperm(len(members), generator=generator) for _ in range(times)]
            taken = members[torch.cat(order)[: self.turns * self.samples]]
            groups.append(taken.view(self.turns, self.samples))
        found = torch.stack(groups)
        order = [torch.randperm(len(groups), generator=generator) for _ in range(self.turns)]
        return torch.cat([found[o, i].flatten() for i, o in enumerate(order)])


def batch_hard_triplet(outputs: Any, batch: dict[str, Any], *, margin: float = 0.2) -> Tensor:
    """max(0, margin + d⁺ − d⁻), one value a row: d⁺ is the distance to the furthest of the batch of
    the same class and d⁻ that to the nearest of another, between embeddings of length 1.

    The batch-hard loss of "In Defense of the Triplet Loss", arXiv 1703.07737; in several processes
    over all their samples. It is from 0 to margin + 2, and 0 as well for a row without a positive
    or a negative. Equal embeddings have no gradient.

    Args:
        outputs: `logits` (batch, embedding).
        batch: `labels` (batch,); −100 takes no part.
        margin: FaceNet's 0.2 (arXiv 1503.03832), which has it of squared distances.
    """
    cosines, same, other = compare(outputs, batch)
    found = same.any(1) & other.any(1)
    furthest = cosines.masked_fill(~same, 2).amin(1)
    nearest = cosines.masked_fill(~other, -2).amax(1)
    positive, negative = ((2 - 2 * c).clamp(min=1e-12).sqrt() for c in (furthest, nearest))
    return torch.where(found, F.relu(margin + positive - negative), 0)


def supcon(outputs: Any, batch: dict[str, Any], *, temperature: float = 0.1) -> Tensor:
    """−mean over the others of its class of log softmax(cosine / temperature) over all others, one
    value a row; 0 for a row without a positive.

    "Supervised Contrastive Learning", arXiv 2004.11362, its loss with the sum outside the
    logarithm; the temperature is the paper's. In several processes over all their samples.

    Args:
        outputs: `logits` (batch, embedding).
        batch: `labels` (batch,); −100 takes no part.
        temperature: cosines are divided by it.
    """
    if temperature <= 0:
        raise ValueError(f"temperature: must be positive, got {temperature}")
    cosines, same, other = compare(outputs, batch)
    scaled = (cosines / temperature).masked_fill(~(same | other), least(cosines))
    positives = (scaled * same).sum(1) / same.sum(1).clamp(min=1)
    return torch.where(same.any(1), scaled.logsumexp(1) - positives, 0)


class NormalisedSoftmax(nn.Module):
    """Cross-entropy of cosine(embedding, wₖ) / temperature over the training classes k, each with a
    learned vector w: "Classification is a Strong Baseline for Deep Metric Learning", arXiv
    1811.12649.

    Args:
        classes: training classes.
        embedding: features of an embedding.
        temperature: cosines are divided by it; 0.05 as in the authors' code.

    Shapes: `logits` (batch, embedding) and `labels` (batch,) to losses (batch,), 0 where a label is
    −100.

    Raises:
        ValueError: for a temperature that is not positive.

    Source: https://github.com/azgo14/classification_metric_learning, `metric_learning/modules/
    losses.py`.
    """

    def __init__(self, classes: int, embedding: int, temperature: float = 0.05) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature: must be positive, got {temperature}")
        self.temperature = temperature
        self.weight = class_vectors(classes, embedding)

    def forward(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        scaled = to_classes(outputs, self.weight) / self.temperature
        return F.cross_entropy(scaled, batch["labels"], ignore_index=IGNORED, reduction="none")


def class_vectors(classes: int, embedding: int) -> nn.Parameter:
    """A vector of each class, (classes, embedding), drawn as `NormalisedSoftmax`'s authors do."""
    return nn.Parameter(torch.empty(classes, embedding).uniform_(-1, 1) / embedding**0.5)


def to_classes(outputs: Any, weight: Tensor) -> Tensor:
    """Cosines (batch, classes) of the embeddings with a vector of each class."""
    found, _ = embeddings(outputs)
    with torch.autocast(found.device.type, enabled=False):
        return found @ F.normalize(weight.to(found.dtype), dim=1).T


def compare(outputs: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """How each sample and all of all processes' are related, three times (batch, samples): cosines,
    whether they are of one class (and not the same sample), and whether of different ones. A sample
    whose label is −100 is of no class."""
    ours, samples, labels, place = everyones(outputs, batch)
    with torch.autocast(ours.device.type, enabled=False):
        cosines = ours @ samples.T
    own = batch["labels"][:, None]
    known = (own != IGNORED) & (labels != IGNORED)
    itself = place[:, None] == torch.arange(len(labels), device=place.device)
    return cosines, (own == labels) & known & ~itself, (own != labels) & known


def everyones(outputs: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The embeddings (batch, embedding), of length 1, those of all processes that train together
    with their labels, and the rows among them of the first.

    Gradients reach all processes' embeddings. In evaluation each process has its own batches, and
    is alone.
    """
    ours, _ = embeddings(outputs)
    labels = batch["labels"]
    rows = torch.arange(len(ours), device=ours.device)
    if not (torch.is_grad_enabled() and dist.is_available() and dist.is_initialized()):
        return ours, ours, labels, rows
    world, rank = dist.get_world_size(), dist.get_rank()
    if world == 1:
        return ours, ours, labels, rows
    most = torch.tensor(len(ours), device=ours.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    missing = int(most) - len(ours)
    samples = gathered(F.pad(ours, (0, 0, 0, missing)), dist.group.WORLD)
    known = gathered(F.pad(labels, (0, missing), value=IGNORED), dist.group.WORLD)
    return ours, samples, known, rows + rank * int(most)


def least(x: Tensor) -> float:
    """A number that adds nothing to a log-sum-exp, and not even two of which overflow."""
    return torch.finfo(x.dtype).min / 4


def retrieval(found: Tensor, labels: Tensor, at: tuple[int, ...]) -> dict[str, float]:
    """Recalls and mean average precision at R of normalised embeddings, over the samples with
    others of their class."""
    others = (labels[:, None] == labels.unique()).sum(0)[labels.unique(return_inverse=True)[1]] - 1
    depth = min(max(*at, int(others.max())), max(len(found) - 1, 1))
    rank = torch.arange(1, depth + 1)
    recalls: list[Tensor] = []
    precisions: list[Tensor] = []
    for rows in torch.arange(len(found)).split(ROWS):
        cosines = found[rows] @ found.T
        cosines[torch.arange(len(rows)), rows] = -torch.inf
        hits = labels[cosines.topk(depth, dim=1).indices] == labels[rows, None]
        recalls.append(torch.stack([hits[:, :k].any(1) for k in at], dim=1))
        within = hits & (rank <= others[rows, None])
        precision = (within * within.cumsum(1)).double() / rank
        precisions.append(precision.sum(1) / others[rows].clamp(min=1))
    asked = others > 0
    means = torch.cat(recalls)[asked].double().mean(0).tolist()
    recall = {f"recall_at_{k}": value for k, value in zip(at, means)}
    return recall | {"map_at_r": torch.cat(precisions)[asked].double().mean().item()}


def few_shot(found: Tensor, labels: Tensor, shots: int) -> float:
    """Accuracy of the nearest prototype, the mean of `EPISODES` draws of labelled samples."""
    generator = torch.Generator().manual_seed(0)
    classes, label = labels.unique(return_inverse=True)
    accuracies = []
    for _ in range(EPISODES):
        order = torch.randperm(len(label), generator=generator)
        support = [order[label[order] == c][:shots] for c in range(len(classes))]
        centre = found[torch.cat(support)].mean(0)
        prototypes = torch.stack([found[rows].mean(0) for rows in support]) - centre
        asked = torch.ones(len(label), dtype=torch.bool)
        asked[torch.cat(support)] = False
        predicted = torch.cdist(found[asked] - centre, prototypes).argmin(1)
        accuracies.append((predicted == label[asked]).double().mean())
    return torch.stack(accuracies).mean().item()


def _by_class(source: Any, train_classes: int) -> tuple[Dataset, Dataset]:
    """The samples of the first classes and those of the others, these in a random order, so that a
    batch of evaluation has several classes."""
    whole = concatenate_datasets([source.train, source.validation])
    labels = np.array(whole["labels"])
    order = np.random.default_rng(0).permutation(len(labels))
    return (
        whole.select(np.flatnonzero((labels >= 0) & (labels < train_classes))),
        whole.select(order[labels[order] >= train_classes]),
    )
