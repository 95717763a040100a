"""Attention with row entropies in linear memory on any device.

Blocks of queries meet all the keys any of them sees, so each row's softmax is complete in one
block; the backward makes the block again from the saved log-sum-exp.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernels.entropy_attention.reference import accumulation_dtype, visible_keys

# Scores in one block, 4 MiB in float32: large enough for the matrix products, small enough to stay
# in a CPU's cache between the passes over it.
BLOCK = 2**20
# exp(HIDDEN) is 0 even in float64, and HIDDEN · 0 is 0 where −∞ · 0 would be NaN.
HIDDEN = -1000.0


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
    start, stop = visible_keys(q, k, causal, window, lengths, cu_seqlens)
    return _EntropyAttention.apply(  # type: ignore[no-any-return]
        q,
        k,
        v,
        head_slopes(q, scale, temperature),
        bias,
        *(bias_factors or (None, None)),
        start.cpu(),
        stop.cpu(),
        key_padding_mask,
    )


def head_slopes(q: Tensor, scale: float, temperature: Tensor | None) -> Tensor:
    """What multiplies q·k in each head: `(heads,)`."""
    dtype = accumulation_dtype(q)
    if temperature is None:
        return torch.full((q.shape[1],), scale, dtype=dtype, device=q.device)
    return scale / temperature.to(dtype)


class _EntropyAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slope: Tensor,
        bias: Tensor | None,
        query_factor: Tensor | None,
        key_factor: Tensor | None,
        start: Tensor,
        stop: Tensor,
        padding: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        scores = _Scores(q, k, slope, bias, query_factor, key_factor, start, stop, padding)
        values = v.to(slope.dtype).contiguous()
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        entropy = slope.new_zeros(q.shape[:-1])
        lse = torch.zeros_like(entropy)
        for block in scores.blocks():
            batch, heads, rows, keys = block
            s, hidden = scores.of(block)
            largest = s.amax(-1, keepdim=True)
            if hidden:
                largest = largest.masked_fill_(largest == -torch.inf, 0)
                s = s.sub_(largest).clamp_(min=HIDDEN)
            else:
                s = s.sub_(largest)
            p = s.exp()
            total = p.sum(-1, keepdim=True)
            total = total.masked_fill_(total == 0, 1)  # rows without a visible key
            mixed = (p.flatten(2, 3) @ values[batch, heads, keys]).unflatten(2, p.shape[2:4])
            scores.grouped(out)[batch, heads, :, rows] = mixed / total
            mean = s.mul_(p).sum(-1, keepdim=True) / total  # of the scores below the largest
            scores.grouped(lse)[batch, heads, :, rows] = (total.log() + largest).squeeze(-1)
            scores.grouped(entropy)[batch, heads, :, rows] = (total.log() - mean).squeeze(-1)
        ctx.save_for_backward(
            q, k, v, slope, bias, query_factor, key_factor, start, stop, padding, lse
        )
        ctx.set_materialize_grads(False)
        return out, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, d_out: Tensor | None, d_entropy: Tensor | None
    ) -> tuple:
        q, k, v, slope, bias, query_factor, key_factor, start, stop, padding, lse = (
            ctx.saved_tensors
        )
        with torch.autocast(q.device.type, enabled=False):
            scores = _Scores(q, k, slope, bias, query_factor, key_factor, start, stop, padding)
            dtype, grouped = slope.dtype, scores.grouped
            values = v.to(dtype).contiguous()
            d_out = torch.zeros_like(q) if d_out is None else d_out
            dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
            dk, dv = torch.zeros_like(values), torch.zeros_like(values)
            d_slope = torch.zeros_like(scores.slope)
            d_bias = d_factors = None
            if scores.bias is not None and ctx.needs_input_grad[4]:
                d_bias = torch.zeros_like(scores.bias, dtype=dtype)
            if scores.factors is not None:
                d_factors = [torch.zeros_like(x) for x in scores.factors]

            for block in scores.blocks():
                batch, heads, rows, keys = block
                row_block = (batch, heads, slice(None), rows)
                log_p, hidden = scores.of(block)
                log_p = log_p.sub_(grouped(lse)[row_block][..., None])
                if hidden:
                    log_p = log_p.clamp_(min=HIDDEN)
                p = log_p.exp()
                do = grouped(d_out)[row_block].flatten(2, 3).to(dtype)
                _add_product(dv[batch, heads, keys], p.flatten(2, 3).mT, do)
                ds = (do @ values[batch, heads, keys].mT).view_as(p)
                if d_entropy is not None:
                    ds = ds.addcmul_(log_p, grouped(d_entropy)[row_block][..., None], value=-1)
                # The softmax's own backward. −Σ p·log p brings in +H·dH.
                mean = torch.mul(p, ds, out=log_p).sum(-1, keepdim=True)
                ds = ds.sub_(mean).mul_(p)
                del log_p, p

                queries = scores.queries[row_block].to(dtype)
                sloped = (queries * scores.slope[:, heads]).flatten(2, 3)
                _add_product(dk[batch, heads, keys], ds.flatten(2, 3).mT, sloped)
                mixed = (ds.flatten(2, 3) @ scores.keys[batch, heads, keys]).view_as(queries)
                grouped(dq)[row_block] = mixed * scores.slope[:, heads]
                d_slope[:, heads] += (mixed * queries).sum((0, 3, 4), keepdim=True)
                if d_bias is not None:
                    part = _cut(d_bias, batch, heads, rows, keys)
                    part += ds.sum_to_size(part.shape)
                if scores.factors is not None and d_factors is not None:
                    of_rows = _cut(scores.factors[0], batch, heads, rows)
                    of_keys = _cut(scores.factors[1], batch, heads, keys)
                    part = _cut(d_factors[0], batch, heads, rows)
                    part += (ds @ of_keys).sum_to_size(part.shape)
                    part = _cut(d_factors[1], batch, heads, keys)
                    part += (ds.mT @ of_rows).sum_to_size(part.shape)

        def like(grad: Tensor | None, x: Tensor | None) -> Tensor | None:
            return None if grad is None or x is None else grad.reshape(x.shape).to(x.dtype)

        return (
            like(dq, q),
            like(dk, k),
            like(dv, v),
            like(d_slope, slope),
            like(d_bias, bias),
            *map(like, d_factors or (None, None), (query_factor, key_factor)),
            None,
            None,
            None,
        )


class _Scores:
    """The score matrix, block by block, as `(batch, kv_heads, group, queries, keys)`."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        slope: Tensor,
        bias: Tensor | None,
        query_factor: Tensor | None,
        key_factor: Tensor | None,
        start: Tensor,
        stop: Tensor,
        padding: Tensor | None,
    ) -> None:
        self.kv_heads, self.group = k.shape[1], q.shape[1] // k.shape[1]
        self.queries = self.grouped(q)
        self.keys = k.to(slope.dtype).contiguous()
        self.slope = self.grouped(slope[None, :, None, None])
        self.bias = None if bias is None else self.grouped(_four(bias))
        self.factors = None
        if query_factor is not None and key_factor is not None:
            self.factors = [
                self.grouped(_four(x).to(slope.dtype)) for x in (query_factor, key_factor)
            ]
        self.start, self.stop, self.padding = start, stop, padding

    def grouped(self, x: Tensor) -> Tensor:
        """Split the heads, dimension 1, by the key-value head they share; one stays one."""
        return x.unflatten(1, (self.kv_heads, self.group) if x.shape[1] > 1 else (1, 1))

    def blocks(self) -> Iterator[tuple[slice, slice, slice, slice]]:
        """Batch, kv heads, queries and keys of every block that has something visible."""
        batch, length, total = self.keys.shape[0], self.queries.shape[3], self.keys.shape[2]
        if 0 in (batch, length, total):
            return
        # Fewer rows where each sees few keys, so that little of a block is hidden.
        visible = int((self.stop - self.start).clamp(min=0).float().mean())
        width = min(total, 2 * visible + 64)
        rows = max(16, min(length, max(64, visible // 8), BLOCK // (self.group * width)))
        rows = min(rows, length)
        matrices = max(1, BLOCK // (self.group * rows * width))
        heads = min(self.kv_heads, matrices)
        samples = max(1, matrices // self.kv_heads)
        for b in range(0, batch, samples):
            samples_slice = slice(b, b + samples)
            start, stop = (_cut(x, samples_slice) for x in (self.start, self.stop))
            for row in range(0, length, rows):
                first, last = start[:, row : row + rows], stop[:, row : row + rows]
                some = first < last
                if not some.any():
                    continue
                keys = slice(int(first[some].min()), int(last[some].max()))
                for head in range(0, self.kv_heads, heads):
                    yield samples_slice, slice(head, head + heads), slice(row, row + rows), keys

    def of(self, block: tuple[slice, slice, slice, slice]) -> tuple[Tensor, bool]:
        """Scores of one block, −∞ where hidden, and whether any may be."""
        batch, heads, rows, keys = block
        queries = self.queries[batch, heads, :, rows].to(self.slope.dtype) * self.slope[:, heads]
        s = queries.flatten(2, 3) @ self.keys[batch, heads, keys].mT
        s = s.unflatten(2, queries.shape[2:4])
        if self.bias is not None:
            s += _cut(self.bias, batch, heads, rows, keys)
        if self.factors is not None:
            of_rows = _cut(self.factors[0], batch, heads, rows)
            s += of_rows @ _cut(self.factors[1], batch, heads, keys).mT
        hidden = self.bias is not None
        first, last = (_cut(x, batch)[:, rows] for x in (self.start, self.stop))
        # Only the two edges of a block's keys may be hidden from some of its rows.
        before = min(int(first.max()), keys.stop) - keys.start
        after = max(int(last.min()), keys.start) - keys.start
        for edge in (slice(0, before), slice(after, None)):
            if (part := s[..., edge]).shape[-1]:
                hidden = True
                key = torch.arange(keys.start, keys.stop)[edge]
                mask = (key < first[..., None]) | (key >= last[..., None])
                part.masked_fill_(mask.to(s.device)[:, None, None], -torch.inf)
        if self.padding is not None:
            hidden = True
            s.masked_fill_(self.padding[batch, None, None, None, keys], -torch.inf)
        return s, hidden


def _four(x: Tensor) -> Tensor:
    """With leading dimensions of one, so that there are four."""
    return x[(None,) * (4 - x.dim())]


def _cut(
    x: Tensor,
    batch: slice,
    heads: slice | None = None,
    rows: slice | None = None,
    keys: slice | None = None,
) -> Tensor:
    """A block of a tensor some of whose dimensions are one and stay so."""
    where = (batch, heads, slice(None), rows, keys)
    return x[
        tuple(slice(None) if size == 1 or cut is None else cut for size, cut in zip(x.shape, where))
    ]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b over two batch dimensions, without a temporary."""
    total.view(-1, *total.shape[2:]).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))
