"""MoMo and MoMo-Adam."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from techniques.optimizer.gradients import with_gradients


class Momo(torch.optim.Optimizer):
    """Momentum SGD whose step size follows a model of the loss.

    With d the average gradient, f̄ the average loss and γ the average of gradient·w, each decayed
    by β from their first values, and λ the weight decay:

        τ = min(lr, max((1 + lr·λ)(f̄ − lb) + d·w − (1 + lr·λ)γ, 0) / ‖d‖²)
        w ← (w − τ·d) / (1 + lr·λ)

    Args:
        params: parameters or groups of them.
        lr: largest step size; 1 as in the code.
        beta: β; 0.9.
        lb: lower bound of the loss; 0.
        weight_decay: λ, proximal.

    `step` takes the loss at the gradient's point. The sums run over all groups.

    Raises:
        ValueError: for a negative lr or weight decay, or a β outside [0, 1).

    Source: "MoMo: Momentum Models for Adaptive Learning Rates", arXiv 2305.07583;
    https://github.com/fabian-sp/MoMo, `momo/momo.py` (without bias correction and with the bound
    given, its defaults).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        beta: float = 0.9,
        lb: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        _check(lr, weight_decay, (beta,))
        # Scalars of the whole optimizer live in the groups, which `state_dict` keeps.
        defaults = {"lr": lr, "beta": beta, "lb": lb, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"loss_average": None})

    @torch.no_grad()
    def step(self, *, loss: Tensor) -> None:  # type: ignore[override]
        """Take one step, given the loss that was differentiated."""
        dot = inner = norm = torch.zeros((), device=loss.device)
        for group, weight, grad in with_gradients(self.param_groups):
            state, beta = self.state[weight], group["beta"]
            product = (weight * grad).sum()
            if not state:
                state["grad_average"], state["product"] = grad.clone(), product.clone()
            state["grad_average"].lerp_(grad, 1 - beta)
            state["product"].lerp_(product, 1 - beta)
            dot = dot + (weight * state["grad_average"]).sum()
            inner = inner + state["product"]
            norm = norm + state["grad_average"].square().sum()
        for group in self.param_groups:
            value, beta = loss.item(), group["beta"]
            before = value if group["loss_average"] is None else group["loss_average"]
            group["loss_average"] = beta * before + (1 - beta) * value
            decay = 1 + group["lr"] * group["weight_decay"]
            model = decay * (group["loss_average"] - group["lb"] - inner.item()) + dot.item()
            size = min(group["lr"], max(model, 0.0) / max(norm.item(), 1e-38))
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.add_(self.state[weight]["grad_average"], alpha=-size)
                    weight.div_(decay)


class MomoAdam(torch.optim.Optimizer):
    """MoMo with Adam's directions: ‖d‖² becomes Σ d²/D, with D = √(v/(1 − β₂ᵗ)) + eps, the update
    τ·d/D, and averages start at 0, corrected by ρ = 1 − β₁ᵗ:

        τ = min(lr/ρ, max((1 + lr·λ)(f̄ − ρ·lb) + d·w − (1 + lr·λ)γ, 0) / Σ d²/D)

    Args:
        params: parameters or groups of them.
        lr: largest step size; 0.01 as in the code.
        betas, eps: Adam's.
        lb: lower bound of the loss; 0.
        weight_decay: λ, proximal.

    `step` takes the loss at the gradient's point. The sums run over all groups.

    Raises:
        ValueError: for a negative lr or weight decay, or a beta outside [0, 1).

    Source: as `Momo`, `momo/momo_adam.py`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        lb: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        _check(lr, weight_decay, betas)
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "lb": lb}
        defaults |= {"weight_decay": weight_decay, "loss_average": 0.0, "steps": 0}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, *, loss: Tensor) -> None:  # type: ignore[override]
        """Take one step, given the loss that was differentiated."""
        dot = inner = norm = torch.zeros((), device=loss.device)
        for group in self.param_groups:
            group["steps"] += 1
        for group, weight, grad in with_gradients(self.param_groups):
            state, (beta1, beta2) = self.state[weight], group["betas"]
            if not state:
                state["exp_avg"] = torch.zeros_like(weight)
                state["exp_avg_sq"] = torch.zeros_like(weight)
                state["product"] = weight.new_zeros(())
            state["exp_avg"].lerp_(grad, 1 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            state["product"].lerp_((weight * grad).sum(), 1 - beta1)
            dot = dot + (weight * state["exp_avg"]).sum()
            inner = inner + state["product"]
            norm = norm + (state["exp_avg"].square() / _size(state, group)).sum()
        for group in self.param_groups:
            beta1 = group["betas"][0]
            group["loss_average"] = beta1 * group["loss_average"] + (1 - beta1) * loss.item()
            correction = 1 - beta1 ** group["steps"]
            decay = 1 + group["lr"] * group["weight_decay"]
            bound = group["loss_average"] - correction * group["lb"]
            model = decay * (bound - inner.item()) + dot.item()
            size = min(group["lr"] / correction, max(model, 0.0) / max(norm.item(), 1e-38))
            for weight in group["params"]:
                if weight.grad is not None:
                    state = self.state[weight]
                    weight.addcdiv_(state["exp_avg"], _size(state, group), value=-size)
                    weight.div_(decay)


def _size(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Adam's preconditioner D."""
    correction = 1 - group["betas"][1] ** group["steps"]
    return (state["exp_avg_sq"] / correction).sqrt().add_(group["eps"])


def _check(lr: float, weight_decay: float, betas: tuple[float, ...]) -> None:
    for name, value in {"lr": lr, "weight_decay": weight_decay}.items():
        if value < 0:
            raise ValueError(f"{name}: must not be negative, got {value}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas: must be in [0, 1), got {betas}")
