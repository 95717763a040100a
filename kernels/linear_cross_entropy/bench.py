"""What `kernels.bench` measures of `linear_cross_entropy`."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.bench import Case
from kernels.linear_cross_entropy import linear_cross_entropy


def _inputs(
    shape: dict[str, int], dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor]:
    """Logits with a standard deviation of about 1, as early in training."""
    tokens, dim, vocab = shape["tokens"], shape["dim"], shape["vocab"]
    normal = functools.partial(torch.randn, generator=generator, device=generator.device)
    hidden = normal(tokens, dim).to(dtype).requires_grad_()
    weight = (normal(vocab, dim) * dim**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (tokens,), generator=generator, device=generator.device)
    return {"hidden": hidden, "weight": weight, "targets": targets}


def _pytorch(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = hidden @ weight.T
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)


def _unreduced(hidden: Tensor, weight: Tensor, targets: Tensor, backend: str) -> Tensor:
    losses = linear_cross_entropy(hidden, weight, targets, reduction="none", backend=backend)
    assert isinstance(losses, Tensor)  # no lse beside it
    return losses.mean()


def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_pytorch)


def _liger() -> Callable[..., Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # pyright: ignore[reportMissingImports]

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, targets: loss(weight, hidden, targets)


def _cut_cross_entropy(impl: str) -> Callable[..., Tensor]:
    from cut_cross_entropy import linear_cross_entropy as peer  # pyright: ignore[reportMissingImports]

    return lambda hidden, weight, targets: peer(hidden, weight, targets, impl=impl)


def cases() -> list[Case]:
    """GPT-2's vocabulary on a CPU, Gemma 2 (2B)'s on a GPU."""
    function = functools.partial
    tiled = {
        "tiled": function(linear_cross_entropy, backend="tiled"),
        "tiled, unreduced": function(_unreduced, backend="tiled"),
    }
    triton = {
        "triton": function(linear_cross_entropy, backend="triton"),
        "triton, filtered": function(linear_cross_entropy, backend="triton", filter_eps="auto"),
        "triton, filtered, Kahan": function(
            linear_cross_entropy, backend="triton", filter_eps="auto", kahan=True
        ),
    }
    exact = function(linear_cross_entropy, backend="tiled")
    return [
        Case(
            op="linear_cross_entropy",
            name="gpt-2",
            device="cpu",
            dtype=torch.float32,
            shape={"tokens": 2048, "dim": 256, "vocab": 50257},
            inputs=_inputs,
            candidates={"F.cross_entropy": _pytorch, **tiled},
            peers={"torch.compile": _compiled},
            exact=exact,
        ),
        Case(
            op="linear_cross_entropy",
            name="gemma-2",
            device="cuda",
            dtype=torch.bfloat16,
            shape={"tokens": 8192, "dim": 2304, "vocab": 256000},
            inputs=_inputs,
            candidates={"F.cross_entropy": _pytorch, "tiled": tiled["tiled"], **triton},
            peers={
                "torch.compile": _compiled,
                "liger-kernel": _liger,
                "cut-cross-entropy": function(_cut_cross_entropy, "cce"),
                "cut-cross-entropy, exact": function(_cut_cross_entropy, "cce_exact"),
            },
            exact=exact,
        ),
    ]
