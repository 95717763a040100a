"""Weights whose number of bits is learned."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from techniques.fake_quant import straight_through


def self_compressing_nets(
    model: nn.Module, *, bits: float = 2.0, exponent: float | None = -8.0, rate: float = 1.0
) -> None:
    """Reparametrise the weights of all linear and convolutional layers by `LearnedBits`.

    For the penalty and the step after training of the same name.

    Args:
        model: changed in place; biases and other parameters stay as they are.
        bits, exponent, rate: as for `LearnedBits`.

    Raises:
        ValueError: for what `LearnedBits` refuses, or a model without such layers.

    Source: "Self-Compressing Neural Networks", arXiv 2301.13142, as
    https://github.com/geohot/ai-notebooks, `mnist_self_compression.ipynb`, has it: formula, start
    and its 2 bits and exponent of −8. The authors' code could not be found.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    if not layers:
        raise ValueError("model: it has no linear or convolutional layer")
    for layer in layers:
        learned = LearnedBits(layer.weight.detach(), bits, exponent, rate)
        parametrize.register_parametrization(layer, "weight", learned)


class LearnedBits(nn.Module):
    """2^e·round(clip(2^−e·w, −2^(b−1), 2^(b−1) − 1)) of a weight (out, ...), with an exponent e and
    a number of bits b ≥ 0, both real, for each output channel. Rounding has the straight-through
    gradient; those of e and b are then exact, b's through the clipping. At b = 0 all is 0.

    b is max(0, its parameter): a channel that has come to 0 stays there.

    Args:
        weight: which it will reparametrise.
        bits: b at the start.
        exponent: e at the start; null is where the channel's largest |w| is 2^(e + b − 1).
        rate: b and e are this times their parameters, so that under an optimizer as Adam, whose
            step does not depend on the gradient's size, they learn as many times as fast as the
            weights. 1 as in the notebook, which trains for 20,000 steps.

    Raises:
        ValueError: for bits or a rate that are not positive.
    """

    rate: Tensor

    def __init__(self, weight: Tensor, bits: float, exponent: float | None, rate: float) -> None:
        super().__init__()
        for name, value in {"bits": bits, "rate": rate}.items():
            if not value > 0:
                raise ValueError(f"{name}: must be above 0, got {value}")
        largest = weight.abs().flatten(1).amax(1)
        start = torch.full_like(largest, exponent or 0.0)
        if exponent is None:
            start = largest.clamp(min=1e-30).log2() - (bits - 1)
        self.bits = nn.Parameter(torch.full_like(largest, bits) / rate)
        self.exponent = nn.Parameter(start / rate)
        self.register_buffer("rate", torch.tensor(rate, dtype=weight.dtype, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        scale, integers = self.scaled(weight)
        return scale * integers

    def scaled(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """2^e, (out, 1, ...), and the rounded numbers."""
        shape = (-1, *[1] * (weight.ndim - 1))
        scale = (2 ** (self.rate * self.exponent)).view(shape)
        half = (2 ** (self.depth() - 1)).view(shape)
        units = torch.minimum(torch.maximum(weight / scale, -half), half - 1)
        return scale, straight_through(units, units.round())

    def depth(self) -> Tensor:
        """b, (out,)."""
        return (self.rate * self.bits).relu()
