"""One pass over the elements each way."""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportIncompatibleMethodOverride=false
# (kernels are not typed as Python: a launch passes plain values for constexpr parameters)

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.aot import AotSpec
from kernels.golu.reference import DEEP

BLOCK = 1024


@triton.jit
def _forward(x, y, count, alpha, beta, gamma, deepest, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(x + at, inside, other=0.0).to(tl.float32)
    inner = tl.exp(tl.minimum(-gamma * value, deepest))
    result = value * alpha * tl.exp(-beta * inner)
    tl.store(y + at, result.to(y.dtype.element_ty), inside)


@triton.jit
def _backward(x, dy, dx, count, alpha, beta, gamma, deepest, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(x + at, inside, other=0.0).to(tl.float32)
    grad = tl.load(dy + at, inside, other=0.0).to(tl.float32)
    inner = beta * tl.exp(tl.minimum(-gamma * value, deepest))
    slope = alpha * tl.exp(-inner) * (1 + gamma * value * inner)
    tl.store(dx + at, (grad * slope).to(dx.dtype.element_ty), inside)


class GoLU(torch.autograd.Function):
    """Saves `x` alone. float64 is computed in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float, beta: float, gamma: float) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        ctx.parameters = alpha, beta, gamma, math.log(DEEP / beta)
        y = torch.empty_like(x)
        if x.numel():
            _forward[_grid(x)](x, y, x.numel(), *ctx.parameters, BLOCK=BLOCK)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        if x.numel():
            dy = grads[0].contiguous()
            _backward[_grid(x)](x, dy, dx, x.numel(), *ctx.parameters, BLOCK=BLOCK)
        return dx, None, None, None


def _grid(x: Tensor) -> tuple[int]:
    return (triton.cdiv(x.numel(), BLOCK),)


def aot_specs() -> list[AotSpec]:
    """Both kernels in float32 and bfloat16."""
    numbers = {"count": "i64"} | dict.fromkeys(("alpha", "beta", "gamma", "deepest"), "fp32")
    specs = []
    for kind in ("fp32", "bf16"):
        for kernel, pointers in ((_forward, ("x", "y")), (_backward, ("x", "dy", "dx"))):
            signature = dict.fromkeys(pointers, f"*{kind}") | numbers
            name = f"golu/{kernel.fn.__name__.strip('_')} {kind}"
            specs.append(AotSpec(name, kernel, signature, {"BLOCK": BLOCK}))
    return specs
