"""Permutations of a perceptron's hidden units that bring its weights near another's."""

from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from models.mlp import MLP
from training.errors import UsageError

State = dict[str, Tensor]


@dataclass
class Units:
    """Where a hidden layer's units are in a model's state: along the first dimension of `rows`, of
    which `counted` are parameters, and along the second of `columns`."""

    counted: list[str] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    columns: str = "head.weight"


def hidden_units(model: nn.Module) -> list[Units]:
    """Those of each hidden layer of a `models.mlp.MLP`, in order.

    Raises:
        UsageError: for another model, or one with other layers than linear ones, norms and
            activations.
    """
    if not isinstance(model, MLP) or type(model.head) is not nn.Linear:
        raise UsageError(
            "callbacks: hidden units are aligned for model=mlp with plain layers alone"
        )
    found: list[Units] = []
    width = 0
    for number, layer in enumerate(model.layers):
        state = layer.state_dict(prefix=f"layers.{number}.")
        if isinstance(layer, nn.Linear):
            width = layer.out_features
            if found:
                found[-1].columns = f"layers.{number}.weight"
            found.append(Units())
        if any(t.ndim > 1 for t in state.values()) and type(layer) is not nn.Linear:
            raise UsageError(f"callbacks: units cannot be permuted in {type(layer).__name__}")
        rows = [name for name, tensor in state.items() if tensor.ndim and len(tensor) == width]
        buffers = {f"layers.{number}.{name}" for name, _ in layer.named_buffers()}
        found[-1].rows += rows
        found[-1].counted += [name for name in rows if name not in buffers]
    return found


def aligned(units: list[Units], ours: State, theirs: State, sweeps: int = 100) -> State:
    """Their state with each hidden layer's units in the order that brings the parameters nearest to
    ours: ⟨θ, π(θ')⟩ is maximised layer by layer, each exactly by `linear_sum_assignment`, until a
    sweep over the layers changes nothing. With one hidden layer that is the best order, with more
    it is one that no change in one layer makes better.

    Source: "Git Re-Basin", arXiv 2209.04836, its weight matching;
    https://github.com/samuela/git-re-basin, `src/weight_matching.py`, where the layers' order in a
    sweep is random and here it is theirs.
    """
    moved = {name: tensor.clone() for name, tensor in theirs.items()}
    for _ in range(sweeps):
        changed = [_permute(layer, ours, moved) for layer in units]
        if not any(changed):
            break
    return moved


def _permute(layer: Units, ours: State, moved: State) -> bool:
    """Put one layer's units in their best order; whether another was not as good."""
    alike = _flat(ours[layer.columns].T) @ _flat(moved[layer.columns].T).T
    for name in layer.counted:
        alike = alike + _flat(ours[name]) @ _flat(moved[name]).T
    _, order = linear_sum_assignment(alike, maximize=True)
    units = np.arange(len(order))
    if alike[units, order].sum() <= np.trace(alike) + 1e-12:
        return False
    chosen = torch.from_numpy(order).to(moved[layer.columns].device)
    for name in layer.rows:
        moved[name] = moved[name][chosen]
    moved[layer.columns] = moved[layer.columns][:, chosen]
    return True


def _flat(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().reshape(len(tensor), -1).numpy()
