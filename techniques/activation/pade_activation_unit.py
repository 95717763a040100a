"""Padé activation units."""

import torch
from torch import Tensor, nn

LEAKY_RELU = (
    (3.35583603e-02, 5.05000375e-01, 1.65343934e00, 2.01001052e00, 9.31901999e-01, 1.52424124e-01),
    (3.30847488e-06, 3.98021568e00, 5.12471206e-07, 3.01830109e-01),
)
"""The authors' fit of LeakyReLU: a₀..a₅ and b₁..b₄ (`pade_optimized_leakyrelu`)."""


class PadeActivationUnit(nn.Module):
    """A learned rational function, elementwise, one set of coefficients a layer, any shape:

        f(x) = (a₀ + a₁x + ... + a₅x⁵) / (1 + |b₁x + ... + b₄x⁴|)

    the paper's "safe" unit, whose denominator has no zero. (The authors' later code has an absolute
    value around each term; at the start, where b₁ and b₃ are near 0, both are the same.) Computed
    in float32 or wider.

    Args:
        numerator: a₀ first; default the authors' fit of LeakyReLU, of degree 5.
        denominator: b₁ first; likewise, of degree 4.

    Raises:
        ValueError: without a coefficient.

    Source: "Padé Activation Units", arXiv 1907.06732; https://github.com/ml-research/pau,
    `pau/cuda/python_imp/Pade.py`.
    """

    def __init__(
        self,
        numerator: tuple[float, ...] = LEAKY_RELU[0],
        denominator: tuple[float, ...] = LEAKY_RELU[1],
    ) -> None:
        super().__init__()
        for name, value in {"numerator": numerator, "denominator": denominator}.items():
            if not len(value):
                raise ValueError(f"{name}: needs at least one coefficient")
        self.numerator = nn.Parameter(torch.tensor(tuple(numerator)))
        self.denominator = nn.Parameter(torch.tensor(tuple(denominator)))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        above, below = horner(wide, self.numerator), wide * horner(wide, self.denominator)
        return (above / (1 + below.abs())).to(x.dtype)


def horner(x: Tensor, coefficients: Tensor) -> Tensor:
    """c₀ + c₁x + c₂x² + ..., elementwise."""
    value = torch.zeros_like(x)
    for coefficient in coefficients.to(x.dtype).flip(0):
        value = value * x + coefficient
    return value
