"""The layers that are quantised after training, and what they get as input."""

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from techniques.callback import probing
from training.errors import UsageError
from training.parallel import like, local, reshard, whole

if TYPE_CHECKING:
    from training.run import Run

Layer = nn.Linear | nn.Conv2d
BATCH = 64
"""Samples at a time."""


def linear_layers(model: nn.Module, exclude: str | None = None) -> dict[str, Layer]:
    """A model's `nn.Linear` and `nn.Conv2d` by name, in the order of its modules.

    Left out are grouped convolutions and weights that are computed from other parameters.

    Args:
        exclude: regular expression, searched in the names; such layers are left out.

    Raises:
        UsageError: when none is left.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and "weight" in module._parameters
        and getattr(module, "groups", 1) == 1
        and not (exclude and re.search(exclude, name))
    }
    if not found:
        raise UsageError("exclude: leaves no linear or convolutional layer")
    return found


def inputs(run: "Run", layers: dict[str, Layer], samples: int) -> dict[str, Tensor]:
    """What each layer multiplies its weight matrix with, (n, columns), in evaluation mode over
    evenly spaced training samples without augmentation; labels are not looked at.

    n counts every position of every sample; a convolution has its patches, in the order of
    `weight.flatten(1)`. A layer that the model does not call has no entry. The same in every
    process.

    Args:
        layers: by name, as of `linear_layers`.
        samples: at most.
    """
    parts: dict[str, list[Tensor]] = {}
    _see(run, layers, samples, lambda name, x: parts.setdefault(name, []).append(x))
    return {name: torch.cat(parts[name]) for name in layers if name in parts}


def hessians(run: "Run", layers: dict[str, Layer], samples: int) -> dict[str, Tensor]:
    """2XᵀX/n of each layer's `inputs` X, (columns, columns) in float64: the second derivative of
    the mean of ‖xw − xŵ‖² by a row of weights."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str, x: Tensor) -> None:
        x = x.double()
        sums[name] = sums[name] + x.T @ x if name in sums else x.T @ x
        counts[name] = counts.get(name, 0) + len(x)

    _see(run, layers, samples, add)
    return {name: 2 * sums[name] / counts[name] for name in layers if name in sums}


def one_by_one(
    run: "Run", layers: dict[str, Layer], samples: int
) -> Iterator[tuple[str, Layer, Tensor]]:
    """Each layer's name, itself and its Hessian when the layers before it are as they are now:
    what is done to one is seen by the next."""
    for name, layer in layers.items():
        for hessian in hessians(run, {name: layer}, samples).values():
            yield name, layer, hessian


def matrix(layer: Layer) -> Tensor:
    """A copy of a layer's whole weight, (rows, columns)."""
    return whole(layer.weight.detach()).flatten(1).clone()


@torch.no_grad()
def give(layer: Layer, value: Tensor) -> None:
    """Set a layer's weight to a matrix (rows, columns), which every process has."""
    weight = layer.weight.detach()
    value = value.to(weight.dtype).view(weight.shape)
    local(weight).copy_(local(like(value, weight)))


def _see(
    run: "Run", layers: dict[str, Layer], samples: int, look: Callable[[str, Tensor], None]
) -> None:
    if samples < 1:
        raise ValueError(f"samples: must be at least 1, got {samples}")

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda layer, given: look(name, rows(layer, given[0].detach()))

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        for _ in probing.validation(run, run.task.train, BATCH, samples):
            pass  # the hooks look
    finally:
        for handle in handles:
            handle.remove()
        reshard(run.model)


def rows(layer: nn.Module, x: Tensor) -> Tensor:
    """An input as rows (n, columns): positions of a linear layer's, patches of a convolution's."""
    if not isinstance(layer, nn.Conv2d):
        return x.flatten(0, -2)
    if layer.padding_mode != "zeros":
        raise UsageError(f"layers: no patches with padding_mode {layer.padding_mode!r}")
    if isinstance(layer.padding, str):
        x = F.pad(x, layer._reversed_padding_repeated_twice)
        padding: Any = 0
    else:
        padding = layer.padding
    patches = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)  # type: ignore[arg-type]
    return patches.transpose(1, 2).flatten(0, 1)
