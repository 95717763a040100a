"""One program a row. τ is bracketed by bisection, then exact from its support."""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportIncompatibleMethodOverride=false
# (kernels are not typed as Python: a launch passes plain values for constexpr parameters)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.aot import AotSpec

HALVINGS = 26  # the bracket is 1 wide; 2⁻²⁶ is below float32's resolution near 1


@triton.jit
def _forward(x, p, columns, HALVINGS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * columns
    at = tl.arange(0, BLOCK)
    inside = at < columns
    score = tl.load(x + row + at, inside, other=-float("inf")).to(tl.float32)
    visible = score > -float("inf")
    highest = tl.max(score, 0)
    highest = tl.where(highest > -float("inf"), highest, 0.0)
    score = tl.where(visible, tl.maximum(score - highest, -2.0), -2.0)
    low, high = -1.0, 0.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        mass = tl.sum(tl.maximum(score - middle, 0.0), 0)
        low = tl.where(mass >= 1, middle, low)
        high = tl.where(mass >= 1, high, middle)
    inner = score > low
    count = tl.sum(inner.to(tl.float32), 0)
    tau = (tl.sum(tl.where(inner, score, 0.0), 0) - 1) / tl.maximum(count, 1.0)
    result = tl.where(visible, tl.maximum(score - tau, 0.0), 0.0)
    tl.store(p + row + at, result.to(p.dtype.element_ty), inside)


@triton.jit
def _backward(p, dp, dx, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * columns
    at = tl.arange(0, BLOCK)
    inside = at < columns
    support = tl.load(p + row + at, inside, other=0.0) > 0
    grad = tl.load(dp + row + at, inside, other=0.0).to(tl.float32)
    grad = tl.where(support, grad, 0.0)
    mean = tl.sum(grad, 0) / tl.maximum(tl.sum(support.to(tl.float32), 0), 1.0)
    result = tl.where(support, grad - mean, 0.0)
    tl.store(dx + row + at, result.to(dx.dtype.element_ty), inside)


class Sparsemax(torch.autograd.Function):
    """Over the last dimension. float64 is computed in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        p = torch.empty_like(x)
        if x.numel():
            _forward[_grid(x)](x, p, x.shape[-1], HALVINGS=HALVINGS, **_launch(x))
        ctx.save_for_backward(p)
        return p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (p,) = ctx.saved_tensors
        dx = torch.empty_like(p)
        if p.numel():
            _backward[_grid(p)](p, grads[0].contiguous(), dx, p.shape[-1], **_launch(p))
        return dx


def _grid(x: Tensor) -> tuple[int]:
    return (x.numel() // x.shape[-1],)


def _launch(x: Tensor) -> dict[str, int]:
    block = triton.next_power_of_2(x.shape[-1])
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


def aot_specs() -> list[AotSpec]:
    """Rows of up to 4096 in float32 and bfloat16."""
    specs = []
    for kind in ("fp32", "bf16"):
        pointers = {"forward": ("x", "p"), "backward": ("p", "dp", "dx")}
        for kernel, constants in ((_forward, {"HALVINGS": HALVINGS}), (_backward, {})):
            name = kernel.fn.__name__.strip("_")
            signature = dict.fromkeys(pointers[name], f"*{kind}") | {"columns": "i32"}
            constants = constants | {"BLOCK": 4096}
            specs.append(AotSpec(f"sparsemax/{name} {kind}", kernel, signature, constants, 8))
    return specs
