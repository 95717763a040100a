"""Burgers' equation, solved by a network of position and time alone: a physics-informed task."""

import math
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from scipy.stats.qmc import LatinHypercube
from torch import Tensor, nn

from tasks import losses
from tasks.arrays import as_dataset
from tasks.losses import precise


class Burgers:
    """Find u(x, t) with u_t + u·u_x = ν·u_xx on −1 ≤ x ≤ 1, 0 ≤ t ≤ 1, where u(±1, t) = 0 and
    u(x, 0) = −sin πx.

    Nothing of the solution is shown in training: the loss is the equation's squared residual at
    points inside (a Latin hypercube), and the conditions at the border and at the start are the
    penalties `boundary` and `initial`, at points that every batch draws anew, so that a run has
    three losses. Validation is on a grid of cells' centres in x and of times from 0 to 1 against
    the exact solution (Cole and Hopf's): `val/loss` is the mean squared error, `relative` the L2
    error over the solution's norm. The loss differentiates through the model's gradient, which
    neither `torch.compile` nor `trainer.strategy=fsdp2` can.

    Args:
        viscosity: ν; 0.01/π, the usual one, makes a shock at x = 0.
        points: inside, in the training set.
        conditions: points at the border, half at each side, and as many at the start, in a batch.
        grid: points in x and in t of the validation set.
        seed: of the points inside.

    Raises:
        ValueError: for a setting that is not positive.

    Source: the benchmark of "Physics-informed neural networks", arXiv 1711.10561; sampled and
    validated as in https://github.com/tum-pbs/ConFIG, `experiments/PINN/lib_pinns/burgers/`, which
    draws the points inside anew too.
    """

    unit = "samples"
    dims = {"in_features": 2, "out_features": 1}  # noqa: RUF012

    def __init__(
        self,
        *,
        viscosity: float = 0.01 / math.pi,
        points: int = 10000,
        conditions: int = 250,
        grid: tuple[int, int] = (256, 100),
        seed: int = 0,
    ) -> None:
        sizes = {"task.viscosity": viscosity, "task.points": points, "task.conditions": conditions}
        for name, value in {**sizes, "task.grid": min(grid)}.items():
            if value <= 0:
                raise ValueError(f"{name}: must be positive, got {value}")
        self.conditions = conditions
        inside = LatinHypercube(2, rng=seed).random(points) * [2, 1] - [1, 0]
        self.train: Dataset = as_dataset({"features": inside, "labels": np.zeros(points)})
        x, t = (2 * np.arange(grid[0]) + 1) / grid[0] - 1, np.linspace(0, 1, grid[1])
        places = np.stack(np.meshgrid(x, t, indexing="ij"), axis=-1).reshape(-1, 2)
        self.validation: Dataset = as_dataset(
            {"features": places, "labels": solution(places[:, 0], places[:, 1], viscosity)}
        )

    def count(self, batch: dict[str, Any]) -> int:
        """Points inside in a batch."""
        return len(batch["labels"])

    def prepare(
        self, rows: dict[str, Any], generator: torch.Generator, training: bool
    ) -> dict[str, Any]:
        """`features` (batch, 2), x and t; `labels` (batch,), the solution or, in training, 0, the
        residual's. In training `boundary` and `initial` (conditions, 2) too."""
        if not training:
            return rows
        free = torch.rand(2, self.conditions, generator=generator)
        side = torch.ones(self.conditions)
        side[::2] = -1
        rows["boundary"] = torch.stack([side, free[0]], dim=-1)
        rows["initial"] = torch.stack([2 * free[1] - 1, torch.zeros(self.conditions)], dim=-1)
        rows["features"].requires_grad_()
        return rows

    loss = staticmethod(losses.squared_error)

    def scores(self, outputs: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Squared error and squared solution."""
        return {
            "mse": losses.squared_error(outputs, batch),
            "squares": batch["labels"].float().square(),
        }

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        """The relative L2 error."""
        return {"relative": math.sqrt(means["mse"] / means["squares"])}


class Residual:
    """(u_t + u·u_x − ν·u_xx)² at the points inside; `task.loss`.

    Shapes: `features` (batch, 2) that require gradients, `logits` (batch, 1) to (batch,).
    """

    def __init__(self, viscosity: float) -> None:
        self.viscosity = viscosity

    def __call__(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        points, u = batch["features"], precise(outputs["logits"]).squeeze(-1)
        with torch.enable_grad():
            (first,) = torch.autograd.grad(u.sum(), points, create_graph=True)
            u_x, u_t = first.unbind(-1)
            (second,) = torch.autograd.grad(u_x.sum(), points, create_graph=True)
        return (u_t + u * u_x - self.viscosity * second[:, 0]).square()


def boundary(model: nn.Module, outputs: Any, batch: dict[str, Any]) -> Tensor:
    """Mean of u(±1, t)²; a penalty."""
    return precise(model(features=batch["boundary"])["logits"]).square().mean()


def initial(model: nn.Module, outputs: Any, batch: dict[str, Any]) -> Tensor:
    """Mean of (u(x, 0) + sin πx)²; a penalty."""
    points = batch["initial"]
    u = precise(model(features=points)["logits"]).squeeze(-1)
    return (u + torch.sin(math.pi * points[:, 0])).square().mean()


def solution(x: np.ndarray, t: np.ndarray, viscosity: float) -> np.ndarray:
    """u at places (n,) and times (n,), by quadrature of Cole and Hopf's formula:

        u = −∫ sin(π(x − η))·w(η) dη / ∫ w(η) dη,
        w = exp(−cos(π(x − η)) / (2πν) − η² / (4νt))

    over η = 2√(νt)·z for |z| up to 6 + 1/√(πν), beyond which w is below 1e-15 of its peak, by the
    trapezoidal rule in steps of 0.05, whose error vanishes exponentially in their number.

    Source: "Spectral and finite difference solutions of the Burgers equation" (Basdevant et al.,
    1986).
    """
    end = math.ceil(20 * (6 + 1 / math.sqrt(math.pi * viscosity)))
    z = np.arange(-end, end + 1) / 20
    found = np.empty(len(x))
    for part in np.array_split(np.arange(len(x)), max(1, len(x) // 512)):
        y = np.pi * (x[part, None] - 2 * np.sqrt(viscosity * t[part, None]) * z)
        exponent = -np.cos(y) / (2 * np.pi * viscosity) - z**2
        weight = np.exp(exponent - exponent.max(1, keepdims=True))
        found[part] = -(np.sin(y) * weight).sum(1) / weight.sum(1)
    return found
