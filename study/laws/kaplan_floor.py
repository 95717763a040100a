"""Loss of parameters and tokens, as Kaplan's law with a floor."""

import torch
from torch import Tensor

from study.laws import Columns, Coordinates, Law, kaplan


def log_loss(law: Coordinates, data: Columns) -> Tensor:
    """log(E + ((N_c/N)^(α_N/α_D) + D_c/D)^α_D)."""
    return torch.logaddexp(law["log_E"], kaplan.log_loss(law, data))


LAW = Law(
    formula="E + ((Nc/parameters)^(alpha_N/alpha_D) + Dc/tokens)^alpha_D",
    source=(
        '"Loss-to-Loss Prediction: Scaling Laws for All Datasets", arXiv 2411.12925, equation 2; '
        "https://github.com/KempnerInstitute/loss-to-loss-notebooks, utils_scaling.py, where one "
        "descent is from each of 16 starts and the mean of Huber losses"
    ),
    columns=("parameters", "tokens"),
    log_loss=log_loss,
    starts=kaplan.LAW.starts | {"log_E": (-4.0, -1.0, 0.0, 0.5, 1.0)},
    exponents=("alpha_N", "alpha_D"),
)
