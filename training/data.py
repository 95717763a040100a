"""Which samples a step sees, as batches."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tasks.domains import COLUMN, number_of
from tasks.fetch import fetch
from tasks.losses import IGNORED
from training.errors import UsageError
from training.objective import Batch

WEIGHT = "weight"
"""The column of a training set that weighs its samples."""


class Shuffled:
    """The default sampler: each epoch a fresh permutation, a function of seed and epoch alone.

    Args:
        length: samples in the training set.
        seed: the run's seed.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed = length, seed

    def indices(self, epoch: int) -> Tensor:
        """One epoch's order, int64."""
        generator = torch.Generator().manual_seed(mix(self.seed, epoch))
        return torch.randperm(self.length, generator=generator)


class Mixture:
    """Domains in given proportions: an epoch draws as many samples as the training set has, of
    each domain its weight's share, in random order, as a function of seed and epoch alone.

    Of n samples in an epoch ⌊n·w⌋ or ⌈n·w⌉ are of a domain of weight w, n·w in expectation
    (systematic sampling), and each place of the epoch has one of it with probability w. A domain's
    samples come in a random order, fresh in each epoch; a domain that is exhausted begins again in
    another order, so that within an epoch none of its samples is seen twice before all were once.

    Args:
        length: samples in the training set.
        seed: the run's seed.
        task: has `domains`, their names, and a training set with a column `domain`, as
            `task=domains`.
        weights: by domain, at least 0, in any unit; those not named are not drawn.

    Raises:
        UsageError: for an unknown domain, one that the training set has no sample of, or a task
            without domains.
        ValueError: for negative weights, or none above 0.
    """

    def __init__(self, length: int, seed: int, task: Any, weights: dict[str, float]) -> None:
        if min(weights.values(), default=0) < 0 or not sum(weights.values()) > 0:
            raise ValueError(f"weights: must be at least 0 and some above it, got {weights}")
        self.length, self.seed = length, seed
        drawn = {name: weight for name, weight in weights.items() if weight > 0}
        numbers = [number_of(name, task, "data.sampler.weights") for name in drawn]
        column = torch.as_tensor(task.train[COLUMN][:])
        self.members = [(column == number).nonzero().flatten() for number in numbers]
        for name, members in zip(drawn, self.members):
            if not len(members):
                raise UsageError(f"data.sampler.weights: no training sample is of '{name}'")
        shares = torch.tensor(list(drawn.values()), dtype=torch.float64)
        self.ends = (shares.cumsum(0) / shares.sum())[:-1]

    def indices(self, epoch: int) -> Tensor:
        """One epoch's order, int64."""
        generator = torch.Generator().manual_seed(mix(self.seed, epoch))
        offset = torch.rand((), generator=generator, dtype=torch.float64)
        places = (torch.arange(self.length) + offset) / self.length
        counts = torch.searchsorted(self.ends, places, right=True).bincount(
            minlength=len(self.members)
        )
        drawn = [
            _repeated(members, int(count), generator)
            for members, count in zip(self.members, counts)
        ]
        return torch.cat(drawn)[torch.randperm(self.length, generator=generator)]


def _repeated(members: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """So many of the members: all of them in a random order, again and again."""
    rounds = -(-count // len(members))
    orders = [torch.randperm(len(members), generator=generator) for _ in range(rounds)]
    return members[torch.cat(orders)[:count]] if orders else members[:0]


def mix(seed: int, counter: int) -> int:
    """A generator's seed from the run's seed and a counter, so that nearby pairs do not collide."""
    return (seed * 1_000_003 + counter * 2_654_435_761 + 0x9E3779B9) % 2**63


class StepBatches:
    """The micro-batches of each training step, a function of the step alone.

    Step k takes samples k·batch_size to (k+1)·batch_size of the epochs' orders laid end to end, so
    no sample is dropped and a resumed run sees what the first one would have. The step's samples
    are cut into parts, one for each micro-batch of each process, and a process prepares its own.

    Args:
        task: gives `train` and `prepare`.
        sampler: `indices(epoch)` of one epoch.
        batch_size: samples per step over all processes and micro-batches.
        accumulate: micro-batches per step.
        transforms: `(batch, generator) -> batch`, in order.
        seed: of the randomness in `prepare` and the transforms, which each part draws anew.
        rank, world: this process and the number of them.
    """

    def __init__(
        self,
        task: Any,
        sampler: Any,
        batch_size: int,
        accumulate: int,
        transforms: list[Callable[[Batch, torch.Generator], Batch]],
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.task, self.sampler, self.transforms = task, sampler, transforms
        self.batch_size, self.accumulate, self.seed = batch_size, accumulate, seed
        self.rank, self.world = rank, world
        self._epoch: tuple[int, Tensor] | None = None

    def __getitem__(self, step: int) -> list[Batch]:
        batches = [
            self.part(step, number)
            for number in range(self.rank, self.accumulate * self.world, self.world)
        ]
        labels = [labelled(batch) for batch in batches]
        for batch, count in zip(batches, labels):
            batch["share"] = torch.tensor(count / max(sum(labels), 1))
        return batches

    def part(self, step: int, number: int) -> Batch:
        """Part `number` of a step's samples; `index` is which samples of the training set, `step`
        the number of steps before, and `weight`, where the training set has this column, theirs."""
        indices = self._indices(step * self.batch_size, self.batch_size)
        own = indices.tensor_split(self.accumulate * self.world)[number]
        seed = mix(self.seed, step)
        generator = torch.Generator().manual_seed(mix(seed, number) if number else seed)
        fetched = fetch(self.task.train, own)
        batch = self.task.prepare(fetched, generator, True)
        batch["index"] = own
        if WEIGHT in fetched:
            batch[WEIGHT] = fetched[WEIGHT]
        for transform in self.transforms:
            batch = transform(batch, generator)
        batch["step"] = torch.tensor(step)
        return batch

    def _indices(self, start: int, count: int) -> Tensor:
        taken = []
        while count:
            order = self._order(start // self.sampler.length)
            part = order[start % self.sampler.length :][:count]
            taken.append(part)
            start, count = start + len(part), count - len(part)
        return torch.cat(taken) if len(taken) > 1 else taken[0]

    def _order(self, epoch: int) -> Tensor:
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self.sampler.indices(epoch))
        return self._epoch[1]

    def loader(self, first: int, last: int, workers: int, pin: bool) -> DataLoader:
        """Batches of steps `first` to `last - 1`, prepared ahead by `workers` processes."""
        return DataLoader(
            self,  # type: ignore[arg-type]
            batch_size=None,
            sampler=range(first, last),
            num_workers=workers,
            pin_memory=pin,
            collate_fn=_identity,
            # Its own generator: the loader draws a seed, which must not disturb the run's.
            generator=torch.Generator(),
        )


def _identity(batches: list[Batch]) -> list[Batch]:
    return batches


def labelled(batch: Batch) -> int:
    """Labels of a batch that count towards the loss; its rows where labels are not classes."""
    labels = batch.get("labels")
    if labels is None:
        return rows(batch)
    if labels.is_floating_point():
        return labels.numel()
    return int((labels != IGNORED).sum())


def rows(batch: Batch) -> int:
    """Samples in a batch."""
    return next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim)


def move(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
