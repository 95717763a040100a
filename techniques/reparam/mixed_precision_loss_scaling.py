"""Activations in half precision, and their gradients."""

from typing import Any

import torch
from torch import Tensor, nn


def half_activations(model: nn.Module) -> None:
    """Round what every module of a model returns to float16, and the gradient of it on its way
    back; the dtype stays. What is below 2⁻²⁵ becomes 0, what is above 65,519 infinite.

    Within a module numbers are as they were, so that a product is rounded once, after its sum in
    float32. Outputs that are not a tensor are left alone. A module whose attribute `exact` is true
    does not round.

    Args:
        model: changed in place.

    Source: "Mixed Precision Training", arXiv 1710.03740, section 3.
    """
    for module in model.modules():
        module.exact = False  # type: ignore[assignment]
        module.register_forward_hook(_rounded)


def _rounded(module: nn.Module, inputs: Any, output: Any) -> Tensor | None:
    if module.exact or not isinstance(output, Tensor) or not output.is_floating_point():
        return None
    return Half.apply(output)  # type: ignore[return-value]


class Half(torch.autograd.Function):
    """x in float16, in x's dtype; so is the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.half().to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].half().to(grads[0].dtype)
