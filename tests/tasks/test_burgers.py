import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn

from tasks.burgers import Burgers, Residual, boundary, initial, solution
from tasks.fetch import fetch


def test_solution_is_that_of_a_spectral_method():
    """u = Σ bₖ sin kπx, its coefficients integrated over time by SciPy."""
    viscosity, modes, size = 0.05, 64, 256
    x = -1 + 2 * np.arange(size) / size
    k = np.pi * np.arange(1, modes + 1)
    basis = np.sin(k[:, None] * x)

    def change(time, b):
        u, u_x = b @ basis, (b * k) @ np.cos(k[:, None] * x)
        return -2 / size * basis @ (u * u_x) - viscosity * k**2 * b

    start = np.zeros(modes)
    start[0] = -1
    found = solve_ivp(change, (0, 1), start, "LSODA", t_eval=[0.3, 1.0], rtol=1e-10, atol=1e-12)
    for time, b in zip(found.t, found.y.T):
        np.testing.assert_allclose(
            solution(x, np.full(size, time), viscosity), b @ basis, atol=2e-9
        )


def test_solution_of_the_usual_viscosity():
    """Basdevant et al.'s least slope at the shock: ∂u/∂x(0, t) = −152.00516 at t = 1.6037/π."""
    x = np.array([-1e-6, 1e-6])
    low, high = solution(x, np.full(2, 1.6037 / math.pi), 0.01 / math.pi)
    assert (high - low) / 2e-6 == pytest.approx(-152.00516, abs=1e-3)


class Known(nn.Module):
    """−x·exp(−t)·(1 − x²), whose derivatives are known."""

    def forward(self, features):
        x, t = features.unbind(-1)
        return {"logits": (-x * torch.exp(-t) * (1 - x**2))[:, None]}


def test_residual_and_conditions():
    task = Burgers(viscosity=0.2, points=50, conditions=10, grid=(4, 3))
    rows = fetch(task.train, torch.arange(50))
    batch = task.prepare(rows, torch.Generator().manual_seed(0), True)
    batch["features"] = batch["features"].detach().double().requires_grad_()
    found = Residual(0.2)(Known()(batch["features"]), batch)
    x, t = batch["features"].detach().numpy().T
    decay = np.exp(-t)
    u, u_x, u_xx = -decay * (x - x**3), -decay * (1 - 3 * x**2), 6 * decay * x
    np.testing.assert_allclose(found.detach(), (-u + u * u_x - 0.2 * u_xx) ** 2, atol=1e-12)
    assert boundary(Known(), {}, batch).item() == 0
    start = batch["initial"][:, 0].numpy()
    expected = np.mean((np.sin(np.pi * start) - start + start**3) ** 2)
    assert initial(Known(), {}, batch).item() == pytest.approx(expected, rel=1e-5)


def test_points_are_where_they_say():
    task = Burgers(points=64, conditions=6, grid=(4, 3))
    rows = fetch(task.train, torch.arange(64))
    inside = rows["features"].numpy()
    assert np.all(np.sort(np.floor(inside[:, 1] * 64)) == np.arange(64))  # a Latin hypercube
    assert np.abs(inside[:, 0]).max() <= 1
    batch = task.prepare(rows, torch.Generator().manual_seed(0), True)
    assert batch["boundary"][:, 0].tolist() == [-1, 1] * 3
    assert batch["initial"][:, 1].tolist() == [0] * 6
    whole = fetch(task.validation, torch.arange(12))
    assert whole["features"][:3].tolist() == [[-0.75, 0.0], [-0.75, 0.5], [-0.75, 1.0]]
    torch.testing.assert_close(whole["labels"][0], torch.tensor(math.sin(0.75 * math.pi)))
    assert task.derived({"mse": 1.0, "squares": 4.0})["relative"] == 0.5


def test_refusals():
    with pytest.raises(ValueError, match=r"task\.viscosity"):
        Burgers(viscosity=0.0)
