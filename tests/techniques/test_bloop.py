import copy

import numpy as np
import pytest
import torch
from torch import nn

from techniques.gradient.bloop import Bloop
from techniques.penalty.lipschitz import lipschitz
from tests.techniques.gradients import microbatches
from tests.techniques.several_losses import Point, Scaled, descend, flat, gradients, objective
from training.assemble import assemble
from training.compose import compose
from training.errors import UsageError
from training.objective import Objective, backprop


@pytest.mark.parametrize("backward", [torch.Tensor.backward, Scaled()])
@pytest.mark.parametrize("ema", [0.01, 1.0])
def test_against_numpy(ema, backward):
    model, estimator, mean = Point(), Bloop(lam=0.3, ema=ema), None
    scale = getattr(backward, "scale", 1.0)
    for _ in range(5):
        rows = gradients(flat(model)[0])
        main, auxiliary = rows[0], rows[1] + rows[2]
        mean = main if mean is None else mean + ema * (main - mean)
        expected = main + 0.3 * (auxiliary - auxiliary @ mean / (mean @ mean + 1e-7) * mean)
        estimator(objective(model), model, microbatches(), backward)
        np.testing.assert_allclose(flat(model)[1] / scale, expected, atol=1e-10)
        descend(model, 0.1 / scale)


class Plane(nn.Module):
    """Main loss ½x², which any y minimises."""

    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))

    def forward(self, features):
        return {"logits": features * 0.5 * self.place[0] ** 2}


def plane(model, coefficient):
    """With the auxiliary loss ½((x − 1)² + (y − 3)²)."""
    target = torch.tensor([1.0, 3.0], dtype=torch.float64)
    distance = lambda model, outputs, batch: 0.5 * (model.place - target).square().sum()  # noqa: E731
    return Objective(
        model,
        lambda outputs, batch: outputs["logits"],
        lambda losses, outputs, batch: losses.mean(),
        {"distance": (distance, coefficient)},
        frozenset({"features"}),
    )


def ends(estimator, coefficient=1.0):
    model = Plane()
    whole = plane(model, coefficient)
    for _ in range(200):
        estimator(whole, model, microbatches(1), torch.Tensor.backward)
        descend(model, 0.3)
    return model.place.detach().numpy()


def test_bilevel_quadratic():
    """It ends at the minimiser of the main loss that the auxiliary likes best, up to the code's
    1e-7: there x(x² + 1e-7) = λ(1 − x)·1e-7. The weighted sum ends at x = λ / (1 + λ)."""
    (root,) = [r.real for r in np.roots([1, 0, 1.5e-7, -0.5e-7]) if abs(r.imag) < 1e-12]
    assert root < 4e-3
    np.testing.assert_allclose(ends(Bloop(lam=0.5, ema=0.5)), [root, 3], atol=1e-8)
    np.testing.assert_allclose(ends(backprop, 0.5), [1 / 3, 3], atol=1e-8)


def test_orthogonal_to_the_mean():
    """Over steps with noise the auxiliary's part is orthogonal to the mean, to the newest not."""
    model, estimator = Point(), Bloop(lam=1.0, ema=0.01)
    for scale in (1.0, -0.4, 1.3):
        model.zero_grad()
        batch = [{"features": torch.tensor([scale]).double(), "share": torch.tensor(1.0)}]
        estimator(objective(model), model, batch, torch.Tensor.backward)
    added = flat(model)[1] - 1.3 * gradients()[0]
    mean = torch.cat([m.flatten() for m in estimator.mean]).numpy()
    assert abs(added @ mean) < 1e-6 * np.linalg.norm(added) * np.linalg.norm(mean)


def test_without_strength_it_is_the_main_gradient():
    model = Point()
    Bloop(lam=0.0)(objective(model), model, microbatches(), torch.Tensor.backward)
    np.testing.assert_allclose(flat(model)[1], gradients()[0], atol=1e-12)


def test_state_goes_on():
    model, estimator, other = Point(), Bloop(), Bloop()
    estimator(objective(model), model, microbatches(), torch.Tensor.backward)
    descend(model, 0.1)
    other.load_state_dict(copy.deepcopy(estimator.state_dict()))
    found = []
    for each in (estimator, other):
        model.zero_grad()
        each(objective(model), model, microbatches(), torch.Tensor.backward)
        found.append(flat(model)[1])
    assert np.array_equal(*found)


def test_lipschitz_penalty():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    largest = [np.linalg.svd(model[i].weight.detach().numpy())[1][0] for i in (0, 2)]
    assert lipschitz(model, {}, {}).item() == pytest.approx(2 * np.log(largest).sum(), abs=1e-12)
    with pytest.raises(UsageError, match="no linear layer"):
        lipschitz(nn.ReLU(), {}, {})


def test_composes():
    penalty = "+penalties.lipschitz={_target_:techniques.penalty.lipschitz.lipschitz,coefficient:1}"
    settings = ["gradient.lam=0.5", "gradient.ema=0.01", penalty]
    run = assemble(compose(["task=digits", "technique=bloop", "tracker=none", *settings]))
    assert (run.gradient.lam, run.gradient.ema) == (0.5, 0.01)


@pytest.mark.parametrize("settings", [{"lam": -1.0}, {"ema": 0.0}, {"ema": 1.5}])
def test_refusals(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Bloop(**settings)
