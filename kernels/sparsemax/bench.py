"""What `kernels.bench` measures of `sparsemax`."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.bench import Case, Outputs
from kernels.sparsemax import sparsemax


def _inputs(
    shape: dict[str, int], dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor]:
    x = torch.randn(shape["rows"], shape["columns"], generator=generator, device=generator.device)
    return {"x": x.to(dtype).requires_grad_()}


def cases() -> list[Case]:
    """Rows of attention scores."""
    reference = functools.partial(sparsemax, backend="reference")
    ours: dict[str, Callable[..., Outputs]] = {
        "reference": reference,
        "tiled": functools.partial(sparsemax, backend="tiled"),
    }
    triton = ours | {"triton": functools.partial(sparsemax, backend="triton")}
    peers: dict[str, Callable[[], Callable[..., Outputs]]] = {
        "torch.compile": lambda: torch.compile(reference)
    }
    small, large = {"rows": 4096, "columns": 1024}, {"rows": 32768, "columns": 4096}
    return [
        Case("sparsemax", "rows", "cpu", torch.float32, small, _inputs, ours, reference, peers),
        Case("sparsemax", "rows", "cuda", torch.bfloat16, large, _inputs, triton, reference, peers),
    ]
