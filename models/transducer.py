"""A transducer: an encoder of frames, a predictor of symbols, and a joiner of the two."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.block import Transformer, init_linear
from models.layers import Factory, build_activation
from models.outputs import Outputs


class Transducer(nn.Module):
    """RNN-T (arXiv 1211.3711) with a transformer as encoder and a predictor without a state.

    A convolution over three frames, then a bidirectional transformer. The predictor sees the last
    two symbols, as icefall's; the joiner is `head(tanh(encoder + predictor))`.

    Args:
        vocab_size: classes: the symbols and, as class 0, the blank.
        frames: of the longest input.
        frame_features: numbers in a frame.
        width, depth, heads: features, blocks, attention heads per block.
        dropout: on the frames and on what each layer adds to the residual stream.
        simple_joiner: return also `am` and `lm`, logits of the encoder and of the predictor alone,
            whose sum is pruned RNN-T's first joiner.
        activation, norm, attention, ffn, block, position, head: the slots.

    Returns `encoder` (batch, frames, width), `predictor` (batch, symbols + 1, width), which the
    module `joiner` makes logits of where their shapes broadcast, and the module `prediction`, which
    makes predictor states of the last symbols (..., 2); `am` (batch, frames, classes) and `lm`
    (batch, symbols + 1, classes).
    """

    def __init__(
        self,
        vocab_size: int,
        frames: int,
        frame_features: int,
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
        simple_joiner: bool = False,
    ) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"model.width: must be at least 1, got {width}")
        self.frames = frames
        self.convolution = nn.Conv1d(frame_features, width, 3, padding=1)
        self.activation = build_activation(activation, width)
        self.transformer = Transformer(
            width,
            depth,
            heads,
            frames,
            causal=False,
            block=block,
            attention=attention,
            ffn=ffn,
            norm=norm,
            activation=activation,
            position=position,
            dropout=dropout,
        )
        self.projection = nn.Linear(width, width)
        self.prediction = Predictor(vocab_size, width)
        self.joiner = Joiner(head(width, vocab_size))
        self.simple_am = nn.Linear(width, vocab_size) if simple_joiner else None
        self.simple_lm = nn.Linear(width, vocab_size) if simple_joiner else None

    def forward(self, input_features: Tensor, attention_mask: Tensor, labels: Tensor) -> Outputs:
        if input_features.shape[1] > self.frames:
            raise ValueError(
                f"input_features: at most {self.frames} frames, got {input_features.shape[1]}"
            )
        x = self.activation(self.convolution(input_features.transpose(1, 2)).transpose(1, 2))
        hidden = self.transformer(x, attention_mask)
        predictor = self.prediction(histories(labels, self.prediction.context))
        outputs = Outputs(
            encoder=self.projection(hidden),
            predictor=predictor,
            joiner=self.joiner,
            prediction=self.prediction,
        )
        if self.simple_am is not None and self.simple_lm is not None:
            outputs["am"], outputs["lm"] = self.simple_am(hidden), self.simple_lm(predictor)
        return outputs


class Predictor(nn.Module):
    """States of the last `context` symbols: (..., context) to (..., width)."""

    def __init__(self, vocab_size: int, width: int, context: int = 2) -> None:
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(vocab_size, width)
        self.mix = nn.Linear(context * width, width)

    def forward(self, symbols: Tensor) -> Tensor:
        return self.mix(self.embedding(symbols).flatten(-2))


class Joiner(nn.Module):
    """`head(tanh(encoder + predictor))`."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        if isinstance(head, nn.Linear):
            init_linear(head, std=0.02)

    def forward(self, encoder: Tensor, predictor: Tensor) -> Tensor:
        return self.head((encoder + predictor).tanh())


def histories(labels: Tensor, context: int) -> Tensor:
    """The last symbols after 0, 1, ... of them, (batch, symbols + 1, context); 0, the blank, before
    the first and in place of −100."""
    return F.pad(labels.clamp(min=0), (context, 0)).unfold(1, context, 1)
