"""A power law with a floor, of one quantity."""

import torch
from torch import Tensor

from study.laws import Columns, Coordinates, Law


def log_loss(law: Coordinates, data: Columns) -> Tensor:
    """log(E + A/x^α)."""
    x = data["x"].log()
    floor = law["log_E"] + torch.zeros_like(x)
    terms = torch.broadcast_tensors(floor, law["log_A"] - law["alpha"] * x)
    return torch.stack(terms).logsumexp(0)


LAW = Law(
    formula="E + A/x^alpha",
    source=(
        '"Scaling Laws for Autoregressive Generative Modeling", arXiv 2010.14701, equation 1.1; '
        'with x the width or parameters under µP, "Research without Re-search", arXiv 2304.06875'
    ),
    columns=("x",),
    log_loss=log_loss,
    starts={
        "log_E": (-4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0),
        "log_A": (-5.0, 0.0, 5.0, 10.0, 15.0, 20.0, 25.0),
        "alpha": (0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 1.5),
    },
    exponents=("alpha",),
)
