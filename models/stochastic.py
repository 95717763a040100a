"""A multilayer perceptron whose outputs depend on noise: an ensemble from one network."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Factory, build_activation
from models.mlp import input_size, the_one_given
from models.outputs import Outputs


class StochasticMLP(nn.Module):
    """`depth` hidden layers (linear, conditional layer norm, activation) and a linear output, one
    for each member of an ensemble. Members differ in their noise alone and are exchangeable.

    A member's noise is embedded by a perceptron of two layers and a layer norm; of that each hidden
    layer's norm makes scales and shifts, as AIFS-CRPS has it.

    Takes `noise` (batch, members, noise_features) and whichever the batch has of `features` (batch,
    in_features), `pixel_values` (batch, channels, height, width) and `past_values` (batch, length,
    channels).

    Args:
        in_features: numbers per sample; default: `in_channels`·`image_size`².
        out_features: outputs per sample and member; default: `num_classes`.
        in_channels, image_size, num_classes: for tasks on images.
        noise_features: numbers of noise per member, of the task.
        width, depth: features of a hidden layer, hidden layers (at least 1).
        noise_width: hidden features of the noise's embedding; 32, anemoi's `noise_mlp_hidden_dim`.
        zero_init: whether scales and shifts start without the noise, so that members are alike;
            true, as in anemoi.
        activation, head: the slots.

    Returns `hidden` (batch, members, width) and `classifier`; `logits` (batch, members,
    out_features).

    Raises:
        ValueError: when the task has no noise, or gives neither form of a size, or a size is too
            small.

    Source: https://github.com/ecmwf/anemoi-core, `models/src/anemoi/models/layers/ensemble.py`
    (`NoiseConditioning`), `normalization.py` (`ConditionalLayerNorm`) and
    `training/src/anemoi/training/config/model/transformer_ens.yaml`.
    """

    def __init__(
        self,
        in_features: int | None = None,
        out_features: int | None = None,
        in_channels: int | None = None,
        image_size: int | None = None,
        num_classes: int | None = None,
        noise_features: int | None = None,
        *,
        width: int,
        depth: int,
        noise_width: int,
        zero_init: bool,
        activation: Factory,
        head: Factory,
    ) -> None:
        super().__init__()
        if noise_features is None:
            raise ValueError(
                "noise_features: the task has no noise for a stochastic model; "
                "task=series has, with task.members=4"
            )
        if width < 1 or depth < 1 or noise_width < 1:
            raise ValueError(
                "model.width, model.depth, model.noise_width: must be at least 1, "
                f"got {width}, {depth} and {noise_width}"
            )
        outputs = out_features or num_classes
        if outputs is None:
            raise ValueError("out_features: the model needs it or num_classes of the task")
        self.embed = nn.Sequential(
            nn.Linear(noise_features, noise_width),
            nn.GELU(),
            nn.Linear(noise_width, noise_features),
            nn.LayerNorm(noise_features),
        )
        sizes = [input_size(in_features, in_channels, image_size)] + [width] * depth
        self.layers = nn.ModuleList(
            StochasticLayer(before, after, noise_features, zero_init, activation)
            for before, after in pairwise(sizes)
        )
        self.head = head(width, outputs)

    def forward(
        self,
        noise: Tensor,
        features: Tensor | None = None,
        pixel_values: Tensor | None = None,
        past_values: Tensor | None = None,
    ) -> Outputs:
        condition = self.embed(noise)
        x = the_one_given(features, pixel_values, past_values).flatten(1)[:, None]
        for layer in self.layers:
            x = layer(x, condition)
        return Outputs(hidden=x, classifier=self.head)


class StochasticLayer(nn.Module):
    """Linear, conditional layer norm, activation."""

    def __init__(
        self, before: int, after: int, condition: int, zero_init: bool, activation: Factory
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(before, after)
        self.norm = ConditionalLayerNorm(after, condition, zero_init)
        self.activation = build_activation(activation, after)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.activation(self.norm(self.linear(x), condition))


class ConditionalLayerNorm(nn.Module):
    """(1 + A·u)·(x − mean) / √(variance + 10⁻⁵) + B·u, A and B affine in the condition u.

    Shapes: x (..., dim) and u (..., condition), which broadcast, to (..., dim).
    """

    def __init__(self, dim: int, condition: int, zero_init: bool = True) -> None:
        super().__init__()
        self.scale, self.shift = nn.Linear(condition, dim), nn.Linear(condition, dim)
        if zero_init:
            for layer in (self.scale, self.shift):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:]) * (1 + self.scale(condition)) + self.shift(condition)
