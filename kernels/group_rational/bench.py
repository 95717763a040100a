"""What `kernels.bench` measures of `group_rational`."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.bench import Case, Outputs
from kernels.group_rational import group_rational


def _inputs(
    shape: dict[str, int], dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor]:
    normal = functools.partial(torch.randn, generator=generator, device=generator.device)
    x = normal(shape["rows"], shape["columns"]).to(dtype)
    a, b = normal(8, 6), normal(8, 4)
    return {n: t.requires_grad_() for n, t in (("x", x), ("numerator", a), ("denominator", b))}


def _gelu(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    return F.gelu(x)


def cases() -> list[Case]:
    """A feed-forward layer's hidden features in 8 groups; on a CPU beside GELU as well."""
    reference = functools.partial(group_rational, backend="reference")
    ours: dict[str, Callable[..., Outputs]] = {
        "reference": reference,
        "tiled": functools.partial(group_rational, backend="tiled"),
    }
    triton = ours | {"triton": functools.partial(group_rational, backend="triton")}
    peers: dict[str, Callable[[], Callable[..., Outputs]]] = {
        "torch.compile": lambda: torch.compile(reference)
    }
    small, large = {"rows": 4096, "columns": 1024}, {"rows": 32768, "columns": 4096}
    gelu: dict[str, Callable[..., Outputs]] = {"torch.nn.GELU": _gelu}
    beside = "beside GELU", "cpu", torch.float32, small, _inputs, gelu | ours, reference, peers
    return [
        Case("group_rational", *beside, others=frozenset(gelu)),
        Case(
            "group_rational", "rows", "cpu", torch.float32, small, _inputs, ours, reference, peers
        ),
        Case(
            "group_rational",
            "rows",
            "cuda",
            torch.bfloat16,
            large,
            _inputs,
            triton,
            reference,
            peers,
        ),
    ]
