"""Transformer blocks, for the `model.block` slot, and the stack of them every transformer uses."""

from typing import Any

from torch import Tensor, nn

from models.layers import Factory


class PreNormBlock(nn.Module):
    """`x + attention(norm(x))`, then `x + ffn(norm(x))`: `(batch, length, dim)` in and out."""

    def __init__(
        self,
        dim: int,
        heads: int,
        layer: int,
        *,
        attention: Factory,
        ffn: Factory,
        norm: Factory,
        activation: Factory,
        causal: bool,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention_norm = norm(dim)
        self.attention = attention(dim, heads, layer, causal=causal)
        self.ffn_norm = norm(dim)
        self.ffn = ffn(dim, activation)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, position: nn.Module | None = None
    ) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), attention_mask, position))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class Transformer(nn.Module):
    """`depth` blocks and a final norm: `(batch, length, width)` in and out.

    Weights start as in GPT-2: N(0, 0.02²), biases at zero, and the two projections that write to
    the residual stream scaled down by √(2·depth).
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        context_length: int,
        *,
        causal: bool,
        block: Factory,
        attention: Factory,
        ffn: Factory,
        norm: Factory,
        activation: Factory,
        position: Factory,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in {"width": width, "depth": depth, "heads": heads}.items():
            if value < 1:
                raise ValueError(f"model.{name}: must be at least 1, got {value}")
        self.position: Any = position(width, heads, context_length)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            block(
                width,
                heads,
                layer,
                attention=attention,
                ffn=ffn,
                norm=norm,
                activation=activation,
                causal=causal,
                dropout=dropout,
            )
            for layer in range(depth)
        )
        self.norm = norm(width)
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear):
                writes_residual = name.endswith(("attention.out", "ffn.down"))
                init_linear(module, std=0.02 / (2 * depth) ** 0.5 if writes_residual else 0.02)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if hasattr(self.position, "embed"):
            x = self.position.embed(x)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, attention_mask, self.position)
        return self.norm(x)


def init_linear(module: nn.Linear, std: float) -> None:
    """Draw the weights from N(0, std²) and zero the bias."""
    nn.init.normal_(module.weight, std=std)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
