"""Blocks of samples that travel around a ring of processes."""

import torch
import torch.distributed as dist
from torch import Tensor


def size(group: dist.ProcessGroup | None) -> int:
    """Number of processes; 1 without a group."""
    return 1 if group is None else dist.get_world_size(group)


def pass_on(tensors: list[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Send the tensors to the next process and return those of the one before."""
    if group is None or size(group) == 1:
        return tensors
    rank, count = dist.get_rank(group), size(group)
    after = dist.get_global_rank(group, (rank + 1) % count)
    before = dist.get_global_rank(group, (rank - 1) % count)
    received = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]
    transfers = [
        transfer
        for ours, theirs in zip(tensors, received)
        for transfer in (
            dist.P2POp(dist.isend, ours.contiguous(), after, group),
            dist.P2POp(dist.irecv, theirs, before, group),
        )
    ]
    for work in dist.batch_isend_irecv(transfers):
        work.wait()
    return received


def check(a: Tensor, group: dist.ProcessGroup | None) -> None:
    """Raise a ValueError on every process when their shapes differ."""
    if size(group) == 1:
        return
    sizes = torch.tensor([[len(a), a.shape[1]], [-len(a), -a.shape[1]]], device=a.device)
    dist.all_reduce(sizes, dist.ReduceOp.MAX, group=group)
    if sizes[0].ne(-sizes[1]).any():
        raise ValueError(
            f"a: expected the same shape on every process of the group, got {tuple(a.shape)} here "
            f"and up to {tuple(sizes[0].tolist())}"
        )
