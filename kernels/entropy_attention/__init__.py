"""Softmax attention that also returns the entropy of each row's weights."""

import torch
from torch import Tensor

from kernels.backend import choose
from kernels.entropy_attention import reference, tiled

__all__ = ["entropy_attention"]


def entropy_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    temperature: Tensor | None = None,
    window: int | None = None,
    bias: Tensor | None = None,
    bias_factors: tuple[Tensor, Tensor] | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention and the entropy of its weights, differentiable through both, in linear memory.

    With s the scores, and hidden keys left out of every sum:

        s = scale · q·k / temperature + bias + query_factor·key_factor
        lse = log Σⱼ exp(sⱼ),  pⱼ = exp(sⱼ − lse)
        out = Σⱼ pⱼ·vⱼ,  H = −Σⱼ pⱼ·log pⱼ = lse − Σⱼ pⱼ·sⱼ   (in nats)

    The backward makes p again from lse, and its gradient of the scores is
    dsⱼ = pⱼ·(dpⱼ − Σᵢ pᵢ·dpᵢ) − pⱼ·(log pⱼ + H)·dH with dpⱼ = dout·vⱼ. A query that sees no key has
    output 0, entropy 0 and no gradient. Gradients are those of first order only, for q, k, v,
    temperature, bias and bias_factors.

    Queries and keys are level at their ends: query i is at the position of key
    i + key_length − query_length, as when queries continue a cache of keys. Under autocast the
    products are done in its dtype; half-precision inputs are accumulated in float32.

    Args:
        q: (batch, heads, query_length, head_dim), floating-point.
        k, v: (batch, kv_heads, key_length, head_dim), where kv_heads divides heads: consecutive
            query heads share a key-value head (grouped-query attention).
        causal: hide the keys after a query's position.
        scale: of the products; default 1/√head_dim.
        temperature: (heads,), divides the scaled products (not the biases), nonzero. Large is flat.
        window: hide the keys `window` or more positions from a query's; with `causal` it sees
            `window` keys, its own among them.
        bias: broadcastable to (batch, heads, query_length, key_length), added to the scores; −inf
            hides a key. A dense bias is itself quadratic: Triton lacks it, prefer `bias_factors`.
        bias_factors: the low-rank bias of FlashBias, (query_factor, key_factor) of shapes
            (heads, query_length, rank) and (heads, key_length, rank), either with a batch
            dimension before; batch and heads may be one.
        lengths: (batch,), integers: the first `lengths[b]` positions of sample b are real, the
            other queries and keys are left out. query_length must be key_length. Values are
            checked only on a CPU.
        cu_seqlens: (sequences + 1,), integers: sequences packed end to end in one sample, each of
            which sees only itself: number n is positions cu_seqlens[n] to cu_seqlens[n + 1].
            batch must be 1 and query_length key_length. Values are checked only on a CPU.
        key_padding_mask: (batch, key_length), boolean, True where a key is padding and hidden (as
            in `torch.nn.MultiheadAttention`; the opposite of Hugging Face's `attention_mask`).
        backend: `"auto"`, `"reference"`, `"tiled"` or `"triton"`. Triton takes float16, bfloat16
            and float32, head_dim to 256, rank to 128 and no `bias`; elsewhere `"auto"` is tiled.

    Returns:
        out (batch, heads, query_length, head_dim) in q's dtype, and the entropy
        (batch, heads, query_length) in float32 (float64 for float64 inputs).

    Raises:
        ValueError: for arguments whose shapes, dtypes, devices or values are not as above, or that
            the backend asked for does not support.

    Sources: entropy regularisation of attention, "Entropy-Guided Attention for Private LLMs", arXiv
    2501.03489, which materialises the weights; "FlashAttention-2", arXiv 2307.08691; "FlashBias",
    arXiv 2505.12044. The online entropy and its gradient are derived here.
    """
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (_autocast(x, dtype) for x in (q, k, v))
        if bias_factors is not None:
            bias_factors = (_autocast(bias_factors[0], dtype), _autocast(bias_factors[1], dtype))
    _check(q, k, v, scale, temperature, window, bias, bias_factors)
    _check_masks(q, k, lengths, cu_seqlens, key_padding_mask)
    tensors = (temperature, bias, *(bias_factors or ()), lengths, cu_seqlens, key_padding_mask)
    chosen = choose(backend, q, k, v, *tensors)
    if chosen == "triton":
        lacking = _lacking_in_triton(q, bias, bias_factors)
        if lacking is not None and backend == "triton":
            raise ValueError(f'{lacking} with backend="triton"; use "tiled"')
        chosen = chosen if lacking is None else "tiled"
    implementation = {"reference": reference.entropy_attention, "tiled": tiled.entropy_attention}
    if chosen == "triton":
        from kernels.entropy_attention import triton

        implementation["triton"] = triton.entropy_attention
    with torch.autocast(q.device.type, enabled=False):
        return implementation[chosen](
            q,
            k,
            v,
            causal=causal,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            temperature=temperature,
            window=window,
            bias=bias,
            bias_factors=bias_factors,
            lengths=lengths,
            cu_seqlens=cu_seqlens,
            key_padding_mask=key_padding_mask,
        )


def _autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    temperature: Tensor | None,
    window: int | None,
    bias: Tensor | None,
    bias_factors: tuple[Tensor, Tensor] | None,
) -> None:
    for name, x in {"q": q, "k": k, "v": v}.items():
        if x.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions, got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"{name}: expected a floating-point dtype, got {x.dtype}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: expected q's dtype {q.dtype}, got {x.dtype}")
    batch, heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    if k.shape[0] != batch or k.shape[3] != head_dim or head_dim == 0:
        raise ValueError(
            f"k: expected (batch, kv_heads, key_length, head_dim) with batch {batch} and a nonzero "
            f"head_dim {head_dim} as in q, got {tuple(k.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"v: expected k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"k: its heads must divide q's {heads}, got {kv_heads}")
    if scale is not None and not torch.isfinite(torch.tensor(scale)):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    if temperature is not None and (
        temperature.shape != (heads,) or not temperature.is_floating_point()
    ):
        raise ValueError(
            f"temperature: expected floating-point of shape ({heads},), one for each head, got "
            f"{temperature.dtype} of shape {tuple(temperature.shape)}"
        )
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1, got {window}")
    if bias is not None:
        if not bias.is_floating_point():
            raise ValueError(f"bias: expected a floating-point dtype, got {bias.dtype}")
        _check_broadcast("bias", bias, (batch, heads, queries, keys))
    if bias_factors is not None:
        if len(bias_factors) != 2:
            raise ValueError(f"bias_factors: expected a pair, got {len(bias_factors)} tensors")
        rank = bias_factors[0].shape[-1]
        for factor, length in zip(bias_factors, (queries, keys)):
            if factor.dim() not in (3, 4) or factor.shape[-2:] != (length, rank) or rank == 0:
                raise ValueError(
                    "bias_factors: expected shapes ([batch,] heads, query_length, rank) and "
                    f"([batch,] heads, key_length, rank) with lengths {queries} and {keys}, got "
                    f"{tuple(bias_factors[0].shape)} and {tuple(bias_factors[1].shape)}"
                )
            if factor.dtype != q.dtype:
                raise ValueError(f"bias_factors: expected q's dtype {q.dtype}, got {factor.dtype}")
            _check_broadcast("bias_factors", factor, (batch, heads, length, rank))


def _check_broadcast(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    sizes = zip(reversed(x.shape), reversed(shape))
    if x.dim() > len(shape) or any(size not in (1, whole) for size, whole in sizes):
        raise ValueError(f"{name}: expected broadcastable to {shape}, got {tuple(x.shape)}")


def _check_masks(
    q: Tensor,
    k: Tensor,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    key_padding_mask: Tensor | None,
) -> None:
    batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
    for name, x in {"lengths": lengths, "cu_seqlens": cu_seqlens}.items():
        if x is None:
            continue
        if x.dim() != 1 or x.is_floating_point() or x.dtype == torch.bool:
            raise ValueError(
                f"{name}: expected integers in 1 dimension, got {x.dtype} of shape {tuple(x.shape)}"
            )
        if queries != keys:
            raise ValueError(f"{name}: needs as many queries as keys, got {queries} and {keys}")
    if lengths is not None and cu_seqlens is not None:
        raise ValueError("lengths: give it or cu_seqlens, not both")
    if lengths is not None:
        if len(lengths) != batch:
            raise ValueError(f"lengths: expected one for each of {batch}, got {len(lengths)}")
        if lengths.device.type == "cpu" and ((lengths < 0) | (lengths > keys)).any():
            raise ValueError(f"lengths: expected from 0 to {keys}, got {lengths.tolist()}")
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"cu_seqlens: needs a batch of 1, got {batch}")
        if len(cu_seqlens) < 2 or (
            cu_seqlens.device.type == "cpu"
            and (cu_seqlens[0] != 0 or cu_seqlens[-1] != keys or (cu_seqlens.diff() < 0).any())
        ):
            raise ValueError(
                f"cu_seqlens: expected to rise from 0 to {keys}, got {cu_seqlens.tolist()}"
            )
    if key_padding_mask is not None and (
        key_padding_mask.shape != (batch, keys) or key_padding_mask.dtype != torch.bool
    ):
        raise ValueError(
            f"key_padding_mask: expected booleans of shape ({batch}, {keys}), got "
            f"{key_padding_mask.dtype} of shape {tuple(key_padding_mask.shape)}"
        )


def _lacking_in_triton(
    q: Tensor, bias: Tensor | None, bias_factors: tuple[Tensor, Tensor] | None
) -> str | None:
    """What the Triton kernels do not support of these arguments, if anything."""
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"q: expected float16, bfloat16 or float32, got {q.dtype},"
    if q.shape[-1] > 256:
        return f"q: expected a head_dim of at most 256, got {q.shape[-1]},"
    if bias is not None:
        return "bias: dense biases are not supported"
    if bias_factors is not None and bias_factors[0].shape[-1] > 128:
        return f"bias_factors: expected a rank of at most 128, got {bias_factors[0].shape[-1]},"
    return None
