"""GPU kernels. Logits exist only as tiles on the chip.

Forward: each program holds a block of tokens and walks one share of the vocabulary with an online
log-sum-exp; the shares are joined afterwards, so there are no atomics and the result is
deterministic. Backward, exact: a kernel makes the logits of one slice of the vocabulary again and
writes their gradient in the inputs' dtype; two matrix products follow, which add up in float32, so
each classifier row's gradient is rounded once. Backward, filtered: one kernel per tile of tokens
and (sorted) vocabulary that leaves when all its gradients are small, and otherwise adds its two
products to the gradients with atomics, or under locks with Kahan's compensation.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot import AotSpec
from kernels.backend import triton_interpreted
from kernels.linear_cross_entropy.options import Gradients, Options
from kernels.linear_cross_entropy.tiled import matmul

# Logit gradients of the exact backward held at once (64 MiB in bfloat16).
SLICE_ELEMENTS = 1 << 25
# Programs that keep every multiprocessor of the largest GPU busy for a few waves.
PROGRAMS = 1024


@triton.jit
def _logits_tile(
    hidden,
    weight,
    bias,
    first_row,
    rows,
    tokens,
    first_column,
    columns,
    stop_column,
    dim,
    stride_hidden,
    stride_weight,
    softcap,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """Logits of `rows` × `columns` in float32. With TMA both are consecutive."""
    z = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    if TMA:
        h_desc = tl.make_tensor_descriptor(
            hidden, [tokens, dim], [stride_hidden, 1], [BLOCK_N, BLOCK_D]
        )
        w_desc = tl.make_tensor_descriptor(
            weight, [stop_column, dim], [stride_weight, 1], [BLOCK_V, BLOCK_D]
        )
        for d in range(0, dim, BLOCK_D):
            h = h_desc.load([first_row, d])
            w = w_desc.load([first_column, d])
            z = tl.dot(h, w.T, z, input_precision=PRECISION)
    else:
        inner = tl.arange(0, BLOCK_D)
        h_ptrs = hidden + rows[:, None].to(tl.int64) * stride_hidden + inner[None, :]
        w_ptrs = weight + columns[None, :].to(tl.int64) * stride_weight + inner[:, None]
        row_mask = rows[:, None] < tokens
        column_mask = columns[None, :] < stop_column
        for d in range(0, dim, BLOCK_D):
            left = inner < dim - d
            h = tl.load(h_ptrs, mask=row_mask & left[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=column_mask & left[:, None], other=0.0)
            z = tl.dot(h, w, z, input_precision=PRECISION)
            h_ptrs += BLOCK_D
            w_ptrs += BLOCK_D
    if HAS_BIAS:
        z += tl.load(bias + columns, mask=columns < stop_column, other=0.0).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        # tanh from exp of a negative number, which cannot overflow
        e = tl.exp(-2.0 * tl.abs(z) / softcap)
        bounded = softcap * (1.0 - e) / (1.0 + e)
        z = tl.where(z < 0, -bounded, bounded)
    return z


@triton.jit
def _statistics_kernel(
    hidden,
    weight,
    bias,
    targets,
    lse,
    target_logit,
    logit_sum,
    tokens,
    vocab,
    dim,
    stride_hidden,
    stride_weight,
    share,
    softcap,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """Log-sum-exp, target logit and sum of logits over one share of the vocabulary."""
    blocks = tl.cdiv(tokens, BLOCK_N)
    # Neighbouring programs read the same classifier rows, which stay in the L2 cache.
    first_row = (tl.program_id(0) % blocks) * BLOCK_N
    index = tl.program_id(0) // blocks
    rows = first_row + tl.arange(0, BLOCK_N)
    start = index * share
    stop = tl.minimum(start + share, vocab)
    target = tl.load(targets + rows, mask=rows < tokens, other=-1)

    peak = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    chosen = tl.zeros((BLOCK_N,), tl.float32)
    plain_sum = tl.zeros((BLOCK_N,), tl.float32)
    for column in range(start, stop, BLOCK_V):
        columns = column + tl.arange(0, BLOCK_V)
        z = _logits_tile(
            hidden,
            weight,
            bias,
            first_row,
            rows,
            tokens,
            column,
            columns,
            stop,
            dim,
            stride_hidden,
            stride_weight,
            softcap,
            BLOCK_N,
            BLOCK_V,
            BLOCK_D,
            HAS_BIAS,
            HAS_SOFTCAP,
            PRECISION,
            TMA,
        )
        chosen += tl.sum(tl.where(columns[None, :] == target[:, None], z, 0.0), 1)
        if HAS_SUM:
            plain_sum += tl.sum(tl.where(columns[None, :] < stop, z, 0.0), 1)
        z = tl.where(columns[None, :] < stop, z, -float("inf"))
        higher = tl.maximum(peak, tl.max(z, 1))
        # A tile of -inf alone (a bias can forbid words) must not make NaN of inf - inf.
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(peak - shift) + tl.sum(tl.exp(z - shift[:, None]), 1)
        peak = higher

    out = index * tokens + rows
    tl.store(lse + out, peak + tl.log(total), mask=rows < tokens)
    tl.store(target_logit + out, chosen, mask=rows < tokens)
    if HAS_SUM:
        tl.store(logit_sum + out, plain_sum, mask=rows < tokens)


@triton.jit
def _logit_gradients(
    z,
    columns,
    stop_column,
    target,
    lse,
    grad_nll,
    grad_lse,
    softcap,
    smoothing,
    vocab,
    HAS_SOFTCAP: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr,
):
    """Gradients before the upstream's factor (what a filter looks at), and with it."""
    p = tl.where(columns[None, :] < stop_column, tl.exp(z - lse[:, None]), 0.0)
    wanted = tl.where(columns[None, :] == target[:, None], 1.0 - smoothing, 0.0)
    wanted += tl.where(columns[None, :] < stop_column, smoothing / vocab, 0.0)
    if HAS_GRAD_LSE:
        plain = tl.maximum(p, tl.abs(p - wanted))
        grad = p * (grad_nll + grad_lse)[:, None] - wanted * grad_nll[:, None]
    else:
        plain = tl.abs(p - wanted)
        grad = (p - wanted) * grad_nll[:, None]
    if HAS_SOFTCAP:
        ratio = z / softcap
        grad *= 1.0 - ratio * ratio
    return plain, grad


