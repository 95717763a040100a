"""What the implementations share: their options, and the autograd function around them."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Options:
    """Checked options of one call.

    Attributes:
        dtype: of the matrix products (autocast's, or the inputs').
        vocab: rows of the whole classifier, over all processes of `group`.
    """

    dtype: torch.dtype
    vocab: int
    softcap: float | None = None
    label_smoothing: float = 0.0
    filter_eps: float | None = None
    kahan: bool = False
    chunk_size: int | None = None
    group: dist.ProcessGroup | None = None


class PerToken(torch.autograd.Function):
    """Negative log likelihood and log-sum-exp of every row; the backward makes the logits again.

    `backend` is the module whose `statistics` and `gradients` do the work. With a process group
    each process has some rows of the classifier and all of the hidden states.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: Options,
        backend: ModuleType,
    ) -> tuple[Tensor, Tensor]:
        with torch.cuda.device_of(hidden):  # Triton launches on the current device
            lse, target_logit, logit_sum = backend.statistics(
                hidden.to(options.dtype), weight.to(options.dtype), bias, targets, options
            )
        if options.group is not None:
            peak = lse.clone()
            dist.all_reduce(peak, dist.ReduceOp.MAX, options.group)
            sums = torch.stack([(lse - peak).exp_(), target_logit, logit_sum])
            dist.all_reduce(sums, dist.ReduceOp.SUM, options.group)
            lse, target_logit, logit_sum = peak + sums[0].log(), sums[1], sums[2]
        smoothing = options.label_smoothing
        nll = lse - (1 - smoothing) * target_logit
        if smoothing:
            nll -= smoothing / options.vocab * logit_sum
        ctx.save_for_backward(hidden, weight, bias, targets, lse)
        ctx.options, ctx.backend = options, backend
        ctx.set_materialize_grads(False)
        return nll, lse

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_nll: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse = ctx.saved_tensors
        options: Options = ctx.options
        needed = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        if grad_nll is None and grad_lse is None:
            return None, None, None, None, None, None
        with torch.cuda.device_of(hidden):
            grads = ctx.backend.gradients(
                hidden.to(options.dtype),
                weight.to(options.dtype),
                bias,
                targets,
                lse,
                torch.zeros_like(lse) if grad_nll is None else grad_nll,
                grad_lse,
                options,
                needed,
            )
        if options.group is not None and grads[0] is not None:
            dist.all_reduce(grads[0], dist.ReduceOp.SUM, options.group)
        inputs = (hidden, weight, bias)
        out = (None if g is None else g.to(x.dtype) for g, x in zip(grads, inputs))
        return (*out, None, None, None)
