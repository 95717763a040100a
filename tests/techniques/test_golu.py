import pytest
import torch
from scipy.stats import gumbel_r

from techniques.activation.golu import GoLU


def test_gate_is_the_gumbel_distribution_function():
    x = torch.linspace(-3, 8, 101, dtype=torch.float64)
    expected = x.numpy() * gumbel_r.cdf(x.numpy())
    torch.testing.assert_close(GoLU()(x), torch.from_numpy(expected), rtol=1e-12, atol=1e-14)


def test_slope_at_the_origin_is_one_over_e():
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    GoLU()(x).sum().backward()
    assert x.grad.item() == pytest.approx(0.36787944117144233, rel=1e-12)


def test_limits():
    """Zero far to the left, the identity far to the right, no NaN in value or gradient."""
    x = torch.tensor([-1e4, -100.0, 100.0, 1e4], requires_grad=True)
    y = GoLU()(x)
    y.sum().backward()
    assert y.tolist() == [0.0, 0.0, 100.0, 1e4]
    assert x.grad.tolist() == [0.0, 0.0, 1.0, 1.0]


def test_gradient():
    x = torch.linspace(-4, 4, 33, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(GoLU(alpha=0.8, beta=1.2, gamma=0.9), (x,))


def test_smaller_variance_than_gelu_under_a_normal_input():
    """The paper's reason: a squashed gate lowers the output's variance."""
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    assert GoLU()(x).var() < torch.nn.functional.gelu(x).var()


@pytest.mark.parametrize("name", ["alpha", "beta", "gamma"])
def test_refuses_a_gate_without_its_shape(name):
    with pytest.raises(ValueError, match=name):
        GoLU(**{name: 0.0})
