"""A quadratic loss whose gradient is known, for the tests of gradient estimators."""

import torch
from torch import nn

from training.objective import Objective

CURVATURE = torch.tensor([1.0, 3.0, 10.0], dtype=torch.float64)


class Bowl(nn.Module):
    """½ Σ cᵢ·wᵢ², whose gradient is c·w; scaled by each sample."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))

    def forward(self, features):
        return {"logits": features * (0.5 * CURVATURE * self.w**2).sum()}


def objective(model):
    loss = lambda outputs, batch: outputs["logits"]  # noqa: E731
    mean = lambda losses, outputs, batch: losses.mean()  # noqa: E731
    return Objective(model, loss, mean, {}, frozenset({"features"}))


def microbatches(parts=2):
    """Samples with a mean of 1, split."""
    samples = torch.tensor([0.5, 1.5, 0.25, 1.75], dtype=torch.float64)
    return [{"features": s, "share": torch.tensor(1.0 / parts)} for s in samples.chunk(parts)]


def gradient(estimator, parts=2, backward=torch.Tensor.backward):
    """The estimator's gradient at the bowl's start, the weights after it, and the loss."""
    model = Bowl()
    losses = estimator(objective(model), model, microbatches(parts), backward)
    return model.w.grad, model.w.detach(), losses.total
