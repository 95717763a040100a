"""Loss of parameters and the least steps of training, without a floor."""

import torch
from torch import Tensor

from study.laws import Columns, Coordinates, Law


def log_loss(law: Coordinates, data: Columns) -> Tensor:
    """log((N_c/N)^α_N + (S_c/S_min)^α_S)."""
    n, s = data["parameters"].log(), data["steps"].log()
    terms = (law["alpha_N"] * (law["log_Nc"] - n), law["alpha_S"] * (law["log_Sc"] - s))
    return torch.stack(torch.broadcast_tensors(*terms)).logsumexp(0)


LAW = Law(
    formula="(Nc/parameters)^alpha_N + (Sc/steps)^alpha_S",
    source=(
        '"Scaling Laws for Neural Language Models", arXiv 2001.08361, equation 1.6, where steps '
        "are those at batches far above the critical one; estimated as in arXiv 2403.06563"
    ),
    columns=("parameters", "steps"),
    log_loss=log_loss,
    starts={
        "log_Nc": (0.0, 10.0, 20.0, 30.0),
        "log_Sc": (-5.0, 0.0, 3.0, 6.0, 10.0),
        "alpha_N": (0.02, 0.05, 0.1, 0.2),
        "alpha_S": (0.1, 0.3, 0.6, 1.0),
    },
    exponents=("alpha_N", "alpha_S"),
)
