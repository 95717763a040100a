"""Every activation with its derivative, and what it makes of a standard normal input."""

import math
from collections.abc import Callable

import torch
from torch import nn

from study.gallery import Curve
from techniques.activation.activation_zoo import ZOO, ActivationZoo
from training.components import factory
from training.configs import card, options, overlay

REACH = 4.0
"""Activations are drawn from minus this to this."""
CHANNELS = 8
"""Given to activations that have coefficients by channel; the first channel is drawn."""
CAPTION = (
    "blue: activation, orange: its derivative, x from -4 to 4, y from -2 to 4; "
    "mean and variance of the output for N(0, 1)"
)


def activations() -> dict[str, Callable[[], nn.Module]]:
    """Makers of every technique of the slot `model.activation`, and of the rest of the zoo."""
    found: dict[str, Callable[[], nn.Module]] = {}
    for name in options("technique"):
        node = overlay(name).get("model", {}).get("activation")
        if card(name)["slot"] == "model.activation" and name != "activation_zoo":
            found[name] = _maker(node)
    for name in ZOO:
        found.setdefault(name, lambda name=name: ActivationZoo(name))
    return dict(sorted(found.items()))


def _maker(node: dict) -> Callable[[], nn.Module]:
    from models.layers import build_activation

    return lambda: build_activation(factory(node, "model.activation"), CHANNELS)


def measure_all() -> list[Curve]:
    """`measure` of every activation; those that start at random start from seed 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [measure(name, make()) for name, make in activations().items()]


def measure(name: str, made: nn.Module) -> Curve:
    """Values, slopes and moments of an activation, in float64.

    Moments are integrals against the normal density from −10 to 10 by the trapezoid rule, which a
    kink does not hurt.
    """
    made = made.double().eval()
    x = torch.linspace(-REACH, REACH, 401, dtype=torch.float64)
    y, slope = _evaluate(made, x)
    wide = torch.linspace(-10, 10, 20_001, dtype=torch.float64)
    density = torch.exp(-wide.square() / 2) / math.sqrt(2 * math.pi)
    values, _ = _evaluate(made, wide)
    mean = torch.trapezoid(values * density, wide)
    variance = torch.trapezoid((values - mean).square() * density, wide)
    moments = {"mean": mean, "variance": variance}
    numbers = {key: round(moment.item(), 6) + 0.0 for key, moment in moments.items()}  # no -0.0
    about = f"mean {numbers['mean']:.2f} var {numbers['variance']:.2f}"
    return Curve(name, x.numpy(), y.numpy(), slope.numpy(), -2.0, 4.0, numbers, about)


def _evaluate(made: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = x[:, None].expand(-1, CHANNELS).clone().requires_grad_()
    outputs = made(inputs)
    (slopes,) = torch.autograd.grad(outputs.sum(), inputs)
    return outputs.detach()[:, 0], slopes[:, 0]
