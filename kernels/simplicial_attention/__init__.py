"""2-simplicial attention: every query attends to pairs of keys."""

import torch
from torch import Tensor

from kernels.backend import choose
from kernels.simplicial_attention import reference, tiled

WINDOWS = (512, 32)
"""The paper's."""


def simplicial_attention(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    *,
    windows: tuple[int, int] = WINDOWS,
    scale: float | None = None,
    k2_bias: float | None = None,
    v2_bias: float | None = None,
    key_padding_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention to the pairs of two sliding windows, in memory linear in the length.

        zᵢⱼₖ = scale · Σ_c qᵢ_c · k1ⱼ_c · (k2ₖ_c + k2_bias),  i − w₁ < j ≤ i and i − w₂ < k ≤ i
        outᵢ = Σⱼₖ softmaxⱼₖ(zᵢ) · v1ⱼ ∘ (v2ₖ + v2_bias)

    Scores are made again in the backward; gradients are of the first order only, but for
    `"reference"`. Half-precision inputs are accumulated in float32. A query that sees no key has
    output 0 and no gradient.

    Args:
        q: (batch, heads, length, head_dim), floating point.
        k1, k2, v1, v2: (batch, kv_heads, length, head_dim), where kv_heads divides heads.
        windows: (w₁, w₂), at least 1 each; the longer one first is faster.
        scale: default 1/√head_dim.
        k2_bias: default 1/head_dim, as in the authors' code: a layer whose k2 and v2 are small is
            then near to ordinary attention. 0 for none.
        v2_bias: default 1, likewise.
        key_padding_mask: (batch, length), boolean, True where a key is padding and hidden.
        backend: `"auto"`, `"reference"`, `"tiled"` or `"triton"`. Triton takes float16, bfloat16
            and float32 and head_dim to 128; elsewhere `"auto"` is tiled.

    Returns:
        (batch, heads, length, head_dim) in q's dtype.

    Raises:
        ValueError: for arguments that are not as above, or that the backend asked for lacks.

    Source: "Fast and Simplex: 2-Simplicial Attention in Triton", arXiv 2507.02754;
    https://github.com/pytorch/FBGEMM, `fbgemm_gpu/experimental/simplicial_attention/`.
    """
    tensors = {"q": q, "k1": k1, "k2": k2, "v1": v1, "v2": v2}
    _check(tensors, windows, key_padding_mask)
    batch, heads, length, dim = q.shape
    k2 = k2 + (1 / dim if k2_bias is None else k2_bias)
    v2 = v2 + (1.0 if v2_bias is None else v2_bias)
    share = heads // k1.shape[1]
    inputs = [q, *(x.repeat_interleave(share, 1) if share > 1 else x for x in (k1, k2, v1, v2))]
    factor = dim**-0.5 if scale is None else scale
    chosen = choose(backend, *tensors.values(), key_padding_mask)
    if chosen == "triton" and (lacking := _lacking_in_triton(q)):
        if backend == "triton":
            raise ValueError(f'{lacking} with backend="triton"; use "tiled"')
        chosen = "tiled"
    with torch.autocast(q.device.type, enabled=False):
        if chosen == "reference":
            out = reference.simplicial_attention(
                *inputs, windows=windows, scale=factor, hidden=key_padding_mask
            )
            return out.to(q.dtype)
        hidden = None
        if key_padding_mask is not None:
            hidden = key_padding_mask.repeat_interleave(heads, 0)
        flat = [x.reshape(batch * heads, length, dim) for x in inputs]
        if chosen == "tiled":
            wide = torch.promote_types(q.dtype, torch.float32)
            flat = [x.to(wide) for x in flat]
            function = tiled.SimplicialAttention
        else:
            from kernels.simplicial_attention import triton

            function = triton.SimplicialAttention
        out: Tensor = function.apply(*flat, windows, factor, hidden)  # type: ignore[assignment]
        return out.view(batch, heads, length, dim).to(q.dtype)


def _check(
    tensors: dict[str, Tensor], windows: tuple[int, int], key_padding_mask: Tensor | None
) -> None:
    q, k1 = tensors["q"], tensors["k1"]
    for name, x in tensors.items():
        if x.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions, got shape {tuple(x.shape)}")
        if not x.is_floating_point() or x.dtype != q.dtype:
            kind = "a floating-point dtype" if name == "q" else f"q's dtype {q.dtype}"
            raise ValueError(f"{name}: expected {kind}, got {x.dtype}")
    batch, heads, length, dim = q.shape
    if (k1.shape[0], *k1.shape[2:]) != (batch, length, dim):
        raise ValueError(
            f"k1: expected ({batch}, kv_heads, {length}, {dim}), got {tuple(k1.shape)}"
        )
    if not k1.shape[1] or heads % k1.shape[1]:
        raise ValueError(f"k1: its heads must divide q's {heads}, got {k1.shape[1]}")
    for name in ("k2", "v1", "v2"):
        if tensors[name].shape != k1.shape:
            raise ValueError(
                f"{name}: expected k1's shape {tuple(k1.shape)}, got {tuple(tensors[name].shape)}"
            )
    if len(windows) != 2 or min(windows) < 1:
        raise ValueError(f"windows: expected two numbers of at least 1, got {windows}")
    mask = key_padding_mask
    if mask is not None and (mask.shape != (batch, length) or mask.dtype != torch.bool):
        raise ValueError(
            f"key_padding_mask: expected booleans of shape ({batch}, {length}), got {mask.dtype} "
            f"of shape {tuple(mask.shape)}"
        )


def _lacking_in_triton(q: Tensor) -> str | None:
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"q: expected float16, bfloat16 or float32, got {q.dtype},"
    if q.shape[-1] > 128:
        return f"q: expected a head_dim of at most 128, got {q.shape[-1]},"
    return None
