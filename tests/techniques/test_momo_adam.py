import numpy as np
import pytest
import torch

from techniques.optimizer.momo import MomoAdam

A = np.diag([1.0, 4.0, 9.0])


def path(optimizer_of, steps=10, loss_offset=0.0):
    weight = torch.nn.Parameter(torch.tensor([3.0, -2.0, 1.0], dtype=torch.float64))
    optimizer, found = optimizer_of([weight]), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = 0.5 * weight @ torch.from_numpy(A) @ weight
        loss.backward()
        keys = {"loss": loss.detach() + loss_offset} if isinstance(optimizer, MomoAdam) else {}
        optimizer.step(**keys)
        found.append(weight.detach().numpy().copy())
    return np.array(found)


def test_far_above_its_lower_bound_it_is_adam():
    """Then the model never asks for less than the largest step."""
    keys = {"lr": 0.01, "betas": (0.8, 0.95)}
    ours = path(lambda p: MomoAdam(p, **keys), loss_offset=1e6)
    np.testing.assert_allclose(ours, path(lambda p: torch.optim.Adam(p, **keys)), rtol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_path_equals_the_equations(decay):
    lr, beta1, beta2, eps, lb = 2.0, 0.8, 0.95, 1e-8, 0.05
    x, d, v, f, gamma = np.array([3.0, -2.0, 1.0]), 0.0, 0.0, 0.0, 0.0
    expected = []
    for k in range(1, 11):
        g = A @ x
        d, v = beta1 * d + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        f = beta1 * f + (1 - beta1) * 0.5 * x @ A @ x
        gamma = beta1 * gamma + (1 - beta1) * (g @ x)
        size, rho, factor = np.sqrt(v / (1 - beta2**k)) + eps, 1 - beta1**k, 1 + lr * decay
        model = factor * (f - rho * lb) + d @ x - factor * gamma
        tau = min(lr / rho, max(model, 0) / (d @ (d / size)))
        x = (x - tau * d / size) / factor
        expected.append(x)
    keys = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "lb": lb, "weight_decay": decay}
    np.testing.assert_allclose(path(lambda p: MomoAdam(p, **keys)), expected, rtol=1e-8)


def test_refusals():
    with pytest.raises(ValueError, match="weight_decay"):
        MomoAdam([torch.zeros(1)], weight_decay=-1.0)
