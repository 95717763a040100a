"""Other errors of a reconstruction than the squared one, for runs with several losses."""

from typing import Any

import torch
from torch import Tensor, nn

from models.mlp import the_one_given
from tasks.losses import precise


class Absolute:
    """Mean over samples of scale · Σ |x̂ − x|.

    Args:
        scale: the unit that the loss is in.

    Shapes: `logits` and `features` (batch, ...) or `pixel_values` to a scalar.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(self, model: nn.Module, outputs: Any, batch: dict[str, Any]) -> Tensor:
        return self.scale * errors(outputs, batch).abs().flatten(1).sum(-1).mean()


class Spectral:
    """Mean over samples of scale · Σ |F x̂ − F x|, with F the orthonormal discrete Fourier transform
    of each sample as one row of numbers, or as images.

    Args:
        scale: the unit that the loss is in.

    Shapes: as `Absolute`'s.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(self, model: nn.Module, outputs: Any, batch: dict[str, Any]) -> Tensor:
        error = errors(outputs, batch)
        image = error.ndim == 4
        transformed = torch.fft.fft2(error, norm="ortho") if image else fft(error.flatten(1))
        return self.scale * transformed.abs().flatten(1).sum(-1).mean()


def fft(x: Tensor) -> Tensor:
    """Of each row, orthonormal."""
    return torch.fft.fft(x, norm="ortho")


def errors(outputs: Any, batch: dict[str, Any]) -> Tensor:
    """x̂ − x, in float32 at least."""
    x = the_one_given(batch.get("features"), batch.get("pixel_values"))
    return precise(outputs["logits"]) - x
