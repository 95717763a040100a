import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from techniques.activation.group_rational import GroupRational
from techniques.ffn.gr_kan import GroupRationalFeedForward
from techniques.init.gr_kan import gain, variance_preserving


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def feed_forward(dim: int = 256) -> GroupRationalFeedForward:
    torch.manual_seed(0)
    return GroupRationalFeedForward(dim, nn.GELU)


def test_each_group_has_its_own_denominator():
    layer = GroupRational(12, groups=3)
    with torch.no_grad():
        layer.denominator.copy_(torch.tensor([[1.0, 0, 0, 0], [-2.0, 1, 0, 0], [0, 0, -3.0, 0.5]]))
    x = normal(5, 12)
    points = x.double().numpy()
    above = np.polynomial.polynomial.polyval(points, layer.numerator[0].detach().numpy())
    powers = points[..., None] ** np.arange(1, 5)
    for channel in range(12):
        b = layer.denominator[channel // 4].detach().double().numpy()
        expected = above[:, channel] / (1 + np.abs(powers[:, channel] * b).sum(-1))
        ours = layer(x)[:, channel].detach().double()
        torch.testing.assert_close(ours, torch.as_tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("start", "function", "tolerance"),
    [("identity", lambda x: x, 0), ("gelu", F.gelu, 0.005), ("swish", F.silu, 1e-5)],
)
def test_starts_as(start, function, tolerance):
    x = torch.linspace(-3, 3, 600)[:, None].expand(-1, 8)
    with torch.no_grad():
        assert (GroupRational(8, start=start)(x) - function(x)).abs().max() <= tolerance


@pytest.mark.parametrize(
    ("start", "published"),
    [("identity", 1.0), ("gelu", 2.3567850379928976), ("swish", 2.8178205270359653)],
)
def test_gain_is_the_authors(start, published):
    """The constants of `calculate_gain` in their code, which are of the exact functions."""
    assert gain(GroupRational(8, start=start)) == pytest.approx(published, rel=0.01)


def test_initialisation_preserves_variance():
    layer = feed_forward()
    variance_preserving(layer, {})
    x = normal(4096, 256)
    with torch.no_grad():
        hidden = layer.up(layer.first(x))
        out = layer.down(layer.second(hidden))
    assert hidden.square().mean().item() == pytest.approx(1, rel=0.03)
    assert out.square().mean().item() == pytest.approx(1, rel=0.06)
    assert not layer.up.bias.any()
    assert not layer.down.bias.any()


def test_default_initialisation_does_not():
    """What the initialisation is for."""
    x = normal(4096, 256)
    with torch.no_grad():
        assert feed_forward()(x).var() < 0.5


@pytest.mark.parametrize(("start", "function"), [("gelu", F.gelu), ("swish", F.silu)])
def test_starts_as_the_ordinary_layer(start, function):
    torch.manual_seed(0)
    layer = GroupRationalFeedForward(256, nn.GELU, start=start)
    x = normal(64, 256)
    with torch.no_grad():
        expected = layer.down(function(layer.up(x)))
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=0.01)


def test_refusals():
    with pytest.raises(ValueError, match="start"):
        GroupRational(8, start="relu")
    with pytest.raises(ValueError, match="groups"):
        GroupRational(12, groups=8)
    with pytest.raises(ValueError, match="no GroupRationalFeedForward"):
        variance_preserving(nn.Linear(2, 2), {})
