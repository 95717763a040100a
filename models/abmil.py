"""Attention-based multiple-instance learning."""

import torch
from torch import Tensor, nn

from models.layers import Factory
from models.mlp import hidden_layers, input_size, the_one_given
from models.outputs import Outputs


class ABMIL(nn.Module):
    """Classifies bags of instances: `depth` hidden layers on each instance, their mean weighted by
    gated attention, a linear output.

    Of "Attention-based Deep Multiple Instance Learning", arXiv 1802.04712, with a multilayer
    perceptron for its convolutions; https://github.com/AMLab-Amsterdam/AttentionDeepMIL, `model.py`
    (`GatedAttention`).

    Args:
        in_features: numbers per instance; default: `in_channels`·`image_size`².
        out_features: outputs per bag; default: `num_classes`.
        in_channels, image_size, num_classes: for tasks on images.
        width, depth: features of a hidden layer, hidden layers; with 0 an instance is its input.
        heads: attentions, whose means are concatenated; 1 in the paper.
        attention_width: features of the attention's hidden layer; 128 in the authors' code.
        activation, norm, head: the slots.

    Takes `pixel_values` (batch, instances, channels, height, width) or `features` (batch,
    instances, in_features), and `attention_mask` (batch, instances), 0 at what only fills up a bag.

    Returns `hidden` (batch, heads·width) and `classifier`; `logits` (batch, out_features); and
    `attention` (batch, heads, instances), the weights, which sum to 1.

    Raises:
        ValueError: when the task gives neither form of a size, or a size is too small.
    """

    def __init__(
        self,
        in_features: int | None = None,
        out_features: int | None = None,
        in_channels: int | None = None,
        image_size: int | None = None,
        num_classes: int | None = None,
        *,
        width: int,
        depth: int,
        heads: int,
        attention_width: int,
        activation: Factory,
        norm: Factory,
        head: Factory,
    ) -> None:
        super().__init__()
        least = {"width": 1, "depth": 0, "heads": 1, "attention_width": 1}
        given = {"width": width, "depth": depth, "heads": heads, "attention_width": attention_width}
        for name, value in given.items():
            if value < least[name]:
                raise ValueError(f"model.{name}: must be at least {least[name]}, got {value}")
        outputs = out_features or num_classes
        if outputs is None:
            raise ValueError("out_features: ABMIL needs it or num_classes of the task")
        sizes = [input_size(in_features, in_channels, image_size)] + [width] * depth
        self.layers = hidden_layers(sizes, activation, norm)
        self.pool = GatedAttention(sizes[-1], attention_width, heads)
        self.head = head(heads * sizes[-1], outputs)

    def forward(
        self,
        features: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Outputs:
        x = the_one_given(features, pixel_values)
        hidden = self.layers(x.flatten(0, 1).flatten(1)).unflatten(0, x.shape[:2])
        weights = self.pool(hidden, attention_mask)
        pooled = (weights.to(hidden.dtype) @ hidden).flatten(1)
        return Outputs(hidden=pooled, classifier=self.head, attention=weights)


class GatedAttention(nn.Module):
    """Weights softmaxₖ wᵀ(tanh(V·hₖ) ⊙ σ(U·hₖ)) of a bag's instances, in at least float32.

    w has no bias, which the softmax would take back. `entropy` (batch, heads) is that of the last
    weights, in nats, for penalties and probes.

    Args:
        dim, width, heads: features of an instance and of the hidden layer, attentions.

    Shapes: (batch, instances, dim), and a mask (batch, instances), to (batch, heads, instances).
    """

    def __init__(self, dim: int, width: int, heads: int = 1) -> None:
        super().__init__()
        self.value, self.gate = nn.Linear(dim, width), nn.Linear(dim, width)
        self.score = nn.Linear(width, heads, bias=False)
        self.entropy: Tensor | None = None

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        scores = self.score(self.value(x).tanh() * self.gate(x).sigmoid()).transpose(1, 2)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if attention_mask is not None:
            # Not −∞, of which the entropy's gradient would be NaN.
            least = torch.finfo(scores.dtype).min / 4
            scores = scores.masked_fill(attention_mask[:, None] == 0, least)
        logs = scores.log_softmax(-1)
        weights = logs.exp()
        self.entropy = -(weights * logs).sum(-1)
        return weights
