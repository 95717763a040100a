import math

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import nn

from models.outputs import Outputs
from techniques.loss.comp_sum_losses import CompSumLoss
from training.compose import compose

TAUS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0]


def draw(shape: tuple[int, ...] = (12,), classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(*shape, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, shape, generator=generator)


@pytest.mark.parametrize("tau", TAUS)
def test_is_the_composition_with_the_sum_of_exponentials(tau):
    """Φ(u) of the sum u over the other classes, one sample at a time."""
    logits, labels = draw()
    losses = CompSumLoss(tau)({"logits": logits}, {"labels": labels})
    for loss, row, label in zip(losses.tolist(), logits.tolist(), labels.tolist()):
        u = sum(math.exp(z - row[label]) for k, z in enumerate(row) if k != label)
        phi = math.log1p(u) if tau == 1 else ((1 + u) ** (1 - tau) - 1) / (1 - tau)
        assert loss == pytest.approx(phi, rel=1e-10, abs=1e-10)


def test_members_of_the_family():
    logits, labels = draw()
    p = logits.softmax(-1).gather(1, labels[:, None]).squeeze(1)
    members = {0.0: 1 / p - 1, 1.0: -p.log(), 1.7: (1 - p**0.7) / 0.7, 2.0: 1 - p}
    for tau, expected in members.items():
        found = CompSumLoss(tau)({"logits": logits}, {"labels": labels})
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_is_continuous_at_cross_entropy():
    logits, labels = draw()
    at = F.cross_entropy(logits, labels, reduction="none")
    assert torch.equal(CompSumLoss(1)({"logits": logits}, {"labels": labels}), at)
    for tau in (1 - 1e-9, 1 + 1e-9):
        near = CompSumLoss(tau)({"logits": logits}, {"labels": labels})
        torch.testing.assert_close(near, at, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tau", TAUS)
def test_gradients(tau):
    logits, labels = draw((4,))
    logits.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: CompSumLoss(tau)({"logits": z}, {"labels": labels}), logits
    )


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5])
def test_minimiser(tau):
    """Probabilities proportional to P(k|x)^(1 / (2 − τ))."""
    q = torch.tensor([0.4, 0.1, 0.3, 0.15, 0.05], dtype=torch.float64)

    def risk(z):
        z = torch.tensor(z, requires_grad=True)
        batch = {"labels": torch.arange(5)}
        value = q @ CompSumLoss(tau)({"logits": z.expand(5, 5)}, batch)
        value.backward()
        return value.item(), z.grad.numpy()

    found = torch.tensor(minimize(risk, [0.0] * 5, jac=True, tol=1e-12).x).softmax(-1)
    expected = q ** (1 / (2 - tau))
    torch.testing.assert_close(found, expected / expected.sum(), rtol=0, atol=1e-5)


def test_the_absolute_error_is_least_on_the_most_probable_class():
    q = torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=torch.float64)
    sure = 50 * torch.eye(4, dtype=torch.float64)
    batch = {"labels": torch.arange(4)}
    risks = [(q @ CompSumLoss(2)({"logits": z.expand(4, 4)}, batch)).item() for z in sure]
    risks.append((q @ CompSumLoss(2)({"logits": q.log().expand(4, 4)}, batch)).item())
    assert risks == pytest.approx([0.6, 0.9, 0.7, 0.8, 1 - (q**2).sum().item()], abs=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("tau", "lost"), [(1.0, 2e4), (1.5, 2.0), (2.0, 1.0), (3.0, 0.5)])
def test_saturated_logits(tau, lost, dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], dtype=dtype).requires_grad_()
    losses = CompSumLoss(tau)({"logits": logits}, {"labels": torch.zeros(2, dtype=torch.long)})
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert losses.tolist() == pytest.approx([0.0, lost], rel=1e-2)
    losses.sum().backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[0] == 0).all()
    assert (logits.grad[1] == 0).all() == (tau > 1)


def test_below_one_the_loss_is_infinite_only_where_the_format_ends():
    labels = torch.zeros(3, dtype=torch.long)
    logits = torch.tensor([[1e4, -1e4], [0.0, 87.0], [0.0, 90.0]], requires_grad=True)
    losses = CompSumLoss(0.0)({"logits": logits}, {"labels": labels})
    assert losses[:2].tolist() == pytest.approx([0.0, math.exp(87)], rel=1e-4)
    assert losses[2] == math.inf
    CompSumLoss(0.0)({"logits": logits[:2]}, {"labels": labels[:2]}).sum().backward()
    assert logits.grad.isfinite().all()
    half = CompSumLoss(0.5)({"logits": logits.detach()}, {"labels": labels})
    assert half[2].item() == pytest.approx(2 * math.exp(45), rel=1e-4)


@pytest.mark.parametrize("tau", [0.5, 1.0, 1.5])
def test_fused_with_the_classifier_it_is_the_same(tau):
    """Value and gradients, without the logits being made."""
    torch.manual_seed(0)
    classifier = nn.Linear(8, 11).double()
    hidden = torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(11, (2, 6))
    labels[0, :2] = -100
    outputs = Outputs(hidden=hidden, classifier=classifier)
    losses = CompSumLoss(tau)(outputs, {"labels": labels})
    assert "logits" not in outputs
    leaves = [hidden, classifier.weight, classifier.bias]
    gradients = torch.autograd.grad(losses.sum(), leaves)

    p = classifier(hidden).softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    plain = -p.log() if tau == 1 else (1 - p ** (tau - 1)) / (tau - 1)
    plain = plain * (labels != -100)
    torch.testing.assert_close(losses, plain, rtol=1e-10, atol=1e-10)
    expected = torch.autograd.grad(plain.sum(), leaves)
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-10)


def test_ignored_labels_have_no_loss():
    logits, labels = draw((4, 9))
    labels[:, ::3] = -100
    logits.requires_grad_()
    losses = CompSumLoss(1.5)({"logits": logits}, {"labels": labels})
    losses.sum().backward()
    assert losses.shape == labels.shape
    assert (losses[:, ::3] == 0).all()
    assert (logits.grad[:, ::3] == 0).all()


def test_settings_reach_the_class():
    config = compose(["task=digits", "technique=comp_sum_losses", "task.loss.tau=0.5"])
    assert config["task"]["loss"]["tau"] == 0.5


def test_refuses_a_negative_tau():
    with pytest.raises(ValueError, match="tau"):
        CompSumLoss(-0.5)
