"""Mish."""

import torch.nn.functional as F
from torch import Tensor, nn


class Mish(nn.Module):
    """Mish(x) = x · tanh(softplus(x)), elementwise, any shape: smooth, unbounded above, bounded
    below by about −0.31, not monotonic. PyTorch's own implementation.

    Source: "Mish: A Self Regularized Non-Monotonic Activation Function", arXiv 1908.08681.
    """

    elementwise: tuple[str, dict[str, float]] = ("mish", {})
    """Its name and parameters among `kernels.gated`'s activations."""

    def forward(self, x: Tensor) -> Tensor:
        return F.mish(x)
