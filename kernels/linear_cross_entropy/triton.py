"""GPU kernels. Logits exist only as tiles on the chip.

Forward: each program holds a block of tokens and walks one share of the vocabulary with an online
log-sum-exp; the shares are joined afterwards, so there are no atomics and the result is
deterministic. Backward, exact: a kernel makes the logits of one slice of the vocabulary again and
writes their gradient in the inputs' dtype; two matrix products follow, which add up in float32, so
each classifier row's gradient is rounded once. Backward, filtered: one kernel per tile of tokens
and (sorted) vocabulary that leaves when all its gradients are small, and otherwise adds its two
products to the gradients with atomics, or under locks with Kahan's compensation.
"""

# pyright: reportArgumentType=false
# (a launch passes plain values for constexpr parameters)

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.aot import AotSpec
from kernels.backend import triton_interpreted
from kernels.linear_cross_entropy.options import Gradients, Options
from kernels.linear_cross_entropy.tiled import matmul

# Logit gradients of the exact backward held at once (64 MiB in bfloat16).
SLICE_ELEMENTS = 1 << 25
# Programs that keep every multiprocessor of the largest GPU busy for a few waves.
PROGRAMS = 1024


# Triton's interpreter computes on NumPy arrays, which have no bfloat16 products.
_WIDEN = tl.constexpr(triton_interpreted())


@triton.jit
def _dot(a, b, c, PRECISION: tl.constexpr):
    """a @ b + c in float32."""
    if _WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision=PRECISION)


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
    """Logits of `rows` × `columns` in float32.

    With TMA both are consecutive, and `hidden` and `weight` are tensor descriptors.
    """
    z = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    if TMA:
        for d in range(0, dim, BLOCK_D):
            h = hidden.load([first_row, d])
            w = weight.load([first_column, d])
            z = _dot(h, w.T, z, PRECISION)
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
            z = _dot(h, w, z, PRECISION)
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
        # past the L1 cache, which other multiprocessors' stores do not reach
        before = tl.load(ptrs, mask=mask, other=0.0, cache_modifier=".cg")
        lost = tl.load(lost_ptrs, mask=mask, other=0.0, cache_modifier=".cg")
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
                _dot(grad, w, None, PRECISION),
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
                _dot(tl.trans(grad), h, None, PRECISION),
                column_mask,
                lock_weight + block_v * tl.cdiv(dim, BLOCK_D) + lane if KAHAN else None,
                KAHAN,
            )


def _precision(dtype: torch.dtype) -> str:
    """float32 products in TF32 only where the user allows PyTorch's own to be."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"


Config = dict[str, int]


def _config(
    dtype: torch.dtype, heavy: bool = False, filtered: bool = False, hip: bool | None = None
) -> Config:
    """Default launch: without spills and within the shared memory of every target.

    `heavy` is a bias and a soft-cap at once, which need more registers.
    """
    if triton_interpreted():
        return _launch(16, 32, 16, 1, 1)
    if hip is None:
        hip = torch.version.hip is not None
    if dtype == torch.float32:
        return _launch(64, 32, 16, 4, 2) if filtered else _launch(64, 64, 16 if hip else 32, 8, 3)
    rows = 64 if heavy else 128
    if filtered:
        return _launch(64, 64, 32, 4, 2) if hip else _launch(rows, 128, 32, 8, 3)
    return _launch(rows, 128, 64, 8, 2 if hip else 3)


def _launch(n: int, v: int, d: int, warps: int, stages: int) -> Config:
    return {"BLOCK_N": n, "BLOCK_V": v, "BLOCK_D": d, "num_warps": warps, "num_stages": stages}


def _candidates(dtype: torch.dtype, heavy: bool) -> list[Config]:
    """What the kernels that only overwrite are tuned over; the default first."""
    if dtype == torch.float32:
        return [_config(dtype, heavy), _launch(128, 64, 32, 8, 3), _launch(64, 128, 32, 8, 3)]
    return [
        _config(dtype, heavy),
        _launch(128, 256, 64, 8, 3),
        _launch(256, 128, 64, 8, 3),
        _launch(128, 128, 64, 4, 4),
        _launch(128, 128, 128, 8, 2),
    ]


_fastest: dict[tuple[Any, ...], Config] = {}


def _tuned(key: tuple[Any, ...], configs: list[Config], launch: Callable[[Config], None]) -> None:
    """Launch with the fastest configuration, timed on the GPU when `key` is new.

    The first of `configs` where runs must repeat bit for bit, and under the interpreter.
    """
    if triton_interpreted() or torch.are_deterministic_algorithms_enabled():
        launch(configs[0])
        return
    if key not in _fastest:
        times = {}
        for index, config in enumerate(configs):
            try:
                launch(config)  # compiles
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                launch(config)
                end.record()
            except triton.OutOfResources:
                continue
            end.synchronize()
            times[index] = start.elapsed_time(end)
        _fastest[key] = configs[min(times, key=times.__getitem__)]
    launch(_fastest[key])


def _use_tma(hidden: Tensor, weight: Tensor) -> bool:
    """Whether tiles are fetched by Hopper's copy engine, which wants rows of whole 16 bytes."""
    if (
        not hidden.is_cuda
        or torch.version.hip
        or torch.cuda.get_device_capability(hidden.device)[0] < 9
    ):
        return False
    return all(
        x.data_ptr() % 16 == 0
        and x.stride(0) * x.element_size() % 16 == 0
        and x.stride(0) >= x.shape[1]
        for x in (hidden, weight)
    )


