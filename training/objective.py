"""The scalar a run minimises, and the default way to its gradient."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

Batch = dict[str, Any]
Backward = Callable[[Tensor], None]
Loss = Callable[[Any, Batch], Tensor]
Weighting = Callable[[Tensor, Any, Batch], Tensor]
Penalty = Callable[[nn.Module, Any, Batch], Tensor]


@dataclass
class Losses:
    """One step's losses.

    `total` is the scalar to differentiate; `parts` are scalars by name (`loss`, and one for each
    penalty before its coefficient), which a gradient estimator may differentiate one by one
    (`techniques/gradient/parts.py`); those that it returns are detached. `outputs` are the model's.
    """

    total: Tensor
    parts: dict[str, Tensor]
    outputs: Any = None


class Objective(nn.Module):
    """Model, loss, weighting and penalties as one module: `objective(batch) -> Losses`.

    Everything that is differentiated happens inside this forward, so it is the module that
    Accelerate wraps for several processes.

    Args:
        model: called with the batch's keys that `inputs` names.
        loss: unreduced losses from outputs and batch; an `nn.Module` may bring parameters.
        weighting: losses to a scalar.
        penalties: by name, a penalty and the coefficient it is added with.
        inputs: names of the batch's entries that the model takes.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        weighting: Weighting,
        penalties: Mapping[str, tuple[Penalty, float]],
        inputs: frozenset[str],
    ) -> None:
        super().__init__()
        self.model, self.loss, self.weighting = model, loss, weighting
        self.penalties = dict(penalties)
        self.penalty_modules = nn.ModuleList(
            p for p, _ in self.penalties.values() if isinstance(p, nn.Module)
        )
        self.inputs = inputs

    def parts(self) -> list[nn.Module]:
        """The model, and what else is a module: loss, weighting, penalties."""
        return [m for m in self.children() if m is not self.penalty_modules] + [
            *self.penalty_modules
        ]

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it, processes that share the objective by FSDP2 exchange no gradients."""
        sharded = [m for m in self.parts() if isinstance(m, FSDPModule)]
        for part in sharded:
            part.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            for part in sharded:
                part.set_requires_gradient_sync(True)

    def predict(self, batch: Batch) -> Any:
        """The model's outputs for a batch."""
        return self.model(**{name: batch[name] for name in self.inputs if name in batch})

    def forward(self, batch: Batch, only: str | None = None) -> Losses:
        """The losses of a batch; `only` names the one part that `total` is to be, the task's loss
        or a penalty times its coefficient. The others are then left out, or counted 0 times where
        processes wait for every parameter's gradient."""
        outputs = self.predict(batch)
        every = only is None or _several_processes()
        terms: dict[str, Tensor] = {}
        parts: dict[str, Tensor] = {}
        if every or only == "loss":
            parts["loss"] = self.weighting(self.loss(outputs, batch), outputs, batch)
            terms["loss"] = parts["loss"]
        if self.penalties:
            unshard(self.model)  # a penalty may read any weight
        for name, (penalty, coefficient) in self.penalties.items():
            if every or only == name:
                parts[name] = penalty(self.model, outputs, batch)
                terms[name] = coefficient * parts[name]
        first, *others = (t if only in (None, name) else 0 * t for name, t in terms.items())
        return Losses(sum(others, first), parts, outputs)


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def unshard(model: nn.Module) -> None:
    """Gather every parameter that processes share by FSDP2, until the next backward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()


def inputs_of(model: nn.Module) -> frozenset[str]:
    """The batch entries a model takes: its `inputs`, else the parameters its `forward` names."""
    if hasattr(model, "inputs"):
        return frozenset(model.inputs)  # type: ignore[arg-type]
    return frozenset(inspect.signature(model.forward).parameters)


def predict(model: nn.Module, batch: Batch) -> Any:
    """The model's outputs for a batch."""
    return model(**{name: batch[name] for name in inputs_of(model) if name in batch})


def backprop(
    objective: nn.Module,
    model: nn.Module,
    microbatches: list[Batch],
    backward: Backward,
    only: str | None = None,
) -> Losses:
    """Backpropagate every micro-batch, weighted by its `share` of the global batch's labels.

    Gradients add to `.grad`; of one part times its coefficient where `only` names it. Processes
    exchange gradients only on the last micro-batch. Returns the weighted mean losses, detached.
    """
    total, parts = torch.zeros((), device=microbatches[0]["share"].device), {}
    for i, batch in enumerate(microbatches):
        last = i == len(microbatches) - 1
        no_sync = getattr(objective, "no_sync", contextlib.nullcontext)
        with contextlib.nullcontext() if last else no_sync():
            losses = objective(batch) if only is None else objective(batch, only)
            losses.outputs = None  # else logits would stay through the backward
            share = batch["share"]
            backward(losses.total * share)
        total = total + losses.total.detach() * share
        for name, value in losses.parts.items():
            parts[name] = parts.get(name, 0) + value.detach() * share
    return Losses(total, parts)
