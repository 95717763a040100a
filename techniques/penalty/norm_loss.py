"""Norm loss: weight vectors of unit norm, softly."""

from typing import Any

import torch
from torch import Tensor, nn

from training.errors import UsageError

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def norm_loss(model: nn.Module, outputs: Any, batch: dict[str, Any]) -> Tensor:
    """Σ (1 − ‖w‖₂)² over the output units of every linear and convolutional layer.

    w is all the weights that make one output feature or channel: a row of (out, in), a filter of
    (out, in, *kernel). The matrices are steered to the oblique manifold, where rows have norm one,
    by gradients along w alone: −2(1 − ‖w‖)·w / ‖w‖. It takes the place of weight decay.

    The overlay's coefficient, 1e-4, is that of Ranger21's port of the first author's code.

    Raises:
        UsageError: for a model without such a layer.

    Source: "Norm Loss: An efficient yet effective regularization method for deep neural networks",
    arXiv 2103.06583; https://github.com/lessw2020/Ranger21, `ranger21/ranger21.py`.
    """
    # A dict of tensors, which compare by identity: a matrix that two layers share counts once.
    weights = dict.fromkeys(m.weight for m in model.modules() if isinstance(m, LAYERS))
    if not weights:
        raise UsageError("penalties.norm_loss: the model has no linear or convolutional layer")
    norms = [torch.linalg.vector_norm(w.flatten(1), dim=1) for w in weights]
    return (1 - torch.cat(norms)).square().sum()
