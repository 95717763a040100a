import pytest
import torch
from torch import nn

from techniques.reparam.sigma_reparam import sigma_reparam


def layer():
    torch.manual_seed(0)
    linear = nn.Linear(12, 7)
    before = linear.weight.detach().clone()
    sigma_reparam(linear)
    return linear, before


def test_starts_where_it_was():
    linear, before = layer()
    torch.testing.assert_close(linear.weight, before)


def test_gamma_is_the_spectral_norm():
    linear, _ = layer()
    with torch.no_grad():
        linear.parametrizations.weight[0].gamma.fill_(2.5)
        linear.parametrizations.weight.original.mul_(9)
    for _ in range(200):  # the power iteration follows
        weight = linear.weight
    assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(2.5, rel=1e-4)


def test_gradient_goes_through_the_weight_and_not_the_vectors():
    """d(γ/σ·W) at fixed u and v, by finite differences in float64."""
    linear, _ = layer()
    linear = linear.double().eval()
    scale = linear.parametrizations.weight[0]
    original = linear.parametrizations.weight.original
    x = torch.randn(3, 12, dtype=torch.float64)
    linear(x).sin().sum().backward()
    v = torch.nn.functional.normalize(original.detach().mv(scale.u), dim=0)
    u = torch.nn.functional.normalize(original.detach().T.mv(v), dim=0)

    def loss(weight):
        w = scale.gamma.detach() / (v @ weight @ u) * weight
        return (x @ w.T + linear.bias.detach()).sin().sum()

    direction = torch.randn_like(original)
    step = 1e-6
    ahead, behind = (loss(original.detach() + s * step * direction) for s in (1, -1))
    numeric = ((ahead - behind) / (2 * step)).item()
    assert (original.grad * direction).sum().item() == pytest.approx(numeric, rel=1e-5)


def test_evaluation_leaves_the_vector():
    linear, _ = layer()
    linear.eval()
    before = linear.parametrizations.weight[0].u.clone()
    _ = linear.weight
    assert linear.parametrizations.weight[0].u.equal(before)


def test_refuses_a_model_without_linear_layers():
    with pytest.raises(ValueError, match="no linear"):
        sigma_reparam(nn.ReLU())
