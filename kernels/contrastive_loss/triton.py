"""Logits as tiles on the chip. Forward: a program walks the columns for its rows with an online
log-sum-exp. Backward: a kernel writes the logits' gradients of one slice of the rows in the inputs'
dtype, and two matrix products follow."""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false
# (kernels are not typed as Python: a launch passes plain values for constexpr parameters)

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot import AotSpec
from kernels.backend import triton_interpreted
from kernels.linear_cross_entropy.tiled import matmul

SLICE_ELEMENTS = 1 << 24
"""Gradients of logits held at once: 32 MiB in bfloat16."""
BLOCK = {"BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_D": 32}

# Triton's interpreter computes on NumPy arrays, which have no bfloat16 products.
_WIDEN = tl.constexpr(triton_interpreted())


@triton.jit
def _tile(
    a,
    b,
    scale,
    bias,
    itself,
    partner,
    rows,
    columns,
    n,
    m,
    dim,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SKIPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logits in float32, −inf where they do not count."""
    z = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, dim, BLOCK_D):
        inner = start + tl.arange(0, BLOCK_D)
        left = tl.load(
            a + rows[:, None].to(tl.int64) * dim + inner[None, :],
            (rows[:, None] < n) & (inner[None, :] < dim),
            other=0.0,
        )
        right = tl.load(
            b + columns[None, :].to(tl.int64) * dim + inner[:, None],
            (columns[None, :] < m) & (inner[:, None] < dim),
            other=0.0,
        )
        if _WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        z = tl.dot(left, right, z, input_precision=PRECISION)
    z = z * tl.load(scale) + tl.load(bias)
    counts = columns[None, :] < m
    if SKIPS > 0:
        counts = counts & (tl.load(itself + rows, rows < n, other=-1)[:, None] != columns[None, :])
    if SKIPS > 1:
        counts = counts & (tl.load(partner + rows, rows < n, other=-1)[:, None] != columns[None, :])
    return tl.where(counts, z, -float("inf"))


@triton.jit
def _softplus(z):
    """log(1 + exp z), also where exp z is lost beside 1 (Kahan's log1p); 0 at −inf."""
    small = tl.exp(-tl.abs(z))
    sum = 1.0 + small
    rest = tl.where(sum == 1.0, small, tl.log(sum) * small / tl.where(sum == 1.0, 1.0, sum - 1.0))
    return tl.maximum(z, 0.0) + rest


@triton.jit
def _rows_kernel(
    a,
    b,
    scale,
    bias,
    itself,
    partner,
    out,
    n,
    m,
    dim,
    SIGMOID: tl.constexpr,
    SKIPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """F of a block of rows."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    peak = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, m, BLOCK_M):
        columns = start + tl.arange(0, BLOCK_M)
        z = _tile(
            a,
            b,
            scale,
            bias,
            itself,
            partner,
            rows,
            columns,
            n,
            m,
            dim,
            BLOCK_N,
            BLOCK_M,
            BLOCK_D,
            SKIPS,
            PRECISION,
        )
        if SIGMOID:
            total += tl.sum(_softplus(z), 1)
        else:
            higher = tl.maximum(peak, tl.max(z, 1))
            safe = tl.where(higher > -float("inf"), higher, 0.0)
            total = total * tl.exp(peak - safe) + tl.sum(tl.exp(z - safe[:, None]), 1)
            peak = higher
    result = total if SIGMOID else peak + tl.log(total)
    tl.store(out + rows, result, rows < n)


@triton.jit
def _slice_kernel(
    a,
    b,
    scale,
    bias,
    itself,
    partner,
    row_lse,
    row_weight,
    column_lse,
    column_weight,
    dz,
    first,
    n,
    m,
    dim,
    SIGMOID: tl.constexpr,
    COLUMNS: tl.constexpr,
    SKIPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the logits of a tile, the rows of `dz` being those from `first`."""
    rows = first + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    z = _tile(
        a,
        b,
        scale,
        bias,
        itself,
        partner,
        rows,
        columns,
        n,
        m,
        dim,
        BLOCK_N,
        BLOCK_M,
        BLOCK_D,
        SKIPS,
        PRECISION,
    )
    weight = tl.load(row_weight + rows, rows < n, other=0.0)[:, None]
    if SIGMOID:
        small = tl.exp(-tl.abs(z))
        result = weight * tl.where(z > 0, 1.0, small) / (1.0 + small)
    else:
        lse = tl.load(row_lse + rows, rows < n, other=float("inf"))[:, None]
        result = weight * tl.exp(z - lse)
    if COLUMNS:
        lse = tl.load(column_lse + columns, columns < m, other=float("inf"))[None, :]
        weight = tl.load(column_weight + columns, columns < m, other=0.0)[None, :]
        result += weight * tl.exp(z - lse)
    at = (rows - first)[:, None].to(tl.int64) * m + columns[None, :]
    inside = (rows[:, None] < n) & (columns[None, :] < m)
    tl.store(dz + at, result.to(dz.dtype.element_ty), inside)


def statistics(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor,
    skipped: list[Tensor],
    kind: str,
    columns: bool,
) -> tuple[Tensor, Tensor]:
    """F of every row, and with `columns` the log-sum-exp of every column."""
    rows = _rows(a, b, scale, bias, skipped, kind)
    return rows, _rows(b, a, scale, bias, [], kind) if columns else rows


def add_gradients(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor,
    skipped: list[Tensor],
    kind: str,
    ours: tuple[Tensor, Tensor],
    theirs: tuple[Tensor, Tensor] | None,
    da: Tensor,
    db: Tensor,
) -> Tensor:
    """As in `tiled`."""
    total = torch.zeros_like(bias)
    # A mean over a large batch is below what float16 can hold.
    dtype = torch.float32 if a.dtype == torch.float16 else a.dtype
    wide_a, wide_b = a.to(dtype), b.to(dtype)
    step = max(BLOCK["BLOCK_N"], SLICE_ELEMENTS // max(len(b), 1))
    for first in range(0, len(a), step):
        last = min(first + step, len(a))
        dz = torch.empty(last - first, len(b), dtype=dtype, device=a.device)
        grid = triton.cdiv(last - first, BLOCK["BLOCK_N"]), triton.cdiv(len(b), BLOCK["BLOCK_M"])
        _slice_kernel[grid](
            *(a, b, scale, bias, *_pointers(skipped)),
            *(*ours, *(theirs or (None, None))),
            *(dz, first, last, len(b), a.shape[1]),
            SIGMOID=kind == "sigmoid",
            COLUMNS=theirs is not None,
            SKIPS=len(skipped),
            PRECISION=_precision(),
            **BLOCK,
        )
        da[first:last] += matmul(dz, wide_b)
        db += matmul(dz.T, wide_a[first:last])
        total += dz.sum(dtype=total.dtype)
    return total


def _rows(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, skipped: list[Tensor], kind: str
) -> Tensor:
    out = torch.empty(len(a), dtype=torch.float32, device=a.device)
    if not len(a):
        return out
    _rows_kernel[(triton.cdiv(len(a), BLOCK["BLOCK_N"]),)](
        *(a, b, scale, bias, *_pointers(skipped), out, len(a), len(b), a.shape[1]),
        SIGMOID=kind == "sigmoid",
        SKIPS=len(skipped),
        PRECISION=_precision(),
        num_warps=_warps(a.element_size(), kind),
        **BLOCK,
    )
    return out


def _warps(size: int, kind: str) -> int:
    """Of the kernel over rows: what its registers need, by bytes of an element."""
    return 4 if size == 2 and kind == "infonce" else 8


def _pointers(skipped: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    first, second, *_ = [*skipped, None, None]
    return first, second


def _precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def aot_specs() -> list[AotSpec]:
    """The default configurations in float32 and bfloat16."""
    numbers = dict.fromkeys(("scale", "bias"), "*fp32") | dict.fromkeys(("n", "m", "dim"), "i32")
    options = BLOCK | {"PRECISION": "ieee"}
    specs = []
    for dtype in ("fp32", "bf16"):
        inputs = {"a": f"*{dtype}", "b": f"*{dtype}"} | numbers
        for kind, skips in (("infonce", 0), ("infonce", 1), ("sigmoid", 1), ("sigmoid", 2)):
            given = dict(zip(("itself", "partner"), ("*i64", "*i64")[:skips]))
            left_out = {k: None for k in ("itself", "partner") if k not in given}
            constants = options | left_out | {"SIGMOID": kind == "sigmoid", "SKIPS": skips}
            name = f"{kind}, {skips} skipped, {dtype}"
            specs.append(
                AotSpec(
                    f"contrastive_loss/rows {name}",
                    _rows_kernel,
                    inputs | given | {"out": "*fp32"},
                    constants,
                    num_warps=_warps(4 if dtype == "fp32" else 2, kind),
                    divisible=("dim",),
                )
            )
            both = kind == "infonce" and not skips
            sums = ["row_lse", "row_weight", *(["column_lse", "column_weight"] if both else [])]
            absent = {} if both else {"column_lse": None, "column_weight": None}
            specs.append(
                AotSpec(
                    f"contrastive_loss/slice {name}",
                    _slice_kernel,
                    inputs
                    | given
                    | dict.fromkeys(sums, "*fp32")
                    | {"dz": f"*{dtype}", "first": "i32"},
                    constants | absent | {"COLUMNS": both},
                    divisible=("dim", "m"),
                )
            )
    return specs
