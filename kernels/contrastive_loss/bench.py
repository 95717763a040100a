"""What `kernels.bench` measures of `contrastive_loss`."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.bench import Case, Outputs
from kernels.contrastive_loss import contrastive_loss

CLIP_SCALE = 1 / 0.07


def _inputs(
    shape: dict[str, int], dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor]:
    def draw() -> Tensor:
        x = torch.randn(shape["batch"], shape["dim"], generator=generator, device=generator.device)
        return F.normalize(x, dim=1).to(dtype).requires_grad_()

    return {"a": draw(), "b": draw()}


def _mean(a: Tensor, b: Tensor, backend: str, **options: float | str) -> Tensor:
    return contrastive_loss(a, b, backend=backend, **options).mean()  # type: ignore[arg-type]


def cases() -> list[Case]:
    """The mean loss of both kinds; the first row is the dense form."""
    kinds = {
        "infonce": {"kind": "infonce", "scale": CLIP_SCALE},
        "sigmoid": {"kind": "sigmoid", "scale": 10.0, "bias": -10.0},
    }
    found = []
    for name, options in kinds.items():
        ours: dict[str, Callable[..., Outputs]] = {
            "dense" if b == "reference" else b: functools.partial(_mean, backend=b, **options)
            for b in ("reference", "tiled", "triton")
        }
        on_cpu = {b: ours[b] for b in ("dense", "tiled")}
        dense = ours["dense"]
        peers: dict[str, Callable[[], Callable[..., Outputs]]] = {
            "torch.compile": lambda dense=dense: torch.compile(dense)
        }
        small, large = {"batch": 16384, "dim": 128}, {"batch": 32768, "dim": 768}
        exact = ours["tiled"]
        found += [
            Case("contrastive_loss", name, "cpu", torch.float32, small, _inputs, on_cpu, exact),
            Case(
                "contrastive_loss",
                name,
                "cuda",
                torch.bfloat16,
                large,
                _inputs,
                ours,
                exact,
                peers,
            ),
        ]
    return found
