"""One program for a block of rows of one group. It writes its share of the coefficients' gradients
to its own place; one sum over the places follows, so there are no atomics."""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportIncompatibleMethodOverride=false
# (kernels are not typed as Python: a launch passes plain values for constexpr parameters)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.aot import AotSpec

ROWS = 32
TERMS = 16
"""Gradients a program writes: 6 of the numerator, 4 of the denominator, the rest unused."""


@triton.jit
def _tile(rows, channels, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Addresses of the program's block of rows in its group, and which of them exist."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    at = row[:, None] * channels + (tl.program_id(1) * width + column)[None, :]
    return at, (row < rows)[:, None] & (column < width)[None, :]


@triton.jit
def _polynomials(x, a, b):
    """P, its slope, the denominator, and its slope in |x|, at x; six and four coefficients."""
    a0, a1, a2 = tl.load(a), tl.load(a + 1), tl.load(a + 2)
    a3, a4, a5 = tl.load(a + 3), tl.load(a + 4), tl.load(a + 5)
    b1, b2 = tl.abs(tl.load(b)), tl.abs(tl.load(b + 1))
    b3, b4 = tl.abs(tl.load(b + 2)), tl.abs(tl.load(b + 3))
    above = a0 + x * (a1 + x * (a2 + x * (a3 + x * (a4 + x * a5))))
    above_slope = a1 + x * (2 * a2 + x * (3 * a3 + x * (4 * a4 + x * 5 * a5)))
    s = tl.abs(x)
    below = 1 + s * (b1 + s * (b2 + s * (b3 + s * b4)))
    below_slope = b1 + s * (2 * b2 + s * (3 * b3 + s * 4 * b4))
    return above, above_slope, below, below_slope


@triton.jit
def _forward(x, a, b, y, rows, channels, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    at, inside = _tile(rows, channels, width, ROWS, WIDTH)
    group = tl.program_id(1)
    value = tl.load(x + at, inside, other=0.0).to(tl.float32)
    above, _, below, _ = _polynomials(value, a + group * 6, b + group * 4)
    tl.store(y + at, (above / below).to(y.dtype.element_ty), inside)


@triton.jit
def _backward(
    x,
    a,
    b,
    dy,
    dx,
    partial,
    rows,
    channels,
    width,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    TERMS: tl.constexpr,
):
    at, inside = _tile(rows, channels, width, ROWS, WIDTH)
    group = tl.program_id(1)
    value = tl.load(x + at, inside, other=0.0).to(tl.float32)
    grad = tl.load(dy + at, inside, other=0.0).to(tl.float32)
    above, above_slope, below, below_slope = _polynomials(value, a + group * 6, b + group * 4)
    size = tl.abs(value)
    sign = tl.where(value > 0, 1.0, tl.where(value < 0, -1.0, 0.0))
    scaled = grad / below
    quotient = above / below
    slope = scaled * (above_slope - quotient * sign * below_slope)
    tl.store(dx + at, slope.to(dx.dtype.element_ty), inside)
    place = partial + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + group) * TERMS
    power = scaled
    for term in tl.static_range(6):
        tl.store(place + term, tl.sum(tl.sum(power, 1), 0))
        power = power * value
    power = -scaled * quotient
    for term in tl.static_range(4):
        power = power * size
        tl.store(place + 6 + term, tl.sum(tl.sum(power, 1), 0))


class GroupRational(torch.autograd.Function):
    """float64 is computed in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
        x = x.contiguous()
        a, b = _padded(numerator, 6), _padded(denominator, 4)
        ctx.save_for_backward(x, a, b)
        ctx.terms = numerator.shape[1], denominator.shape[1], numerator.dtype, denominator.dtype
        y = torch.empty_like(x)
        if x.numel():
            _forward[_grid(x, a)](x, a, b, y, *_sizes(x, a), **_blocks(x, a))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, a, b = ctx.saved_tensors
        m, n, a_kind, b_kind = ctx.terms
        dx = torch.empty_like(x)
        blocks, groups = _grid(x, a)
        partial = torch.zeros(blocks, groups, TERMS, device=x.device)
        if x.numel():
            dy = grads[0].contiguous()
            sizes, constants = _sizes(x, a), _blocks(x, a)
            _backward[blocks, groups](x, a, b, dy, dx, partial, *sizes, TERMS=TERMS, **constants)
        total = partial.sum(0)
        db = total[:, 6 : 6 + n] * b[:, :n].sign()
        return dx, total[:, :m].to(a_kind), db.to(b_kind)


def _padded(coefficients: Tensor, terms: int) -> Tensor:
    missing = terms - coefficients.shape[1]
    return torch.nn.functional.pad(coefficients.float(), (0, missing)).contiguous()


def _sizes(x: Tensor, a: Tensor) -> tuple[int, int, int]:
    channels = x.shape[-1]
    return x.numel() // max(channels, 1), channels, channels // len(a)


def _grid(x: Tensor, a: Tensor) -> tuple[int, int]:
    return triton.cdiv(_sizes(x, a)[0], ROWS), len(a)


def _blocks(x: Tensor, a: Tensor) -> dict[str, int]:
    return {"ROWS": ROWS, "WIDTH": triton.next_power_of_2(_sizes(x, a)[2])}


def aot_specs() -> list[AotSpec]:
    """Groups of 64 channels in float32 and bfloat16."""
    specs = []
    sizes = {"rows": "i64", "channels": "i32", "width": "i32"}
    for kind in ("fp32", "bf16"):
        coefficients = {"a": "*fp32", "b": "*fp32"}
        forward = {"x": f"*{kind}"} | coefficients | {"y": f"*{kind}"} | sizes
        backward = {"x": f"*{kind}"} | coefficients | {"dy": f"*{kind}", "dx": f"*{kind}"}
        backward |= {"partial": "*fp32"} | sizes
        shape = {"ROWS": ROWS, "WIDTH": 64}
        specs.append(AotSpec(f"group_rational/forward {kind}", _forward, forward, shape))
        shape = shape | {"TERMS": TERMS}
        specs.append(AotSpec(f"group_rational/backward {kind}", _backward, backward, shape))
    return specs
