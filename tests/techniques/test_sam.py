import pytest
import torch
from torch import nn

from techniques.gradient.sam import SAM, frozen_statistics
from tests.techniques.gradients import CURVATURE, Bowl, gradient

START = Bowl().w.detach()


@pytest.mark.parametrize("parts", [1, 2])
def test_gradient_on_a_quadratic(parts):
    g = CURVATURE * START
    expected = CURVATURE * (START + 0.3 * g / g.norm())
    found, weights, loss = gradient(SAM(rho=0.3), parts)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(weights, START, rtol=0, atol=0)
    torch.testing.assert_close(loss, (0.5 * CURVATURE * START**2).sum())


def test_adaptive():
    g = CURVATURE * START
    expected = CURVATURE * (START + 0.3 * START**2 * g / (START.abs() * g).norm())
    torch.testing.assert_close(gradient(SAM(rho=0.3, adaptive=True))[0], expected)


def test_without_radius_it_is_backpropagation():
    torch.testing.assert_close(gradient(SAM(rho=0.0))[0], CURVATURE * START)


def test_scaled_gradients_climb_as_far():
    """Under fp16 every gradient carries the loss scale; the ascent must not."""
    scaled = lambda loss: (1024 * loss).backward()  # noqa: E731
    plain, _, _ = gradient(SAM(rho=0.3))
    torch.testing.assert_close(gradient(SAM(rho=0.3), backward=scaled)[0], 1024 * plain)


def test_batch_norm_statistics_are_kept():
    norm = nn.BatchNorm1d(3)
    norm(torch.randn(8, 3))
    before = {name: b.clone() for name, b in norm.named_buffers()}
    with frozen_statistics(norm):
        norm(5 + torch.randn(8, 3))
    assert all(b.equal(before[name]) for name, b in norm.named_buffers())


def test_refuses_a_negative_radius():
    with pytest.raises(ValueError, match="rho"):
        SAM(rho=-1.0)
