"""Linear memory on any device: the logits exist for one chunk of rows or columns at a time."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.linear_cross_entropy.options import Gradients, Options


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 for half-precision inputs, in the inputs' dtype otherwise.

    Off CUDA the float32 sums are rounded to half precision once, as by `torch.nn.Linear`.
    """
    if a.dtype not in (torch.float16, torch.bfloat16):
        return a @ b
    if a.is_cuda and torch.version.hip is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()  # PyTorch has no product with a wider result elsewhere


def capped_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None
) -> Tensor:
    logits = matmul(hidden, weight.T)
    if bias is not None:
        logits += bias
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def _chunks(length: int, across: int, device: torch.device, options: Options) -> list[slice]:
    """Slices of `length` whose logits, `across` for each, exist at once.

    2²² of them by default (16 MiB in float32), which keeps a CPU's cores as busy as more would.
    GPUs need larger products.
    """
    elements = 1 << (22 if device.type == "cpu" else 27)
    step = options.chunk_size or max(16, elements // max(across, 1))
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _owned(targets: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Rows whose target is in [start, stop), and that target counted from start."""
    rows = ((targets >= start) & (targets < stop)).nonzero().squeeze(1)
    return rows, targets[rows] - start


def statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp, target logit (0 where the target is not in this shard) and sum of the logits.

    Each (tokens,); the sum is computed only with label smoothing (0 otherwise).
    """
    tokens, vocab = len(hidden), len(weight)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    lse, target_logit, logit_sum = (hidden.new_zeros(tokens, dtype=dtype) for _ in range(3))
    for rows in _chunks(tokens, vocab, hidden.device, options):
        logits = capped_logits(hidden[rows], weight, bias, options.softcap)
        owned, columns = _owned(targets[rows], 0, vocab)
        target_logit[rows][owned] = logits[owned, columns]
        if options.label_smoothing:
            logit_sum[rows] = logits.sum(1)
        peak = logits.amax(1, keepdim=True)
        lse[rows] = peak.squeeze(1) + logits.sub_(peak).exp_().sum(1).log_()
        del logits  # before the next chunk's are made
    return lse, target_logit, logit_sum


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
    """Gradients of hidden, weight and bias, from logits that are made again.

    The chunks are of the vocabulary, so each row of the weight's gradient is one matrix product,
    and only the hidden states' gradient is a sum over chunks (in float32).
    """
    tokens, vocab = len(hidden), len(weight)
    dtype, smoothing = lse.dtype, options.label_smoothing
    grad_hidden = hidden.new_zeros(hidden.shape, dtype=dtype) if needed[0] else None
    grad_weight = weight.new_empty(weight.shape, dtype=dtype) if needed[1] else None
    grad_bias = weight.new_empty(vocab, dtype=dtype) if needed[2] else None
    grad_softmax = grad_nll if grad_lse is None else grad_nll + grad_lse
    for part in _chunks(vocab, tokens, hidden.device, options):
        logits = capped_logits(
            hidden, weight[part], None if bias is None else bias[part], options.softcap
        )
        slope = None
        if options.softcap is not None:
            slope = 1 - (logits / options.softcap) ** 2
        grad = logits.sub_(lse[:, None]).exp_().mul_(grad_softmax[:, None])
        rows, columns = _owned(targets, part.start, part.stop)
        grad[rows, columns] -= (1 - smoothing) * grad_nll[rows]
        if smoothing:
            grad -= (smoothing / options.vocab) * grad_nll[:, None]
        if slope is not None:
            grad *= slope
        if grad_bias is not None:
            grad_bias[part] = grad.sum(0)
        grad = grad.to(hidden.dtype)
        if grad_weight is not None:
            grad_weight[part] = matmul(grad.T, hidden)
        if grad_hidden is not None:
            grad_hidden += matmul(grad, weight[part])
        del logits, grad, slope  # before the next chunk's are made
    return grad_hidden, grad_weight, grad_bias


def _accumulate(total: Tensor, compensation: Tensor | None, grad: Tensor, hidden: Tensor) -> None:
    """total += gradᵀ @ hidden, where `compensation` carries what Kahan's rounding took away."""
    if total.dtype == grad.dtype and compensation is None:
        total.addmm_(grad.T, hidden)
        return
    update = matmul(grad.T, hidden)
    if compensation is None:
        total += update
        return
    update -= compensation
    before = total.to(update.dtype)
    total += update
    compensation.copy_((total.to(update.dtype) - before) - update)


class WeightedSum(torch.autograd.Function):
    """Σᵢ scaleᵢ · nllᵢ, whose gradients are formed in the forward: three products, not four."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor,
        targets: Tensor,
        options: Options,
    ) -> Tensor:
        h, w = hidden.to(options.dtype), weight.to(options.dtype)
        dtype = torch.promote_types(options.dtype, torch.float32)
        vocab, smoothing = len(weight), options.label_smoothing
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = compensation = None
        if ctx.needs_input_grad[1]:
            kept = weight.dtype if options.kahan else torch.promote_types(weight.dtype, dtype)
            grad_weight = torch.zeros_like(weight, dtype=kept)
            if kept != dtype:
                compensation = torch.zeros_like(grad_weight)
        grad_bias = None
        if bias is not None and ctx.needs_input_grad[2]:
            grad_bias = torch.zeros_like(bias, dtype=dtype)
        nll = hidden.new_empty(len(hidden), dtype=dtype)
        for rows in _chunks(len(hidden), vocab, hidden.device, options):
            logits = capped_logits(h[rows], w, bias, options.softcap)
            slope = None
            if options.softcap is not None:
                slope = 1 - (logits / options.softcap) ** 2
            peak = logits.amax(1, keepdim=True)
            logits -= peak
            row = torch.arange(len(logits), device=logits.device)
            chosen = (1 - smoothing) * logits[row, targets[rows]]
            if smoothing:
                chosen += smoothing * logits.mean(1)
            grad = logits.exp_()
            total = grad.sum(1)
            nll[rows] = total.log() - chosen
            grad *= (scale[rows] / total)[:, None]
            grad[row, targets[rows]] -= (1 - smoothing) * scale[rows]
            if smoothing:
                grad -= (smoothing / vocab) * scale[rows, None]
            if slope is not None:
                grad *= slope
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(options.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = matmul(grad, w)
            if grad_weight is not None:
                _accumulate(grad_weight, compensation, grad, h[rows])
            del logits, grad, slope  # before the next chunk's are made
        ctx.save_for_backward(
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
            nll if ctx.needs_input_grad[3] else None,
        )
        return (scale * nll).sum()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_output: Tensor
    ) -> tuple[Tensor | None, ...]:
        # Times one changes nothing, and would copy the largest tensor there is.
        one = bool(grad_output == 1)
        scaled = (
            saved if saved is None or one else saved * grad_output.to(saved.dtype)
            for saved in ctx.saved_tensors
        )
        return (*scaled, None, None)
