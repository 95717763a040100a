"""Training on, as a step after training."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from training.assemble import build_optimizer
from training.components import call, factory
from training.objective import Losses
from training.parallel import local
from training.trainer import Step

if TYPE_CHECKING:
    from training.run import Run


class Finetune:
    """Trains on for some steps, with the run's own objective, gradient and batches, a new state of
    its optimizer and its schedule from the beginning.

    Numbers of matrices that are exactly 0, such as pruned weights, stay 0. What was quantised does
    not stay so. `run.step` counts on, and with it the batches go on; callbacks hear `on_batch` and
    `on_gradients` alone.

    Args:
        steps: at least 1.
        lr: learning rate; default: `optimizer.lr`.

    Raises:
        ValueError: for no steps, or a learning rate that is not above 0.
    """

    def __init__(self, steps: int, lr: float | None = None) -> None:
        if steps < 1:
            raise ValueError(f"steps: must be at least 1, got {steps}")
        if lr is not None and not lr > 0:
            raise ValueError(f"lr: must be above 0, got {lr}")
        self.steps, self.lr = steps, lr

    def __call__(self, run: "Run") -> None:
        """Train."""
        config = run.config
        rate = {} if self.lr is None else {"lr": self.lr}
        kept = {p: local(p.detach()) != 0 for p in run.model.parameters() if p.ndim > 1}
        before = run.optimizer, run.schedule, run.gradient
        run.optimizer = build_optimizer({**config["optimizer"], **rate}, run.objective)
        run.schedule = call(
            factory(config["schedule"], "schedule"), "schedule", run.optimizer, max_steps=self.steps
        )
        run.gradient = _Masked(run.gradient, kept)
        run.objective.train()
        first, take_step = run.step, Step(run)
        workers, pin = config["trainer"]["workers"], run.device.type == "cuda"
        for microbatches in run.batches.loader(first, first + self.steps, workers, pin):
            take_step(microbatches)
            _clear(kept)
        run.optimizer, run.schedule, run.gradient = before
        run.window = {}


class _Masked:
    """A gradient estimator that leaves nothing where numbers are not kept."""

    def __init__(self, gradient: Any, kept: dict[nn.Parameter, Tensor]) -> None:
        self.gradient, self.kept = gradient, kept

    def __call__(self, *arguments: Any) -> Losses:
        losses = self.gradient(*arguments)
        for parameter, kept in self.kept.items():
            if parameter.grad is not None:
                local(parameter.grad).masked_fill_(~kept, 0)
        return losses


@torch.no_grad()
def _clear(kept: dict[nn.Parameter, Tensor]) -> None:
    """Set again to 0 what an optimizer that needs no gradient has moved."""
    for parameter, places in kept.items():
        local(parameter.detach()).masked_fill_(~places, 0)
