"""Gradient checkpointing: memory for recomputation."""

import contextlib
import functools
import itertools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from techniques.gradient.sam import frozen_statistics


def gradient_checkpointing(
    model: nn.Module, *, segments: int | None = None, recursive: bool = False
) -> None:
    """Keep of a model's stacks of layers only what goes into their segments, and compute the rest
    again in the backward.

    With √n segments of n layers the memory of activations is O(√n) for one more forward: √n inputs
    of segments, and the activations of the √n layers of the segment whose turn it is. Recursive,
    each of k segments is divided into k in turn, down to single layers: O(k·logₖ n) memory for
    logₖ n forwards at most. Values, gradients and names of parameters stay as they are.
    Random numbers are drawn again alike, and running statistics are updated once.

    A stack is a model's outermost `nn.Sequential` or `nn.ModuleList` of two layers or more, where
    each layer takes the tensor that the one before returns, and what other arguments all take.
    Iterating over a `nn.ModuleList` gives its segments from then on, its indices still the layers.

    Args:
        model: changed in place.
        segments: of a stack, or of a segment when recursive, at least 2; `None`: √n rounded, or 2
            when recursive (the paper's k = 1).
        recursive: divide segments too.

    Raises:
        ValueError: for fewer than 2 segments, or a model without a stack.

    Source: "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174, sections 4.3 and 4.4;
    `torch.utils.checkpoint` does the work. The authors' https://github.com/dmlc/mxnet-memonger,
    `memonger.py`, cuts where the activations' bytes pass a threshold that it searches; layers here
    count alike.
    """
    if segments is not None and segments < 2:
        raise ValueError(f"segments: must be at least 2, got {segments}")
    found = stacks(model)
    if not found:
        raise ValueError("reparam.gradient_checkpointing: the model has no stack of layers")
    for name, stack in found.items():
        made = Chain() if isinstance(stack, nn.Sequential) else Stack()
        for key, layer in stack._modules.items():
            made.add_module(key, layer)
        made.segments, made.recursive = segments, recursive
        model.set_submodule(name, made)


def stacks(model: nn.Module) -> dict[str, nn.Sequential | nn.ModuleList]:
    """The outermost lists of at least two modules, by name."""
    found: dict[str, nn.Sequential | nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and not inside and type(module) in (nn.Sequential, nn.ModuleList):
            assert isinstance(module, nn.Sequential | nn.ModuleList)
            if len(module) > 1:
                found[name] = module
    return found


class Chain(nn.Sequential):
    """An `nn.Sequential` whose forward keeps what goes into its segments."""

    segments: int | None = None
    recursive = False

    def forward(self, input: Tensor) -> Tensor:
        return through(list(self), self.segments, self.recursive, input)


class Stack(nn.ModuleList):
    """An `nn.ModuleList` that, iterated over, gives its segments, each a function."""

    segments: int | None = None
    recursive = False

    def __iter__(self) -> Iterator[Any]:
        layers = list(self._modules.values())
        for part in divided(layers, self.segments, self.recursive):
            yield functools.partial(again, part, self.segments, self.recursive)


def through(
    layers: list[Any], segments: int | None, recursive: bool, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """x through all layers, of whose segments only the inputs are kept."""
    for part in divided(layers, segments, recursive):
        x = again(part, segments, recursive, x, *args, **kwargs)
    return x


def again(
    layers: list[Any], segments: int | None, recursive: bool, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """x through the layers, whose activations the backward computes again."""
    if recursive and len(layers) > 1:
        function = functools.partial(through, layers, segments, recursive)
    else:
        function = functools.partial(plainly, layers)
    keys = {"context_fn": functools.partial(contexts, layers)} if counted(layers) else {}
    return checkpoint(function, x, *args, use_reentrant=False, **keys, **kwargs)


def plainly(layers: list[Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """x through the layers."""
    for layer in layers:
        x = layer(x, *args, **kwargs)
    return x


def divided(layers: list[Any], segments: int | None, recursive: bool) -> list[list[Any]]:
    """Consecutive parts whose lengths differ by one at most."""
    count = segments or (2 if recursive else round(len(layers) ** 0.5))
    count = min(count, len(layers))
    ends = [len(layers) * i // count for i in range(count + 1)]
    return [layers[start:end] for start, end in itertools.pairwise(ends)]


def counted(layers: list[nn.Module]) -> bool:
    """Whether the layers have running statistics."""
    norms = (m for layer in layers for m in layer.modules())
    return any(isinstance(m, _NormBase) and m.track_running_stats for m in norms)


def contexts(layers: list[nn.Module]) -> tuple[Any, Any]:
    """Of the layers' forward, and of computing them again."""
    return contextlib.nullcontext(), frozen_statistics(nn.ModuleList(layers))
