"""Forward: a program holds a block of queries, and for every key of the second window walks the
keys of the first. Backward: scores are made again, once for dq, once for dk1 and dv1 by blocks of
first keys, and once for dk2 and dv2 by single second keys; nothing is added atomically."""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportIncompatibleMethodOverride=false, reportCallIssue=false
# (kernels are not typed as Python: a launch passes plain values for constexpr parameters)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.aot import AotSpec
from kernels.backend import triton_interpreted

HALF = {"BLOCK_Q": 32, "BLOCK_K": 16, "num_warps": 4}
LAUNCH = {
    **{(name, 2): HALF for name in ("forward", "dq", "first", "second")},
    **{(name, 4): HALF for name in ("forward", "dq")},
    ("first", 4): HALF | {"num_warps": 8},
    ("second", 4): {"BLOCK_Q": 16, "BLOCK_K": 16, "num_warps": 2},
}
"""By kernel and bytes of an element: what fits the registers of every target at a head size of 64.
"""

# Triton's interpreter computes on NumPy arrays, which have no bfloat16 products.
_WIDEN = tl.constexpr(triton_interpreted())


@triton.jit
def _dot(a, b, c, PRECISION: tl.constexpr):
    """a @ b + c in float32."""
    if _WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision=PRECISION)


@triton.jit
def _rows(x, at, length, dim, inner, base):
    """Rows `at` of one head, 0 where there are none."""
    inside = (at[:, None] >= 0) & (at[:, None] < length) & (inner[None, :] < dim)
    return tl.load(x + base + at[:, None].to(tl.int64) * dim + inner[None, :], inside, other=0.0)


@triton.jit
def _row(x, at, dim, inner, base):
    """One row in float32."""
    return tl.load(x + base + at * dim + inner, inner < dim, other=0.0).to(tl.float32)


@triton.jit
def _seen(queries, keys, k, window1, window2, places, start, HIDDEN: tl.constexpr, length):
    """Which of queries × keys count with the second key `k`.

    `places` are the keys' positions, for hidden ones far before every window. Beyond the length
    there are no keys before a query, and queries whose rows are 0 add nothing.
    """
    if HIDDEN:
        keys = tl.load(places + start + keys, keys < length, other=length)
        k = tl.load(places + start + k)
    distance = queries[:, None] - keys[None, :]
    other = queries - k
    near = (other >= 0) & (other < window2)
    return (distance >= 0) & (distance < window1) & near[:, None]


