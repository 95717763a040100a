"""Loss of parameters and tokens, without a floor."""

import torch
from torch import Tensor

from study.laws import Columns, Coordinates, Law


def log_loss(law: Coordinates, data: Columns) -> Tensor:
    """α_D · log((N_c/N)^(α_N/α_D) + D_c/D)."""
    n, d = data["parameters"].log(), data["tokens"].log()
    ratio = law["alpha_N"] / law["alpha_D"]
    terms = torch.broadcast_tensors(ratio * (law["log_Nc"] - n), law["log_Dc"] - d)
    return law["alpha_D"] * torch.stack(terms).logsumexp(0)


LAW = Law(
    formula="((Nc/parameters)^(alpha_N/alpha_D) + Dc/tokens)^alpha_D",
    source='"Scaling Laws for Neural Language Models", arXiv 2001.08361, equation 1.5',
    columns=("parameters", "tokens"),
    log_loss=log_loss,
    starts={
        "log_Nc": (10.0, 15.0, 20.0, 25.0, 30.0, 35.0),
        "log_Dc": (10.0, 15.0, 20.0, 25.0, 30.0, 35.0),
        "alpha_N": (0.05, 0.1, 0.2, 0.4),
        "alpha_D": (0.05, 0.1, 0.2, 0.4),
    },
    exponents=("alpha_N", "alpha_D"),
)
