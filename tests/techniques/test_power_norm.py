import numpy as np
import pytest
import torch

from techniques.norm.power_norm import PowerNorm

EPS = 1e-5


class Recursion:
    """The authors' recursions on (tokens, dim) in float64 and without autograd."""

    def __init__(self, dim: int, weight: np.ndarray, warmup: int, alpha: float, groups: int):
        self.phi, self.product, self.step = np.ones(dim), np.zeros(dim), 0
        self.weight, self.warmup, self.alpha, self.groups = weight, warmup, alpha, groups

    def __call__(self, x: np.ndarray, grad: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Output (without affine bias) and the gradient of the input after group scaling."""
        self.step += 1
        split = x.reshape(len(x), self.groups, -1)
        scaled = split / np.sqrt((split**2).mean(-1, keepdims=True) + EPS)
        x = scaled.reshape(x.shape)
        square = (x**2).mean(0)
        z = x / np.sqrt((square if self.step <= self.warmup else self.phi) + EPS)
        if self.step < self.warmup:
            self.phi = self.phi * (self.step - 1) / self.step + square / self.step
        self.phi = self.alpha * self.phi + (1 - self.alpha) * square
        g = grad * self.weight - (1 - self.alpha) * self.product * z
        self.product = self.product + (g * z).mean(0)
        return z * self.weight, g / np.sqrt(square + EPS)


def normal(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def group_scaling_gradient(x: torch.Tensor, grad: np.ndarray, groups: int) -> torch.Tensor:
    x = x.detach().requires_grad_()
    split = x.view(len(x), groups, -1)
    scaled = split / (split.square().mean(-1, keepdim=True) + EPS).sqrt()
    scaled.view_as(x).backward(torch.from_numpy(grad))
    return x.grad


@pytest.mark.parametrize("groups", [1, 2])
def test_follows_the_recursions_through_and_past_the_warm_up(groups):
    torch.manual_seed(0)
    norm = PowerNorm(6, warmup=3, groups=groups).double()
    torch.nn.init.normal_(norm.weight)
    recursion = Recursion(6, norm.weight.detach().numpy(), 3, 0.9, groups)
    for step in range(6):
        x = (1 + step) * normal(4, 5, 6, seed=step).requires_grad_()
        x.retain_grad()
        grad = normal(4, 5, 6, seed=100 + step)
        y = norm(x)
        y.backward(grad)
        flat = x.detach().flatten(0, 1)
        expected, inner = recursion(flat.numpy(), grad.flatten(0, 1).numpy())
        torch.testing.assert_close(y.detach().flatten(0, 1), torch.from_numpy(expected))
        through = group_scaling_gradient(flat, inner, groups)
        torch.testing.assert_close(x.grad.flatten(0, 1), through)
        torch.testing.assert_close(norm.mean_square, torch.from_numpy(recursion.phi))
        torch.testing.assert_close(norm.product, torch.from_numpy(recursion.product))
    assert norm.steps == 6


def test_evaluation_uses_the_running_mean_square():
    norm = PowerNorm(4).double().eval()
    norm.mean_square.copy_(torch.tensor([1.0, 4.0, 9.0, 16.0]))
    x = torch.tensor([[2.0, -2.0, 2.0, -2.0]], dtype=torch.float64)  # group scaling makes it ±1
    expected = torch.tensor([[1.0, -1 / 2, 1 / 3, -1 / 4]], dtype=torch.float64)
    torch.testing.assert_close(norm(x), expected, rtol=1e-4, atol=0)
    assert norm.steps == 0


def test_mean_is_not_subtracted():
    """A constant input stays, unlike under batch or layer norm."""
    out = PowerNorm(4)(torch.full((3, 5, 4), 7.0))
    torch.testing.assert_close(out, torch.ones(3, 5, 4), rtol=1e-4, atol=0)


def test_scale_of_the_input_does_not_matter():
    x = normal(2, 8, 6, seed=0)
    first, second = PowerNorm(6).double()(x), PowerNorm(6).double()(1000 * x)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_statistics_stay_wide_under_bf16():
    norm = PowerNorm(8)
    out = norm(normal(4, 16, 8, seed=0).bfloat16())
    assert out.dtype == torch.bfloat16
    assert norm.mean_square.dtype == torch.float32


def test_state_is_in_the_state_dict():
    assert {"mean_square", "product", "steps"} <= PowerNorm(4).state_dict().keys()


@pytest.mark.parametrize(
    ("name", "value"), [("groups", 4), ("alpha_forward", 1.5), ("alpha_backward", -0.1)]
)
def test_refuses(name, value):
    with pytest.raises(ValueError, match=name):
        PowerNorm(6, **{name: value})
