"""ZerO initialisation."""

import math
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def zero_init_hadamard(model: nn.Module, batch: dict[str, Any]) -> None:
    """Start every linear and convolutional layer from zeros and ones, up to a factor; no
    randomness. Biases start at 0.

    A matrix (out, in) with out ≤ in is the partial identity. Else it is I·H·I, with H the Hadamard
    matrix of size 2ᵐ = 2^⌈log₂ out⌉ times 2^(−m/2), which keeps the gradient from being stuck in
    the input's dimension. A convolution has this at its centre and zeros around it.

    Args:
        model: changed in place.
        batch: not used.

    Raises:
        ValueError: for a model without such layers.

    Source: "ZerO Initialization: Initializing Neural Networks with only Zeros and Ones", arXiv
    2110.12661; https://github.com/jiaweizzhao/ZerO-initialization, `example_mnist.ipynb`, which
    covers fully connected networks. What the paper does beside this to residual branches is not in
    that code and not done here.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)]
    if not layers:
        raise ValueError("the model has no linear or convolutional layer")
    for layer in layers:
        weight = layer.weight
        start = matrix(weight.shape[0], weight.shape[1]).to(weight)
        if isinstance(layer, nn.Linear):
            weight.copy_(start)
        else:
            centre = tuple(size // 2 for size in weight.shape[2:])
            weight.zero_()
            weight[(slice(None), slice(None), *centre)] = start
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def matrix(rows: int, columns: int) -> Tensor:
    """The starting matrix of a layer from `columns` to `rows` features, float32."""
    if rows <= columns:
        return torch.eye(rows, columns)
    order = math.ceil(math.log2(rows))
    hadamard = torch.ones(1, 1)
    for _ in range(order):  # Sylvester's construction
        top = torch.cat([hadamard, hadamard], dim=1)
        hadamard = torch.cat([top, torch.cat([hadamard, -hadamard], dim=1)])
    return hadamard[:rows, :columns] * 2 ** (-order / 2)
