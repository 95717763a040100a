"""Removing the hidden units that vary least, and keeping their mean."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from techniques.post.hidden import Hidden, hidden_units, remove
from techniques.post.layers import inputs

if TYPE_CHECKING:
    from training.run import Run

CRITERIA = ("variance", "magnitude", "random")


class VarianceBasedPruning:
    """Removes a fraction of the hidden units h of all feed-forward layers and puts their means into
    the biases after them: b₂ + W₂[:, removed]·μ[removed].

    Over the training samples seen, μ_j = E[h_j] and σ_j² = Σ (h_j − μ_j)² / (n − 1) of unit j after
    its activation (gate included), at every position of every sample. h_j replaced by μ_j errs by
    σ_j² in the mean square, so those of the smallest σ_j² go, all layers in one ranking. Each layer
    keeps at least its best unit.

    Args:
        amount: fraction of all hidden units that is removed; 0.5, of the paper's ablations.
        by: "variance"; "magnitude" (‖w‖₂ of all weights into a unit) and "random" are baselines.
        compensate: put the means into the bias.
        samples: training samples looked at, at most; the paper's are as many as there are, and a
            layer's hidden values of all of them are in memory at once.

    Raises:
        ValueError: for an amount outside [0, 1), another criterion, or fewer than two samples.

    Source: "Variance-Based Pruning for Accelerating and Compressing Trained Networks", arXiv
    2507.12988, as notes on it give its section 3; a third party's
    https://github.com/AvrahamRaviv/sirc-torch-pruning, `torch_pruning/pruner/importance.py`
    (`VarianceImportance`; it divides by n) and `torch_pruning/pruner/algorithms/vbp_pruner.py`. The
    authors' code (boschresearch/variance-based-pruning) could not be had. The paper fine-tunes for
    ten epochs afterwards, with the model of before as teacher.
    """

    def __init__(
        self,
        amount: float = 0.5,
        *,
        by: str = "variance",
        compensate: bool = True,
        samples: int = 1024,
    ) -> None:
        if not 0 <= amount < 1:
            raise ValueError(f"amount: must be at least 0 and below 1, got {amount}")
        if by not in CRITERIA:
            raise ValueError(f"by: one of {', '.join(CRITERIA)}, got '{by}'")
        if samples < 2:
            raise ValueError(f"samples: must be at least 2, got {samples}")
        self.amount, self.by, self.compensate, self.samples = amount, by, compensate, samples

    def __call__(self, run: "Run") -> None:
        """Prune the run's model."""
        hidden = hidden_units(run.model)
        moments = {name: self._moments(run, name, h) for name, h in hidden.items()}
        if self.by == "variance":
            scores = {name: variance for name, (variance, _) in moments.items()}
        elif self.by == "magnitude":
            scores = {name: incoming(h) for name, h in hidden.items()}
        else:
            generator = torch.Generator().manual_seed(run.config["seed"])
            scores = {name: torch.rand(h.size, generator=generator) for name, h in hidden.items()}
        means = {name: mean for name, (_, mean) in moments.items()}
        remove(run, lowest(scores, self.amount), means if self.compensate else None)

    def _moments(self, run: "Run", name: str, hidden: Hidden) -> tuple[Tensor, Tensor]:
        found = inputs(run, {name: hidden.out}, self.samples)[name]
        return torch.var_mean(found.to(torch.promote_types(found.dtype, torch.float32)), dim=0)


def incoming(hidden: Hidden) -> Tensor:
    """‖w‖₂ of the weights into each unit."""
    weights = torch.cat([layer.weight.detach() for layer in hidden.into], dim=1)
    return torch.linalg.vector_norm(weights, dim=1)


def lowest(scores: dict[str, Tensor], amount: float) -> dict[str, Tensor]:
    """By name, a mask of the fraction `amount` of all entries that is lowest, the first of equal
    ones; the highest of each tensor is spared."""
    spared = [score.double().index_fill(0, score.argmax(), torch.inf) for score in scores.values()]
    together = torch.cat([score.cpu() for score in spared])
    count = min(round(amount * len(together)), len(together) - len(scores))
    gone = torch.zeros(len(together), dtype=torch.bool)
    gone[together.argsort(stable=True)[:count]] = True
    return dict(zip(scores, gone.split([len(score) for score in scores.values()])))
