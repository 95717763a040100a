"""Round-to-nearest quantisation."""

from typing import TYPE_CHECKING

from techniques.post.grids import minmax, quantised
from techniques.post.layers import give, linear_layers, matrix
from training.packing import Affine

if TYPE_CHECKING:
    from training.run import Run


class Quantise:
    """Rounds the weights of linear and convolutional layers to the nearest of 2^bits evenly spaced
    values, from each row's least to its largest: scale·(code − zero).

    Zeros stay zeros. Nothing is calibrated, and activations are not quantised.

    Args:
        bits: 2 to 8.
        group: columns of a row that share a scale; default: the whole row.
        symmetric: values from −max|w| to max|w|.
        exclude: regular expression for names of layers that stay as they are.

    Raises:
        ValueError: for another number of bits.
        UsageError: when it is applied, for a group that does not divide a layer's columns, or
            when no layer is left.
    """

    def __init__(
        self,
        bits: int = 8,
        group: int | None = None,
        symmetric: bool = False,
        exclude: str | None = None,
    ) -> None:
        if not 2 <= bits <= 8:
            raise ValueError(f"bits: must be between 2 and 8, got {bits}")
        self.bits, self.group, self.symmetric, self.exclude = bits, group, symmetric, exclude

    def __call__(self, run: "Run") -> None:
        """Round them."""
        for name, layer in linear_layers(run.model, self.exclude).items():
            weight = matrix(layer)
            scale, zero = minmax(weight, self.bits, group=self.group, symmetric=self.symmetric)
            give(layer, quantised(weight, scale, zero, self.bits))
            run.grids[f"{name}.weight"] = Affine(scale, zero, self.bits)
