"""Weights of learned bits as integers, without the channels that have come to 0."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from techniques.penalty.self_compressing_nets import learned_bits
from techniques.post.hidden import hidden_units, remove
from techniques.post.layers import inputs
from training.errors import UsageError
from training.packing import Affine

if TYPE_CHECKING:
    from training.run import Run


class SelfCompress:
    """Makes weights of `LearnedBits` the numbers that they stand for, and removes the hidden units
    of feed-forward layers whose weights are all 0: they are constant, and what they add goes into
    the next layer's bias, so that the model computes what it did. Each layer keeps one.

    Each row's integers are packed in as many bits as they span, ⌈b⌉ at most, and rows of zeros in
    none. Records what is left of the weights of the layers with learned bits, as `post/weights`
    (columns that are there, of rows that are not zero), and of their 32 bits, as `post/bits`.

    Raises:
        UsageError: when it is applied, for a model without learned bits, or under FSDP2.

    Source: see `techniques.reparam.self_compressing_nets`.
    """

    @torch.no_grad()
    def __call__(self, run: "Run") -> None:
        """Compress the run's model."""
        layers = {n: m for n, m in run.model.named_modules() if learned_bits(m)}
        if not layers:
            raise UsageError("post.self_compressing_nets: reparam has given no layer learned bits")
        count = sum(m.parametrizations.weight.original.numel() for m in layers.values())  # type: ignore[union-attr]
        scales = {layer: fix(layer) for layer in layers.values()}
        _remove_constant(run, scales)
        left, bits = 0, 0
        for name, layer in layers.items():
            weight = layer.get_parameter("weight").flatten(1)
            grid = grid_of(weight, scales[layer])
            run.grids[f"{name}.weight"] = grid
            left += int((weight != 0).any(1).sum()) * weight.shape[1]
            bits += int(torch.as_tensor(grid.bits).sum()) * weight.shape[1]
        run.record({"post/weights": left / count, "post/bits": bits / (32 * count)})


def fix(layer: nn.Module) -> Tensor:
    """Make a layer's weight a parameter of the quantised numbers; returns its steps, (rows, 1)."""
    learned = learned_bits(layer)
    assert learned is not None
    scale, _ = learned.scaled(layer.parametrizations.weight.original)  # type: ignore[union-attr]
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return scale.flatten(1)


def grid_of(weight: Tensor, scale: Tensor) -> Affine:
    """The grid of a matrix of integers times steps (rows, 1) that spans each row's."""
    integers = (weight / scale).round()
    low = integers.amin(1, keepdim=True).clamp(max=0)
    span = integers.amax(1, keepdim=True).clamp(min=0) - low
    return Affine(scale, -low, torch.ceil(torch.log2(span + 1)))


def _remove_constant(run: "Run", scales: dict[nn.Module, Tensor]) -> None:
    try:
        hidden = hidden_units(run.model)
    except UsageError:
        return
    gone, constants = {}, {}
    for name, units in hidden.items():
        zero = torch.stack([(layer.weight == 0).all(1) for layer in units.into]).all(0)
        zero[0] &= not zero.all()
        gone[name] = zero
        constants[name] = inputs(run, {name: units.out}, 1)[name][0]
    remove(run, gone, constants)
    for name, units in hidden.items():
        for layer in units.into:
            scales[layer] = scales[layer][~gone[name]]
