"""Variance-preserving initialisation of group-rational layers."""

from typing import Any

import torch
from torch import nn

from techniques.activation.group_rational import GroupRational
from techniques.ffn.gr_kan import GroupRationalFeedForward

SAMPLES = 1 << 16


def variance_preserving(model: nn.Module, batch: dict[str, Any]) -> None:
    """Draw the weights after each group-rational function F from N(0, α / fan_in), α = 1 / E[F(x)²]
    for x ~ N(0, 1), so that a layer's output has the variance of its input.

    α is 1 for the identity and about 2.36 for GELU, the authors' constants; here it is computed
    from the function as it is. Biases start at 0. Every `GroupRationalFeedForward` is changed in
    place.

    Args:
        model: has at least one such layer.
        batch: not used.

    Raises:
        ValueError: when the model has none.

    Source: "Kolmogorov-Arnold Transformer", arXiv 2409.10594, and `katransformer.py` of
    https://github.com/Adamdad/kat. (There a later branch overwrites these weights with
    N(0, 0.02²); this is the initialisation of the paper.)
    """
    layers = [m for m in model.modules() if isinstance(m, GroupRationalFeedForward)]
    if not layers:
        raise ValueError("the model has no GroupRationalFeedForward layer")
    for layer in layers:
        for function, linear in ((layer.first, layer.up), (layer.second, layer.down)):
            std = (gain(function) / linear.in_features) ** 0.5
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)


@torch.no_grad()
def gain(function: GroupRational) -> float:
    """1 / E[F(x)²] for x ~ N(0, 1), averaged over the groups, by quantiles of the normal."""
    middle = (torch.arange(SAMPLES, dtype=torch.float64) + 0.5) / SAMPLES
    x = torch.special.ndtri(middle).float().to(function.numerator.device)
    values = function(x[:, None].expand(-1, function.groups))
    return 1 / values.double().square().mean().item()
