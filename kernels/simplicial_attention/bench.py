"""What `kernels.bench` measures of `simplicial_attention`."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.bench import Case, Outputs
from kernels.simplicial_attention import simplicial_attention


def _inputs(
    shape: dict[str, int], dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor]:
    def draw() -> Tensor:
        size = shape["batch"], shape["heads"], shape["length"], shape["head_dim"]
        x = torch.randn(*size, generator=generator, device=generator.device)
        return x.to(dtype).requires_grad_()

    return {name: draw() for name in ("q", "k1", "k2", "v1", "v2")}


def cases() -> list[Case]:
    """On a CPU small enough for the cube of scores; on a GPU the paper's windows."""
    found = []
    for device, dtype, shape, windows, backends in (
        (
            "cpu",
            torch.float32,
            {"batch": 1, "heads": 2, "length": 192, "head_dim": 32},
            (64, 16),
            ("reference", "tiled"),
        ),
        (
            "cuda",
            torch.bfloat16,
            {"batch": 1, "heads": 8, "length": 4096, "head_dim": 64},
            (512, 32),
            ("tiled", "triton"),
        ),
    ):
        ours: dict[str, Callable[..., Outputs]] = {
            b: functools.partial(simplicial_attention, windows=windows, backend=b) for b in backends
        }
        exact = functools.partial(simplicial_attention, windows=windows, backend="tiled")
        name = f"windows {windows[0]} and {windows[1]}"
        found.append(Case("simplicial_attention", name, device, dtype, shape, _inputs, ours, exact))
    return found
