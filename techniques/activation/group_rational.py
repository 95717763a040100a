"""The group-rational activation of the Kolmogorov-Arnold Transformer."""

import torch
from torch import Tensor, nn

from kernels.group_rational import group_rational

COEFFICIENTS = {
    "identity": ((0.0, 1.0, 0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0)),
    "gelu": (
        (-0.00124236, 0.50804971, 0.41586363, 0.13022719, 0.0243559, 0.00290284),
        (-0.06675016, 0.17927646, 0.03746683, 1.65616109e-10),
    ),
    "swish": (
        (3.05487974e-07, 0.50000079, 0.24999783, 0.05326627, 0.00580303, 0.00027520),
        (-4.11155496e-06, 0.10652899, -1.26900074e-06, 0.00055023),
    ),
}
"""The authors' fits of the functions an activation can start as: a₀..a₅ and b₁..b₄."""


class GroupRational(nn.Module):
    """A learned rational function by group of channels: `(..., channels)` to the same.

        F(x) = (a₀ + a₁x + ... + a₅x⁵) / (1 + |b₁x| + ... + |b₄x⁴|)

    The numerator is shared by all groups and the denominator belongs to each, as in the authors'
    code. (The paper's formula has one absolute value around the denominator's sum, the code one
    around each term. The start as GELU is therefore the code's `gelu_old`, which was fitted to its
    own form; its newer `gelu` was fitted to the paper's, and is off by up to 1.5 on [−3, 3] here.)

    Args:
        channels: features; `groups` must divide them.
        groups: of consecutive channels; 8 as in the paper.
        start: function it starts as: `"gelu"`, `"swish"` or `"identity"`.

    Raises:
        ValueError: for another `start`, or `groups` that do not divide `channels`.

    Source: "Kolmogorov-Arnold Transformer", arXiv 2409.10594;
    https://github.com/Adamdad/rational_kat_cu, `kat_rational/kat_1dgroup.py` and `init.json`.
    """

    def __init__(self, channels: int, groups: int = 8, start: str = "gelu") -> None:
        super().__init__()
        if start not in COEFFICIENTS:
            raise ValueError(f"start: one of {', '.join(COEFFICIENTS)}, got {start!r}")
        if groups < 1 or channels % groups:
            raise ValueError(f"groups: must divide {channels} channels, got {groups}")
        above, below = COEFFICIENTS[start]
        self.groups, self.start = groups, start
        self.numerator = nn.Parameter(torch.tensor([above]))
        self.denominator = nn.Parameter(torch.tensor([below]).repeat(groups, 1))

    def forward(self, x: Tensor) -> Tensor:
        return group_rational(x, self.numerator.expand(self.groups, -1), self.denominator)

    def extra_repr(self) -> str:
        return f"groups={self.groups}, start={self.start!r}"
