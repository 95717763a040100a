"""A model's loss on one kind of text from another model's, or its own, on another kind."""

import torch
from torch import Tensor

from study.laws import Columns, Coordinates, Law


def log_loss(law: Coordinates, data: Columns) -> Tensor:
    """log(E₁ + K·(L₀ − E₀)^κ), with E₀ below every L₀: the least of them less a positive gap."""
    other = data["other_loss"]
    above = other - other.min() + law["log_gap"].exp()
    terms = (
        law["log_E"] + torch.zeros_like(other),
        law["log_K"] + law["kappa"] * above.log(),
    )
    return torch.stack(torch.broadcast_tensors(*terms)).logsumexp(0)


LAW = Law(
    formula="E + K*(other_loss - E0)^kappa, E0 = min(other_loss) - gap",
    source=(
        '"Loss-to-Loss Prediction: Scaling Laws for All Datasets", arXiv 2411.12925, equation 4; '
        "https://github.com/KempnerInstitute/loss-to-loss-olmo, where E and E0 come from a law of "
        "each data set; here they are fitted with the rest"
    ),
    columns=("other_loss",),
    log_loss=log_loss,
    starts={
        "log_E": (-4.0, -2.0, -1.0, 0.0, 0.5),
        "log_K": (-2.0, -1.0, 0.0, 1.0),
        "log_gap": (-4.0, -2.0, -1.0, 0.0, 1.0),
        "kappa": (0.5, 0.75, 1.0, 1.5, 2.0),
    },
    exponents=("kappa",),
)
