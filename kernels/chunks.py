"""Elementwise work on a CPU a chunk at a time, so that what lies between stays in the cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

ELEMENTS = 1 << 18
"""Of a chunk: 1 MiB, and large enough for PyTorch to share it among threads."""


def worthwhile(x: Tensor) -> bool:
    """Whether to go by chunks: on a CPU, where no compiler fuses the passes."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def flat(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same chunk of each, all of one shape, as vectors; views of those that are contiguous."""
    return zip(*(t.reshape(-1).split(ELEMENTS) for t in tensors))


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def buffers(count: int, x: Tensor) -> list[Tensor]:
    """So many to hold a chunk of `x`, in float32 at least, used again for the next: fresh memory
    costs more than a pass."""
    size = min(ELEMENTS, x.numel())
    return [
        x.new_empty(size, dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(count)
    ]