@triton.jit
def _slice_kernel(
    hidden,
    weight,
    bias,
    targets,
    lse,
    grad_nll,
    grad_lse,
    out,
    tokens,
    start,
    stop,
    dim,
    vocab,
    stride_hidden,
    stride_weight,
    stride_out,
    softcap,
    smoothing,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """Gradients of the logits of columns [start, stop), in the dtype of `out`."""
    blocks = tl.cdiv(tokens, BLOCK_N)
    first_row = (tl.program_id(0) % blocks) * BLOCK_N
    first_column = start + (tl.program_id(0) // blocks) * BLOCK_V
    rows = first_row + tl.arange(0, BLOCK_N)
    columns = first_column + tl.arange(0, BLOCK_V)
    z = _logits_tile(
        hidden,
        weight,
        bias,
        first_row,
        rows,
        tokens,
        first_column,
        columns,
        stop,
        dim,
        stride_hidden,
        stride_weight,
        softcap,
        BLOCK_N,
        BLOCK_V,
        BLOCK_D,
        HAS_BIAS,
        HAS_SOFTCAP,
        PRECISION,
        TMA,
    )
    inside = rows < tokens
    target = tl.load(targets + rows, mask=inside, other=-1)
    row_lse = tl.load(lse + rows, mask=inside, other=float("inf"))
    row_grad = tl.load(grad_nll + rows, mask=inside, other=0.0)
    row_grad_lse = row_grad
    if HAS_GRAD_LSE:
        row_grad_lse = tl.load(grad_lse + rows, mask=inside, other=0.0)
    _, grad = _logit_gradients(
        z,
        columns,
        stop,
        target,
        row_lse,
        row_grad,
        row_grad_lse,
        softcap,
        smoothing,
        vocab,
        HAS_SOFTCAP,
        HAS_GRAD_LSE,
    )
    ptrs = out + rows[:, None].to(tl.int64) * stride_out + (columns - start)[None, :]
    mask = inside[:, None] & (columns[None, :] < stop)
    tl.store(ptrs, grad.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _add(ptrs, lost_ptrs, update, mask, lock, KAHAN: tl.constexpr):
    """Add a tile to memory: atomically in float32, or locked and compensated in its own dtype."""
    if KAHAN:
        while tl.atomic_cas(lock, 0, 1) == 1:
            pass
        before = tl.load(ptrs, mask=mask, other=0.0)
        lost = tl.load(lost_ptrs, mask=mask, other=0.0)
        update -= lost.to(tl.float32)
        after = (before.to(tl.float32) + update).to(before.dtype)
        tl.store(ptrs, after, mask=mask)
        lost = (after.to(tl.float32) - before.to(tl.float32)) - update
        tl.store(lost_ptrs, lost.to(before.dtype), mask=mask)
        tl.debug_barrier()  # every thread has stored before the lock opens
        tl.atomic_xchg(lock, 0)
    else:
        tl.atomic_add(ptrs, update, mask=mask, sem="relaxed")


@triton.jit
def _filtered_kernel(
    hidden,
    weight,
    bias,
    targets,
    lse,
    grad_nll,
    grad_lse,
    order,
    grad_hidden,
    lost_hidden,
    lock_hidden,
    grad_weight,
    lost_weight,
    lock_weight,
    grad_bias,
    tokens,
    own_vocab,
    dim,
    vocab,
    stride_hidden,
    stride_weight,
    softcap,
    smoothing,
    filter_eps,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr,
    HAS_FILTER: tl.constexpr,
    HIDDEN_GRAD: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    KAHAN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile's part of all gradients; nothing where every entry is below `filter_eps`."""
    blocks = tl.cdiv(tokens, BLOCK_N)
    block_n = tl.program_id(0) % blocks
    block_v = tl.program_id(0) // blocks
    rows = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    places = block_v * BLOCK_V + tl.arange(0, BLOCK_V)
    columns = tl.load(order + places, mask=places < own_vocab, other=own_vocab)
    z = _logits_tile(
        hidden,
        weight,
        bias,
        0,
        rows,
        tokens,
        0,
        columns,
        own_vocab,
        dim,
        stride_hidden,
        stride_weight,
        softcap,
        BLOCK_N,
        BLOCK_V,
        BLOCK_D,
        HAS_BIAS,
        HAS_SOFTCAP,
        PRECISION,
        False,
    )
    inside = rows < tokens
    target = tl.load(targets + rows, mask=inside, other=-1)
    row_lse = tl.load(lse + rows, mask=inside, other=float("inf"))
    row_grad = tl.load(grad_nll + rows, mask=inside, other=0.0)
    row_grad_lse = row_grad
    if HAS_GRAD_LSE:
        row_grad_lse = tl.load(grad_lse + rows, mask=inside, other=0.0)
    plain, grad = _logit_gradients(
        z,
        columns,
        own_vocab,
        target,
        row_lse,
        row_grad,
        row_grad_lse,
        softcap,
        smoothing,
        vocab,
        HAS_SOFTCAP,
        HAS_GRAD_LSE,
    )
    if HAS_FILTER:
        plain = tl.where(inside[:, None], plain, 0.0)
        if tl.max(plain) < filter_eps:
            return
    known = columns < own_vocab
    if BIAS_GRAD:
        tl.atomic_add(grad_bias + columns, tl.sum(grad, 0), mask=known, sem="relaxed")
    grad = grad.to(hidden.dtype.element_ty)
    row_offset = rows[:, None].to(tl.int64)
    column_offset = columns[:, None].to(tl.int64)
    for d in range(0, dim, BLOCK_D):
        inner = d + tl.arange(0, BLOCK_D)
        row_mask = inside[:, None] & (inner[None, :] < dim)
        column_mask = known[:, None] & (inner[None, :] < dim)
        lane = d // BLOCK_D
        if HIDDEN_GRAD:
            w_ptrs = weight + column_offset * stride_weight + inner[None, :]
            w = tl.load(w_ptrs, mask=column_mask, other=0.0)
            at = row_offset * dim + inner[None, :]
            _add(
                grad_hidden + at,
                lost_hidden + at if KAHAN else None,
                tl.dot(grad, w, input_precision=PRECISION),
                row_mask,
                lock_hidden + block_n * tl.cdiv(dim, BLOCK_D) + lane if KAHAN else None,
                KAHAN,
            )
        if WEIGHT_GRAD:
            h_ptrs = hidden + row_offset * stride_hidden + inner[None, :]
            h = tl.load(h_ptrs, mask=row_mask, other=0.0)
            at = column_offset * dim + inner[None, :]
            _add(
                grad_weight + at,
                lost_weight + at if KAHAN else None,
                tl.dot(tl.trans(grad), h, input_precision=PRECISION),
                column_mask,
                lock_weight + block_v * tl.cdiv(dim, BLOCK_D) + lane if KAHAN else None,
                KAHAN,
            )


def _precision(dtype: torch.dtype) -> str:
    """float32 products in TF32 only where the user allows PyTorch's own to be."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"


def _config(dtype: torch.dtype, backward: bool = False) -> dict[str, int]:
    """Default launch configuration."""
    if triton_interpreted():
        return {"BLOCK_N": 16, "BLOCK_V": 32, "BLOCK_D": 16}
    if dtype == torch.float32:
        return {"BLOCK_N": 64, "BLOCK_V": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 3}
    if backward:
        return {"BLOCK_N": 128, "BLOCK_V": 128, "BLOCK_D": 32, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_N": 128, "BLOCK_V": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3}


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp, target logit (0 where the target is not in this shard) and sum of the logits."""
    hidden, weight = _rows(hidden), _rows(weight)
    (tokens, dim), vocab = hidden.shape, len(weight)
    if tokens == 0:
        return (hidden.new_zeros(0, dtype=torch.float32),) * 3
    config = _config(hidden.dtype)
    blocks = triton.cdiv(tokens, config["BLOCK_N"])
    shares = max(1, min(PROGRAMS // blocks, triton.cdiv(vocab, config["BLOCK_V"])))
    share = triton.cdiv(triton.cdiv(vocab, shares), config["BLOCK_V"]) * config["BLOCK_V"]
    shares = triton.cdiv(vocab, share)
    partial = [
        torch.empty(shares, tokens, dtype=torch.float32, device=hidden.device)
        for _ in range(3 if options.label_smoothing else 2)
    ]
    _statistics_kernel[(blocks * shares,)](
        hidden,
        weight,
        bias,
        targets,
        partial[0],
        partial[1],
        partial[2] if options.label_smoothing else None,
        tokens,
        vocab,
        dim,
        hidden.stride(0),
        weight.stride(0),
        share,
        options.softcap or 1.0,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=options.softcap is not None,
        HAS_SUM=options.label_smoothing > 0,
        PRECISION=_precision(hidden.dtype),
        TMA=_use_tma(hidden, weight),
        **config,
    )
    target_logit = partial[1].sum(0)
    logit_sum = partial[2].sum(0) if options.label_smoothing else torch.zeros_like(target_logit)
    return partial[0].logsumexp(0), target_logit, logit_sum
