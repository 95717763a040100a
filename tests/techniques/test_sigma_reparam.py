import pytest
import torch
from torch import nn

from techniques.reparam.sigma_reparam import sigma_reparam


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(12, 8)
    sigma_reparam(layer)
    return layer.to(dtype)


def spectral_norm(weight: torch.Tensor) -> float:
    return torch.linalg.svdvals(weight.detach().double().flatten(1))[0].item()


def parts(layer: nn.Module) -> tuple[nn.Parameter, nn.Module]:
    parametrization = layer.parametrizations.weight
    return parametrization.original, parametrization[0]


def test_the_weight_starts_as_it_was():
    torch.manual_seed(0)
    before = nn.Linear(12, 8).weight
    torch.testing.assert_close(linear().weight, before)


def test_spectral_norm_is_gamma():
    """Whatever the raw weight becomes, once the power iteration has followed it."""
    layer = linear()
    original, scale = parts(layer)
    with torch.no_grad():
        original.copy_(7 * torch.randn(8, 12, generator=torch.Generator().manual_seed(1)))
        scale.gamma.fill_(0.3)
    for _ in range(200):
        layer.weight  # noqa: B018 (one iteration each)
    assert spectral_norm(layer.weight) == pytest.approx(0.3, rel=1e-5)


def test_gradient_is_that_of_the_normalised_weight():
    """With u, v the singular vectors: γ/σ·(G − ⟨G, Ŵ⟩·vuᵀ) for W, and ⟨G, Ŵ⟩ for γ, Ŵ = W/σ."""
    layer = linear(torch.float64)
    original, scale = parts(layer)
    for _ in range(500):
        layer.weight  # noqa: B018
    grad = torch.randn(8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    layer.weight.backward(grad)
    left, values, right = torch.linalg.svd(original.detach())
    along = (grad * original.detach()).sum() / values[0]
    expected = grad - along * torch.outer(left[:, 0], right[0])
    expected = scale.gamma.detach() / values[0] * expected
    torch.testing.assert_close(original.grad, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(scale.gamma.grad, along[None], rtol=1e-6, atol=1e-8)


def test_scale_of_the_raw_weight_does_not_matter():
    layer = linear()
    before = layer.weight.detach().clone()
    with torch.no_grad():
        parts(layer)[0].mul_(100)
    torch.testing.assert_close(layer.weight, before)


def test_evaluation_does_not_move_the_power_iteration():
    layer = linear()
    original, scale = parts(layer)
    with torch.no_grad():
        original.copy_(torch.randn(8, 12, generator=torch.Generator().manual_seed(1)))
    layer.eval()
    before = scale.u.clone()
    layer.weight  # noqa: B018
    assert scale.u.equal(before)
    layer.train()
    layer.weight  # noqa: B018
    assert not scale.u.equal(before)


def test_convolution_is_normalised_as_a_matrix():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 6, 3)
    sigma_reparam(layer)
    original, scale = parts(layer)
    with torch.no_grad():
        original.mul_(5)
        scale.gamma.fill_(2.0)
    assert layer.weight.shape == (6, 3, 3, 3)
    assert spectral_norm(layer.weight) == pytest.approx(2.0, rel=1e-5)


def test_norm_is_exact_under_autocast():
    layer = linear()
    with torch.autocast("cpu", torch.bfloat16):
        weight = layer.weight
    assert weight.dtype == torch.float32
    assert spectral_norm(weight) == pytest.approx(parts(layer)[1].gamma.item(), rel=1e-5)


def test_every_layer_of_a_model():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 3))
    sigma_reparam(model)
    assert [hasattr(m, "parametrizations") for m in model] == [True, False, False, True]


def test_refuses_a_model_without_layers():
    with pytest.raises(ValueError, match="no linear or convolutional layer"):
        sigma_reparam(nn.LayerNorm(4))
