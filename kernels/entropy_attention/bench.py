"""What `kernels.bench` measures of `entropy_attention`."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.bench import Case
from kernels.entropy_attention import entropy_attention


def _inputs(
    shape: dict[str, int], dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor]:
    """Scores with a standard deviation of 1."""
    size = shape["batch"], shape["heads"], shape["tokens"], shape["head_dim"]
    normal = functools.partial(torch.randn, generator=generator, device=generator.device)
    return {name: normal(*size).to(dtype).requires_grad_() for name in ("q", "k", "v")}


def _output(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return entropy_attention(q, k, v, **options)[0]


def _compiled(causal: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """The materialised form as its users write it."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(hidden, -torch.inf)
        p = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
        return p.to(v.dtype) @ v, -(p * (p + 1e-9).log()).sum(-1)

    return torch.compile(attend)


def _sdpa(causal: bool) -> Callable[..., Tensor]:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def _flex(causal: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

    @functools.cache
    def mask(length: int, device: torch.device) -> BlockMask | None:
        if not causal:
            return None
        return create_block_mask(
            lambda _b, _h, i, j: i >= j, None, None, length, length, device=str(device)
        )

    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask(q.shape[2], q.device))


def cases() -> list[Case]:
    """With the entropy, and the output alone beside attention without entropies.

    No peer differentiates the entropy: the first case is to be read against the second's too.
    """
    cpu = {"batch": 1, "heads": 4, "tokens": 4096, "head_dim": 64}
    gpu = {"batch": 4, "heads": 16, "tokens": 4096, "head_dim": 64}
    found = []
    for device, dtype, shape, causal, fused in (
        ("cpu", torch.float32, cpu, False, "tiled"),
        ("cuda", torch.bfloat16, gpu, True, "triton"),
    ):
        both = functools.partial(entropy_attention, causal=causal)
        alone = functools.partial(_output, causal=causal)
        backends = dict.fromkeys(("reference", "tiled", fused))
        case = functools.partial(
            Case, op="entropy_attention", device=device, dtype=dtype, shape=shape, inputs=_inputs
        )
        found += [
            case(
                name="output and entropy",
                candidates={name: functools.partial(both, backend=name) for name in backends},
                peers={"torch.compile": functools.partial(_compiled, causal)},
                exact=functools.partial(both, backend="tiled"),
            ),
            case(
                name="output alone",
                candidates={name: functools.partial(alone, backend=name) for name in backends},
                peers={
                    "SDPA": functools.partial(_sdpa, causal),
                    "FlexAttention": functools.partial(_flex, causal),
                },
                exact=functools.partial(alone, backend="tiled"),
            ),
        ]
    return found
