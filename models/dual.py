"""Embeddings for contrastive losses: of images and their captions, or of two views of an image."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from models.block import Transformer
from models.layers import Factory, build_activation
from models.outputs import Outputs
from models.vit import PatchTransformer


class Dual(nn.Module):
    """An image transformer and, where the task has text, a text transformer, each with a head that
    projects to one space of embeddings.

    With text it has the shape of CLIP (arXiv 2103.00020), the text being read both ways and pooled
    by the mean over its tokens. Without text it has that of SimCLR (arXiv 2002.05709): the task
    stacks two views of each image in the batch. The temperature belongs to the loss.

    Args:
        in_channels, image_size: of the images, which are square.
        vocab_size, context_length: of the text; without them there is no text transformer.
        width, depth, heads: features per token, blocks, attention heads per block of each.
        embedding: features of an embedding.
        patch_size: side of a patch in pixels; default as in `models.vit.ViT`.
        dropout: on embeddings and on what each layer adds to the residual stream.
        activation, norm, attention, ffn, block, position, head: the slots; `head` projects.

    Returns, with text, `image_embeds` and `text_embeds` (batch, embedding), of length 1, and
    `image_hidden` (batch, width), the image's features before their projection; without, `hidden`
    (batch, width) and `classifier`, hence `logits` (batch, embedding), as projected.

    Raises:
        ValueError: for sizes that do not fit, or a batch without the text it should have.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        vocab_size: int | None = None,
        context_length: int | None = None,
        *,
        width: int,
        depth: int,
        heads: int,
        embedding: int,
        activation: Factory,
        norm: Factory,
        attention: Factory,
        ffn: Factory,
        block: Factory,
        position: Factory,
        head: Factory,
        patch_size: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if embedding < 1:
            raise ValueError(f"model.embedding: must be at least 1, got {embedding}")
        sizes: dict[str, Any] = {"width": width, "depth": depth, "heads": heads, "dropout": dropout}
        slots: dict[str, Any] = {
            "activation": activation,
            "norm": norm,
            "attention": attention,
            "ffn": ffn,
            "block": block,
            "position": position,
        }
        self.image = PatchTransformer(
            in_channels, image_size, patch_size=patch_size, **sizes, **slots
        )
        self.head = head(width, embedding)
        self.text = None
        if vocab_size is not None and context_length is not None:
            self.text = TextTransformer(vocab_size, context_length, **sizes, **slots)
            self.text_head = head(width, embedding)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Outputs:
        hidden = self.image(pixel_values)
        if self.text is None:
            return Outputs(hidden=hidden, classifier=self.head)
        if input_ids is None:
            raise ValueError("input_ids: the task has text, this batch has none")
        text = self.text_head(self.text(input_ids, attention_mask))
        return Outputs(
            image_embeds=F.normalize(self.head(hidden), dim=-1),
            text_embeds=F.normalize(text, dim=-1),
            image_hidden=hidden,
        )


class TextTransformer(nn.Module):
    """Token embedding, bidirectional transformer, mean over the tokens that are not padding:
    `(batch, length)` to `(batch, width)`. The rest is for `models.block.Transformer`."""

    def __init__(
        self, vocab_size: int, context_length: int, *, width: int, **transformer: Any
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)  # N(0, 1): positions are those of images
        self.transformer = Transformer(
            width=width, context_length=context_length, causal=False, **transformer
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.transformer(self.embedding(input_ids), attention_mask)
        if attention_mask is None:
            return x.mean(dim=1)
        kept = attention_mask[..., None].to(x.dtype)
        return (x * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)


class Projection(nn.Module):
    """SimCLR's projection head, two linear layers with an activation between:
    `(..., in_features) -> (..., out_features)`. For the slot `model.head`.

    Args:
        in_features, out_features: sizes; the hidden layer has `in_features`, as in the paper.
        activation: factory; the paper's ReLU by default.
    """

    def __init__(self, in_features: int, out_features: int, activation: Factory = nn.ReLU) -> None:
        super().__init__()
        self.hidden = nn.Linear(in_features, in_features)
        self.activation = build_activation(activation, in_features)
        self.out = nn.Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.activation(self.hidden(x)))
