"""What `kernels.bench` measures of `golu`."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.bench import Case, Outputs
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
    """A feed-forward layer's hidden features; on a CPU beside GELU as well."""
    ours: dict[str, Callable[..., Outputs]] = {
        b: functools.partial(golu, backend=b) for b in ("reference", "tiled")
    }
    triton = ours | {"triton": functools.partial(golu, backend="triton")}
    peers: dict[str, Callable[[], Callable[..., Outputs]]] = {
        "torch.compile": lambda: torch.compile(_reference)
    }
    small, large = {"tokens": 4096, "features": 512}, {"tokens": 32768, "features": 8192}
    gelu: dict[str, Callable[..., Outputs]] = {"torch.nn.GELU": F.gelu}
    beside = "beside GELU", "cpu", torch.float32, small, _inputs, gelu | ours, _reference, peers
    return [
        Case("golu", *beside, others=frozenset(gelu)),
        Case("golu", "hidden", "cpu", torch.float32, small, _inputs, ours, _reference, peers),
        Case("golu", "hidden", "cuda", torch.bfloat16, large, _inputs, triton, _reference, peers),
    ]
