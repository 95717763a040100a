"""A bound of a network's Lipschitz constant."""

from typing import Any

import torch
from torch import Tensor, nn

from training.errors import UsageError


def lipschitz(model: nn.Module, outputs: Any, batch: dict[str, Any]) -> Tensor:
    """log Π ‖W‖₂² over the matrices of linear layers, the squared bound of an MLP without norms.

    Raises:
        UsageError: for a model without linear layers.

    Source: the auxiliary loss of Bloop, arXiv 2402.02998; https://github.com/apple/ml-bloop,
    `examples/smooth_mnist/train_smooth_mnist.py` (`lipschitz_loss_fn`).
    """
    weights = dict.fromkeys(m.weight for m in model.modules() if isinstance(m, nn.Linear))
    if not weights:
        raise UsageError("penalties.lipschitz: the model has no linear layer")
    norms = torch.stack([torch.linalg.matrix_norm(w, ord=2) for w in weights])
    return 2 * norms.log().sum()
