"""A model's loss on one kind of text from another model's, or its own, on another kind."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from study.laws import Columns, Coordinates, Law


def log_loss(law: Coordinates, data: Columns) -> Tensor:
    """log(E₁ + K·(L₀ − E₀)^κ), where L₀ is not above E₀ log E₁."""
    other = data["other_loss"]
    above = (other - law["log_E0"].exp()).clamp(min=1e-9)
    terms = (
        law["log_E"] + torch.zeros_like(other),
        law["log_K"] + law["kappa"] * above.log(),
    )
    return torch.stack(torch.broadcast_tensors(*terms)).logsumexp(0)


def between(floor: float, other_floor: float) -> Law:
    """The law with E₁ and E₀ given, of which K and κ are fitted, as its authors have it: E₁ and E₀
    come from a scaling law of each loss."""
    given = {"log_E": math.log(floor), "log_E0": math.log(other_floor)}
    fixed = {name: torch.tensor(value, dtype=torch.float64) for name, value in given.items()}
    return replace(
        LAW,
        formula=f"{floor:.4g} + K*(other_loss - {other_floor:.4g})^kappa",
        log_loss=lambda law, data: log_loss(law | fixed, data),
        starts={name: LAW.starts[name] for name in ("log_K", "kappa")},
    )


LAW = Law(
    formula="E + K*(other_loss - E0)^kappa",
    source=(
        '"Loss-to-Loss Prediction: Scaling Laws for All Datasets", arXiv 2411.12925, equation 4; '
        "https://github.com/KempnerInstitute/loss-to-loss-notebooks, utils_plotting.py, where E "
        "and E0 come from a law of each data set; here they are fitted with the rest"
    ),
    columns=("other_loss",),
    log_loss=log_loss,
    starts={
        "log_E": (-4.0, -2.0, -1.0, 0.0, 0.5),
        "log_K": (-2.0, -1.0, 0.0, 1.0),
        "log_E0": (-4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0),
        "kappa": (0.5, 0.75, 1.0, 1.5, 2.0),
    },
    exponents=("kappa",),
)
