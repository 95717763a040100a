from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import norm

from techniques.loss.almost_fair_crps import AlmostFairCRPS
from training.assemble import assemble
from training.compose import compose
from training.errors import UsageError

ALPHAS = [0.0, 0.5, 0.95, 1.0]


def draw(members=5, shape=(3, 2, 4)):
    generator = torch.Generator().manual_seed(0)
    members = torch.randn(shape[0], members, *shape[1:], generator=generator, dtype=torch.float64)
    return members, torch.randn(shape, generator=generator, dtype=torch.float64)


def loss_of(members, labels, alpha):
    """Of a list of numbers and a number."""
    logits = torch.tensor(members, dtype=torch.float64).view(1, -1, 1, 1)
    batch = {"labels": torch.tensor(labels, dtype=torch.float64).view(1, 1, 1)}
    return AlmostFairCRPS(alpha)({"logits": logits}, batch).item()


def by_definition(x, y, alpha):
    """The paper's equations 1 to 3 of a list and a number, in pure Python."""
    size = len(x)
    error = sum(abs(a - y) for a in x) / size
    pairs = sum(abs(a - b) for a, b in product(x, x))
    crps, fair = error - pairs / (2 * size**2), error - pairs / (2 * size * (size - 1))
    return alpha * fair + (1 - alpha) * crps


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("size", [2, 3, 8])
def test_is_the_double_sum(alpha, size):
    members, labels = draw(size)
    losses = AlmostFairCRPS(alpha)({"logits": members}, {"labels": labels})
    flat = AlmostFairCRPS(alpha)({"logits": members.flatten(2)}, {"labels": labels})
    expected = [
        by_definition(members[i, :, j, k].tolist(), labels[i, j, k].item(), alpha)
        for i, j, k in np.ndindex(*labels.shape)
    ]
    assert losses.shape == labels.shape
    assert losses.flatten().tolist() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(flat, losses, rtol=0, atol=0)


def test_alpha_zero_is_the_integral_of_the_squared_difference_of_distribution_functions():
    members, labels = draw(6, (20, 1, 1))
    found = AlmostFairCRPS(0.0)({"logits": members}, {"labels": labels}).flatten()
    for x, y, value in zip(members[..., 0, 0].numpy(), labels[:, 0, 0].numpy(), found):
        points = np.sort(np.append(x, y))
        steps = [(x <= p).mean() - (y <= p) for p in points[:-1]]
        assert value.item() == pytest.approx(np.sum(np.square(steps) * np.diff(points)), abs=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_many_members_have_the_gaussians_crps(alpha):
    """Its closed form, σ·(z·(2Φ(z) − 1) + 2φ(z) − 1/√π), from 999 quantiles."""
    mean, std, y = 0.7, 1.6, -0.4
    z = (y - mean) / std
    members = norm.ppf((np.arange(999) + 0.5) / 999, mean, std).tolist()
    expected = std * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))
    assert loss_of(members, y, alpha) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_only_the_fair_score_is_unbiased(size):
    """All ensembles of a distribution on three points, with their probabilities."""
    points, p, y = np.array([-1.0, 0.5, 3.0]), np.array([0.2, 0.5, 0.3]), 0.1
    pairs = np.abs(points[:, None] - points)
    true = p @ np.abs(points - y) - p @ pairs @ p / 2

    def expectation(alpha):
        return sum(
            p[list(which)].prod() * loss_of(points[list(which)].tolist(), y, alpha)
            for which in product(range(3), repeat=size)
        )

    assert expectation(1.0) == pytest.approx(true, abs=1e-12)
    biases = {alpha: (1 - alpha) / size * (p @ pairs @ p) / 2 for alpha in (0.0, 0.95)}
    for alpha, bias in biases.items():
        assert expectation(alpha) == pytest.approx(true + bias, abs=1e-12)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("far", [-1e4, -1.0, 0.3, 1e4])
def test_one_free_member_is_degenerate_for_the_fair_score_alone(size, far):
    """All others are the label: the loss is (1 − α)/M² times the distance of the last."""
    members, y = [2.0] * (size - 1) + [2.0 + far], 2.0
    assert loss_of(members, y, 1.0) == 0
    assert loss_of(members, y, 0.95) == pytest.approx(0.05 / size**2 * abs(far), rel=1e-6)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradient(alpha):
    members, labels = draw(3)
    loss = lambda x: AlmostFairCRPS(alpha)({"logits": x}, {"labels": labels})  # noqa: E731
    assert torch.autograd.gradcheck(loss, members.requires_grad_())


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_out_it_is_finite_and_never_negative(alpha, dtype):
    values = torch.tensor([-1e4, 1e4, 0.0, 1.0, 1e4], dtype=dtype)
    members = values.view(1, 5, 1, 1).repeat(3, 1, 1, 1).requires_grad_()
    labels = torch.tensor([-1e4, 0.0, 1e4]).view(3, 1, 1)
    losses = AlmostFairCRPS(alpha)({"logits": members}, {"labels": labels})
    assert losses.dtype == torch.float32
    assert losses.isfinite().all()
    assert (losses >= 0).all()
    losses.sum().backward()
    assert members.grad.isfinite().all()
    assert members.grad.abs().max() <= 2 / 5 + 1e-2


def test_minimising_a_location_and_spread_on_a_sample():
    """Normal members under the fair score end at the labels' distribution; under the CRPS, at too
    small a spread: (1 − 1/M)·|x − x′| has less weight."""
    generator = torch.Generator().manual_seed(0)
    labels = 3 + 2 * torch.randn(2048, 1, 1, generator=generator)
    noise = torch.randn(2048, 2, 1, 1, generator=generator)
    found = {}
    for alpha in (1.0, 0.0):
        location, scale = (torch.tensor(x, requires_grad=True) for x in (0.0, 1.0))
        optimizer = torch.optim.Adam([location, scale], lr=0.1)
        for _ in range(120):
            optimizer.zero_grad()
            outputs = {"logits": location + scale * noise}
            AlmostFairCRPS(alpha)(outputs, {"labels": labels}).mean().backward()
            optimizer.step()
        found[alpha] = (location.item(), abs(scale.item()))
    assert found[1.0] == pytest.approx((3, 2), abs=0.15)
    assert found[0.0][0] == pytest.approx(3, abs=0.15)
    assert found[0.0][1] < 1.2


def test_the_setting_reaches_the_loss():
    natural = compose(["technique=almost_fair_crps"])["techniques"]["almost_fair_crps"]["natural"]
    overrides = [*natural, "technique=almost_fair_crps", "task.loss.alpha=0.5", "model.width=8"]
    run = assemble(compose([*overrides, "task.channels=[x1,x2]", "task.context_length=3"]))
    assert isinstance(run.objective.loss, AlmostFairCRPS)
    assert run.objective.loss.alpha == 0.5
    batch = run.batches.part(0, 0)
    assert run.objective.predict(batch)["logits"].shape == (32, 4, 8)
    assert run.objective(batch).total.item() > 0


def test_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"^alpha"):
        AlmostFairCRPS(1.5)
    labels = torch.zeros(2, 3, 1)
    with pytest.raises(UsageError, match=r"task\.members"):
        AlmostFairCRPS()({"logits": torch.zeros(2, 3)}, {"labels": labels})
