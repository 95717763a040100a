"""Loss at a step of training, of the sum of the learning rates up to it alone."""

import torch
from torch import Tensor

from study.laws import Columns, Coordinates, Law, annealing


def log_loss(law: Coordinates, data: Columns) -> Tensor:
    """log(L₀ + A·S₁^−α), the law of annealing with C = 0."""
    return annealing.log_loss(law | {"C": torch.zeros(())}, data)


LAW = Law(
    formula="L0 + A*forward^-alpha",
    source='"Scaling Law with Learning Rate Annealing", arXiv 2408.11029, equation 1 without S2',
    columns=annealing.LAW.columns,
    log_loss=log_loss,
    starts={name: values for name, values in annealing.LAW.starts.items() if name != "C"},
    exponents=("alpha",),
)
