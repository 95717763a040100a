"""Averages of a length that is chosen after training."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from techniques.callback.posthoc_ema import PowerEMA, exponent
from training.errors import UsageError
from training.evaluate import evaluate
from training.parallel import like, local

if TYPE_CHECKING:
    from training.run import Run


class PosthocEMA:
    """Replaces the weights by the average of length `sigma_rel`, made of the snapshots of
    `techniques.callback.posthoc_ema`.

    Of several lengths each is evaluated, as `post/posthoc_ema/<σ>/<metric>`, and the weights are
    left at the one with the lowest `trainer.monitor`. A run that has ended does it again with other
    lengths under `assay run --resume FOLDER post.posthoc_ema.sigma_rel=[...]`.

    Args:
        sigma_rel: one length or several; 0.10, the longer one that the callback tracks.
        callback: name of the callback.

    Raises:
        ValueError: for no length, or one outside (0, 0.289).
        UsageError: when the callback is not a `PowerEMA`.

    Source: `reconstruct_phema.py`, see the callback.
    """

    def __init__(self, sigma_rel: Sequence[float] = (0.10,), callback: str = "posthoc_ema") -> None:
        if not sigma_rel:
            raise ValueError("sigma_rel: expected at least one")
        self.lengths = list(sigma_rel)
        for sigma in self.lengths:
            exponent(sigma)
        self.callback = callback

    def __call__(self, run: "Run") -> None:
        """Make the averages, and keep one."""
        source = run.callbacks.get(self.callback)
        if not isinstance(source, PowerEMA):
            raise UsageError(f"post: callbacks.{self.callback} is not a PowerEMA")
        found = {}
        for sigma in self.lengths:
            give(run, source.reconstruct(run, sigma))
            if len(self.lengths) > 1:
                metrics = evaluate(run)
                run.record({f"post/posthoc_ema/{sigma:g}/{k}": v for k, v in metrics.items()})
                found[sigma] = metrics[run.config["trainer"]["monitor"]]
        if found:
            give(run, source.reconstruct(run, min(found, key=lambda sigma: found[sigma])))


@torch.no_grad()
def give(run: "Run", weights: dict[str, Tensor]) -> None:
    """Set a run's parameters to whole tensors, by name."""
    parameters = dict(run.objective.named_parameters())
    for name, value in weights.items():
        own = local(parameters[name].detach())
        own.copy_(local(like(value, parameters[name].detach())))
