import pytest
import torch
from torch import nn

from techniques.gradient.gradient_noise import GradientNoise
from tests.techniques.gradients import CURVATURE, Bowl, gradient, microbatches, objective

START = Bowl().w.detach()


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(200_000))

    def forward(self, features):
        return {"logits": features * self.w.sum()}


@pytest.mark.parametrize("step", [0, 9, 99])
def test_variance_is_annealed(step):
    model, noise = Wide(), GradientNoise(eta=0.3)
    noise.load_state_dict({"step": step})
    noise(objective(model), model, microbatches(), torch.Tensor.backward)
    added = model.w.grad - 1
    assert added.var().item() == pytest.approx(0.3 / (1 + step) ** 0.55, rel=0.02)
    assert added.mean().item() == pytest.approx(0, abs=5e-3)


def test_without_noise_it_is_backpropagation():
    torch.testing.assert_close(gradient(GradientNoise(eta=0.0))[0], CURVATURE * START)


def test_noise_is_a_function_of_seed_and_step():
    first, second = GradientNoise(eta=1.0, seed=4), GradientNoise(eta=1.0, seed=4)
    a, b = gradient(first)[0], gradient(first)[0]
    assert not a.equal(b)
    second.load_state_dict({"step": 1})
    assert gradient(second)[0].equal(b)
    assert not gradient(GradientNoise(eta=1.0, seed=5))[0].equal(a)


def test_refusals():
    with pytest.raises(ValueError, match="eta"):
        GradientNoise(eta=-1.0)
