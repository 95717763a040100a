"""A decoder-only language model."""

from torch import Tensor, nn

from models.block import Transformer, init_linear
from models.layers import Factory
from models.outputs import Outputs


class GPT(nn.Module):
    """Token embedding, causal transformer, classifier over the vocabulary.

    Args:
        vocab_size: tokens in the vocabulary.
        context_length: longest sequence, in tokens.
        width, depth, heads: features per token, blocks, attention heads per block.
        dropout: on embeddings and on what each layer adds to the residual stream.
        tie_embeddings: use the token embedding's weights as the classifier's.
        activation, norm, attention, ffn, block, position, head: the slots.

    Returns `hidden` (batch, length, width) and `classifier`; `logits` (batch, length, vocab_size).
    """

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
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
        dropout: float = 0.0,
        tie_embeddings: bool = False,
    ) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"model.width: must be at least 1, got {width}")
        self.context_length = context_length
        self.embedding = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.transformer = Transformer(
            width,
            depth,
            heads,
            context_length,
            causal=True,
            block=block,
            attention=attention,
            ffn=ffn,
            norm=norm,
            activation=activation,
            position=position,
            dropout=dropout,
        )
        self.head = head(width, vocab_size)
        if isinstance(self.head, nn.Linear):
            init_linear(self.head, std=0.02)
        if tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Outputs:
        if input_ids.shape[1] > self.context_length:
            raise ValueError(
                f"input_ids: at most {self.context_length} tokens, got {input_ids.shape[1]}"
            )
        hidden = self.transformer(self.embedding(input_ids), attention_mask)
        return Outputs(hidden=hidden, classifier=self.head)
