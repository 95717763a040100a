"""A multilayer perceptron."""

from itertools import pairwise

from torch import Tensor, nn

from models.layers import Factory, build_activation
from models.outputs import Outputs


class MLP(nn.Module):
    """`depth` hidden layers (linear, norm, activation) and a linear output, on flattened input.

    Takes whichever the batch has of `features` (batch, in_features), `pixel_values` (batch,
    channels, height, width) and `past_values` (batch, length, channels).

    Args:
        in_features: numbers per sample; default: `in_channels`·`image_size`².
        out_features: outputs per sample; default: `num_classes`.
        in_channels, image_size, num_classes: for tasks on images.
        width, depth: features of a hidden layer, hidden layers; depth 0 is a linear model.
        activation, norm, head: the slots.

    Returns `hidden` (batch, width) and `classifier`; `logits` (batch, out_features).

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
        activation: Factory,
        norm: Factory,
        head: Factory,
    ) -> None:
        super().__init__()
        if width < 1 or depth < 0:
            raise ValueError(f"model.width, model.depth: at least 1 and 0, got {width} and {depth}")
        outputs = out_features or num_classes
        if outputs is None:
            raise ValueError("out_features: an MLP needs it or num_classes of the task")
        sizes = [input_size(in_features, in_channels, image_size)] + [width] * depth
        self.layers = hidden_layers(sizes, activation, norm)
        self.head = head(sizes[-1], outputs)

    def forward(
        self,
        features: Tensor | None = None,
        pixel_values: Tensor | None = None,
        past_values: Tensor | None = None,
    ) -> Outputs:
        x = the_one_given(features, pixel_values, past_values)
        return Outputs(hidden=self.layers(x.flatten(1)), classifier=self.head)


def hidden_layers(sizes: list[int], activation: Factory, norm: Factory) -> nn.Sequential:
    """Linear, norm and activation from each size to the next."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), norm(after), build_activation(activation, after)]
    return nn.Sequential(*layers)


def input_size(in_features: int | None, in_channels: int | None, image_size: int | None) -> int:
    """Numbers per sample, given as such or as channels and side of a square image.

    Raises:
        ValueError: when given as neither.
    """
    if in_features is not None:
        return in_features
    if in_channels is None or image_size is None:
        raise ValueError("in_features: needed, or in_channels and image_size, of the task")
    return in_channels * image_size**2


def the_one_given(*inputs: Tensor | None) -> Tensor:
    """The one input that is not `None`.

    Raises:
        ValueError: when there is not exactly one.
    """
    given = [x for x in inputs if x is not None]
    if len(given) != 1:
        raise ValueError(
            "the batch must have exactly one of features, pixel_values and past_values, "
            f"got {len(given)}"
        )
    return given[0]
