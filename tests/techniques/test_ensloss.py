import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from techniques.loss.ensloss import EnsLoss, exponential, hinge, signed_margins, slopes
from tests.processes import in_processes
from training.compose import compose


def draw(count=50, spread=2.0):
    generator = torch.Generator().manual_seed(0)
    logits = spread * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return {"logits": logits}, {"labels": torch.randint(2, (count,), generator=generator)}


def seeded(loss, outputs, batch, seed=3):
    torch.manual_seed(seed)
    return loss(outputs, batch)


def by_hand(outputs, batch, power, seed=3):
    """Each derivative by its margin's rank among Python's sorted lists."""
    torch.manual_seed(seed)
    labels = batch["labels"].tolist()
    z = [(b - a) * (1 if y else -1) for (a, b), y in zip(outputs["logits"].tolist(), labels)]
    sizes = []
    for v in torch.randn(len(z), dtype=torch.float64).tolist():
        size = math.exp(v) if power == 0 else max(1 + power * v, 0) ** (1 / power)
        sizes.append(min(size, 1))
    sizes.sort(reverse=True)
    found = []
    for margin in z:
        size = sizes[sorted(z).index(margin)]
        found.append(-(size / margin if margin > 1 else size) - 1e-6)
    return torch.tensor(z, dtype=torch.float64), torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("power", [0.0, 0.5, -0.5])
def test_value_and_gradient_are_the_sampled_derivatives(power):
    outputs, batch = draw()
    z, expected = by_hand(outputs, batch, power)
    logits = outputs["logits"].requires_grad_()
    losses = seeded(EnsLoss(power), outputs, batch)
    losses.sum().backward()
    torch.testing.assert_close(losses.detach(), expected * z, rtol=0, atol=1e-10)
    signs = 2 * batch["labels"] - 1
    torch.testing.assert_close(logits.grad[:, 1], signs * expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(logits.grad[:, 0], -signs * expected, rtol=0, atol=1e-10)


def test_gradcheck_below_a_margin_of_1():
    """Over 1 the derivative is divided by a margin that is held fixed."""
    outputs, batch = draw(10, spread=0.3)
    assert signed_margins(outputs, batch).max() < 1

    def losses(logits):
        return seeded(EnsLoss(), {"logits": logits}, batch)

    assert torch.autograd.gradcheck(losses, outputs["logits"].requires_grad_())


@pytest.mark.parametrize("seed", range(20))
def test_every_draw_is_convex_and_calibrated(seed):
    """φ′ does not fall, and is negative at 0 as everywhere."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.cat([4 * torch.randn(30, generator=generator), torch.zeros(1)])
    found = slopes(z, torch.randn(31, generator=generator))
    assert (found[z.argsort()].diff() >= 0).all()
    assert found[-1] < 0
    assert found.max() < 0
    assert found.min() >= -1 - 2e-6


def test_the_mean_derivative_of_each_rank_is_its_order_statistic():
    """Of the distribution of min(exp(v), 1), by SciPy's quadrature."""
    count, repeats = 3, 4000
    generator = torch.Generator().manual_seed(0)
    z = torch.tensor([0.9, -2.0, 0.1], dtype=torch.float64)
    draws = torch.randn(repeats, count, generator=generator, dtype=torch.float64)
    found = torch.stack([slopes(z, row) for row in draws])
    for position, rank in enumerate([2, 0, 1]):  # of the margins, from the smallest
        order = count - 1 - rank  # of the sizes, from the smallest
        density = stats.beta(order + 1, count - order)

        def weighted(v, density=density):
            return min(math.exp(v), 1) * density.pdf(stats.norm.cdf(v)) * stats.norm.pdf(v)

        expected = -integrate.quad(weighted, -9, 9, points=[0.0])[0] - 1e-6
        error = found[:, position].std().item() / repeats**0.5
        assert found[:, position].mean().item() == pytest.approx(expected, abs=5 * error)


def test_numbers_come_from_the_global_generator():
    outputs, batch = draw()
    first, again, other = (seeded(EnsLoss(), outputs, batch, seed) for seed in (0, 0, 1))
    assert first.equal(again)
    assert not first.equal(other)


def test_ignored_labels_take_no_draw_from_the_others():
    outputs, batch = draw(8)
    some = batch["labels"].clone()
    some[::2] = -100
    losses = seeded(EnsLoss(), outputs, {"labels": some})
    kept = {"logits": outputs["logits"][1::2]}
    torch.manual_seed(3)
    drawn = torch.randn(8, dtype=torch.float64)[:4]
    z = signed_margins(kept, {"labels": some[1::2]})
    assert (losses[::2] == 0).all()
    torch.testing.assert_close(losses[1::2], slopes(z, drawn) * z)


@pytest.mark.parametrize("power", [0.0, 1.0, -1.0])
def test_saturated_logits(power):
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]]).requires_grad_()
    losses = seeded(EnsLoss(power), {"logits": logits}, {"labels": torch.tensor([1, 1])})
    losses.sum().backward()
    assert losses.isfinite().all()
    assert -1.1 <= losses[1] <= 0 <= losses[0] <= 2.1e4
    assert logits.grad.isfinite().all()
    assert (logits.grad[:, 1] < 0).all()
    assert logits.grad[1].abs().max() < 1e-4


def _half(rank):
    outputs, batch = draw()
    torch.manual_seed(3)
    losses = EnsLoss()(
        {"logits": outputs["logits"].view(2, 25, 2)[rank]},
        {"labels": batch["labels"].view(2, 25)[rank]},
    )
    z, expected = by_hand(outputs, batch, 0.0)
    torch.testing.assert_close(losses, (expected * z).view(2, 25)[rank], rtol=0, atol=1e-10)


@pytest.mark.slow
def test_processes_sort_together():
    in_processes(_half, 2)


def test_fixed_losses():
    outputs, batch = draw()
    logits = outputs["logits"].requires_grad_()
    z = signed_margins(outputs, batch).detach().numpy()
    assert hinge(outputs, batch).detach().numpy() == pytest.approx(np.maximum(1 - z, 0))
    assert exponential(outputs, batch).detach().numpy() == pytest.approx(np.exp(-z))
    assert torch.autograd.gradcheck(lambda x: hinge({"logits": x}, batch), logits)
    assert torch.autograd.gradcheck(lambda x: exponential({"logits": x}, batch), logits)


def test_composes():
    overrides = ["technique=ensloss", "task=tabular", "task.path=breast_cancer"]
    assert compose(overrides)["task"]["loss"]["power"] == 0.0
