"""Selection of training samples as a stage: scored once, kept in the cache, and shown.

A technique is a function of the training set that gives `Scores`, and `Select` keeps a fraction:

    data:
      transforms:
        mine:
          _target_: techniques.data.selection.Select
          scores: {_target_: techniques.data.mine.scores, temperature: 2}
          fraction: 0.25
          keep: lowest

    def scores(dataset, task, accelerator, temperature):
        model, about = model_of(...)
        parts = ["mine-1", about, model_digest(model), str(temperature)]
        losses = sample_losses(model, task)
        return scored(dataset, task, parts, lambda: over(losses, dataset, task, accelerator),
                      accelerator)

One with a rule of its own makes a `Selection` in its `__call__` and writes it in `on_fit_start`, as
`Select` does.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn

from study import selections
from tasks.cache import cached, dataset_digest, digest
from tasks.fetch import fetch
from tasks.losses import per_sample, valid
from training.data import WEIGHT, mix, move
from training.errors import UsageError
from training.objective import Batch, predict

if TYPE_CHECKING:
    from training.run import Run

KEEP = ("lowest", "highest")
SHOWN = 64
"""Samples whose prepared batch is in the key of scores: it shows what the task makes of rows."""


@dataclass
class Scores:
    """A number for each sample of a training set.

    Args:
        values: float64, (samples, ...).
        found: whether they were in the cache.
    """

    values: np.ndarray
    found: bool


def scored(
    dataset: Dataset,
    task: Any,
    parts: Iterable[str | bytes],
    score: Callable[[], np.ndarray],
    accelerator: Accelerator,
) -> Scores:
    """What `score()` gives, (samples, ...), or what it gave before for the same samples.

    One process of each machine calls `score`, the others read what it wrote: in all, and in a
    resumed run, the values are the same bits. The key is the dataset's contents, what the task's
    `prepare` makes of its first samples, the precision, and `parts`.

    Args:
        dataset, task: the training set and its task.
        parts: what else decides the scores: the scorer's name and settings, and
            `tasks.cache.model_digest` of each model that is asked.
        score: of the whole training set.
        accelerator: the run's.

    Raises:
        UsageError: for values that are not finite, or not one for each sample.
    """
    key = [dataset_digest(dataset), _prepared_digest(dataset, task), accelerator.mixed_precision]
    built = []

    def build(folder: Path) -> None:
        values = np.asarray(score(), dtype=np.float64)
        if len(values) != len(dataset) or not np.isfinite(values).all():
            raise UsageError(
                f"data.transforms: expected {len(dataset)} finite scores, got {len(values)} of "
                f"which {int(np.isfinite(values).sum())} numbers are finite"
            )
        np.save(folder / "scores.npy", values)
        built.append(True)

    with accelerator.local_main_process_first():
        path = cached("scores", digest(["scores-1", *key, *parts]), build)
    return Scores(np.load(path / "scores.npy"), not built)


def over(
    function: Callable[[Batch], Tensor],
    dataset: Dataset,
    task: Any,
    accelerator: Accelerator,
    batch_size: int = 64,
) -> np.ndarray:
    """`function(batch)`, (rows, ...), of every sample in order, (samples, ...) in float64.

    The batches are prepared as for validation, without augmentation, and are on the device; the
    function runs under the run's autocast and without gradients, unless it enables them.
    """
    found = []
    with torch.no_grad(), accelerator.autocast():
        for start in range(0, len(dataset), batch_size):
            rows = range(start, min(start + batch_size, len(dataset)))
            batch = move(_prepared(dataset, task, rows), accelerator.device)
            found.append(function(batch).double().cpu().numpy())
    return np.concatenate(found)


def sample_losses(model: nn.Module, task: Any) -> Callable[[Batch], Tensor]:
    """For `over`: each sample's task loss under a model, the mean over its labels that count."""

    def losses(batch: Batch) -> Tensor:
        return per_sample(task.loss(predict(model, batch), batch), batch)

    return losses


def check(
    function: Callable[[Batch], Tensor],
    dataset: Dataset,
    task: Any,
    accelerator: Accelerator,
    where: str,
) -> None:
    """Ask about one sample, in every process, so that a model that does not fit is told in a line.

    Args:
        function, dataset, task, accelerator: as for `over`.
        where: the configuration key of the model.

    Raises:
        UsageError: when the function cannot take the task's batches.
    """
    try:
        over(function, dataset.select(range(1)), task, accelerator)
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{where}: it does not work on the task's batches: {reason}") from error


