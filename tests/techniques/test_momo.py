import numpy as np
import pytest
import torch

from techniques.optimizer.momo import Momo

A = np.diag([1.0, 4.0, 9.0])


def run(steps, **keys):
    weight = torch.nn.Parameter(torch.tensor([3.0, -2.0, 1.0], dtype=torch.float64))
    optimizer, path = Momo([weight], **keys), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = 0.5 * weight @ torch.from_numpy(A) @ weight
        loss.backward()
        optimizer.step(loss=loss.detach())
        path.append(weight.detach().numpy().copy())
    return np.array(path)


def written_out(steps, lr, beta, lb, decay):
    """Equations of the paper with the sums over past batches written out, in NumPy."""
    x, grads, losses, products, path = np.array([3.0, -2.0, 1.0]), [], [], [], []
    for k in range(steps):
        g = A @ x
        grads.append(g), losses.append(0.5 * x @ A @ x), products.append(g @ x)
        weights = np.array([beta**k] + [(1 - beta) * beta ** (k - j) for j in range(1, k + 1)])
        d, f, gamma = weights @ np.array(grads), weights @ losses, weights @ products
        factor = 1 + lr * decay
        tau = min(lr, max(factor * (f - lb) + d @ x - factor * gamma, 0) / (d @ d))
        x = (x - tau * d) / factor
        path.append(x)
    return np.array(path)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("lr", [0.05, 10.0])
def test_path_equals_the_equations(lr, decay):
    ours = run(12, lr=lr, beta=0.7, lb=0.1, weight_decay=decay)
    np.testing.assert_allclose(ours, written_out(12, lr, 0.7, 0.1, decay), rtol=1e-9)


def test_without_momentum_it_is_the_polyak_step():
    """x − (f − f*)/‖g‖²·g: on ½‖x‖² with f* = 0 exactly half-way."""
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = Momo([weight], lr=100.0, beta=0.0)
    loss = 0.5 * weight.square().sum()
    loss.backward()
    optimizer.step(loss=loss.detach())
    assert weight.tolist() == pytest.approx([1.5, 2.0])


def test_state_survives():
    first = torch.nn.Parameter(torch.ones(2))
    optimizer = Momo([first])
    first.grad = torch.ones(2)
    optimizer.step(loss=torch.tensor(1.0))
    other = Momo([torch.nn.Parameter(torch.ones(2))])
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["loss_average"] == 1.0


def test_refusals():
    with pytest.raises(ValueError, match="lr"):
        Momo([torch.zeros(1)], lr=-1.0)
    with pytest.raises(ValueError, match="betas"):
        Momo([torch.zeros(1)], beta=1.0)