def _operand(x: Tensor, rows: int, columns: int, tma: bool) -> Any:
    """What a kernel reads x through: a pointer, or a descriptor of its tiles."""
    return TensorDescriptor.from_tensor(x, [rows, columns]) if tma else x


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp, target logit (0 where the target is not in this shard) and sum of the logits."""
    hidden, weight, targets = _rows(hidden), _rows(weight), targets.contiguous()
    bias = None if bias is None else bias.contiguous()
    (tokens, dim), vocab = hidden.shape, len(weight)
    if tokens == 0:
        empty = hidden.new_zeros(0, dtype=torch.float32)
        return empty, empty, empty
    # Shares of the vocabulary that fill the GPU, whole tiles of any configuration.
    shares = max(1, PROGRAMS // triton.cdiv(tokens, 128))
    share = triton.cdiv(triton.cdiv(vocab, shares), 256) * 256
    shares = triton.cdiv(vocab, share)
    partial = [
        torch.empty(shares, tokens, dtype=torch.float32, device=hidden.device)
        for _ in range(3 if options.label_smoothing else 2)
    ]
    tma = _use_tma(hidden, weight)

    def launch(config: Config) -> None:
        _statistics_kernel[(triton.cdiv(tokens, config["BLOCK_N"]) * shares,)](
            _operand(hidden, config["BLOCK_N"], config["BLOCK_D"], tma),
            _operand(weight, config["BLOCK_V"], config["BLOCK_D"], tma),
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
            TMA=tma,
            **config,
        )

    heavy = bias is not None and options.softcap is not None
    key = "statistics", tokens, vocab, dim, hidden.dtype, hidden.device, heavy
    _tuned(key, _candidates(hidden.dtype, heavy), launch)
    target_logit = partial[1].sum(0)
    logit_sum = partial[2].sum(0) if options.label_smoothing else torch.zeros_like(target_logit)
    return partial[0].logsumexp(0), target_logit, logit_sum


def gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    grad_nll: Tensor,
    grad_lse: Tensor | None,
    options: Options,
    needed: tuple[bool, bool, bool],
) -> Gradients:
    """Gradients of hidden, weight and bias: exact, or filtered when the options ask for it."""
    hidden, weight, targets = _rows(hidden), _rows(weight), targets.contiguous()
    bias = None if bias is None else bias.contiguous()
    grad_nll = grad_nll.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    if len(hidden) == 0:
        return (
            torch.zeros_like(hidden) if needed[0] else None,
            torch.zeros_like(weight) if needed[1] else None,
            torch.zeros_like(bias) if bias is not None and needed[2] else None,
        )
    inputs = (hidden, weight, bias, targets, lse, grad_nll, grad_lse)
    if options.filter_eps is not None or options.kahan:
        return _filtered_gradients(*inputs, options, needed)
    return _exact_gradients(*inputs, options, needed)


def _exact_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    grad_nll: Tensor,
    grad_lse: Tensor | None,
    options: Options,
    needed: tuple[bool, bool, bool],
) -> Gradients:
    (tokens, dim), vocab = hidden.shape, len(weight)
    device, tma = hidden.device, _use_tma(hidden, weight)
    step = max(256, options.chunk_size or SLICE_ELEMENTS // tokens)
    # Tensor cores want rows of a multiple of 8 elements. Zeros, because oneDNN's bfloat16 product
    # reads the padding, and not a number times zero is not a number.
    width = min(step, triton.cdiv(vocab, 8) * 8)
    buffer = torch.zeros(tokens, width, dtype=hidden.dtype, device=device)
    grad_hidden = grad_weight = grad_bias = None
    if needed[0]:
        grad_hidden = torch.zeros(tokens, dim, dtype=torch.float32, device=device)
    if needed[1]:
        grad_weight = torch.empty(vocab, dim, dtype=weight.dtype, device=device)
    if needed[2]:
        grad_bias = torch.empty(vocab, dtype=torch.float32, device=device)

    def launch(config: Config, start: int, stop: int) -> None:
        columns = triton.cdiv(stop - start, config["BLOCK_V"])
        _slice_kernel[(triton.cdiv(tokens, config["BLOCK_N"]) * columns,)](
            _operand(hidden, config["BLOCK_N"], config["BLOCK_D"], tma),
            _operand(weight, config["BLOCK_V"], config["BLOCK_D"], tma),
            bias,
            targets,
            lse,
            grad_nll,
            grad_lse,
            buffer,
            tokens,
            start,
            stop,
            dim,
            options.vocab,
            hidden.stride(0),
            weight.stride(0),
            buffer.stride(0),
            options.softcap or 1.0,
            options.label_smoothing,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=options.softcap is not None,
            HAS_GRAD_LSE=grad_lse is not None,
            PRECISION=_precision(hidden.dtype),
            TMA=tma,
            **config,
        )

    heavy = bias is not None and options.softcap is not None
    key = "slice", tokens, step, dim, hidden.dtype, device, heavy
    configs = _candidates(hidden.dtype, heavy)
    for start in range(0, vocab, step):
        stop = min(start + step, vocab)
        _tuned(key, configs, functools.partial(launch, start=start, stop=stop))
        grad = buffer[:, : stop - start]
        if grad_weight is not None:
            torch.mm(grad.T, hidden, out=grad_weight[start:stop])
        if grad_hidden is not None:
            grad_hidden += matmul(grad, weight[start:stop])
        if grad_bias is not None:
            grad_bias[start:stop] = grad.sum(0, dtype=torch.float32)
    return grad_hidden, grad_weight, grad_bias


def _filtered_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    grad_nll: Tensor,
    grad_lse: Tensor | None,
    options: Options,
    needed: tuple[bool, bool, bool],
) -> Gradients:
    (tokens, dim), vocab = hidden.shape, len(weight)
    heavy = bias is not None and options.softcap is not None
    device, config = hidden.device, _config(hidden.dtype, heavy, filtered=True)
    # The average logit is linear in the hidden states, so sorting by it costs one product with a
    # vector. Words that are unlikely everywhere then share tiles, which are skipped.
    average = weight @ hidden.mean(0, dtype=torch.float32).to(weight.dtype)
    order = (average if bias is None else average + bias).argsort().to(torch.int32)
    blocks_n = triton.cdiv(tokens, config["BLOCK_N"])
    blocks_v = triton.cdiv(vocab, config["BLOCK_V"])
    lanes = triton.cdiv(dim, config["BLOCK_D"])
    dtype = hidden.dtype if options.kahan else torch.float32

    def accumulator(rows: int, blocks: int, wanted: bool) -> tuple[Tensor | None, ...]:
        if not wanted:
            return None, None, None
        total = torch.zeros(rows, dim, dtype=dtype, device=device)
        if not options.kahan:
            return total, None, None
        locks = torch.zeros(blocks * lanes, dtype=torch.int32, device=device)
        return total, torch.zeros_like(total), locks

    grad_hidden, lost_hidden, lock_hidden = accumulator(tokens, blocks_n, needed[0])
    grad_weight, lost_weight, lock_weight = accumulator(vocab, blocks_v, needed[1])
    grad_bias = torch.zeros(vocab, dtype=torch.float32, device=device) if needed[2] else None
    _filtered_kernel[(blocks_n * blocks_v,)](
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
        vocab,
        dim,
        options.vocab,
        hidden.stride(0),
        weight.stride(0),
        options.softcap or 1.0,
        options.label_smoothing,
        options.filter_eps or 0.0,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=options.softcap is not None,
        HAS_GRAD_LSE=grad_lse is not None,
        HAS_FILTER=options.filter_eps is not None,
        HIDDEN_GRAD=needed[0],
        WEIGHT_GRAD=needed[1],
        BIAS_GRAD=needed[2],
        KAHAN=options.kahan,
        PRECISION=_precision(hidden.dtype),
        **config,
    )
    return grad_hidden, grad_weight, grad_bias


# Types of the kernels' arguments that do not depend on the inputs' dtype.
_TYPES = {
    **dict.fromkeys(("tokens", "vocab", "own_vocab", "dim", "share", "start", "stop"), "i32"),
    **dict.fromkeys(("stride_hidden", "stride_weight", "stride_out"), "i32"),
    **dict.fromkeys(("softcap", "smoothing", "filter_eps"), "fp32"),
    **dict.fromkeys(("lse", "target_logit", "logit_sum", "grad_nll", "grad_lse"), "*fp32"),
    **dict.fromkeys(("order", "lock_hidden", "lock_weight"), "*i32"),
    "targets": "*i64",
    "grad_bias": "*fp32",
}
_OPTIONAL = ("bias", "logit_sum", "grad_lse", "grad_bias")
_TOTALS = ("grad_hidden", "grad_weight", "lost_hidden", "lost_weight")


def _spec(
    name: str,
    kernel: Any,
    kind: str,
    config: dict[str, int],
    targets: tuple[str, ...],
    full: bool,
    tma: bool = False,
    kahan: bool = False,
) -> AotSpec:
    n, v, d = config["BLOCK_N"], config["BLOCK_V"], config["BLOCK_D"]
    types = {**_TYPES, **dict.fromkeys(("hidden", "weight", "bias", "out"), f"*{kind}")}
    types |= dict.fromkeys(_TOTALS, f"*{kind}" if kahan else "*fp32")
    if tma:
        types |= {
            "hidden": f"tensordesc<{kind}[{n},{d}]>",
            "weight": f"tensordesc<{kind}[{v},{d}]>",
        }
    constexprs: dict[str, Any] = {"BLOCK_N": n, "BLOCK_V": v, "BLOCK_D": d}
    constexprs |= dict.fromkeys(("HIDDEN_GRAD", "WEIGHT_GRAD", "HAS_FILTER"), True)
    constexprs |= dict.fromkeys(
        ("HAS_BIAS", "HAS_SOFTCAP", "HAS_SUM", "HAS_GRAD_LSE", "BIAS_GRAD"), full
    )
    precision = _precision(torch.float32 if kind == "fp32" else torch.bfloat16)
    constexprs |= {"KAHAN": kahan, "TMA": tma, "PRECISION": precision}
    if not full:
        constexprs |= dict.fromkeys(_OPTIONAL)
    if not kahan:
        constexprs |= dict.fromkeys(("lost_hidden", "lost_weight", "lock_hidden", "lock_weight"))
    arguments = kernel.arg_names
    constexprs = {key: value for key, value in constexprs.items() if key in arguments}
    options = ", all options" if full else ""
    return AotSpec(
        f"linear_cross_entropy/{name}, {kind}{options}",
        kernel,
        {key: types[key] for key in arguments if key not in constexprs},
        constexprs,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        divisible=("dim", "stride_hidden", "stride_weight"),
        targets=targets,
    )


def aot_specs() -> list[AotSpec]:
    """Every kernel in its default configurations, with no option and with all of them."""
    specs = []
    for kind, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        for targets in (("cuda:80",), ("cuda:90", "cuda:100"), ("hip:gfx942",)):
            hip, tma = "hip:gfx942" in targets, "cuda:90" in targets
            for full in (False, True):
                config = _config(dtype, full, hip=hip)
                filtered = _config(dtype, full, filtered=True, hip=hip)
                for name, kernel in {
                    "statistics": _statistics_kernel,
                    "slice": _slice_kernel,
                }.items():
                    specs.append(_spec(name, kernel, kind, config, targets, full, tma=tma))
                for kahan in (False, True) if kind != "fp32" else (False,):
                    name = "filtered, Kahan" if kahan else "filtered"
                    specs.append(
                        _spec(name, _filtered_kernel, kind, filtered, targets, full, kahan=kahan)
                    )
    return specs
