"""Cross-entropy of a linear classifier, without its logits matrix."""

import math
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.backend import choose
from kernels.linear_cross_entropy import reference, tiled
from kernels.linear_cross_entropy.options import Options, PerToken

__all__ = ["linear_cross_entropy"]


Function = TypeVar("Function", bound=Callable[..., object])


def _eager(function: Function) -> Function:
    """`torch.compiler.disable`, keeping the signature: how many rows count depends on the data."""
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType]


@_eager
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    return_lse: bool = False,
    filter_eps: float | str | None = None,
    kahan: bool = False,
    group: dist.ProcessGroup | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of logits `hidden @ weight.T + bias`, without the logits matrix.

    With x the logits, z = softcap·tanh(x / softcap) (z = x without it), t the target, ε the label
    smoothing and V the vocabulary's size:

        lse = log Σᵥ exp(zᵥ),  loss = token_weight · (lse − (1−ε)·z_t − ε/V · Σᵥ zᵥ)

    Any function of the unreduced losses is differentiated exactly, so weightings that depend on
    the likelihood (focal, PolyLoss) need no support of their own. With `"mean"` and `"sum"` the
    tiled implementation forms the gradients in the forward (three matrix products); with `"none"`
    or `return_lse` the upstream gradient is not known yet, and the backward makes the logits again
    (four). Gradients are those of first order only.

    Under autocast the products are done in its dtype, and the gradients are in the parameters'.
    Losses, sums and log-sum-exps are float32 for half-precision inputs.

    Args:
        hidden: (..., dim), floating-point.
        weight: (vocab, dim), the classifier; with `group`, this process's consecutive rows.
        targets: (...), integers in [0, vocab) or `ignore_index`.
        bias: (vocab,); with `group`, of this process's rows.
        ignore_index: targets without a loss. Their rows are not computed.
        softcap: bound of the logits (Gemma 2's is 30), positive.
        label_smoothing: in [0, 1].
        token_weights: (...), a factor of each loss; may require a gradient.
        reduction: `"mean"` over the targets that are not ignored (0 when there are none; whatever
            the token weights), `"sum"` or `"none"`, which gives 0 where a target is ignored.
        return_lse: also return lse (...), differentiable (for a z-loss), 0 where ignored.
        filter_eps: the Triton backward may skip a tile of logits whose softmax gradients are all
            smaller than this in absolute value, with the vocabulary sorted by average logit. The
            error of a hidden state's gradient is then below filter_eps·|upstream|·Σᵥ|weightᵥ| in
            each component, and that of a classifier row's below filter_eps·Σ|upstream·hidden|.
            `"auto"` is the dtype's epsilon / 32, as in the authors' code (2⁻¹² in bfloat16, the
            paper's). None, the default, is exact, which pre-training needs. The other
            implementations are always exact.
        kahan: keep gradients that are summed over tiles in their own dtype, with Kahan's
            compensation, instead of float32. Only half-precision gradients differ.
        group: processes that share the vocabulary, in the order of their ranks. Every one gets the
            whole loss and the whole gradient of `hidden`.
        chunk_size: tokens (in a backward that makes the logits again, vocabulary entries) whose
            logits exist at once. Default: 2²² logits on a CPU, 2²⁷ on a GPU (Triton: 2²⁵).
        backend: `"auto"`, `"reference"`, `"tiled"` or `"triton"`.

    Returns:
        The loss, scalar or (...); with `return_lse`, the pair of it and lse (...).

    Raises:
        ValueError: for shapes, dtypes, devices or options that do not fit, targets out of range, or
            a combination that the chosen backend lacks.

    Source: "Cut Your Losses in Large-Vocabulary Language Models", arXiv 2411.09009;
    https://github.com/apple/ml-cross-entropy, `cut_cross_entropy/`.
    """
    _check_tensors(hidden, weight, targets, bias, token_weights)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: must be positive, got {softcap}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: must be in [0, 1], got {label_smoothing}")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction: expected none, mean or sum, got {reduction!r}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: must be positive, got {chunk_size}")
    chosen = choose(backend, hidden, weight, targets, bias, token_weights)
    dtype = _product_dtype(hidden)
    if chosen == "triton" and dtype == torch.float64:
        if backend == "triton":
            raise ValueError("hidden: Triton's matrix products have no float64; use 'tiled'")
        chosen = "tiled"
    if chosen == "reference" and group is not None:
        raise ValueError("group: the reference has no vocabulary-parallel form; use 'tiled'")

    start, vocab = _shard(weight, group)
    options = Options(
        dtype=dtype,
        vocab=vocab,
        softcap=softcap,
        label_smoothing=label_smoothing,
        filter_eps=_filter_threshold(filter_eps, dtype),
        kahan=kahan,
        chunk_size=chunk_size,
        group=group,
    )
    flat = targets.reshape(-1)
    kept = flat != ignore_index
    if bool((kept & ((flat < 0) | (flat >= vocab))).any()):
        raise ValueError(f"targets: expected values in [0, {vocab}) or {ignore_index}")
    rows = None if bool(kept.all()) else kept.nonzero().squeeze(1)
    h = hidden.reshape(-1, hidden.shape[-1])
    weights = None if token_weights is None else token_weights.reshape(-1)
    if rows is not None:
        h, flat = h[rows], flat[rows]
        weights = None if weights is None else weights[rows]
    count = max(len(flat), 1)

    with torch.autocast(hidden.device.type, enabled=False):
        if chosen == "tiled" and reduction != "none" and not return_lse and group is None:
            accumulate = torch.promote_types(dtype, torch.float32)
            scale = h.new_ones(len(flat), dtype=accumulate)
            if weights is not None:
                scale = weights.to(accumulate)
            scale = scale / count if reduction == "mean" else scale
            if torch.is_grad_enabled():
                return tiled.WeightedSum.apply(h, weight, bias, scale, flat, options)
            nll, _ = PerToken.apply(h, weight, bias, flat, options, tiled)
            return (nll * scale).sum()
        if chosen == "reference":
            b = None if bias is None else bias.to(dtype)
            nll, lse = reference.per_token(
                h.to(dtype), weight.to(dtype), b, flat, softcap, label_smoothing
            )
        else:
            nll, lse = PerToken.apply(h, weight, bias, flat - start, options, _module(chosen))
        losses = nll if weights is None else nll * weights
        if reduction != "none":
            loss = losses.sum() / (count if reduction == "mean" else 1)
        else:
            loss = _at(rows, losses, targets)
    return (loss, _at(rows, lse, targets)) if return_lse else loss


def _module(name: str):
    if name == "tiled":
        return tiled
    from kernels.linear_cross_entropy import triton

    return triton


def _at(rows: Tensor | None, values: Tensor, like: Tensor) -> Tensor:
    """`values` at `rows` of a tensor of zeros shaped like `like` (None: at all of them)."""
    if rows is not None:
        values = values.new_zeros(like.numel()).index_put((rows,), values)
    return values.reshape(like.shape)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def _filter_threshold(filter_eps: float | str | None, dtype: torch.dtype) -> float | None:
    if filter_eps == "auto":
        return torch.finfo(dtype).eps / 32
    if filter_eps is None:
        return None
    if isinstance(filter_eps, str) or not 0 < filter_eps < math.inf:
        raise ValueError(
            f"filter_eps: expected None, 'auto' or a positive number, got {filter_eps!r}"
        )
    return float(filter_eps)


def _shard(weight: Tensor, group: dist.ProcessGroup | None) -> tuple[int, int]:
    """First row of this process's classifier, and rows over all processes."""
    if group is None:
        return 0, len(weight)
    own = torch.tensor([len(weight)], device=weight.device)
    sizes = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, own, group)
    counts = [int(size) for size in sizes]
    return sum(counts[: dist.get_rank(group)]), sum(counts)


def _check_tensors(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    token_weights: Tensor | None,
) -> None:
    if hidden.ndim == 0 or not hidden.is_floating_point():
        raise ValueError(
            f"hidden: expected floating-point (..., dim), got {hidden.dtype} {tuple(hidden.shape)}"
        )
    dim = hidden.shape[-1]
    if weight.ndim != 2 or weight.shape[1] != dim or len(weight) == 0:
        raise ValueError(f"weight: expected (vocab, {dim}), got {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets: expected {tuple(hidden.shape[:-1])}, got {tuple(targets.shape)}"
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"targets: expected int64, got {targets.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected ({len(weight)},), got {tuple(bias.shape)}")
    if token_weights is not None and token_weights.shape != targets.shape:
        raise ValueError(
            f"token_weights: expected {tuple(targets.shape)}, got {tuple(token_weights.shape)}"
        )
    # Autocast makes mixed dtypes of its inputs one, as it does for a matrix product.
    if torch.is_autocast_enabled(hidden.device.type):
        return
    for name, tensor in {"weight": weight, "bias": bias}.items():
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(f"{name}: expected {hidden.dtype} like hidden, got {tensor.dtype}")