def extreme(values: np.ndarray, fraction: float, keep: str) -> np.ndarray:
    """Indices, ascending, of the fraction of samples with the lowest or highest values: as many as
    ⌊fraction · samples⌋, at least one; of equal ones the first."""
    count = max(int(fraction * len(values) + 1e-9), 1)
    order = np.argsort(values if keep == "lowest" else -values, kind="stable")
    return np.sort(order[:count])


@dataclass
class Selection:
    """What a stage kept of a training set.

    Args:
        dataset, task: the training set before, and its task.
        scores: one number a sample.
        kept: indices of the samples kept, in their new order; one may be there several times.
        weights: of those kept, in the same order: they become the column `weight`, which batches
            have as `batch["weight"]` (batch,), float32. `weighted_mean` is a weighting of them.
    """

    dataset: Dataset
    task: Any
    scores: Scores
    kept: np.ndarray
    weights: np.ndarray | None = None

    def chosen(self) -> Dataset:
        """The training set after."""
        chosen = self.dataset.select(self.kept)
        if self.weights is None:
            return chosen
        weights = np.asarray(self.weights, dtype=np.float32)
        if WEIGHT in chosen.column_names:  # of a stage before
            weights = weights * np.asarray(chosen[WEIGHT], dtype=np.float32)
            chosen = chosen.remove_columns(WEIGHT)
        return chosen.add_column(WEIGHT, weights)  # type: ignore[call-arg,arg-type]

    def write(self, run: "Run", transform: Any) -> None:
        """Put it into the run's folder, for people and for `assay report`.

        Args:
            run: from `on_fit_start`.
            transform: the component of `data.transforms` whose selection it is, which names it.
        """
        if run.main:
            name = next(name for name, part in run.transforms.items() if part is transform)
            weights, kept = self.weights, np.asarray(self.kept)
            about = selections.describe(self.scores.values, kept, weights, self.scores.found)
            about |= selections.examples(self.dataset, self.task, self.scores.values, kept)
            selections.save(about, run.folder, name)


class Select:
    """Keeps a fraction of the training set, by scores.

    Args:
        scores: `(dataset, task, accelerator) -> Scores`, one number a sample.
        fraction: share of the samples to keep, in (0, 1]: ⌊fraction · samples⌋ of them.
        keep: `"lowest"` or `"highest"` scores.

    Raises:
        ValueError: for another `fraction` or `keep`.
    """

    def __init__(self, scores: Callable[..., Scores], fraction: float, keep: str) -> None:
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction: must be in (0, 1], got {fraction}")
        if keep not in KEEP:
            raise ValueError(f"keep: one of {', '.join(KEEP)}, got '{keep}'")
        self.scores, self.fraction, self.keep = scores, fraction, keep

    def __call__(self, dataset: Dataset, task: Any, accelerator: Accelerator) -> Dataset:
        scores = self.scores(dataset, task=task, accelerator=accelerator)
        kept = extreme(scores.values, self.fraction, self.keep)
        self.selection = Selection(dataset, task, scores, kept)
        return self.selection.chosen()

    def on_fit_start(self, run: "Run") -> None:
        self.selection.write(run, self)


def weighted_mean(losses: Tensor, outputs: Any, batch: Batch) -> Tensor:
    """A `weighting`: the sum of losses times their sample's `batch["weight"]`, over the number of
    labels that count; not over the sum of weights, so that importance weights stay unbiased and
    micro-batches add up to the batch. Without the column, `tasks.losses.masked_mean`.
    """
    mask = valid(losses, batch)
    weights = batch.get(WEIGHT)
    if weights is not None:
        losses = losses * weights.view(-1, *[1] * (losses.ndim - 1))
    return (losses * mask).sum() / mask.sum().clamp(min=1)


def _prepared(dataset: Dataset, task: Any, rows: range) -> Batch:
    generator = torch.Generator().manual_seed(mix(0, rows.start))
    return task.prepare(fetch(dataset, rows), generator, False)


def _prepared_digest(dataset: Dataset, task: Any) -> str:
    batch = _prepared(dataset, task, range(min(SHOWN, len(dataset))))
    parts: list[str | bytes] = []
    for name, value in sorted(batch.items()):
        raw = value.contiguous().numpy().tobytes() if isinstance(value, Tensor) else repr(value)
        parts += [name, raw]
    return digest(parts)
