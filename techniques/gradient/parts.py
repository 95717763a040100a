"""The gradient of each of a run's losses by itself, and sums of them.

A gradient is a list of tensors, one for each trained parameter of the objective and sharded as it
is; it is of the whole step, that is of all micro-batches and processes, and free of the loss scale.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from techniques.gradient.sam import frozen_statistics
from training.objective import Backward, Batch, Losses, Objective, backprop
from training.parallel import like, local

Gradient = list[Tensor]


def plain(objective: nn.Module) -> Objective:
    """The objective itself of one that processes share."""
    found = getattr(objective, "module", objective)
    assert isinstance(found, Objective)
    return found


def names(objective: nn.Module) -> list[str]:
    """Of the parts of the loss: `loss`, and the penalties.

    Raises:
        ValueError: when there is no penalty.
    """
    penalties = plain(objective).penalties
    if not penalties:
        raise ValueError("gradient: needs several losses, but the run has no penalty")
    return ["loss", *penalties]


def coefficients(objective: nn.Module) -> dict[str, float]:
    """What each part is multiplied with in the total."""
    return {"loss": 1.0} | {name: c for name, (_, c) in plain(objective).penalties.items()}


def part_gradients(
    objective: nn.Module, model: nn.Module, microbatches: list[Batch], backward: Backward
) -> tuple[Losses, dict[str, Gradient]]:
    """The losses, and by name the gradient of each part times its coefficient; their sum is
    backpropagation's. `.grad` is left empty.

    Each part has a forward and a backward of its own, with the same random numbers, and running
    statistics of batch norms follow one of them. In one process only the part itself is computed,
    beside the model's outputs.

    Raises:
        ValueError: for a run with one loss.
    """
    found, total, parts = {}, torch.zeros(()), {}
    *others, last = names(objective)
    for name in (*others, last):
        with contextlib.nullcontext() if name == last else _aside(model, microbatches):
            losses = backprop(objective, model, microbatches, backward, name)
        found[name] = take(objective, backward)
        total, parts[name] = losses.total + total.to(losses.total), losses.parts[name]
    return Losses(total, parts), found


def take(objective: nn.Module, backward: Backward) -> Gradient:
    """The gradient in `.grad`, which is emptied; 0 where a parameter has none."""
    scale = getattr(backward, "scale", 1.0)
    gradient = [
        torch.zeros_like(p) if p.grad is None else p.grad / scale for p in trained(objective)
    ]
    objective.zero_grad(set_to_none=True)
    return [g.detach() for g in gradient]


def put(gradient: Gradient, objective: nn.Module, backward: Backward) -> None:
    """Make it the one that the optimizer finds."""
    scale = getattr(backward, "scale", 1.0)
    for parameter, value in zip(trained(objective), gradient):
        parameter.grad = value * scale


def trained(objective: nn.Module) -> list[nn.Parameter]:
    """The parameters that a gradient has an entry for."""
    return [p for p in objective.parameters() if p.requires_grad]


def combine(weights: Sequence[float], gradients: Sequence[Gradient]) -> Gradient:
    """Σ weight · gradient."""
    total = list(torch._foreach_mul(gradients[0], weights[0]))
    for weight, gradient in zip(weights[1:], gradients[1:]):
        torch._foreach_add_(total, gradient, alpha=weight)
    return total


def products(gradients: Sequence[Gradient]) -> Tensor:
    """The dot products of gradients with one another, (gradients, gradients), in float64; the same
    in every process."""
    rows = torch.stack([torch.cat([local(t).flatten().double() for t in g]) for g in gradients])
    found = rows @ rows.T
    mesh = next((t.device_mesh for t in gradients[0] if isinstance(t, DTensor)), None)
    if mesh is not None:
        dist.all_reduce(found, group=mesh.get_group())
    return found


def placed(gradient: Gradient, objective: nn.Module) -> Gradient:
    """One of a checkpoint, where and sharded as this run's parameters are."""
    return [
        g if isinstance(g, DTensor) else like(g, p) for g, p in zip(gradient, trained(objective))
    ]


@contextlib.contextmanager
def _aside(model: nn.Module, microbatches: list[Batch]) -> Iterator[None]:
    """Within it batch norms keep their running statistics; afterwards random state is as before."""
    device = microbatches[0]["share"].device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), frozen_statistics(model):
        yield
