"""Attention with row entropies on a GPU: FlashAttention-2's loops with one more running sum.

Scores are in base 2 inside the kernels (multiplied by log₂ e), because the hardware's exponential
is. Every mask but the key padding is an interval of keys for each query and of queries for each
key. In the forward a block of rows meets at most three runs of tiles: cut by its rows' first keys,
seen whole, and cut by their last keys; only the outer two pay for masking. The backward has one
run: three would cost more registers than the mask costs time.
"""

# Pyright takes the types of a kernel's parameters for those of a launch's arguments.
# pyright: reportArgumentType=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot import TARGETS, AotSpec
from kernels.backend import triton_interpreted
from kernels.entropy_attention.reference import visible_keys, visible_queries
from kernels.entropy_attention.tiled import head_slopes

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# Finite stand-ins for −∞, which would make NaN of 0·∞ and ∞ − ∞: of a score, and of a log₂ p.
LOWEST: tl.constexpr = tl.constexpr(-1.0e30)
HIDDEN: tl.constexpr = tl.constexpr(-1.0e4)


# Triton's interpreter computes on NumPy arrays, which have no bfloat16 products.
_WIDEN = tl.constexpr(triton_interpreted())


@triton.jit
def _dot(a, b, c, PRECISION: tl.constexpr):
    """a @ b + c in float32, or a @ b where c is None."""
    if _WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision=PRECISION)


@triton.jit
def _load(pointers, rows, columns, CHECK_ROWS: tl.constexpr, CHECK_COLUMNS: tl.constexpr):
    """A tile, 0 outside the tensor, without the checks that are not needed."""
    if CHECK_ROWS:
        if CHECK_COLUMNS:
            return tl.load(pointers, mask=rows & columns, other=0.0)
        return tl.load(pointers, mask=rows, other=0.0)
    if CHECK_COLUMNS:
        return tl.load(pointers, mask=columns, other=0.0)
    return tl.load(pointers)


