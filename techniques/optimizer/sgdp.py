"""SGDP."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from techniques.optimizer.adamp import project
from techniques.optimizer.gradients import with_gradients


class SGDP(torch.optim.Optimizer):
    """SGD with momentum that takes the radial part out of the updates of scale-invariant weights.

    Which weights those are, and what becomes of their update and weight decay, is as in `AdamP`.
    The momentum is d ← μ·d + (1 − dampening)·gradient. The weight decay is decoupled: weights are
    multiplied by 1 − lr·weight_decay/(1 − μ), which is as strong as SGD's in the long run.

    Args:
        params: parameters or groups of them.
        lr, momentum, dampening, weight_decay, nesterov: as in `torch.optim.SGD`.
        eps: of the cosine; 1e-8.
        delta: δ; 0.1.
        wd_ratio: 0.1.

    Raises:
        ValueError: for a negative lr or weight decay, or a momentum outside [0, 1).

    Source: "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights",
    arXiv 2006.08217; https://github.com/clovaai/AdamP, `adamp/sgdp.py`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
    ) -> None:
        for name, value in {"lr": lr, "weight_decay": weight_decay}.items():
            if value < 0:
                raise ValueError(f"{name}: must not be negative, got {value}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum: must be in [0, 1), got {momentum}")
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening}
        defaults |= {"weight_decay": weight_decay, "nesterov": nesterov, "eps": eps}
        super().__init__(params, defaults | {"delta": delta, "wd_ratio": wd_ratio})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step."""
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        for group, weight, grad in with_gradients(self.param_groups):
            self._update(weight, grad, group)
        return value

    def _update(self, weight: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        state, momentum = self.state[weight], group["momentum"]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        update = state["momentum"].mul_(momentum).add_(grad, alpha=1 - group["dampening"])
        if group["nesterov"]:
            update = grad + momentum * update
        decay = group["weight_decay"] / (1 - momentum)
        if weight.ndim > 1:
            update, invariant = project(weight, grad, update, group["delta"], group["eps"])
            decay *= group["wd_ratio"] if invariant else 1.0
        weight.mul_(1 - group["lr"] * decay).add_(update, alpha=-group["lr"])
