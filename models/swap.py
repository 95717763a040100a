"""Replacing activations and norms in models we did not write.

Modules are known by the names of their classes, which PyTorch, transformers and timm share or
prefix (`GELU`, `NewGELUActivation`, `LlamaRMSNorm`). Gates (sigmoid, tanh, softmax) are not
activations in this sense and stay.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from models.layers import Factory, build_activation, build_image_norm, takes

ACTIVATION = re.compile(
    r"ReLU6?|(Leaky|P|R)ReLU|ReLUSquared|[CS]?ELU|(|New|Fast|Quick|Accurate|Clipped)GELU|GELUTanh|"
    r"SiLU|Swish|Mish|Hard[Ss]wish|HardMish|Laplace|XIELU"
)
SUFFIX = re.compile(r"(Activation|Me)$")
"""What transformers, and timm's memory-efficient variants, add to an activation's name."""
NORM = re.compile(r"\w*(LayerNorm|RMSNorm|RmsNorm|BatchNorm|GroupNorm)(2d)?")


def swap_activations(model: nn.Module, factory: Factory, forward: Callable[[], Any]) -> None:
    """Replace every activation module of `model` by one from `factory`.

    Args:
        model: changed in place.
        factory: as for `model.activation`.
        forward: runs the model once on an example; needed, and run, only for a factory that takes
            `channels`, to see how many each activation works on and which dimension they are.

    Raises:
        ValueError: when there is no activation module, or one works on a shape that is neither
            `(..., channels)` nor `(batch, channels, height, width)`.
    """
    found = [m for m in model.modules() if ACTIVATION.fullmatch(SUFFIX.sub("", type(m).__name__))]
    if not found:
        raise ValueError(f"model.activation: {type(model).__name__} has no activation to replace")
    if not takes(factory, "channels"):
        _replace(model, {module: factory() for module in found})
        return
    layouts = _layouts(model, found, forward)
    # One that the forward pass never reaches keeps its place.
    _replace(model, {m: build_activation(factory, *layout) for m, layout in layouts.items()})


def swap_norms(model: nn.Module, factory: Factory) -> None:
    """Replace every layer, RMS, batch and group norm of `model` by one from `factory`.

    What the old ones had learned is lost. The new ones act on the same number of features; those of
    images, `(batch, channels, height, width)`, are built with `models.layers.build_image_norm`.

    Raises:
        ValueError: when there is no norm, or one does not tell its number of features.
    """
    found = [m for m in model.modules() if NORM.fullmatch(type(m).__name__)]
    if not found:
        raise ValueError(f"model.norm: {type(model).__name__} has no norm to replace")
    _replace(
        model,
        {
            module: build_image_norm(factory, _features(module))
            if _is_image_norm(module)
            else factory(_features(module))
            for module in found
        },
    )


def _replace(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    # A module may be reached by several names, and is replaced by the same one under each.
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replacements:
                setattr(parent, name, replacements[child])


def _layouts(
    model: nn.Module, activations: list[nn.Module], forward: Callable[[], Any]
) -> dict[nn.Module, tuple[int, bool]]:
    """For each activation the forward pass reaches: its channels, and whether it acts on images."""
    layouts: dict[nn.Module, tuple[int, bool]] = {}
    after_convolution = False

    def remember(layer: nn.Module, *_: Any) -> None:
        nonlocal after_convolution
        after_convolution = isinstance(layer, nn.modules.conv._ConvNd)

    def look(activation: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shape = inputs[0].shape
        images = after_convolution and len(shape) > 2
        layout = (shape[1] if images else shape[-1], images)
        if (images and len(shape) != 4) or layouts.setdefault(activation, layout) != layout:
            raise ValueError(
                f"model.activation: a {type(activation).__name__} of this model works on shape "
                f"{tuple(shape)}; one with coefficients per channel cannot take its place"
            )

    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
    hooks = [layer.register_forward_hook(remember) for layer in layers]
    hooks += [activation.register_forward_pre_hook(look) for activation in activations]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return layouts


def _is_image_norm(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.BatchNorm2d | nn.GroupNorm)
        or type(module).__name__.endswith("2d")
        or getattr(module, "data_format", None) == "channels_first"
    )


def _features(norm: nn.Module) -> int:
    for name in ("num_features", "num_channels"):
        if hasattr(norm, name):
            return getattr(norm, name)
    if getattr(norm, "normalized_shape", None):
        return norm.normalized_shape[-1]  # type: ignore[index]
    if isinstance(getattr(norm, "weight", None), Tensor):
        return norm.weight.shape[-1]  # type: ignore[union-attr]
    raise ValueError(
        f"model.norm: a {type(norm).__name__} of this model does not tell its number of features"
    )
