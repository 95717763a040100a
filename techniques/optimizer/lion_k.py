"""Lion-K."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from techniques.optimizer.gradients import with_gradients

KINDS = ("norm", "threshold", "huber")


class LionK(torch.optim.Optimizer):
    """Lion with the gradient of any convex K in the place of the sign. With g the gradient and m
    starting at 0:

        u ← β₁·m − (1 − β₁)·g,  m ← β₂·m − (1 − β₂)·g,  w ← w + lr·(∇K(u) − λ·w)

    Where it rests, w minimises f(w) + K*(λ·w)/λ, K* being the convex conjugate: weight decay and K
    are a constraint. From outside it w comes nearer by 1 − lr·λ each step at least, and from inside
    it stays there, while lr·λ ≤ 1. K is summed over the tensors, so that each has a constraint of
    its own; those without weight decay have none.

    With K(u) and ∇K(u) by `k`, and what w minimises:

        norm        ‖u‖ₚ               sign(u)·(|u|/‖u‖ₚ)^(p−1)   f, ‖w‖_q ≤ 1/λ, 1/p + 1/q = 1
        threshold   Σ max(|u| − e, 0)  sign(u)·[|u| > e]          f + e·‖w‖₁, ‖w‖_∞ ≤ 1/λ
        huber       Σ huber(u; e)/e    u/e, clipped to ±1         f + ½·e·λ·‖w‖², ‖w‖_∞ ≤ 1/λ

    The norm with p = 1 is Lion. That of a whole tensor shrinks with its size: p = 2 makes steps of
    length lr, p = 1 of lr·√size.

    Args:
        params: parameters or groups of them.
        lr, betas: Lion's defaults.
        weight_decay: λ, decoupled.
        k: one of those above.
        p: of the norm, at least 1 and finite.
        e: of `threshold` and `huber`, in units of the gradient.

    Raises:
        ValueError: for a negative lr, weight decay or e, a beta outside [0, 1), an unknown k, a p
            below 1 or infinite, or huber with e = 0.

    Source: "Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts", arXiv 2310.05898,
    as the authors restate it at https://www.cs.utexas.edu/~lqiang/lionk; Lion and its defaults:
    https://github.com/google/automl, `lion/lion_pytorch.py`. No code of the paper was found.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        k: str = "norm",
        p: float = 1.0,
        e: float = 0.0,
    ) -> None:
        for name, value in {"lr": lr, "weight_decay": weight_decay, "e": e}.items():
            if value < 0:
                raise ValueError(f"{name}: must not be negative, got {value}")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: two numbers in [0, 1), got {betas}")
        if k not in KINDS:
            raise ValueError(f"k: expected one of {', '.join(KINDS)}, got {k!r}")
        if not 1 <= p < float("inf"):
            raise ValueError(f"p: must be at least 1 and finite, got {p}")
        if k == "huber" and e == 0:
            raise ValueError("e: must be positive for huber")
        defaults = {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay}
        super().__init__(params, defaults | {"k": k, "p": p, "e": e})

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
            state["momentum"] = torch.zeros_like(weight)
        momentum = state["momentum"]
        update = slope(beta1 * momentum - (1 - beta1) * grad, group["k"], group["p"], group["e"])
        momentum.mul_(beta2).add_(grad, alpha=beta2 - 1)
        weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=group["lr"])


def slope(u: Tensor, k: str, p: float, e: float) -> Tensor:
    """∇K(u), of the smallest size where K has a kink."""
    if k == "huber":
        return (u / e).clamp(-1, 1)
    if k == "threshold":
        return u.sign() * (u.abs() > e)
    if p == 1:
        return u.sign()
    norm = u.abs().pow(p).sum().pow(1 / p)
    return u.sign() * (u.abs() / norm.clamp(min=torch.finfo(u.dtype).tiny)).pow(p - 1)
