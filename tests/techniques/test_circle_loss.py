import math

import pytest
import torch
import torch.nn.functional as F

from techniques.loss.circle_loss import CircleLoss
from training.assemble import assemble
from training.compose import compose


def draw(rows=8, dim=4, classes=3):
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    return found, torch.randint(classes, (rows,), generator=generator)


def log_sum(values):
    most = max(values)
    return most + math.log(sum(math.exp(v - most) for v in values))


def by_pairs(found, labels, margin, scale, weights=None):
    """Equation 6 of the paper, one pair at a time; `weights` are of other similarities' α."""
    constant = found if weights is None else weights
    rows = []
    for i in range(len(found)):
        positive, negative = [], []
        for j in range(len(found)):
            if i == j or -100 in (labels[i], labels[j]):
                continue
            s = F.cosine_similarity(found[i], found[j], dim=0).item()
            of = F.cosine_similarity(constant[i], constant[j], dim=0).item()
            if labels[i] == labels[j]:
                positive.append(-scale * max(1 + margin - of, 0) * (s - (1 - margin)))
            else:
                negative.append(scale * max(of + margin, 0) * (s - margin))
        if not positive or not negative:
            rows.append(0.0)
            continue
        total = log_sum(positive) + log_sum(negative)
        rows.append(max(total, 0) + math.log1p(math.exp(-abs(total))))
    return torch.tensor(rows, dtype=torch.float64)


def losses(loss, found, labels):
    return loss({"logits": found}, {"labels": labels})


@pytest.mark.parametrize(("margin", "scale"), [(0.25, 256.0), (0.4, 80.0), (0.0, 1.0)])
def test_is_the_papers_equation(margin, scale):
    """On random embeddings, and those of pytorch-metric-learning's test, at 0° to 80°."""
    angles = torch.arange(0, 100, 20, dtype=torch.float64).deg2rad()
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    for found, labels in (draw(), (3 * circle, torch.tensor([0, 0, 1, 1, 2]))):
        expected = by_pairs(found, labels, margin, scale)
        torch.testing.assert_close(
            losses(CircleLoss(margin, scale), found, labels), expected, rtol=1e-10, atol=1e-10
        )
    assert expected[4] == 0  # it has no positive


def test_ignored_labels_take_no_part():
    found, labels = draw()
    labels[2] = -100
    value = losses(CircleLoss(), found, labels)
    torch.testing.assert_close(value, by_pairs(found, labels, 0.4, 80.0), rtol=1e-10, atol=1e-10)
    kept = torch.arange(8) != 2
    torch.testing.assert_close(value[kept], losses(CircleLoss(), found[kept], labels[kept]))
    assert value[2] == 0


class Numeric(torch.autograd.Function):
    """The equation with its weights α as they are at `constant`, and our gradient."""

    @staticmethod
    def forward(ctx, found, constant, labels):
        ctx.save_for_backward(found, labels)
        return by_pairs(found, labels, 0.4, 8.0, constant)

    @staticmethod
    def backward(ctx, *grads):
        found, labels = ctx.saved_tensors
        with torch.enable_grad():
            x = found.detach().requires_grad_()
            value = losses(CircleLoss(0.4, 8.0), x, labels)
        return torch.autograd.grad(value, x, grads[0])[0], None, None


def test_gradient_is_that_of_the_equation_with_constant_weights():
    found, labels = draw(6, 3)
    constant = found.clone()
    assert torch.autograd.gradcheck(
        lambda x: Numeric.apply(x, constant, labels), found.requires_grad_()
    )


def pairs_at(positive, negative):
    """One row with a positive and a negative at these cosines, in three dimensions."""
    rows = [[1.0, 0.0, 0.0]]
    rows += [[s, math.sqrt(1 - s * s), 0.0] for s in (positive, negative)]
    return torch.tensor(rows, dtype=torch.float64), torch.tensor([0, 0, 1])


def test_range_and_what_the_gradient_drives_to():
    loss = CircleLoss(0.4, 8.0)
    found, labels = pairs_at(1.0, 0.0)
    least = losses(loss, found, labels)[0].item()
    assert least == pytest.approx(math.log1p(math.exp(-2 * 8 * 0.4**2)), abs=1e-12)
    found, labels = pairs_at(-1.0, 1.0)
    most = losses(loss, found, labels)[0].item()
    assert most == pytest.approx(math.log1p(math.exp(8 * (5 - 2 * 0.4**2))), abs=1e-9)
    generator = torch.Generator().manual_seed(1)
    for positive, negative in (2 * torch.rand(50, 2, generator=generator) - 1).tolist():
        found, labels = pairs_at(positive, negative)
        assert least <= losses(loss, found, labels)[0].item() <= most

    def slope(negative):
        found, labels = pairs_at(0.9, negative)
        found.requires_grad_()
        losses(loss, found, labels)[0].backward()
        return found.grad[2].abs().max()

    assert slope(-0.1) > 1e-4
    assert slope(-0.39) > 0
    assert slope(-0.41) == 0


def test_class_level_loss_is_a_cross_entropy():
    """CircleLossLikeCE of TinyZeaMays/CircleLoss: softmax of γ·α·(s − Δ)."""
    found, labels = draw()
    labels[5] = -100
    loss = CircleLoss(0.25, 64.0, classes=3, embedding=4).double()
    cosines = F.normalize(found, dim=1) @ F.normalize(loss.weight, dim=1).T
    true = F.one_hot(labels.clamp(min=0), 3).bool()
    alpha = torch.where(true, 1.25 - cosines, cosines + 0.25).clamp(min=0)
    logits = 64 * alpha * (cosines - torch.where(true, 0.75, 0.25).double())
    expected = F.cross_entropy(logits, labels, reduction="none")
    value = losses(loss, found, labels)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    value.sum().backward()
    assert loss.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("scale", [1e4, -1e4, 0.0])
def test_saturated_embeddings(scale):
    found, labels = draw()
    far = (scale * found.float().sign()).requires_grad_()
    value = losses(CircleLoss(), far, labels)
    value.sum().backward()
    assert value.isfinite().all()
    assert far.grad.isfinite().all()


def test_autocast_computes_cosines_in_float32():
    found, labels = draw()
    half = found.bfloat16()
    expected = losses(CircleLoss(), half.float(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        value = losses(CircleLoss(), half, labels)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected)


def test_composes():
    overrides = ["technique=circle_loss", "task=metric_learning", "task.loss.margin=0.25"]
    overrides += ["+task.loss.classes=5", "+task.loss.embedding=64", "tracker=none"]
    run = assemble(compose(overrides))
    loss = run.objective.loss
    assert (loss.margin, loss.scale, loss.weight.shape) == (0.25, 80.0, (5, 64))
    assert any(p is loss.weight for group in run.optimizer.param_groups for p in group["params"])


@pytest.mark.parametrize(
    ("named", "keys"),
    [("margin", {"margin": -0.1}), ("scale", {"scale": 0}), ("classes", {"classes": 3})],
)
def test_refusals(named, keys):
    with pytest.raises(ValueError, match=f"^{named}"):
        CircleLoss(**keys)
