"""The hidden units of feed-forward layers, and how some are removed for good."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from models.mlp import MLP
from study.probes.memory import Flops
from techniques.callback import probing
from training.errors import UsageError
from training.parallel import distribute

if TYPE_CHECKING:
    from training.run import Run

NAMES = (("up", "gate", "down"), ("fc1", "", "fc2"), ("up_proj", "gate_proj", "down_proj"))
"""What a feed-forward layer's linear layers are called here, in timm and in Hugging Face's models:
into the hidden units, into their gate where there is one, out of them."""


@dataclass(frozen=True)
class Hidden:
    """Hidden units between linear layers: rows of `into`, columns of `out`."""

    into: tuple[nn.Linear, ...]
    out: nn.Linear

    @property
    def size(self) -> int:
        """How many units there are."""
        return self.out.in_features


def hidden_units(model: nn.Module) -> dict[str, Hidden]:
    """By name of the layer they go into, the hidden units of a model's feed-forward layers, and of
    an `MLP` without norms those of all its layers.

    Raises:
        UsageError: when there are none.
    """
    names = {module: name for name, module in model.named_modules()}
    found = {names[hidden.out]: hidden for m in names for hidden in (*_feed_forward(m), *_chain(m))}
    if not found:
        raise UsageError(
            "model: no feed-forward layer whose hidden units can be removed; an MLP needs "
            "model.norm._target_=torch.nn.Identity"
        )
    return found


def _feed_forward(module: nn.Module) -> list[Hidden]:
    for up, gate, down in NAMES:
        into = [getattr(module, name) for name in (up, gate) if name and hasattr(module, name)]
        out = getattr(module, down, None)
        if not into or not all(isinstance(m, nn.Linear) for m in (*into, out)):
            continue
        rest = [m for m in module.children() if m is not out and m not in into]
        if _fits(into, out, rest):  # type: ignore[arg-type]
            return [Hidden(tuple(into), out)]  # type: ignore[arg-type]
    return []


def _chain(module: nn.Module) -> list[Hidden]:
    if not isinstance(module, MLP):
        return []
    layers = list(module.layers)
    if not all(isinstance(norm, nn.Identity) for norm in layers[1::3]):
        return []
    linear = [*layers[::3], module.head]
    if not all(isinstance(m, nn.Linear) for m in linear):
        return []
    return [
        Hidden((into,), out)  # type: ignore[arg-type]
        for into, out, activation in zip(linear, linear[1:], layers[2::3])
        if _fits([into], out, [activation])
    ]


def _fits(into: list[nn.Module], out: nn.Module, rest: list[nn.Module]) -> bool:
    """Whether the layers have the same hidden units, and no other module parameters for them."""
    size = out.in_features
    others = (tensor for m in rest for tensor in m.state_dict().values())
    return all(m.out_features == size for m in into) and not any(size in t.shape for t in others)


@torch.no_grad()
def remove(run: "Run", gone: dict[str, Tensor], constant: dict[str, Tensor] | None = None) -> None:
    """Remove hidden units: rows of the layers into them and columns of the layer out of them, whose
    weights become smaller parameters in place.

    Records what is left of all hidden units as `post/units`, and of the multiply-adds of one
    sample's matrix products, convolutions and attention as `post/macs`.

    Args:
        run: its model is changed; its optimizer keeps the parameters of before.
        gone: which are removed, (units,) of bool, by the names of `hidden_units`.
        constant: values (units,) that the removed ones are taken to have, which go into the next
            layer's bias: b + W[:, gone]·c[gone]; default: zero.

    Raises:
        UsageError: under FSDP2, or for weights that are computed from other parameters.
    """
    hidden = hidden_units(run.model)
    _check(hidden)
    before, units = macs(run), sum(h.size for h in hidden.values())
    for name, mask in gone.items():
        kept = ~mask.to(hidden[name].out.weight.device)
        if constant is not None:
            _fold(hidden[name].out, ~kept, constant[name])
        _cut(hidden[name], kept)
    if run.accelerator.num_processes > 1:  # they would go on sharing the parameters of before
        run.wrapped = distribute(run.objective, run.accelerator, "ddp")
    left = sum(h.size for h in hidden.values())
    run.record({"post/units": left / units, "post/macs": macs(run) / before})


def macs(run: "Run") -> float:
    """Multiply-adds of one sample's matrix products, convolutions and attention."""
    batch = probing.training_batch(run, 1)
    with probing.looking(run), Flops() as flops:
        probing.outputs(run, batch)
    return flops.total / 2


def _check(hidden: dict[str, Hidden]) -> None:
    layers = {layer for h in hidden.values() for layer in (*h.into, h.out)}
    if any(isinstance(p, DTensor) for layer in layers for p in layer.parameters()):
        raise UsageError(
            "post: fsdp2's parameters cannot be made smaller; do it in one process, of the "
            "finished run (trainer.start_from, trainer.max_steps=0)"
        )
    if any(parametrize.is_parametrized(layer) for layer in layers):
        raise UsageError("post: weights that are computed from other parameters cannot be smaller")


def _fold(layer: nn.Linear, gone: Tensor, constant: Tensor) -> None:
    weight = layer.weight[:, gone]
    shift = weight.double() @ constant.to(weight.device)[gone].double()
    if layer.bias is None:
        layer.bias = nn.Parameter(weight.new_zeros(layer.out_features))
    layer.bias.add_(shift.to(weight.dtype))


def _cut(hidden: Hidden, kept: Tensor) -> None:
    for layer in hidden.into:
        layer.weight = nn.Parameter(layer.weight[kept])
        layer.out_features = len(layer.weight)
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias[kept])
    hidden.out.weight = nn.Parameter(hidden.out.weight[:, kept].contiguous())
    hidden.out.in_features = hidden.out.weight.shape[1]
