"""The group-rational Kolmogorov-Arnold feed-forward layer."""

from torch import Tensor, nn

from models.layers import Factory
from techniques.activation.group_rational import GroupRational


class GroupRationalFeedForward(nn.Module):
    """down(F₂(up(F₁(x)))): `(..., dim) -> (..., dim)`, with F₁ starting as the identity and F₂ as
    `start`, both `GroupRational`. The initialisation `techniques.init.gr_kan` belongs to it.

    Args:
        dim: features per token; `groups` must divide it.
        activation: not used, as the layer's activations are its own.
        expansion: hidden features per input feature.
        groups: of channels that share coefficients; 8 as in the paper.
        start: of F₂; `"gelu"` as in the code, whose published models are trained from `"swish"`.

    Source: "Kolmogorov-Arnold Transformer", arXiv 2409.10594; https://github.com/Adamdad/kat,
    `katransformer.py` (class `KAN`).
    """

    def __init__(
        self,
        dim: int,
        activation: Factory,
        *,
        expansion: float = 4.0,
        groups: int = 8,
        start: str = "gelu",
    ) -> None:
        super().__init__()
        hidden = int(dim * expansion)
        self.first = GroupRational(dim, groups, "identity")
        self.up = nn.Linear(dim, hidden)
        self.second = GroupRational(hidden, groups, start)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.second(self.up(self.first(x))))
