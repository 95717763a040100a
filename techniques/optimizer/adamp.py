"""AdamP."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from techniques.optimizer.gradients import with_gradients


class AdamP(torch.optim.Optimizer):
    """Adam that takes the radial part out of the updates of scale-invariant weights.

    A weight of two or more dimensions counts as scale-invariant when |cos(w, gradient)| <
    δ/√size, tried first channel by channel (all must pass) and then as a whole. Its update p then
    becomes p − (ŵ·p)·ŵ, and its weight decay, decoupled as in AdamW, is multiplied by `wd_ratio`.

    Args:
        params: parameters or groups of them.
        lr, betas, eps, weight_decay: as in AdamW; the code's defaults.
        delta: δ; 0.1.
        wd_ratio: 0.1.
        nesterov: whether the momentum is Nesterov's.

    Raises:
        ValueError: for a negative lr, eps or weight decay, or a beta outside [0, 1).

    Source: "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights",
    arXiv 2006.08217; https://github.com/clovaai/AdamP, `adamp/adamp.py`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
    ) -> None:
        for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
            if value < 0:
                raise ValueError(f"{name}: must not be negative, got {value}")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: two numbers in [0, 1), got {betas}")
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        defaults |= {"delta": delta, "wd_ratio": wd_ratio, "nesterov": nesterov}
        super().__init__(params, defaults)

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

    def _update(self, weight: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[weight], group["betas"]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = (
                torch.zeros_like(weight),
                torch.zeros_like(weight),
            )
        state["step"] += 1
        first, second = state["exp_avg"], state["exp_avg_sq"]
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        size = (second / (1 - beta2 ** state["step"])).sqrt().add_(group["eps"])
        direction = beta1 * first + (1 - beta1) * grad if group["nesterov"] else first
        update, decay = direction / size, group["weight_decay"]
        if weight.ndim > 1:
            update, invariant = project(weight, grad, update, group["delta"], group["eps"])
            decay *= group["wd_ratio"] if invariant else 1.0
        weight.mul_(1 - group["lr"] * decay)
        weight.add_(update, alpha=-group["lr"] / (1 - beta1 ** state["step"]))


def project(
    weight: Tensor, grad: Tensor, update: Tensor, delta: float, eps: float
) -> tuple[Tensor, bool]:
    """The update without its radial part where the weight looks scale-invariant, and whether."""
    for shape in ((weight.shape[0], -1), (1, -1)):
        w, g = weight.reshape(shape), grad.reshape(shape)
        cosine = F.cosine_similarity(g, w, dim=1, eps=eps).abs()
        if cosine.max() < delta / math.sqrt(w.shape[1]):
            unit = w / (w.norm(dim=1, keepdim=True) + eps)
            radial = (unit * update.reshape(shape)).sum(dim=1, keepdim=True)
            return update - (unit * radial).view_as(update), True
    return update, False
