"""Magnitude and random pruning of single weights."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from techniques.post.layers import give, linear_layers, matrix
from training.data import mix

if TYPE_CHECKING:
    from training.run import Run

SCOPES = ("global", "layer")
METHODS = {"magnitude": prune.L1Unstructured, "random": prune.RandomUnstructured}


class Prune:
    """Sets part of the weights of linear and convolutional layers to 0: of those that are not 0
    yet, so that pruning a half again leaves a quarter.

    Args:
        amount: the part, from 0 to 1.
        scope: "global", over all layers together, or "layer", in each layer.
        by: "magnitude", the smallest first, or "random", a function of the run's seed.
        exclude: regular expression for names of layers that stay as they are.

    Raises:
        ValueError: for an amount outside 0 to 1, or another scope or order.
        UsageError: when it is applied and no layer is left.
    """

    def __init__(
        self,
        amount: float,
        scope: str = "global",
        by: str = "magnitude",
        exclude: str | None = None,
    ) -> None:
        if not 0 <= amount <= 1:
            raise ValueError(f"amount: must be between 0 and 1, got {amount}")
        for name, value, known in (("scope", scope, SCOPES), ("by", by, METHODS)):
            if value not in known:
                raise ValueError(f"{name}: one of {', '.join(known)}, got '{value}'")
        self.amount, self.scope, self.by, self.exclude = float(amount), scope, by, exclude

    def __call__(self, run: "Run") -> None:
        """Prune them."""
        layers = linear_layers(run.model, self.exclude)
        holders = [(_Weight(matrix(layer)), "weight") for layer in layers.values()]
        together = [holders] if self.scope == "global" else [[holder] for holder in holders]
        devices = [run.device] if run.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # in every process the same
            torch.manual_seed(mix(run.config["seed"], sum(h.gone() for h, _ in holders)))
            for group in together:
                prune.global_unstructured(group, METHODS[self.by], amount=self.amount)
        for layer, (holder, _) in zip(layers.values(), holders):
            give(layer, holder.weight.detach() + 0)  # a masked negative number is −0


class _Weight(nn.Module):
    """A matrix whose zeros count as pruned."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(value)
        prune.custom_from_mask(self, "weight", value != 0)

    def gone(self) -> int:
        """How many are pruned."""
        return int((self.weight == 0).sum())
