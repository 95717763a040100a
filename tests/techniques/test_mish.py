import pytest
import torch
from scipy.optimize import minimize_scalar

from techniques.activation.mish import Mish


def test_formula():
    """With tanh(log(1 + eˣ)) written as ((1 + eˣ)² − 1) / ((1 + eˣ)² + 1)."""
    x = torch.linspace(-10, 10, 201, dtype=torch.float64)
    square = (1 + x.exp()).square()
    torch.testing.assert_close(Mish()(x), x * (square - 1) / (square + 1), rtol=1e-10, atol=1e-12)


def test_minimum():
    """The paper's lower bound of about −0.31."""
    found = minimize_scalar(lambda x: Mish()(torch.tensor(x, dtype=torch.float64)).item())
    assert found.x == pytest.approx(-1.1924, abs=1e-3)
    assert found.fun == pytest.approx(-0.30884, abs=1e-5)


def test_slope_at_the_origin_is_three_fifths():
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    Mish()(x).sum().backward()
    assert x.grad.item() == pytest.approx(0.6, rel=1e-12)


def test_limits():
    x = torch.tensor([-1e4, -100.0, 100.0, 1e4], requires_grad=True)
    y = Mish()(x)
    y.sum().backward()
    torch.testing.assert_close(y, torch.tensor([0.0, 0.0, 100.0, 1e4]))
    torch.testing.assert_close(x.grad, torch.tensor([0.0, 0.0, 1.0, 1.0]))
