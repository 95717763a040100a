"""The definitions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.golu.reference import golu

DEFAULTS: dict[str, dict[str, float]] = {
    **{name: {} for name in ("identity", "sigmoid", "relu", "squared_relu", "silu", "gelu")},
    **{name: {} for name in ("gelu_tanh", "mish", "softplus", "tanh")},
    "leaky_relu": {"negative_slope": 0.01},
    "elu": {"alpha": 1.0},
    "golu": {"alpha": 1.0, "beta": 1.0, "gamma": 1.0},
}
"""The activations by name, and their parameters."""

_FUNCTIONS = {
    "identity": lambda x: x,
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
    "squared_relu": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "mish": F.mish,
    "softplus": F.softplus,
    "tanh": torch.tanh,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "golu": golu,
}


def activate(x: Tensor, name: str, parameters: dict[str, float]) -> Tensor:
    """The activation of `x`, in at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return _FUNCTIONS[name](wide, **parameters)


def gated(gate: Tensor, up: Tensor, name: str, parameters: dict[str, float]) -> Tensor:
    """activation(gate)·up."""
    return (activate(gate, name, parameters) * up).to(up.dtype)
