"""Three quadratic losses whose gradients are known, for the tests of estimators that take a run's
losses one by one."""

import numpy as np
import torch
from torch import nn

from training.objective import Objective

CENTRES = np.array([[1.0, -2.0, 0.5, 3.0, 0.1, -1.0], [2.0, 1.0, -1.0, 0.3, 0.2, 0.9], [0.0] * 6])
CURVATURES = np.array([[1.0, 3.0, 0.2, 0.1, 2.0, 1.0], [0.5, 1.0, 4.0, 1.0, 0.1, 0.7], [5.0] * 6])
COEFFICIENTS = (1.0, 0.5, 2.0)
START = np.array([0.3, 0.4, -0.7, 0.2, -1.1, 0.6])


class Point(nn.Module):
    """A place, whose first coordinates and last are two parameters."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(START[:4]).view(2, 2))
        self.v = nn.Parameter(torch.tensor(START[4:]))

    def height(self, part):
        place = torch.cat([self.w.flatten(), self.v])
        centre, curvature = torch.tensor(CENTRES[part]), torch.tensor(CURVATURES[part])
        return 0.5 * (curvature * (place - centre) ** 2).sum()

    def forward(self, features):
        return {"logits": features * self.height(0)}


def objective(model, several=True):
    penalties = {
        "first": (lambda model, outputs, batch: model.height(1), COEFFICIENTS[1]),
        "second": (lambda model, outputs, batch: model.height(2), COEFFICIENTS[2]),
    }
    loss = lambda outputs, batch: outputs["logits"]  # noqa: E731
    mean = lambda losses, outputs, batch: losses.mean()  # noqa: E731
    inputs = frozenset({"features"})
    return Objective(model, loss, mean, penalties if several else {}, inputs)


def gradients(place=START):
    """Of the parts with their coefficients, (3, 6)."""
    return np.array(COEFFICIENTS)[:, None] * CURVATURES * (place - CENTRES)


def flat(model):
    """The place, and the gradient there."""
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    place = torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()
    return place, torch.cat(grads).numpy() if grads else None


def descend(model, rate):
    """A step of gradient descent."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= rate * parameter.grad
            parameter.grad = None


class Scaled:
    """A backward that scales, as under fp16."""

    scale = 1024.0

    def __call__(self, loss):
        (self.scale * loss).backward()
