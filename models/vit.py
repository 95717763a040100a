"""A vision transformer."""

from typing import Any

import torch
from torch import Tensor, nn

from models.block import Transformer, init_linear
from models.layers import Factory
from models.outputs import Outputs

POOLS = ("class", "mean")


class ViT(nn.Module):
    """Patches as tokens of a bidirectional transformer ("An Image is Worth 16x16 Words",
    arXiv 2010.11929), pooled and classified.

    Args:
        in_channels, image_size: of the images, which are square.
        num_classes: classes to tell apart.
        width, depth, heads: features per token, blocks, attention heads per block.
        patch_size: side of a patch in pixels; default: the smallest that cuts the image into at
            most 8×8 patches (1 for 8×8 images, 4 for 32×32).
        pool: the paper's "class" token, or the "mean" over the patches.
        dropout: on embeddings and on what each layer adds to the residual stream.
        activation, norm, attention, ffn, block, position, head: the slots.

    Returns `hidden` (batch, width) and `classifier`; `logits` (batch, num_classes).

    Raises:
        ValueError: when `patch_size` does not divide `image_size`, or for an unknown `pool`.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        num_classes: int,
        *,
        width: int,
        depth: int,
        heads: int,
        activation: Factory,
        norm: Factory,
        attention: Factory,
        ffn: Factory,
        block: Factory,
        position: Factory,
        head: Factory,
        patch_size: int | None = None,
        pool: str = "class",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.features = PatchTransformer(
            in_channels,
            image_size,
            width=width,
            depth=depth,
            heads=heads,
            patch_size=patch_size,
            pool=pool,
            activation=activation,
            norm=norm,
            attention=attention,
            ffn=ffn,
            block=block,
            position=position,
            dropout=dropout,
        )
        self.head = head(width, num_classes)
        if isinstance(self.head, nn.Linear):
            init_linear(self.head, std=0.02)

    def forward(self, pixel_values: Tensor) -> Outputs:
        return Outputs(hidden=self.features(pixel_values), classifier=self.head)


class PatchTransformer(nn.Module):
    """`ViT` without its classifier: `(batch, in_channels, image_size, image_size)` to
    `(batch, width)`. `transformer` are the remaining arguments of `models.block.Transformer`."""

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        *,
        width: int,
        patch_size: int | None = None,
        pool: str = "class",
        **transformer: Any,
    ) -> None:
        super().__init__()
        if patch_size is None:
            patch_size = default_patch_size(image_size)
        if patch_size < 1 or image_size % patch_size:
            raise ValueError(
                f"model.patch_size: must divide the image size {image_size}, got {patch_size}"
            )
        if pool not in POOLS:
            raise ValueError(f"model.pool: one of {', '.join(POOLS)}, got '{pool}'")
        length = (image_size // patch_size) ** 2
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if pool == "class" else None
        self.patches = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        assert self.patches.bias is not None
        nn.init.zeros_(self.patches.bias)  # the same vector in every token would hide the rest
        self.transformer = Transformer(
            width=width,
            context_length=length + (pool == "class"),
            causal=False,
            **transformer,
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patches(pixel_values).flatten(2).transpose(1, 2)
        if self.class_token is None:
            return self.transformer(x).mean(dim=1)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
        return self.transformer(x)[:, 0]


def default_patch_size(image_size: int) -> int:
    """The smallest divisor of `image_size` that leaves at most 8 patches a side."""
    return next(p for p in range(1, image_size + 1) if image_size % p == 0 and image_size <= 8 * p)
