"""The almost fair CRPS, a loss of ensembles."""

from typing import Any

import torch
from torch import Tensor

from tasks.series import forecasts
from training.errors import UsageError


class AlmostFairCRPS:
    """afCRPS = α·fCRPS + (1 − α)·CRPS of M members xⱼ and the label y, which is

        Σⱼ Σₖ≠ⱼ (|xⱼ − y| + |xₖ − y| − (1 − ε)·|xⱼ − xₖ|) / (2M(M − 1)),  ε = (1 − α)/M.

    It is computed so: no term is negative, so that reduced precision cancels nothing.

    α = 0 is the CRPS of the ensemble, mean|xⱼ − y| − Σⱼₖ|xⱼ − xₖ| / 2M², which favours ensembles
    with too little spread, the more the fewer members. α = 1 is the fair CRPS, with M(M − 1) for
    M²: its expectation over independent members is the CRPS of their distribution, whatever M. But
    where all members but one are y it is 0 wherever that one is (for M = 2: where one is); the loss
    there is ε/M times the one's distance, which brings it back.

    Minimiser: in expectation, for independent members, α = 1: the label's distribution; below, one
    a little narrower. Range: 0, where all members are the label, to infinity. Far from the label
    it is linear, and each member's gradient is at most 2/M.

    Args:
        alpha: between 0 and 1; 0.95, the paper's and anemoi's.

    Shapes: `logits` (batch, M, horizon, channels), or flat after M, and real `labels` (batch,
    horizon, channels) to losses shaped like the labels. M(M − 1)/2 times their memory.

    Raises:
        ValueError: for an alpha outside [0, 1].
        UsageError: when there is one member only.

    Source: "AIFS-CRPS: Ensemble forecasting using a model trained with a loss function based on the
    Continuous Ranked Probability Score", arXiv 2412.15832, equation 4;
    https://github.com/ecmwf/anemoi-core, `training/src/anemoi/training/losses/kcrps.py` (`CRPS`,
    formerly `AlmostFairKernelCRPS`, backend `stable`).
    """

    def __init__(self, alpha: float = 0.95) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: must be in [0, 1], got {alpha}")
        self.alpha = alpha

    def __call__(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        labels = batch["labels"]
        error = forecasts(outputs, labels) - labels[:, None]
        members = error.shape[1]
        if members < 2:
            raise UsageError(
                "task.loss: the CRPS needs an ensemble; set task.members and a stochastic model"
            )
        first, second = torch.triu_indices(members, members, 1, device=error.device)
        a, b = error[:, first], error[:, second]
        epsilon = (1 - self.alpha) / members
        return (a.abs() + b.abs() - (1 - epsilon) * (a - b).abs()).mean(1) / 2
