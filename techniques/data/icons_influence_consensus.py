"""ICONS: samples whose gradients help many target tasks, by vote."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from tasks.cache import dataset_digest
from tasks.losses import masked_mean
from techniques.data.pilot import pilot
from techniques.data.selection import Scores, over, scored
from techniques.data.self_supervised_prototype_pruning import named
from training.evaluate import spread
from training.objective import Batch, Loss, inputs_of

CONSENSUS = ("vote", "mean")


def scores(
    dataset: Dataset,
    task: Any,
    accelerator: Accelerator,
    column: str,
    fraction: float = 0.2,
    consensus: str = "vote",
    samples: int | None = None,
    dimensions: int = 5120,
    of: str | None = None,
    model: Callable[..., nn.Module] | None = None,
    trust: bool = False,
    seed: int = 0,
) -> Scores:
    """For `Select`: of how many target tasks a sample is among the most influential.

    A sample's influence on a task is the mean cosine of its gradient with those of the task's
    samples, in a random projection by signs, of a model after a short warm-up. The tasks are the
    values of a column of the validation set. Each votes for the `fraction` of the training set of
    highest influence, and `Select` keeps those with most votes, the first of equal ones; the
    authors' code sorts by votes too, and leaves ties to the order of the sort.

    Where the model has no more parameters than dimensions, gradients are not projected; the
    authors' code refuses that. They take LoRA's parameters only, here all of the model's.

    Args:
        dataset, task, accelerator: as `Select` gives them.
        column: of the validation set, whose values are the target tasks.
        fraction: that is voted for; 0.2, and the same as is kept, as in the authors' code.
        consensus: `"vote"`, or `"mean"` of the influences over tasks.
        samples: of each task, evenly spaced; null: all.
        dimensions: of the projection; 5120 as in the authors' code.
        of, model, trust: the model after warm-up, as in `techniques.data.pilot`.
        seed: of the projection.

    Raises:
        ValueError: for a setting out of range.
        UsageError: for a column that is not there, or without a model.

    Source: "ICONS: Influence Consensus for Vision-Language Data Selection", arXiv 2501.00654;
    https://github.com/princetonvisualai/icons, `icons/collect_grads.py`,
    `icons/influence_matrix.py`, `icons/generalist.py`, `scripts/`.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction: must be in (0, 1), got {fraction}")
    if consensus not in CONSENSUS:
        raise ValueError(f"consensus: one of {', '.join(CONSENSUS)}, got '{consensus}'")
    if dimensions < 1:
        raise ValueError(f"dimensions: must be at least 1, got {dimensions}")
    groups = targets(task.validation, column, samples)
    made, about = pilot(of, model, task, accelerator, trust)
    made.requires_grad_(True)
    settings = [column, samples, dimensions, seed]
    parts = ["icons-1", dataset_digest(task.validation), *map(str, settings), *about]

    def score() -> np.ndarray:
        gradients = projected(made, task.loss, dimensions, seed)
        train = over(gradients, dataset, task, accelerator)
        found = (over(gradients, group, task, accelerator) for group in groups)
        return np.stack([influences(train, target) for target in found], 1)

    found = scored(dataset, task, parts, score, accelerator)
    by_task = found.values.T
    return Scores(by_task.mean(0) if consensus == "mean" else votes(by_task, fraction), found.found)


def targets(dataset: Dataset, column: str, samples: int | None) -> list[Dataset]:
    """A dataset for each value of a column, of up to so many samples of it."""
    values = np.asarray(dataset[named(column, dataset)])
    found = (np.flatnonzero(values == value) for value in np.unique(values))
    return [dataset.select(rows[spread(len(rows), samples).numpy()]) for rows in found]


def projected(
    model: nn.Module, loss: Loss, dimensions: int, seed: int
) -> Callable[[Batch], Tensor]:
    """For `over`: each sample's gradient in the projection."""
    trained = [p for p in model.parameters() if p.requires_grad]
    signs = projection(sum(p.numel() for p in trained), dimensions, seed)
    matrix = None if signs is None else torch.from_numpy(signs).to(trained[0].device)

    def gradients(batch: Batch) -> Tensor:
        # Without autocast: under vmap a backward through its casts meets two dtypes.
        with torch.autocast(trained[0].device.type, enabled=False):
            found = sample_gradients(model, loss, batch)
        return found if matrix is None else found.to(matrix) @ matrix.T

    return gradients


def sample_gradients(model: nn.Module, loss: Loss, batch: Batch) -> Tensor:
    """Gradient of each sample's loss, the mean over its labels, with respect to the trained
    parameters: (samples, parameters). The model is to be in evaluation mode."""
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    rows = {n: v for n, v in batch.items() if isinstance(v, Tensor) and v.ndim}
    names = inputs_of(model) & rows.keys()

    def one(weights: dict[str, Tensor], row: Batch) -> Tensor:
        single = {name: value[None] for name, value in row.items()}
        outputs = functional_call(model, weights, kwargs={n: single[n] for n in names})
        return masked_mean(loss(outputs, single), outputs, single)

    found = vmap(grad(one), in_dims=(None, 0))(weights, rows)
    return torch.cat([part.flatten(1) for part in found.values()], 1)


def projection(parameters: int, dimensions: int, seed: int = 0) -> np.ndarray | None:
    """Random signs over √dimensions, float32 (dimensions, parameters), that keep inner products in
    expectation; None where there are no more parameters than dimensions."""
    from sklearn.random_projection import SparseRandomProjection

    if parameters <= dimensions:
        return None
    signs = SparseRandomProjection(dimensions, density=1, random_state=seed)  # type: ignore[arg-type]
    return signs.fit(np.broadcast_to(np.float32(0), (1, parameters))).components_


def influences(train: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Mean cosine similarity of each training gradient to those of a task's target samples.

    To first order, the smaller the loss of the target samples after a step on the training sample
    of unit length, the larger; weighted by the inverse of the length of the targets' gradients.

    Shapes: (samples, dim) and (targets, dim) to (samples,).
    """
    from sklearn.preprocessing import normalize

    units: np.ndarray = normalize(targets)  # type: ignore[assignment]
    return normalize(train) @ units.mean(0)


def votes(influences: np.ndarray, fraction: float) -> np.ndarray:
    """Of how many tasks each sample is among the most influential `fraction`: at least as
    influential as the (1 − fraction) quantile. Shapes: (tasks, samples) to integers (samples,)."""
    return (influences >= np.quantile(influences, 1 - fraction, axis=1, keepdims=True)).sum(0)