@triton.jit
def _runs(start, stop, valid, total, BLOCK: tl.constexpr, ALL_MASKED: tl.constexpr):
    """Where the tiles of these rows begin, are first and last seen whole by all, and end."""
    begin = tl.min(tl.where(valid & (start < stop), start, total), 0) // BLOCK * BLOCK
    end = tl.max(tl.where(valid, stop, 0), 0)
    if ALL_MASKED:
        return begin, begin, begin, end
    whole = tl.max(tl.where(valid, start, 0), 0)
    whole = tl.maximum(tl.cdiv(whole, BLOCK) * BLOCK, begin)
    cut = tl.maximum(tl.min(tl.where(valid, stop, total), 0) // BLOCK * BLOCK, whole)
    return begin, whole, cut, end


@triton.jit
def _attend(
    mixed,
    largest,
    total,
    moment,
    q,
    query_factor,
    start,
    stop,
    slope,
    k,
    v,
    key_factor,
    padding,
    begin,
    end,
    keys,
    k_n,
    v_n,
    kf_n,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    RANK: tl.constexpr,
    RANK_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take the keys from `begin` to `end` into a block of rows' running sums."""
    d = tl.arange(0, DIM)
    r = tl.arange(0, RANK_DIM)
    for first in range(begin, end, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        real = n < keys
        k_pointers = k + n[None, :] * k_n + d[:, None]
        k_tile = _load(k_pointers, real[None, :], d[:, None] < HEAD_DIM, MASKED, DIM != HEAD_DIM)
        s = _dot(q, k_tile, None, PRECISION) * slope
        if RANK > 0:
            kf_pointers = key_factor + n[None, :] * kf_n + r[:, None]
            kf_tile = _load(kf_pointers, real[None, :], r[:, None] < RANK, MASKED, RANK_DIM != RANK)
            s += _dot(query_factor, kf_tile, None, PRECISION) * LOG2E
        visible = (n[None, :] >= start[:, None]) & (n[None, :] < stop[:, None])
        if MASKED:
            if padding is not None:
                hidden = tl.load(padding + n, mask=real, other=1)
                visible = visible & (hidden == 0)[None, :]
            s = tl.where(visible, s, LOWEST)
        top = tl.maximum(largest, tl.max(s, 1))
        s = s - top[:, None]
        if MASKED:
            s = tl.where(visible, s, HIDDEN)
        p = tl.exp2(s)
        change = largest - top
        decay = tl.exp2(change)
        moment = decay * (moment + change * total) + tl.sum(p * s, 1)
        total = decay * total + tl.sum(p, 1)
        v_pointers = v + n[:, None] * v_n + d[None, :]
        v_tile = _load(v_pointers, real[:, None], d[None, :] < HEAD_DIM, MASKED, DIM != HEAD_DIM)
        mixed = mixed * decay[:, None]
        mixed = _dot(p.to(v_tile.dtype), v_tile, mixed, PRECISION)
        largest = top
    return mixed, largest, total, moment


@triton.jit
def _forward_kernel(
    q,
    k,
    v,
    slopes,
    query_factor,
    key_factor,
    starts,
    stops,
    padding,
    out,
    entropies,
    lses,
    heads,
    queries,
    keys,
    interval_b,
    q_b,
    q_h,
    q_m,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    o_b,
    o_h,
    o_m,
    qf_b,
    qf_h,
    qf_m,
    kf_b,
    kf_h,
    kf_n,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    RANK: tl.constexpr,
    RANK_DIM: tl.constexpr,
    LEFT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of queries of one head: output, entropy and log₂-sum-exp."""
    # Under causality the last rows have most to do: they go first.
    row_block = tl.num_programs(0) - 1 - tl.program_id(0)
    index = tl.program_id(1).to(tl.int64)
    b, h = index // heads, index % heads
    m = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, DIM)
    r = tl.arange(0, RANK_DIM)
    valid = m < queries
    q_pointers = q + b * q_b + h * q_h + m[:, None] * q_m + d[None, :]
    q_tile = _load(q_pointers, valid[:, None], d[None, :] < HEAD_DIM, True, DIM != HEAD_DIM)
    qf_tile = q_tile
    kf_head = key_factor
    if RANK > 0:
        qf_pointers = query_factor + b * qf_b + h * qf_h + m[:, None] * qf_m + r[None, :]
        qf_tile = _load(qf_pointers, valid[:, None], r[None, :] < RANK, True, RANK_DIM != RANK)
        kf_head = key_factor + b * kf_b + h * kf_h
    padding_row = padding
    if padding is not None:
        padding_row = padding + b * keys
    k_head = k + b * k_b + h // GROUP * k_h
    v_head = v + b * v_b + h // GROUP * v_h
    slope = tl.load(slopes + h) * LOG2E
    start = tl.load(starts + b * interval_b + m, mask=valid, other=0)
    stop = tl.load(stops + b * interval_b + m, mask=valid, other=0)
    begin, whole, cut, end = _runs(start, stop, valid, keys, BLOCK_N, padding is not None)

    mixed = tl.zeros((BLOCK_M, DIM), tl.float32)
    largest = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    moment = tl.zeros((BLOCK_M,), tl.float32)
    if LEFT:
        mixed, largest, total, moment = _attend(
            mixed, largest, total, moment, q_tile, qf_tile, start, stop, slope,
            k_head, v_head, kf_head, padding_row, begin, tl.minimum(whole, end), keys,
            k_n, v_n, kf_n, HEAD_DIM, DIM, RANK, RANK_DIM, BLOCK_N, True, PRECISION,
        )  # fmt: skip
    mixed, largest, total, moment = _attend(
        mixed, largest, total, moment, q_tile, qf_tile, start, stop, slope,
        k_head, v_head, kf_head, padding_row, whole, cut, keys,
        k_n, v_n, kf_n, HEAD_DIM, DIM, RANK, RANK_DIM, BLOCK_N, False, PRECISION,
    )  # fmt: skip
    mixed, largest, total, moment = _attend(
        mixed, largest, total, moment, q_tile, qf_tile, start, stop, slope,
        k_head, v_head, kf_head, padding_row, cut, end, keys,
        k_n, v_n, kf_n, HEAD_DIM, DIM, RANK, RANK_DIM, BLOCK_N, True, PRECISION,
    )  # fmt: skip

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    log_total = tl.log2(total)
    o_pointers = out + b * o_b + h * o_h + m[:, None] * o_m + d[None, :]
    stored = valid[:, None] & (d[None, :] < HEAD_DIM)
    tl.store(o_pointers, (mixed / total[:, None]).to(out.dtype.element_ty), mask=stored)
    row = index * queries + m
    tl.store(entropies + row, (log_total - moment / total) * LN2, mask=valid)
    tl.store(lses + row, tl.where(empty, 0.0, largest + log_total), mask=valid)


@triton.jit
def _common_kernel(
    out,
    d_out,
    entropies,
    d_entropies,
    commons,
    heads,
    queries,
    o_b,
    o_h,
    o_m,
    do_b,
    do_h,
    do_m,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Σ dout·out + dH·H of each row: what its score gradients have in common."""
    index = tl.program_id(1).to(tl.int64)
    b, h = index // heads, index % heads
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, DIM)
    valid = m < queries
    inside = valid[:, None] & (d[None, :] < HEAD_DIM)
    o = tl.load(out + b * o_b + h * o_h + m[:, None] * o_m + d[None, :], mask=inside, other=0.0)
    do_pointers = d_out + b * do_b + h * do_h + m[:, None] * do_m + d[None, :]
    do = tl.load(do_pointers, mask=inside, other=0.0)
    common = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    row = index * queries + m
    if d_entropies is not None:
        entropy = tl.load(entropies + row, mask=valid, other=0.0)
        common += entropy * tl.load(d_entropies + row, mask=valid, other=0.0)
    tl.store(commons + row, common, mask=valid)


@triton.jit
def _query_gradients(
    dq,
    d_factor,
    q,
    query_factor,
    do,
    lse,
    common,
    d_entropy,
    start,
    stop,
    slope,
    k,
    v,
    key_factor,
    padding,
    begin,
    end,
    keys,
    k_n,
    v_n,
    kf_n,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    RANK: tl.constexpr,
    RANK_DIM: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take the keys from `begin` to `end` into a block of queries' gradients."""
    d = tl.arange(0, DIM)
    r = tl.arange(0, RANK_DIM)
    for first in range(begin, end, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        real = n < keys
        inside = d[None, :] < HEAD_DIM
        k_pointers = k + n[:, None] * k_n + d[None, :]
        k_tile = _load(k_pointers, real[:, None], inside, True, DIM != HEAD_DIM)
        log_p = _dot(q, tl.trans(k_tile), None, PRECISION) * slope
        kf_tile = k_tile
        if RANK > 0:
            kf_pointers = key_factor + n[:, None] * kf_n + r[None, :]
            kf_tile = _load(kf_pointers, real[:, None], r[None, :] < RANK, True, RANK_DIM != RANK)
            log_p += _dot(query_factor, tl.trans(kf_tile), None, PRECISION) * LOG2E
        log_p = log_p - lse[:, None]
        visible = (n[None, :] >= start[:, None]) & (n[None, :] < stop[:, None])
        if padding is not None:
            hidden = tl.load(padding + n, mask=real, other=1)
            visible = visible & (hidden == 0)[None, :]
        log_p = tl.where(visible, log_p, HIDDEN)
        p = tl.exp2(log_p)
        v_pointers = v + n[:, None] * v_n + d[None, :]
        v_tile = _load(v_pointers, real[:, None], inside, True, DIM != HEAD_DIM)
        ds = _dot(do, tl.trans(v_tile), None, PRECISION) - common[:, None]
        if ENTROPY:
            ds -= log_p * d_entropy[:, None]
        ds = (p * ds).to(k_tile.dtype)
        dq = _dot(ds, k_tile, dq, PRECISION)
        if RANK > 0:
            d_factor = _dot(ds, kf_tile, d_factor, PRECISION)
    return dq, d_factor


@triton.jit
def _query_kernel(
    q,
    k,
    v,
    slopes,
    query_factor,
    key_factor,
    starts,
    stops,
    padding,
    d_out,
    d_entropies,
    lses,
    commons,
    dq,
    d_slopes,
    d_query_factor,
    heads,
    queries,
    keys,
    interval_b,
    q_b,
    q_h,
    q_m,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    do_b,
    do_h,
    do_m,
    dq_b,
    dq_h,
    dq_m,
    qf_b,
    qf_h,
    qf_m,
    kf_b,
    kf_h,
    kf_n,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    RANK: tl.constexpr,
    RANK_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of queries of one head: gradients of q, its bias factor and each row's slope."""
    row_block = tl.num_programs(0) - 1 - tl.program_id(0)
    index = tl.program_id(1).to(tl.int64)
    b, h = index // heads, index % heads
    m = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, DIM)
    r = tl.arange(0, RANK_DIM)
    valid = m < queries
    inside = d[None, :] < HEAD_DIM
    q_pointers = q + b * q_b + h * q_h + m[:, None] * q_m + d[None, :]
    q_tile = _load(q_pointers, valid[:, None], inside, True, DIM != HEAD_DIM)
    do_pointers = d_out + b * do_b + h * do_h + m[:, None] * do_m + d[None, :]
    do_tile = _load(do_pointers, valid[:, None], inside, True, DIM != HEAD_DIM)
    qf_tile = q_tile
    kf_head = key_factor
    if RANK > 0:
        qf_pointers = query_factor + b * qf_b + h * qf_h + m[:, None] * qf_m + r[None, :]
        qf_tile = _load(qf_pointers, valid[:, None], r[None, :] < RANK, True, RANK_DIM != RANK)
        kf_head = key_factor + b * kf_b + h * kf_h
    padding_row = padding
    if padding is not None:
        padding_row = padding + b * keys
    k_head = k + b * k_b + h // GROUP * k_h
    v_head = v + b * v_b + h // GROUP * v_h
    slope = tl.load(slopes + h)
    row = index * queries + m
    lse = tl.load(lses + row, mask=valid, other=0.0)
    common = tl.load(commons + row, mask=valid, other=0.0)
    d_entropy = common
    if d_entropies is not None:
        d_entropy = tl.load(d_entropies + row, mask=valid, other=0.0) * LN2
    start = tl.load(starts + b * interval_b + m, mask=valid, other=0)
    stop = tl.load(stops + b * interval_b + m, mask=valid, other=0)
    begin, _, _, end = _runs(start, stop, valid, keys, BLOCK_N, True)

    dq_tile = tl.zeros((BLOCK_M, DIM), tl.float32)
    d_factor = tl.zeros((BLOCK_M, RANK_DIM), tl.float32)
    dq_tile, d_factor = _query_gradients(
        dq_tile, d_factor, q_tile, qf_tile, do_tile, lse, common, d_entropy, start, stop,
        slope * LOG2E, k_head, v_head, kf_head, padding_row, begin, end, keys, k_n, v_n, kf_n,
        HEAD_DIM, DIM, RANK, RANK_DIM, d_entropies is not None, BLOCK_N, PRECISION,
    )  # fmt: skip

    dq_pointers = dq + b * dq_b + h * dq_h + m[:, None] * dq_m + d[None, :]
    tl.store(dq_pointers, (dq_tile * slope).to(dq.dtype.element_ty), mask=valid[:, None] & inside)
    if d_slopes is not None:
        tl.store(d_slopes + row, tl.sum(dq_tile * q_tile.to(tl.float32), 1), mask=valid)
    if RANK > 0:
        pointers = d_query_factor + row[:, None] * RANK + r[None, :]
        tl.store(pointers, d_factor, mask=valid[:, None] & (r[None, :] < RANK))


@triton.jit
def _key_gradients(
    dk,
    dv,
    d_factor,
    k,
    v,
    key_factor,
    start,
    stop,
    slope,
    q,
    d_out,
    query_factor,
    lses,
    commons,
    d_entropies,
    begin,
    end,
    queries,
    q_m,
    do_m,
    qf_m,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    RANK: tl.constexpr,
    RANK_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take the queries from `begin` to `end` into a block of keys' gradients (transposed tiles)."""
    d = tl.arange(0, DIM)
    r = tl.arange(0, RANK_DIM)
    for first in range(begin, end, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        real = m < queries
        inside = d[None, :] < HEAD_DIM
        q_pointers = q + m[:, None] * q_m + d[None, :]
        q_tile = _load(q_pointers, real[:, None], inside, True, DIM != HEAD_DIM)
        log_p = _dot(k, tl.trans(q_tile), None, PRECISION) * (slope * LOG2E)
        qf_tile = q_tile
        if RANK > 0:
            qf_pointers = query_factor + m[:, None] * qf_m + r[None, :]
            qf_tile = _load(qf_pointers, real[:, None], r[None, :] < RANK, True, RANK_DIM != RANK)
            log_p += _dot(key_factor, tl.trans(qf_tile), None, PRECISION) * LOG2E
        log_p = log_p - tl.load(lses + m, mask=real, other=0.0)[None, :]
        visible = (m[None, :] >= start[:, None]) & (m[None, :] < stop[:, None])
        log_p = tl.where(visible, log_p, HIDDEN)
        p = tl.exp2(log_p)
        do_pointers = d_out + m[:, None] * do_m + d[None, :]
        do_tile = _load(do_pointers, real[:, None], inside, True, DIM != HEAD_DIM)
        dv = _dot(p.to(do_tile.dtype), do_tile, dv, PRECISION)
        ds = _dot(v, tl.trans(do_tile), None, PRECISION)
        ds -= tl.load(commons + m, mask=real, other=0.0)[None, :]
        if d_entropies is not None:
            ds -= log_p * (tl.load(d_entropies + m, mask=real, other=0.0) * LN2)[None, :]
        ds = p * ds
        if RANK > 0:
            d_factor = _dot(ds.to(q_tile.dtype), qf_tile, d_factor, PRECISION)
        if GROUP > 1:
            ds = ds * slope  # the heads that share these keys may differ in it
        dk = _dot(ds.to(q_tile.dtype), q_tile, dk, PRECISION)
    return dk, dv, d_factor


@triton.jit
def _key_kernel(
    q,
    k,
    v,
    slopes,
    query_factor,
    key_factor,
    starts,
    stops,
    padding,
    d_out,
    d_entropies,
    lses,
    commons,
    dk,
    dv,
    d_key_factor,
    kv_heads,
    queries,
    keys,
    interval_b,
    q_b,
    q_h,
    q_m,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    do_b,
    do_h,
    do_m,
    dk_b,
    dk_h,
    dk_n,
    qf_b,
    qf_h,
    qf_m,
    kf_b,
    kf_h,
    kf_n,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    RANK: tl.constexpr,
    RANK_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of keys of one key-value head: gradients of k, v and each head's bias factor."""
    index = tl.program_id(1).to(tl.int64)
    b, kv_head = index // kv_heads, index % kv_heads
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, DIM)
    r = tl.arange(0, RANK_DIM)
    valid = n < keys
    inside = d[None, :] < HEAD_DIM
    k_pointers = k + b * k_b + kv_head * k_h + n[:, None] * k_n + d[None, :]
    k_tile = _load(k_pointers, valid[:, None], inside, True, DIM != HEAD_DIM)
    v_pointers = v + b * v_b + kv_head * v_h + n[:, None] * v_n + d[None, :]
    v_tile = _load(v_pointers, valid[:, None], inside, True, DIM != HEAD_DIM)
    start = tl.load(starts + b * interval_b + n, mask=valid, other=0)
    stop = tl.load(stops + b * interval_b + n, mask=valid, other=0)
    # A padding key's gradients are discarded below, so its scores need no mask.
    begin, _, _, end = _runs(start, stop, valid, queries, BLOCK_M, True)
    kept = valid
    if padding is not None:
        kept = valid & (tl.load(padding + b * keys + n, mask=valid, other=1) == 0)

    dk_tile = tl.zeros((BLOCK_N, DIM), tl.float32)
    dv_tile = tl.zeros((BLOCK_N, DIM), tl.float32)
    for g in range(GROUP):
        h = kv_head * GROUP + g
        slope = tl.load(slopes + h)
        row = (b * kv_heads * GROUP + h) * queries
        kf_tile = k_tile
        qf_head = query_factor
        if RANK > 0:
            kf_pointers = key_factor + b * kf_b + h * kf_h + n[:, None] * kf_n + r[None, :]
            kf_tile = _load(kf_pointers, valid[:, None], r[None, :] < RANK, True, RANK_DIM != RANK)
            qf_head = query_factor + b * qf_b + h * qf_h
        d_entropy_row = d_entropies
        if d_entropies is not None:
            d_entropy_row = d_entropies + row
        q_head = q + b * q_b + h * q_h
        do_head = d_out + b * do_b + h * do_h
        d_factor = tl.zeros((BLOCK_N, RANK_DIM), tl.float32)
        dk_tile, dv_tile, d_factor = _key_gradients(
            dk_tile, dv_tile, d_factor, k_tile, v_tile, kf_tile, start, stop, slope,
            q_head, do_head, qf_head, lses + row, commons + row, d_entropy_row,
            begin, end, queries, q_m, do_m, qf_m,
            HEAD_DIM, DIM, RANK, RANK_DIM, GROUP, BLOCK_M, PRECISION,
        )  # fmt: skip
        if RANK > 0:
            pointers = (b * kv_heads * GROUP + h) * keys * RANK + n[:, None] * RANK + r[None, :]
            d_factor = tl.where(kept[:, None], d_factor, 0.0)
            stored = valid[:, None] & (r[None, :] < RANK)
            tl.store(d_key_factor + pointers, d_factor, mask=stored)
        if GROUP == 1:
            dk_tile = dk_tile * slope

    pointers = b * dk_b + kv_head * dk_h + n[:, None] * dk_n + d[None, :]
    stored = valid[:, None] & inside
    dk_tile = tl.where(kept[:, None], dk_tile, 0.0)
    dv_tile = tl.where(kept[:, None], dv_tile, 0.0)
    tl.store(dk + pointers, dk_tile.to(dk.dtype.element_ty), mask=stored)
    tl.store(dv + pointers, dv_tile.to(dv.dtype.element_ty), mask=stored)


@torch.compiler.disable
def entropy_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float,
    temperature: Tensor | None,
    window: int | None,
    bias: Tensor | None,
    bias_factors: tuple[Tensor, Tensor] | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    key_padding_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `kernels.entropy_attention.entropy_attention`, which validates the arguments."""
    assert bias is None  # the dispatch refuses it
    query_factor, key_factor = bias_factors or (None, None)
    if query_factor is not None and key_factor is not None:
        query_factor = query_factor.expand(*q.shape[:2], -1, -1)
        key_factor = key_factor.expand(*q.shape[:2], -1, -1)
    masks = (q, k, causal, window, lengths, cu_seqlens)
    return _EntropyAttention.apply(  # type: ignore[no-any-return]
        q,
        k,
        v,
        head_slopes(q, scale, temperature),
        query_factor,
        key_factor,
        *visible_keys(*masks),
        *visible_queries(*masks),
        None if key_padding_mask is None else key_padding_mask.contiguous().view(torch.uint8),
        window is not None or cu_seqlens is not None,
    )


class _EntropyAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        query_factor: Tensor | None,
        key_factor: Tensor | None,
        key_starts: Tensor,
        key_stops: Tensor,
        query_starts: Tensor,
        query_stops: Tensor,
        padding: Tensor | None,
        local: bool,
    ) -> tuple[Tensor, Tensor]:
        batch, heads, queries, _ = q.shape
        q, k, v = _rows(q), _rows(k), _rows(v)
        if query_factor is not None and key_factor is not None:
            query_factor, key_factor = _rows(query_factor), _rows(key_factor)
        key_starts, query_starts = key_starts.contiguous(), query_starts.contiguous()
        out = torch.empty_like(q)
        entropy = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        lse = torch.empty_like(entropy)
        sizes = _sizes(q, k, query_factor)
        config = _config("forward", q.dtype, q.shape[-1], sizes["RANK"])
        if q.numel():
            with torch.cuda.device_of(q):
                _forward_kernel[(triton.cdiv(queries, config["BLOCK_M"]), batch * heads)](
                    q,
                    k,
                    v,
                    slopes,
                    query_factor,
                    key_factor,
                    key_starts,
                    key_stops,
                    padding,
                    out,
                    entropy,
                    lse,
                    heads,
                    queries,
                    k.shape[2],
                    _batch_stride(key_stops),
                    *q.stride()[:3],
                    *k.stride()[:3],
                    *v.stride()[:3],
                    *out.stride()[:3],
                    *_strides(query_factor),
                    *_strides(key_factor),
                    LEFT=local,
                    **sizes,
                    **config,
                )
        ctx.save_for_backward(
            q, k, v, slopes, query_factor, key_factor, out, entropy, lse,
            key_starts, key_stops, query_starts, query_stops, padding,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        return out, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, d_out: Tensor | None, d_entropy: Tensor | None
    ) -> tuple:
        (
            q, k, v, slopes, query_factor, key_factor, out, entropy, lse,
            key_starts, key_stops, query_starts, query_stops, padding,
        ) = ctx.saved_tensors  # fmt: skip
        batch, heads, queries, head_dim = q.shape
        kv_heads, keys = k.shape[1:3]
        d_out = torch.zeros_like(out) if d_out is None else _rows(d_out)
        if d_entropy is not None:
            d_entropy = d_entropy.contiguous()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(k)
        common = torch.empty_like(entropy)
        d_slopes = torch.empty_like(entropy) if ctx.needs_input_grad[3] else None
        d_query_factor = d_key_factor = None
        if query_factor is not None and key_factor is not None:
            rank = query_factor.shape[-1]
            d_query_factor = entropy.new_empty((batch, heads, queries, rank))
            d_key_factor = entropy.new_empty((batch, heads, keys, rank))
        sizes = _sizes(q, k, query_factor)
        factor_strides = *_strides(query_factor), *_strides(key_factor)
        with torch.cuda.device_of(q):
            if q.numel():
                _common_kernel[(triton.cdiv(queries, 64), batch * heads)](
                    out,
                    d_out,
                    entropy,
                    d_entropy,
                    common,
                    heads,
                    queries,
                    *out.stride()[:3],
                    *d_out.stride()[:3],
                    HEAD_DIM=head_dim,
                    DIM=sizes["DIM"],
                    BLOCK_M=64,
                )
                config = _config("query", q.dtype, head_dim, sizes["RANK"])
                _query_kernel[(triton.cdiv(queries, config["BLOCK_M"]), batch * heads)](
                    q,
                    k,
                    v,
                    slopes,
                    query_factor,
                    key_factor,
                    key_starts,
                    key_stops,
                    padding,
                    d_out,
                    d_entropy,
                    lse,
                    common,
                    dq,
                    d_slopes,
                    d_query_factor,
                    heads,
                    queries,
                    keys,
                    _batch_stride(key_stops),
                    *q.stride()[:3],
                    *k.stride()[:3],
                    *v.stride()[:3],
                    *d_out.stride()[:3],
                    *dq.stride()[:3],
                    *factor_strides,
                    **sizes,
                    **config,
                )
            if k.numel():
                config = _config("key", q.dtype, head_dim, sizes["RANK"])
                _key_kernel[(triton.cdiv(keys, config["BLOCK_N"]), batch * kv_heads)](
                    q,
                    k,
                    v,
                    slopes,
                    query_factor,
                    key_factor,
                    query_starts,
                    query_stops,
                    padding,
                    d_out,
                    d_entropy,
                    lse,
                    common,
                    dk,
                    dv,
                    d_key_factor,
                    kv_heads,
                    queries,
                    keys,
                    _batch_stride(query_stops),
                    *q.stride()[:3],
                    *k.stride()[:3],
                    *v.stride()[:3],
                    *d_out.stride()[:3],
                    *dk.stride()[:3],
                    *factor_strides,
                    **sizes,
                    **config,
                )
        if d_slopes is not None:
            d_slopes = d_slopes.sum((0, 2))
        if query_factor is not None and d_query_factor is not None and d_key_factor is not None:
            d_query_factor = d_query_factor.to(query_factor.dtype)
            d_key_factor = d_key_factor.to(query_factor.dtype)
        return dq, dk, dv, d_slopes, d_query_factor, d_key_factor, *(None,) * 6


def _rows(x: Tensor) -> Tensor:
    """Contiguous in the last dimension, as the kernels read it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()[:3]


def _batch_stride(interval: Tensor) -> int:
    return interval.stride(0) if interval.shape[0] > 1 else 0


def _sizes(q: Tensor, k: Tensor, factor: Tensor | None) -> dict[str, Any]:
    rank = 0 if factor is None else factor.shape[-1]
    return {
        "GROUP": q.shape[1] // k.shape[1],
        "HEAD_DIM": q.shape[-1],
        "DIM": _padded(q.shape[-1]),
        "RANK": rank,
        "RANK_DIM": _padded(rank),
        "PRECISION": _precision(q.dtype),
    }


def _padded(size: int) -> int:
    """The power of two a tile has for a dimension of this size; tensor cores need at least 16."""
    return max(16, triton.next_power_of_2(size))


def _precision(dtype: torch.dtype) -> str:
    """float32 products follow PyTorch's setting."""
    exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def _config(
    kernel: str, dtype: torch.dtype, head_dim: int, rank: int, target: str | None = None
) -> dict[str, int]:
    """Tile sizes and launch options that do not spill (see `aot_specs`; ranks above 16 may)."""
    target = target or _target()
    size = _padded(head_dim) * (2 if dtype == torch.float32 else 1)
    column = 0 if size <= 64 else 1 if size <= 128 else 2
    if target.startswith("hip"):
        # Masks live in scalar registers there: few elements for each thread.
        m, n = {
            "forward": [(64, 32), (64, 32), (64, 32)],
            "query": [(64, 16), (64, 16), (16, 16)],
            "key": [(16, 64), (16, 32), (16, 16)],
        }[kernel][column]
        return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": 4, "num_stages": 1}
    m, n, warps, stages = {
        "forward": [(128, 64, 8, 3), (64, 64, 8, 2), (64, 32, 8, 2)],
        "query": [(128, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)],
        "query, factors": [(128, 32, 8, 2), (64, 16, 8, 2), (16, 16, 4, 2)],
        "key": [(32, 128, 8, 2), (32, 64, 8, 2), (32, 32, 8, 2)],
        "key, factors": [(32, 128, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)],
    }[f"{kernel}, factors" if kernel != "forward" and rank else kernel][column]
    if kernel == "forward" and column == 0 and target == "cuda:100":
        n, stages = 32, 2
    if kernel == "key" and dtype == torch.float32 and column == 2:
        stages = 1
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}


def _target() -> str:
    """The device's architecture as `kernels.aot` names it, as far as configurations differ."""
    if torch.version.hip is not None:
        return "hip:gfx942"
    blackwell = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 10
    return "cuda:100" if blackwell else "cuda:90"


def aot_specs() -> list[AotSpec]:
    """Every default configuration, with everything that shares it."""
    kernels = {"forward": _forward_kernel, "query": _query_kernel, "key": _key_kernel}
    specs = []
    for kind, dtype, head_dim in (
        ("bf16", torch.bfloat16, 64),
        ("bf16", torch.bfloat16, 128),
        ("bf16", torch.bfloat16, 256),
        ("fp32", torch.float32, 64),
        ("fp32", torch.float32, 128),
    ):
        common = {"BLOCK_M": 64, "num_warps": 4, "num_stages": 2}
        specs.append(_spec("common", _common_kernel, kind, head_dim, 0, common, TARGETS))
        for rank in (0, 16):
            for targets in (("cuda:80", "cuda:90"), ("cuda:100",), ("hip:gfx942",)):
                for name, kernel in kernels.items():
                    config = _config(name, dtype, head_dim, rank, targets[0])
                    specs.append(_spec(name, kernel, kind, head_dim, rank, config, targets))
    return specs


def _spec(
    name: str,
    kernel: Any,
    kind: str,
    head_dim: int,
    rank: int,
    config: dict[str, int],
    targets: tuple[str, ...],
) -> AotSpec:
    """Grouped, local, with padding and gradients of everything; with bias factors or without."""
    inputs = {"q", "k", "v", "query_factor", "key_factor", "out", "d_out", "dq", "dk", "dv"}
    factors = {"query_factor", "key_factor", "d_query_factor", "d_key_factor"}
    values: dict[str, Any] = {
        "GROUP": 4,
        "HEAD_DIM": head_dim,
        "DIM": _padded(head_dim),
        "RANK": rank,
        "RANK_DIM": _padded(rank),
        "LEFT": True,
        "PRECISION": "tf32",
        **config,
    }
    signature, constexprs = {}, {}
    for argument in kernel.arg_names:
        if argument in values:
            constexprs[argument] = values[argument]
        elif argument in factors and not rank:
            constexprs[argument] = None
        elif argument in inputs:
            signature[argument] = f"*{kind}"
        elif argument in ("starts", "stops"):
            signature[argument] = "*i32"
        elif argument == "padding":
            signature[argument] = "*u8"
        elif argument in ("heads", "kv_heads", "queries", "keys") or argument[-2] == "_":
            signature[argument] = "i32"
        else:
            signature[argument] = "*fp32"
    return AotSpec(
        name=f"entropy_attention/{name} {kind} {head_dim}{' factors' if rank else ''}",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        divisible=tuple(name for name, kind in signature.items() if kind == "i32"),
        targets=targets,
    )
