"""What `kernels.bench` measures of `golu`."""

import functools

import torch
from torch import Tensor

from kernels.bench import Case
from kernels.golu import golu


def _inputs(
    shape: dict[str, int], dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor]:
    size = shape["tokens"], shape["features"]
    x = torch.randn(*size, generator=generator, device=generator.device)
    return {"x": x.to(dtype).requires_grad_()}


def _reference(x: Tensor) -> Tensor:
    return golu(x, backend="reference")


def cases() -> list[Case]:
    """A feed-forward layer's hidden features."""
    ours = {b: functools.partial(golu, backend=b) for b in ("reference", "tiled")}
    shared = {"inputs": _inputs, "exact": _reference}
    peers = {"torch.compile": lambda: torch.compile(_reference)}
    cpu, gpu = {"tokens": 4096, "features": 512}, {"tokens": 32768, "features": 8192}
    return [
        Case("golu", "hidden", "cpu", torch.float32, cpu, candidates=ours, peers=peers, **shared),
        Case(
            "golu",
            "hidden",
            "cuda",
            torch.bfloat16,
            gpu,
            candidates=ours | {"triton": functools.partial(golu, backend="triton")},
            peers=peers,
            **shared,
        ),
    ]
