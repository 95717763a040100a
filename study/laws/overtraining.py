"""Loss of compute, and of how many tokens there are for each parameter."""

import torch
from torch import Tensor

from study.laws import Columns, Coordinates, Law


def log_loss(law: Coordinates, data: Columns) -> Tensor:
    """log(E + (a·M^η + b·M^−η)·C^−η), with M = D/N and C = 6·N·D."""
    n, d = data["parameters"].log(), data["tokens"].log()
    m, c = d - n, torch.log(torch.tensor(6.0, dtype=n.dtype)) + n + d
    terms = (
        law["log_E"] + torch.zeros_like(n),
        law["log_a"] + law["eta"] * (m - c),
        law["log_b"] - law["eta"] * (m + c),
    )
    return torch.stack(torch.broadcast_tensors(*terms)).logsumexp(0)


LAW = Law(
    formula="E + (a*M^eta + b*M^-eta) * C^-eta, M = tokens/parameters, C = 6*parameters*tokens",
    source=(
        '"Language models scale reliably with over-training and on downstream tasks", arXiv '
        "2403.08540, equation 4, https://github.com/mlfoundations/scaling"
    ),
    columns=("parameters", "tokens"),
    log_loss=log_loss,
    starts={
        "log_E": (-1.0, 0.0, 0.5, 1.0),
        "log_a": (0.0, 5.0, 10.0, 15.0),
        "log_b": (0.0, 5.0, 10.0, 15.0),
        "eta": (0.05, 0.1, 0.2, 0.4, 0.8),
    },
    exponents=("eta",),
)
