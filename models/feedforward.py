"""Feed-forward layers, for the `model.ffn` slot: factories `(dim, activation) -> nn.Module`."""

from torch import Tensor, nn

from kernels.gated import gated, named
from models.layers import Factory, build_activation


class FeedForward(nn.Module):
    """Two linear layers with an activation between: `(..., dim) -> (..., dim)`.

    Args:
        dim: features per token.
        activation: factory of the activation between the two layers.
        expansion: hidden features per input feature; 4 as in "Attention Is All You Need".
    """

    def __init__(self, dim: int, activation: Factory, *, expansion: float = 4.0) -> None:
        super().__init__()
        hidden = int(dim * expansion)
        self.up = nn.Linear(dim, hidden)
        self.activation = build_activation(activation, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class GatedFeedForward(nn.Module):
    """Gated feed-forward (GLU variants, arXiv 2002.05202): `down(activation(gate(x)) · up(x))`.

    Args:
        dim: features per token.
        activation: factory of the activation of the gate.
        expansion: hidden features per input feature; 8/3 keeps the parameter count of
            `FeedForward` at 4.
        fused: activation and product in one pass that keeps less for the backward
            (`kernels.gated`); not for activations that are random or look at other tokens.
    """

    def __init__(
        self, dim: int, activation: Factory, *, expansion: float = 8 / 3, fused: bool = False
    ) -> None:
        super().__init__()
        hidden = int(dim * expansion)
        self.fused = fused
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.activation = build_activation(activation, hidden)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate(x), self.up(x)
        if not self.fused:
            return self.down(self.activation(gate) * up)
        known = named(self.activation)
        if known is None:
            return self.down(gated(gate, up, self.activation))
        name, parameters = known
        return self.down(gated(gate, up, name, **parameters))
