"""Averages of the weights over training."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from training.parallel import like, local

if TYPE_CHECKING:
    from training.run import Run

Rule = Callable[[list[Tensor], list[Tensor], int], None]
"""`(averages, parameters, averaged)`, changes the averages in place, as torch's `multi_avg_fn`."""


class Average:
    """A running average of an objective's trained parameters, each sharded as its parameter.

    It is torch's `AveragedModel` without its copy of the model, which FSDP2 refuses to make: the
    first update copies the parameters, later ones follow a rule. Buffers are not averaged.

    Attributes:
        tensors: the averages, by the parameter's name.
        averaged: updates so far.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.averaged = 0
        self.parameters: dict[str, nn.Parameter] = {}

    def follow(self, objective: nn.Module) -> None:
        """Take the parameters to average; what a checkpoint has brought is kept."""
        self.parameters = {n: p for n, p in objective.named_parameters() if p.requires_grad}
        self.tensors = {
            name: like(self.tensors[name], p) if name in self.tensors else p.detach().clone()
            for name, p in self.parameters.items()
        }

    def update(self, rule: Rule) -> None:
        """Move the averages by the rule; the first time, to the parameters."""
        averages, parameters = self._pairs()
        if self.averaged:
            rule(averages, parameters, self.averaged)
        else:
            torch._foreach_copy_(averages, parameters)
        self.averaged += 1

    def give(self) -> None:
        """Set the parameters to the averages."""
        averages, parameters = self._pairs()
        torch._foreach_copy_(parameters, averages)

    def swap(self) -> None:
        """Exchange averages and parameters."""
        averages, parameters = self._pairs()
        kept = [p.clone() for p in parameters]
        torch._foreach_copy_(parameters, averages)
        torch._foreach_copy_(averages, kept)

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """This process's parts of the averages and of the parameters, sharing their memory."""
        parameters = [local(p.detach()) for p in self.parameters.values()]
        return [local(tensor) for tensor in self.tensors.values()], parameters

    def state_dict(self) -> dict[str, Any]:
        """The averages, and how many updates they are of."""
        return {"tensors": dict(self.tensors), "averaged": self.averaged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back, before `follow`."""
        self.tensors, self.averaged = dict(state["tensors"]), state["averaged"]


class Averaging:
    """Keeps an average of the weights, and evaluates with it: what `EMA` and `SWA` share.

    Callbacks listed before it see the averages too in `on_eval_end`. Checkpoints have the weights
    of training as the model, and the averages in the callback's state; `techniques.post.averaged`
    makes them the model after training. Buffers (batch norm's statistics) are training's.

    Args:
        rule: of an update.
        start: fraction of the steps before the first update; until then the weights themselves are
            evaluated.
        every: steps between updates.
        final: leave the averages in the model after the evaluation at `max_steps`, for the last
            checkpoint.

    Raises:
        ValueError: for a start outside [0, 1) or steps below 1.
    """

    def __init__(self, rule: Rule, start: float = 0.0, every: int = 1, final: bool = False) -> None:
        if not 0 <= start < 1:
            raise ValueError(f"start: must be in [0, 1), got {start}")
        if every < 1:
            raise ValueError(f"every: must be at least 1, got {every}")
        self.rule, self.start, self.every, self.final = rule, start, every, final
        self.average = Average()

    def on_fit_start(self, run: "Run") -> None:
        """Follow the parameters."""
        self.average.follow(run.objective)

    def on_step_end(self, run: "Run") -> None:
        """Update when it is time."""
        if run.step > self.start * run.max_steps and run.step % self.every == 0:
            self.average.update(self.rule)

    def on_eval_start(self, run: "Run") -> None:
        """Evaluate with the averages."""
        if self.average.averaged:
            self.average.swap()

    def on_eval_end(self, run: "Run") -> None:
        """Go on with the weights of training."""
        if self.average.averaged:
            self.average.swap()
            if self.final and run.step == run.max_steps:
                self.average.give()

    def state_dict(self) -> dict[str, Any]:
        """The average's."""
        return self.average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.average.load_state_dict(state)


class EMA(Averaging):
    """An exponential moving average: θ̄ ← γ·θ̄ + (1 − γ)·θ.

    Args:
        decay: γ; 0.999 as in torch's `get_ema_multi_avg_fn`.
        start, every, final: of `Averaging`.

    Raises:
        ValueError: for a decay outside [0, 1).
    """

    def __init__(
        self, decay: float = 0.999, start: float = 0.0, every: int = 1, final: bool = False
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay: must be in [0, 1), got {decay}")
        super().__init__(get_ema_multi_avg_fn(decay), start, every, final)


class SWA(Averaging):
    """The plain mean of the weights at every `every`-th step after the first part of training.

    Stochastic weight averaging ("Averaging Weights Leads to Wider Optima and Better
    Generalization", arXiv 1803.05407) without its learning rate, which is the schedule's, and
    without recomputing batch norm's statistics.

    Args:
        start: that part; 0.75 is ours.
        every, final: of `Averaging`.
    """

    def __init__(self, start: float = 0.75, every: int = 1, final: bool = False) -> None:
        super().__init__(get_swa_multi_avg_fn(), start, every, final)
