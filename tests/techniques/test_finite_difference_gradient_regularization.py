import pytest
import torch

from techniques.gradient.finite_difference_gradient_regularization import (
    FiniteDifferenceGradientRegularization as Regularizer,
)
from tests.techniques.gradients import CURVATURE, Bowl, gradient

START = Bowl().w.detach()


@pytest.mark.parametrize("ascent", [True, False])
@pytest.mark.parametrize("epsilon", [1e-3, 0.1])
def test_exact_on_a_quadratic(ascent, epsilon):
    """There the difference is the derivative: ∇L + γ·H·∇L, with H the curvature."""
    found, weights, _ = gradient(Regularizer(gamma=0.2, epsilon=epsilon, ascent=ascent))
    g = CURVATURE * START
    torch.testing.assert_close(found, g + 0.2 * CURVATURE * g)
    torch.testing.assert_close(weights, START, rtol=0, atol=0)


def test_equals_double_backpropagation():
    """As the gradient of L + γ/2·‖∇L‖², by autograd."""
    w = START.clone().requires_grad_()
    loss = (0.5 * CURVATURE * w**2).sum()
    (g,) = torch.autograd.grad(loss, w, create_graph=True)
    (expected,) = torch.autograd.grad(loss + 0.1 * g.square().sum(), w)
    torch.testing.assert_close(gradient(Regularizer(gamma=0.2, epsilon=0.01))[0], expected)


def test_gamma_equal_to_epsilon_is_the_gradient_after_the_ascent():
    g = CURVATURE * START
    expected = CURVATURE * (START + 0.05 * g)
    torch.testing.assert_close(gradient(Regularizer())[0], expected)


def test_refusals():
    with pytest.raises(ValueError, match="gamma"):
        Regularizer(gamma=-0.1)
    with pytest.raises(ValueError, match="epsilon"):
        Regularizer(epsilon=0.0)
