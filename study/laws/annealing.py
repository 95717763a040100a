"""Loss at a step of training, of the learning rates up to it."""

import torch
from torch import Tensor

from study.laws import Columns, Coordinates, Law


def log_loss(law: Coordinates, data: Columns) -> Tensor:
    """log(L₀ + A·S₁^−α − C·S₂); where that is not positive, far below any loss."""
    grown = law["log_L0"].exp() + (law["log_A"] - law["alpha"] * data["forward"].log()).exp()
    return (grown - law["C"] * data["annealing"]).clamp(min=1e-9).log()


def areas(rates: Tensor, decay: float = 0.999) -> tuple[Tensor, Tensor]:
    """Forward area S₁ = Σ_{i ≤ s} ηᵢ and annealing area S₂ = Σ_{i ≤ s} Σ_{k ≤ i} (η_{k−1} − η_k)·
    λ^(i−k) after each step s, each (steps,), float64.

    Args:
        rates: η of each step, (steps,); what comes before a warm-up's peak counts as the peak, so
            that warming up is no negative annealing, as in the authors' code.
        decay: λ; 0.999 as in the paper.
    """
    rates = rates.double()
    peak = int(rates.argmax())
    drops = torch.zeros_like(rates)
    drops[peak + 1 :] = rates[peak:-1] - rates[peak + 1 :]
    momentum, total = torch.zeros_like(rates), 0.0
    for i, drop in enumerate(drops.tolist()):
        total = decay * total + drop
        momentum[i] = total
    return rates.cumsum(0), momentum.cumsum(0)


LAW = Law(
    formula="L0 + A*forward^-alpha - C*annealing",
    source='"Scaling Law with Learning Rate Annealing", arXiv 2408.11029, equation 1',
    columns=("forward", "annealing"),
    log_loss=log_loss,
    starts={
        "log_L0": (-1.0, -0.5, 0.0, 0.5, 1.0),
        "log_A": (-3.0, -2.0, -1.0, 0.0, 1.0),
        "C": (0.0, 0.5, 1.0, 2.0, 5.0),
        "alpha": (0.1, 0.3, 0.5, 0.8, 1.2),
    },
    exponents=("alpha",),
)
