"""Dynamic loss-based sample reweighting: samples weigh by where their loss lies in the batch's."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tasks.losses import precise, valid

STRATEGIES: dict[str, Callable[[Tensor], Tensor]] = {
    "linupper": lambda h: (h + 1).clamp(max=1),
    "quadratic": lambda h: 1 - h.square(),
    "extremes": torch.abs,
}


class LossBasedReweighting:
    """Mean of the losses, each times its sample's weight n·w_i.

    With ℓ_i the mean loss of sample i, over its labels that count, of n samples:

        h_i = (2·ℓ_i − ℓ_max − ℓ_min)/(ℓ_max − ℓ_min) in [−1, 1],   w = softmax(s(h)/r)

    and the strategy s(h): `"linupper"` min(h + 1, 1), by which the easy samples weigh less and the
    hard ones alike; `"quadratic"` 1 − h², by which those in the middle weigh most; `"extremes"`
    |h|. No gradient flows through the weights. δ of the paper is 1, as everywhere in its code.

    Of the first `warmup_steps` steps the weights are 1: the losses do not tell samples apart yet.
    The code at scale (fms-fsdp) has r = 100 there, which is almost that.

    The batch is a micro-batch, of all processes; with accumulation each has weights of its own, as
    in the code.

    Args:
        strategy: s.
        temperature: r, above 0; ∞ is the plain mean. 0.4 in most of the code's configurations.
        warmup_steps: 1000 in the code's configurations, of 20,000; 2000 in fms-fsdp.

    Shapes: losses (batch, ...) to a scalar; 0 where every label is −100.

    Raises:
        ValueError: for an unknown `strategy`, a `temperature` that is not above 0, or a negative
            `warmup_steps`.

    Source: "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining",
    arXiv 2502.06733; https://github.com/sowmaster/Sample-Level-Loss-Reweighting-ICLR-2025,
    `src/trainer.py`, in which samples also weigh by their number of labels (not in its README).
    """

    def __init__(
        self, strategy: str = "linupper", temperature: float = 0.4, warmup_steps: int = 1000
    ) -> None:
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy: one of {', '.join(STRATEGIES)}, got '{strategy}'")
        if not temperature > 0:
            raise ValueError(f"temperature: must be above 0, got {temperature}")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps: must be 0 or more, got {warmup_steps}")
        self.strategy, self.temperature = STRATEGIES[strategy], temperature
        self.warmup_steps = warmup_steps

    def __call__(self, losses: Tensor, outputs: Any, batch: dict[str, Any]) -> Tensor:
        mask, rows = (x.reshape(len(x), -1) for x in (valid(losses, batch), losses))
        counts = mask.sum(1)
        means = precise(rows.detach() * mask).sum(1) / counts.clamp(min=1)
        weights = self.weights(means, counts > 0)
        if "step" in batch:
            weights = torch.where(batch["step"] < self.warmup_steps, 1.0, weights)
        return (rows * mask * weights[:, None]).sum() / mask.sum().clamp(min=1)

    @torch.no_grad()
    def weights(self, losses: Tensor, counted: Tensor) -> Tensor:
        """n·w of samples' losses, (batch,), with n and the softmax over all processes.

        Args:
            losses: (batch,).
            counted: (batch,), which of them take part.
        """
        ends = [(sign * losses).masked_fill(~counted, -math.inf).amax() for sign in (1, -1)]
        high, negative_low = _over_processes(torch.stack(ends), "MAX")
        span = (high + negative_low).clamp(min=1e-6)  # as in the code: equal losses weigh alike
        h = (2 * losses - high + negative_low) / span
        scores = (self.strategy(h) / self.temperature).masked_fill(~counted, -math.inf)
        powers = (scores - _over_processes(scores.amax(), "MAX")).exp()
        total, number = _over_processes(torch.stack([powers.sum(), counted.sum()]), "SUM")
        return torch.where(counted, powers * number / total, 0.0)


def _over_processes(value: Tensor, operation: str) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(value, getattr(dist.ReduceOp, operation))
    return value
