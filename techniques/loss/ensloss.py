"""EnsLoss: a random calibrated loss for every batch."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tasks.binary import margins
from tasks.losses import IGNORED
from techniques.loss.inf_cl_tiled_contrastive import processes


class EnsLoss(nn.Module):
    """Every batch draws the derivatives φ′ of a new convex, calibrated loss at its margins.

    With margins zᵢ = ±(f₁ − f₀), positive where the sample is classified rightly, and n draws
    vᵢ ~ N(0, 1), the derivatives are −min(B(vᵢ), 1), B the inverse Box-Cox transform: exp(v) at
    power 0, else (1 + power·v)₊^(1/power). They are sorted, the most negative for the smallest
    margin, so that φ′ does not fall as z grows (φ is convex) and φ′ < 0 (it is calibrated); those
    of margins over 1 are divided by the margin, and all are 1e-6 lower.

    The value returned is gᵢ·zᵢ with gᵢ = φ′(zᵢ) held fixed, as in the authors' code: its gradient
    is gᵢ, but it is no loss's value, and `train/loss` says little. With two logits, df₁ = −df₀.

    Range: from −1 − 1e-6·z, unbounded above. Minimiser: where class 1 has probability η, a margin
    with the sign of 2η − 1; infinite where η is 0 or 1. Where logits are saturated the gradient is
    −min(B, 1) at wrong ones and −min(B, 1)/z − 1e-6 at right ones, so that it is never 0.

    Random numbers come from torch's global generator, in several processes the first's: all margins
    are sorted together, as one process would. Micro-batches have losses of their own.

    Args:
        power: of the inverse Box-Cox transform; 0 as in all of the authors' runs. Their trainer can
            also draw it anew every so many epochs, which those runs switch off.

    Shapes: two-class `logits` (..., 2) and `labels` (...) of 0 and 1 to (...), 0 where a label is
    −100.

    Raises:
        ValueError: for a model whose outputs are not two.

    Source: "EnsLoss: Stochastic Calibrated Loss Ensembles for Preventing Overfitting in
    Classification", arXiv 2409.00908; https://github.com/statmlben/ensloss, `losses.py` (`ensLoss`)
    and `main_tab.py`.
    """

    def __init__(self, power: float = 0.0) -> None:
        super().__init__()
        self.power = power

    def forward(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        z, kept = signed_margins(outputs, batch), batch["labels"] != IGNORED
        # Ignored ones come last in the order, and take no draw from the others.
        own = torch.where(kept, z.detach(), torch.inf).flatten()
        slopes = self._slopes(own, processes(self.training)).view_as(z)
        return torch.where(kept, slopes * z, 0)

    def _slopes(self, own: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        if group is None:
            return slopes(own, torch.randn_like(own), self.power)
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, own, group)
        every = torch.cat(parts)
        draws = torch.randn_like(every)
        dist.broadcast(draws, 0, group)
        return slopes(every, draws, self.power).view(len(parts), -1)[dist.get_rank(group)]


def slopes(z: Tensor, draws: Tensor, power: float = 0.0) -> Tensor:
    """φ′ at the margins `z` (n,), from as many normal `draws`; infinite margins take none."""
    taken = torch.arange(len(z), device=z.device) < z.isfinite().sum()
    sizes = draws.exp() if power == 0 else (1 + power * draws).clamp(min=0) ** (1 / power)
    ordered = torch.where(taken, -sizes.clamp(max=1), 0).sort().values
    found = torch.empty_like(z)
    found[z.argsort(stable=True)] = ordered
    return torch.where(z > 1, found / z, found) - 1e-6


def hinge(outputs: Any, batch: dict[str, Any]) -> Tensor:
    """max(0, 1 − z) of the margins, one of the fixed losses that the paper compares with.

    Range: 0 to infinity. Minimiser: z ≥ 1. Its gradient is −1 below and 0 above."""
    z = signed_margins(outputs, batch)
    return torch.where(batch["labels"] != IGNORED, (1 - z).clamp(min=0), 0)


def exponential(outputs: Any, batch: dict[str, Any]) -> Tensor:
    """exp(−z) of the margins, another.

    Range: 0 to infinity. Minimiser: infinite z, or half the log odds. It overflows, and its
    gradient too, at a margin below −88; the authors clip gradients to a norm of 10."""
    z = signed_margins(outputs, batch)
    return torch.where(batch["labels"] != IGNORED, (-z).exp(), 0)


def signed_margins(outputs: Any, batch: dict[str, Any]) -> Tensor:
    """±(f₁ − f₀), positive where the larger logit is the label's."""
    z = margins(outputs)
    return torch.where(batch["labels"] == 1, z, -z)