@triton.jit
def _forward(
    q,
    k1,
    k2,
    v1,
    v2,
    out,
    lse,
    places,
    length,
    dim,
    window1,
    window2,
    scale,
    HIDDEN: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    base, start = head * length * dim, head * length
    first = tl.program_id(0) * BLOCK_Q
    queries, inner = first + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    query = _rows(q, queries, length, dim, inner, base)
    peak = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    mixed = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    end = tl.minimum(first + BLOCK_Q, length)
    for k in range(tl.maximum(0, first - window2 + 1), end):
        product = (query.to(tl.float32) * _row(k2, k, dim, inner, base)[None, :]).to(query.dtype)
        value = _row(v2, k, dim, inner, base)[None, :]
        for j in range(tl.maximum(0, first - window1 + 1), end, BLOCK_K):
            keys = j + tl.arange(0, BLOCK_K)
            z = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
            key = _rows(k1, keys, length, dim, inner, base)
            z = _dot(product, tl.trans(key), z, PRECISION) * scale
            counts = _seen(queries, keys, k, window1, window2, places, start, HIDDEN, length)
            z = tl.where(counts, z, -float("inf"))
            higher = tl.maximum(peak, tl.max(z, 1))
            safe = tl.where(higher > -float("inf"), higher, 0.0)
            weights = tl.exp(z - safe[:, None])
            shrink = tl.exp(peak - safe)
            total = total * shrink + tl.sum(weights, 1)
            some = _rows(v1, keys, length, dim, inner, base)
            part = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
            part = _dot(weights.to(some.dtype), some, part, PRECISION)
            mixed = mixed * shrink[:, None] + part * value
            peak = higher
    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    at = base + queries[:, None].to(tl.int64) * dim + inner[None, :]
    inside = (queries[:, None] < length) & (inner[None, :] < dim)
    tl.store(out + at, mixed.to(out.dtype.element_ty), inside)
    tl.store(lse + head * length + queries, peak + tl.log(total), queries < length)


@triton.jit
def _weights(z, counts, lse):
    safe = tl.where(lse > -float("inf"), lse, 0.0)
    return tl.where(counts, tl.exp(z - safe[:, None]), 0.0)


@triton.jit
def _dq_kernel(
    q,
    k1,
    k2,
    v1,
    v2,
    grad,
    lse,
    delta,
    places,
    dq,
    length,
    dim,
    window1,
    window2,
    scale,
    HIDDEN: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    base, start = head * length * dim, head * length
    first = tl.program_id(0) * BLOCK_Q
    queries, inner = first + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    query = _rows(q, queries, length, dim, inner, base)
    upstream = _rows(grad, queries, length, dim, inner, base)
    sums = tl.load(lse + head * length + queries, queries < length, other=0.0)
    means = tl.load(delta + head * length + queries, queries < length, other=0.0)
    result = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    end = tl.minimum(first + BLOCK_Q, length)
    for k in range(tl.maximum(0, first - window2 + 1), end):
        other = _row(k2, k, dim, inner, base)[None, :]
        product = (query.to(tl.float32) * other).to(query.dtype)
        value = _row(v2, k, dim, inner, base)[None, :]
        scaled = (upstream.to(tl.float32) * value).to(query.dtype)
        for j in range(tl.maximum(0, first - window1 + 1), end, BLOCK_K):
            keys = j + tl.arange(0, BLOCK_K)
            key = _rows(k1, keys, length, dim, inner, base)
            some = _rows(v1, keys, length, dim, inner, base)
            zero = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
            z = _dot(product, tl.trans(key), zero, PRECISION) * scale
            counts = _seen(queries, keys, k, window1, window2, places, start, HIDDEN, length)
            weights = _weights(z, counts, sums)
            slope = _dot(scaled, tl.trans(some), zero, PRECISION) - means[:, None]
            slope = (weights * slope * scale).to(key.dtype)
            part = _dot(slope, key, tl.zeros((BLOCK_Q, BLOCK_D), tl.float32), PRECISION)
            result += part * other
    at = base + queries[:, None].to(tl.int64) * dim + inner[None, :]
    inside = (queries[:, None] < length) & (inner[None, :] < dim)
    tl.store(dq + at, result.to(dq.dtype.element_ty), inside)


@triton.jit
def _first_kernel(
    q,
    k1,
    k2,
    v1,
    v2,
    grad,
    lse,
    delta,
    places,
    dk1,
    dv1,
    length,
    dim,
    window1,
    window2,
    scale,
    HIDDEN: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk1 and dv1 of a block of first keys."""
    head = tl.program_id(1).to(tl.int64)
    base, start = head * length * dim, head * length
    begin = tl.program_id(0) * BLOCK_K
    keys, inner = begin + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    key = _rows(k1, keys, length, dim, inner, base)
    some = _rows(v1, keys, length, dim, inner, base)
    key_sum = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    value_sum = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for first in range(begin, tl.minimum(begin + BLOCK_K + window1 - 1, length), BLOCK_Q):
        queries = first + tl.arange(0, BLOCK_Q)
        query = _rows(q, queries, length, dim, inner, base)
        upstream = _rows(grad, queries, length, dim, inner, base)
        sums = tl.load(lse + head * length + queries, queries < length, other=0.0)
        means = tl.load(delta + head * length + queries, queries < length, other=0.0)
        end = tl.minimum(first + BLOCK_Q, length)
        for k in range(tl.maximum(0, first - window2 + 1), end):
            other = _row(k2, k, dim, inner, base)[None, :]
            product = (query.to(tl.float32) * other).to(query.dtype)
            value = _row(v2, k, dim, inner, base)[None, :]
            scaled = (upstream.to(tl.float32) * value).to(query.dtype)
            zero = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
            z = _dot(product, tl.trans(key), zero, PRECISION) * scale
            counts = _seen(queries, keys, k, window1, window2, places, start, HIDDEN, length)
            weights = _weights(z, counts, sums)
            value_sum = _dot(tl.trans(weights.to(scaled.dtype)), scaled, value_sum, PRECISION)
            slope = _dot(scaled, tl.trans(some), zero, PRECISION) - means[:, None]
            slope = (weights * slope * scale).to(product.dtype)
            key_sum = _dot(tl.trans(slope), product, key_sum, PRECISION)
    at = base + keys[:, None].to(tl.int64) * dim + inner[None, :]
    inside = (keys[:, None] < length) & (inner[None, :] < dim)
    tl.store(dk1 + at, key_sum.to(dk1.dtype.element_ty), inside)
    tl.store(dv1 + at, value_sum.to(dv1.dtype.element_ty), inside)


@triton.jit
def _second_kernel(
    q,
    k1,
    k2,
    v1,
    v2,
    grad,
    lse,
    delta,
    places,
    dk2,
    dv2,
    length,
    dim,
    window1,
    window2,
    scale,
    HIDDEN: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk2 and dv2 of one second key."""
    head = tl.program_id(1).to(tl.int64)
    base, start = head * length * dim, head * length
    k = tl.program_id(0)
    inner = tl.arange(0, BLOCK_D)
    other = _row(k2, k, dim, inner, base)[None, :]
    value = _row(v2, k, dim, inner, base)[None, :]
    key_sum = tl.zeros((BLOCK_D,), tl.float32)
    value_sum = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(k, tl.minimum(k + window2, length), BLOCK_Q):
        queries = first + tl.arange(0, BLOCK_Q)
        query = _rows(q, queries, length, dim, inner, base)
        upstream = _rows(grad, queries, length, dim, inner, base)
        sums = tl.load(lse + head * length + queries, queries < length, other=0.0)
        means = tl.load(delta + head * length + queries, queries < length, other=0.0)
        product = (query.to(tl.float32) * other).to(query.dtype)
        scaled = (upstream.to(tl.float32) * value).to(query.dtype)
        end = tl.minimum(first + BLOCK_Q, length)
        for j in range(tl.maximum(0, first - window1 + 1), end, BLOCK_K):
            keys = j + tl.arange(0, BLOCK_K)
            key = _rows(k1, keys, length, dim, inner, base)
            some = _rows(v1, keys, length, dim, inner, base)
            zero = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
            empty = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
            z = _dot(product, tl.trans(key), zero, PRECISION) * scale
            counts = _seen(queries, keys, k, window1, window2, places, start, HIDDEN, length)
            weights = _weights(z, counts, sums)
            mixed = _dot(weights.to(some.dtype), some, empty, PRECISION)
            value_sum += tl.sum(mixed * upstream.to(tl.float32), 0)
            slope = _dot(scaled, tl.trans(some), zero, PRECISION) - means[:, None]
            slope = (weights * slope * scale).to(key.dtype)
            key_sum += tl.sum(_dot(slope, key, empty, PRECISION) * query.to(tl.float32), 0)
    at = base + k * dim + inner
    tl.store(dk2 + at, key_sum.to(dk2.dtype.element_ty), inner < dim)
    tl.store(dv2 + at, value_sum.to(dv2.dtype.element_ty), inner < dim)


class SimplicialAttention(torch.autograd.Function):
    """Of (batch · heads, length, head_dim); saves its inputs, the output and one number a query."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k1: Tensor,
        k2: Tensor,
        v1: Tensor,
        v2: Tensor,
        windows: tuple[int, int],
        scale: float,
        hidden: Tensor | None,
    ) -> Tensor:
        q, k1, k2, v1, v2 = (x.contiguous() for x in (q, k1, k2, v1, v2))
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        keys = None if hidden is None else _places(hidden)
        sizes = *q.shape[1:], *windows, scale
        if q.numel():
            options = _options("forward", q, keys)
            grid = triton.cdiv(q.shape[1], options["BLOCK_Q"]), len(q)
            _forward[grid](q, k1, k2, v1, v2, out, lse, keys, *sizes, **options)
        ctx.save_for_backward(q, k1, k2, v1, v2, out, lse, keys)
        ctx.sizes = sizes
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k1, k2, v1, v2, out, lse, keys = ctx.saved_tensors
        grad = grads[0].contiguous()
        delta = (grad.float() * out.float()).sum(-1)
        dq, dk1, dk2, dv1, dv2 = (torch.empty_like(x) for x in (q, k1, k2, v1, v2))
        if q.numel():
            given = q, k1, k2, v1, v2, grad, lse, delta, keys
            for name, kernel, outputs, size in (
                ("dq", _dq_kernel, (dq,), "BLOCK_Q"),
                ("first", _first_kernel, (dk1, dv1), "BLOCK_K"),
                ("second", _second_kernel, (dk2, dv2), None),
            ):
                options = _options(name, q, keys)
                block = options[size] if size else 1
                kernel[triton.cdiv(q.shape[1], block), len(q)](
                    *given, *outputs, *ctx.sizes, **options
                )
        return dq, dk1, dk2, dv1, dv2, None, None, None


def _places(hidden: Tensor) -> Tensor:
    position = torch.arange(hidden.shape[1], dtype=torch.int32, device=hidden.device)
    return torch.where(hidden, -(1 << 30), position)


def _options(name: str, q: Tensor, keys: Tensor | None) -> dict[str, Any]:
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    dim = max(16, triton.next_power_of_2(q.shape[2]))
    launch = LAUNCH[name, q.element_size()]
    return launch | {
        "HIDDEN": keys is not None,
        "BLOCK_D": dim,
        "PRECISION": precision,
    }


def aot_specs() -> list[AotSpec]:
    """The default configuration at a head size of 64, with and without padding."""
    sizes = dict.fromkeys(("length", "dim", "window1", "window2"), "i32")
    specs = []
    for dtype in ("fp32", "bf16"):
        inputs = dict.fromkeys(("q", "k1", "k2", "v1", "v2"), f"*{dtype}")
        for masked in (False, True):
            hidden = {"places": "*i32"} if masked else {}
            left_out = {} if masked else {"places": None}
            constants = {"HIDDEN": masked, "BLOCK_D": 64, "PRECISION": "ieee"} | left_out
            rest = hidden | sizes | {"scale": "fp32"}
            saved = {"grad": f"*{dtype}", "lse": "*fp32", "delta": "*fp32"}
            for kernel, outputs in (
                (_forward, {"out": f"*{dtype}", "lse": "*fp32"}),
                (_dq_kernel, saved | {"dq": f"*{dtype}"}),
                (_first_kernel, saved | dict.fromkeys(("dk1", "dv1"), f"*{dtype}")),
                (_second_kernel, saved | dict.fromkeys(("dk2", "dv2"), f"*{dtype}")),
            ):
                name = kernel.fn.__name__.strip("_").removesuffix("_kernel")
                label = f"simplicial_attention/{name}{', masked' if masked else ''}, {dtype}"
                launch = LAUNCH[name, 4 if dtype == "fp32" else 2]
                blocks = {key: launch[key] for key in ("BLOCK_Q", "BLOCK_K")}
                specs.append(
                    AotSpec(
                        label,
                        kernel,
                        inputs | outputs | rest,
                        constants | blocks,
                        num_warps=launch["num_warps"],
                        divisible=("dim",),
                    )
                )
    return specs
