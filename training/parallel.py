"""One run over several processes: what each keeps of the model.

Under `ddp` every process has the whole model and the gradients are averaged. Under `fsdp2` each
has its part of every parameter, gradient and optimizer state: parameters are `DTensor`s, gathered
block by block while they are used.
"""

from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from training.errors import UsageError
from training.objective import Objective

STRATEGIES = ("ddp", "fsdp2")


def distribute(objective: Objective, accelerator: Accelerator, strategy: str) -> nn.Module:
    """The objective as the processes share it; under FSDP2 its parameters are sharded in place.

    To be called before the optimizer is built.

    Raises:
        UsageError: when a parameter cannot be sharded.
    """
    if accelerator.num_processes == 1 or strategy == "ddp":
        return accelerator.prepare_model(objective)
    scalars = [name for name, p in objective.named_parameters() if p.ndim == 0]
    if scalars:
        raise UsageError(f"trainer.strategy: fsdp2 cannot shard the scalar parameter {scalars[0]}")
    if accelerator.scaler is not None:
        raise UsageError("trainer.strategy: fsdp2 has no loss scaling for fp16; use bf16")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    # Each part of the objective is a root, so that it can be called by itself, as evaluation does.
    for part in (*blocks(objective.model), *objective.parts()):
        if any(True for _ in part.parameters()):
            fully_shard(part, mesh=mesh)
    return accelerator.prepare_model(objective, evaluation_mode=True)  # for its autocast alone


def blocks(model: nn.Module) -> list[nn.Module]:
    """The members of a model's outermost lists of modules: what FSDP2 gathers one at a time.

    Left out are those that share a parameter with the rest of the model.
    """
    found: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList | nn.Sequential):
                found.extend(child.children())
            else:
                walk(child)

    walk(model)
    counts: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    return [m for m in found if all(counts[id(p)] == 1 for p in m.parameters())]


def reshard(model: nn.Module) -> None:
    """Give up what a forward without a backward has left gathered; nothing where it is whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; another as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, by all processes together; another as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, which every process has, on `other`'s device and sharded as it is."""
    value = value.to(other.device)
    if not isinstance(other, DTensor):
        return value
    return distribute_tensor(value, other.device_mesh, other.placements, src_data_rank=None)


def gathered(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The rows of all processes, in the processes' order; without a group `x`. The gradient is that
    of the sum of all processes' losses, of which DDP's average makes that of their mean.

    Raises:
        ValueError: in every process, when their shapes differ.
    """
    if group is None:
        return x
    shape = torch.tensor([x.shape, [-n for n in x.shape]], device=x.device)
    dist.all_reduce(shape, dist.ReduceOp.MAX, group=group)
    if shape[0].ne(-shape[1]).any():
        raise ValueError(
            "trainer.batch_size: must divide evenly over the processes, which have "
            f"{-shape[1, 0]} to {shape[0, 0]} rows of a batch"
        )
    return _Gather.apply(x, group)  # type: ignore[return-value]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.rows = group, len(x)
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        start = dist.get_rank(ctx.group) * ctx.rows
        return grad[start : start + ctx.rows], None
